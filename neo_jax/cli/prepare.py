"""neo-jax prepare: text to a tokenized data set."""

import dataclasses
from collections.abc import Sequence
from textwrap import indent
from typing import Annotated, Any, get_args

from tyro.conf import Positional, arg

from neo_jax.cli import UsageError, parse
from neo_jax.cli.options import print_json, print_table
from neo_jax.data.examples import Schema, is_table
from neo_jax.data.prepare import TokenizerKind, prepare
from neo_jax.data.prepare_labelled import prepare_labelled
from neo_jax.data.statistics import draw_histogram
from neo_jax.errors import NeoError
from neo_jax.fields import check, choice, number
from neo_jax.labels import HeadKind, ProblemType


@dataclasses.dataclass(frozen=True)
class Options:
    """Tokenizes .txt, .jsonl and TFRecord files, folders and globs into a data set for training.

    A line of .jsonl is {"text": ...}, or {"prompt": ..., "completion": ...} to learn completions.

    What was interrupted goes on where it was: give the same command again.
    """

    # .txt, .jsonl, .tfrecords (.bz2, .gz, .xz, .zst); folders, globs, gs://; hf://NAME:CONFIG:SPLIT
    inputs: Annotated[Positional[tuple[str, ...]], arg(metavar="FILE...")] = ()
    output: str = "data"  # the folder to write, also gs://; new, or empty
    tokenizer: str = ""  # of a model, by any name that --model takes; or a folder or file of one
    train_tokenizer: int = 0  # or the size of a vocabulary to learn from the text
    tokenizer_kind: TokenizerKind = "sentencepiece"  # of the tokenizer to train
    new_tokens: tuple[str, ...] = ()  # special tokens to add to it, such as "<|user|>"
    # The name of the text in .jsonl and hf://, of the ids in TFRecords; "text" if not given.
    text_field: str = ""
    separator: str = ""  # of documents in .txt, where it is another than <|endoftext|>
    held_out: float = 0.0  # share of the text kept from training, to evaluate on
    # Examples with labels of .tsv, .csv, .jsonl and hf://: the column of labels, by name, or by its
    # number from 1 in files whose first line names none; --text-field likewise.
    label_field: str = ""
    # What labels are of: "score", of texts; "classifier", of words, in the columns "tokens" and
    # "tags" if not given; "qa_outputs", answers, in "answers", of "question" and "context".
    head: HeadKind = choice("lm_head", get_args(HeadKind))
    # The column of the second text, where examples are pairs; of answers that of questions.
    second_text_field: str = ""
    labels: tuple[str, ...] = ()  # their names, in the order that the model is to have them
    # What labels are: one name, any of several joined by commas, or a number.
    problem_type: ProblemType = "single_label_classification"
    held_out_files: tuple[str, ...] = ()  # of examples, in the place of a share
    skip_bad: int = number(0, least=0)  # rows that cannot be examples, left out and reported
    json: bool = False  # print the statistics as JSON

    def __post_init__(self) -> None:
        check(self)
        for name in ("second_text_field", "labels", "held_out_files", "skip_bad"):
            if getattr(self, name) and not self.is_labelled:
                raise NeoError(f"{_option(name)} goes with --label-field, the column of labels.")
        for name in ("new_tokens", "separator", "train_tokenizer"):
            if getattr(self, name) and self.is_labelled:
                raise NeoError(f"{_option(name)} is for texts without labels; leave it out.")
        if not self.is_labelled and any(map(is_table, self.inputs)):
            raise NeoError("tables hold examples with labels: name their column by --label-field.")
        if self.second_text_field and self.head == "classifier":
            raise NeoError("--head classifier takes one list of words; leave out the second text.")
        if self.head == "score" and not self.label_field:
            raise NeoError("--head score needs --label-field, the column of labels.")
        if self.problem_type != "single_label_classification" and self.kind != "score":
            raise NeoError(
                f"--problem-type is for labels of texts; --head {self.head} has one kind."
            )

    @property
    def is_labelled(self) -> bool:
        """Whether these are examples with labels."""
        return bool(self.label_field) or self.head != "lm_head"

    @property
    def kind(self) -> HeadKind:
        """The head that examples with labels are for."""
        return "score" if self.head == "lm_head" else self.head


def _option(field: str) -> str:
    return "--" + field.replace("_", "-")


def main(args: Sequence[str]) -> None:
    """Runs the verb."""
    options = parse(Options, "prepare", args)
    if not options.inputs:
        raise UsageError(
            "name the files to prepare, as in: neo-jax prepare my.txt --tokenizer gpt-neo-125m"
        )
    if bool(options.tokenizer) == bool(options.train_tokenizer):
        raise UsageError("give either --tokenizer, as in gpt-neo-125m, or --train-tokenizer 4096.")
    if not 0 <= options.train_tokenizer < 2**31:
        raise UsageError(f"no vocabulary has {options.train_tokenizer} tokens; take 4096, say.")
    fields = _labelled(options) if options.is_labelled else _documents(options)
    if options.json:
        print_json(fields)
        return
    for split, numbers in fields["splits"].items():
        _print_split(split, numbers)


def _documents(options: Options) -> dict[str, Any]:
    """Prepares documents, or pairs of prompts and completions."""
    return prepare(
        options.inputs,
        options.output,
        options.tokenizer or None,
        train_tokenizer=options.train_tokenizer,
        tokenizer_kind=options.tokenizer_kind,
        new_tokens=options.new_tokens,
        text_field=options.text_field or "text",
        separator=options.separator,
        held_out=options.held_out,
    )


def _labelled(options: Options) -> dict[str, Any]:
    """Prepares examples with labels."""
    if not options.tokenizer:
        raise UsageError("examples with labels need --tokenizer, as in gpt-neo-125m.")
    schema = Schema.usual(options.kind)
    schema = dataclasses.replace(
        schema,
        text=options.text_field or schema.text,
        label=options.label_field or schema.label,
        second_text=options.second_text_field or schema.second_text,
        problem_type=options.problem_type,
        labels=options.labels,
    )
    return prepare_labelled(
        options.inputs,
        options.output,
        options.tokenizer,
        schema,
        held_out=options.held_out,
        held_out_inputs=options.held_out_files,
        skip_bad=options.skip_bad,
    )


def _print_split(split: str, numbers: dict[str, Any]) -> None:
    """Prints how much there is, of documents or of examples, and how long they are."""
    lengths, rows = numbers["lengths"], []
    if count := numbers.get("examples"):
        rows.append(("examples", f"{count:,}"))
        balance = numbers.get("balance", {}).items()
        labelled = numbers.get("words", count)
        if "words" in numbers:
            rows.append(("words with a label", f"{labelled:,}"))
        rows += [(label, f"{some:,}, {some / labelled:.1%}") for label, some in balance]
        if none := numbers.get("unanswerable"):
            rows.append(("without an answer", f"{none:,}, {none / count:.1%}"))
        if "mean" in numbers:
            rows.append(("label", f"mean {numbers['mean']:.4g}, sd {numbers['sd']:.4g}"))
    else:
        rows.append(("documents", f"{numbers['documents']:,}"))
        rows.append(("bytes", f"{numbers['bytes']:,}"))
        rows.append(("tokens", f"{numbers['tokens']:,}, {numbers['tokens_per_byte']:.4f} a byte"))
    each = "an example" if count else "a document"
    rows.append(
        (
            f"tokens {each}",
            f"median {lengths['median']:,}, mean {lengths['mean']:,.1f}, longest "
            f"{lengths['longest']:,}; of as many up to twice as many:",
        )
    )
    print(split)
    print_table([(f"  {name}", value) for name, value in rows])
    print(indent(draw_histogram(lengths["histogram"]), "    "))
