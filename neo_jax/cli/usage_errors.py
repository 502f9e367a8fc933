"""What is wrong with a command line, in a line that speaks of options as they were typed."""

import re
from collections.abc import Sequence


def as_typed(message: str, args: Sequence[str]) -> str:
    """Returns a message that calls fields as the command line did: `top_p` is --top-p.

    Names of fields that are plain words too are left alone, but for a first one that "must" be
    something or "has no effect".
    """
    flags: dict[str, str] = {}
    for arg in args:
        flag = arg.partition("=")[0]
        name = flag.removeprefix("--").replace("-", "_")
        if flag.startswith("--"):
            flags |= {name.rpartition(".")[2]: flag, name: flag}

    def call(found: re.Match[str]) -> str:
        is_field = re.search("[_.]", found[0]) or (
            found.start() == 0 and message[found.end() :].startswith((" must ", " has no effect"))
        )
        return flags.get(found[0], found[0]) if is_field else found[0]

    return re.sub(r"(?<![\w./-])[a-z_]+(\.[a-z_]+)*(?![\w/])", call, message)


def one_line(box: str, verb: str) -> str:
    """Returns what tyro says in a drawn box, and what it suggests: its first paragraphs."""
    paragraphs = [""]
    for line in box.splitlines()[1:]:  # the first has the title
        text = line.strip("│╭╮╰╯ ")
        if text.strip("─-"):
            paragraphs[-1] += f" {text}"
        elif paragraphs[-1]:
            paragraphs.append("")
    said = " ".join(paragraphs[0].split()).rstrip(".")
    if re.match("Unrecognized options: [^-]", said):
        return f"{said}; put a text of several words in quotes."
    near = re.search(r"(?:you meant|similar to \S+): (--[\w.-]+)", " ".join(paragraphs[1:]))
    return f"{said}; " + (f"did you mean {near[1]}?" if near else f"see neo-jax {verb} --help.")
