"""neo-jax classify: labels of texts."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated

from tyro.conf import OmitArgPrefixes, Positional, arg

from neo_jax.cli import UsageError, parse
from neo_jax.cli.cluster import ClusterOptions
from neo_jax.cli.options import (
    TextModelOptions,
    check_output,
    output_lines,
    print_json,
    read_prompts,
)

_TOGETHER = 256  # texts whose labels come at one time


@dataclasses.dataclass(frozen=True)
class Options:
    """Labels a text, or every line of a file, by a classifier that `neo-jax train` made.

    A JSON line a text: its label, and the probability of each.
    """

    text: Annotated[Positional[str], arg(metavar="TEXT")] = ""  # one text
    # .txt, a text a line; or .jsonl, {"text": ...} or {"ids": [...]} a line; the texts of a pair
    # have a line break between them
    input: str = ""
    output: str = ""  # a .jsonl file; stdout if not given
    json: bool = False  # print an object for TEXT too, not its label and probability
    # which model, and how to hold it
    model: OmitArgPrefixes[TextModelOptions] = dataclasses.field(default_factory=TextModelOptions)
    # where a mesh spans several processes; each of them runs the same command
    cluster: OmitArgPrefixes[ClusterOptions] = dataclasses.field(default_factory=ClusterOptions)


def main(args: Sequence[str]) -> None:
    """Runs the verb."""
    options = parse(Options, "classify", args)
    if bool(options.text) == bool(options.input):
        raise UsageError(
            'name a text, as in: neo-jax classify "a fine film" --model RUN; or a file, --input.'
        )
    texts = read_prompts(options.input, "text") if options.input else [options.text]
    check_output(options.output, options.input)
    with options.cluster.joined(options.model.is_split):
        lm = options.model.load()
        with output_lines(options.output) as file:
            for start in range(0, len(texts), _TOGETHER):
                for found in lm.classify(texts[start : start + _TOGETHER]):
                    named = zip(lm.config.head.labels, found.probabilities.tolist(), strict=True)
                    numbers = {label: round(number, 6) for label, number in named}
                    if options.input or options.json or options.output:
                        print_json({"label": found.label, "probabilities": numbers}, file)
                    else:
                        print(found.label, *(f"{x:.3f} {label}" for label, x in numbers.items()))
