"""What is wrong with a command line, in a line that speaks of options as they were typed."""

import re
from collections.abc import Sequence

_NUMBERS = (
    (r"invalid literal for int\(\) with base 10: '(.*)'", "a whole number"),
    (r"could not convert string to float: '(.*)'", "a number"),
)


def as_typed(message: str, args: Sequence[str]) -> str:
    """Returns a message that calls fields as the command line did: `top_p` is --top-p.

    Names of fields that are plain words too are left alone, but for a first one that "must" be
    something or "has no effect".

    Args:
      message: speaks of fields.
      args: the options that were given.
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


def one_line(box: str, verb: str, args: Sequence[str]) -> str:
    """Brings tyro's drawn error down to a line.

    Args:
      box: as tyro draws it.
      verb: what was asked for.
      args: the options that were given.
    """
    text = _undrawn(box)
    see = f"see neo-jax {verb} --help"
    if found := re.match(r"Error parsing (--\S+): (.*)", text):
        return _bad_value(found[1], found[2], see)
    if found := re.match(r"Error parsing [\w.]+: (.*)", text):  # what a dataclass says
        return f"{found[1]}."
    if found := re.match(r"invalid choice '(.*)' for argument '(\S+)'. Expected .*\((.*)\)", text):
        return f"{found[2]} {found[1]}: expected {_one_of(found[3])}."
    if found := re.match(r"Missing value for argument '(\S+)'", text):
        return f"{found[1]} needs a value; {see}."
    if text.startswith("Missing from") and (found := re.search(r": (\S+)", text)):
        return f"{found[1]} is missing; {see}."
    if found := re.match("Unrecognized options: (.*)", text):
        return _unknown(found[1], see, args)
    return f"{text}; {see}."


def _undrawn(box: str) -> str:
    """Returns what an error says, without its title, its frame and the help of the option."""
    words = []
    for line in box.splitlines()[1:]:
        text = line.strip("│╭╮╰╯─ ")
        if not text.strip("-"):
            continue
        if text.startswith(("For full helptext", "Argument helptext")):
            break
        words.append(text)
    return " ".join(" ".join(words).split()).rstrip(".")


def _bad_value(flag: str, message: str, see: str) -> str:
    for pattern, kind in _NUMBERS:
        if found := re.fullmatch(pattern, message):
            return f"{flag} {found[1] or repr('')}: expected {kind}."
    if found := re.fullmatch(r".*parse for arguments: \['(.*)'\]", message):
        return f"{flag} {found[1]} cannot be read; {see}."
    return f"{flag}: {message}."


def _one_of(choices: str) -> str:
    """Returns names as a sentence has them, of names as a tuple has them."""
    *names, last = re.findall("'(.*?)'", choices)
    return f"{', '.join(names)} or {last}" if names else last


def _unknown(text: str, see: str, args: Sequence[str]) -> str:
    """Says what nothing is called, and what is called nearly so."""
    given = [arg for arg in args if text.startswith(" ".join(arg.split()))]
    first = max(given, key=len) if given else text.split(", ")[0]
    if not first.startswith("-"):
        return f"'{first}' is an argument too many; put a text of several words in quotes."
    first = first.partition("=")[0]
    near = re.search(rf"(?:you meant|similar to {re.escape(first)}): (--[\w.-]+)", text)
    return f"there is no option {first}{f'. Did you mean {near[1]}?' if near else f'; {see}.'}"
