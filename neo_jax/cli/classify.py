"""neo-jax classify: labels of texts and of words, and answers."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import OmitArgPrefixes, Positional, arg

from neo_jax.cli import UsageError, parse
from neo_jax.cli.cluster import ClusterOptions
from neo_jax.cli.options import (
    TextModelOptions,
    check_output,
    output_lines,
    print_json,
    print_table,
    read_prompts,
)
from neo_jax.errors import NeoError
from neo_jax.fields import check, number

if TYPE_CHECKING:
    from neo_jax.text.language_model import LanguageModel

_TOGETHER = 256  # texts whose labels come at one time


@dataclasses.dataclass(frozen=True)
class Options:
    """Labels a text, or every line of a file, by a classifier that `neo-jax train` made.

    A JSON line a text: its label, and the probability of each; of a classifier of words the label
    of each word; of a model that finds answers the answer.
    """

    text: Annotated[Positional[str], arg(metavar="TEXT")] = ""  # one text, or question
    # .txt, a text a line; or .jsonl, {"text": ...} or {"ids": [...]} a line; the texts of a pair
    # have a line break between them
    input: str = ""
    context: str = ""  # the text in which questions have their answers
    # With --context: tokens of a question and a part of the context that are read together, as in
    # training, 0 is 384; a longer context is read in parts that overlap.
    length: int = number(0, least=0)
    allow_none: bool = False  # with --context: no answer may be the likeliest, of a model for that
    output: str = ""  # a .jsonl file; stdout if not given
    json: bool = False  # print an object for TEXT too, not lines of words
    # which model, and how to hold it
    model: OmitArgPrefixes[TextModelOptions] = dataclasses.field(default_factory=TextModelOptions)
    # where a mesh spans several processes; each of them runs the same command
    cluster: OmitArgPrefixes[ClusterOptions] = dataclasses.field(default_factory=ClusterOptions)

    def __post_init__(self) -> None:
        check(self)
        for name in ("length", "allow_none"):
            if getattr(self, name) and not self.context:
                raise NeoError(f"{name} has no effect without --context; leave it out.")


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
                for said in _say(lm, texts[start : start + _TOGETHER], options):
                    if options.input or options.json or options.output:
                        print_json(said, file)
                    else:
                        _print(said)


def _say(lm: "LanguageModel", texts: Sequence[Any], options: Options) -> Iterator[dict[str, Any]]:
    """Yields what a model says of each text, by name; raises as the methods of the model do."""
    head, context = lm.config.head, options.context
    if context or head.kind == "qa_outputs":
        if not context:
            raise NeoError("this model finds answers; name the text that has them with --context.")
        questions = [(text, context) for text in texts]
        for answer in lm.answers(questions, length=options.length, allow_none=options.allow_none):
            yield _rounded(answer._asdict())
    elif head.kind == "classifier":
        for words in lm.classify_tokens(texts):
            yield {"words": [_rounded(word._asdict()) for word in words]}
    else:
        for found in lm.classify(texts):
            named = zip(head.labels, found.probabilities.tolist(), strict=True)
            yield {"label": found.label, "probabilities": _rounded(dict(named))}


def _rounded(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: round(x, 6) if isinstance(x, float) else x for name, x in fields.items()}


def _print(said: dict[str, Any]) -> None:
    """Prints what is said of one text for people."""
    if "words" in said:
        print_table([(w["word"], f"{w['label']} {w['probability']:.3f}") for w in said["words"]])
    elif "label" in said:
        print(said["label"], *(f"{x:.3f} {label}" for label, x in said["probabilities"].items()))
    else:
        print(f"{said['text'] or '(no answer)'} {said['probability']:.3f}")
