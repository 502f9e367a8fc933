"""neo-jax prepare: text to a tokenized data set."""

import dataclasses
from collections.abc import Sequence

from tyro.conf import Positional

from neo_jax.cli import UsageError, parse
from neo_jax.cli.options import print_json, print_table
from neo_jax.data.prepare import prepare


@dataclasses.dataclass(frozen=True)
class Options:
    """Tokenizes .txt and .jsonl files, folders and globs into a data set for training."""

    output: str  # the folder to write, also gs://
    inputs: Positional[tuple[str, ...]] = ()  # .txt, .jsonl, also .gz, .xz; folders, globs, gs://
    tokenizer: str = ""  # a folder with a tokenizer's files
    train_tokenizer: int = 0  # or the size of a SentencePiece vocabulary to learn from the text
    held_out: float = 0.0  # share of documents kept from training, to evaluate on
    json: bool = False  # print the statistics as JSON


def main(args: Sequence[str]) -> None:
    """Runs the verb."""
    options = parse(Options, "prepare", args)
    if not options.inputs:
        raise UsageError("name the files to prepare, as in: neo-jax prepare text/ --output data")
    if bool(options.tokenizer) == bool(options.train_tokenizer):
        raise UsageError("give either --tokenizer FOLDER or --train-tokenizer 4096.")
    fields = prepare(
        options.inputs,
        options.output,
        options.tokenizer or None,
        train_tokenizer=options.train_tokenizer,
        held_out=options.held_out,
    )
    if options.json:
        print_json(fields)
        return
    print_table(
        [
            (
                split,
                f"{numbers['documents']:,} documents, {numbers['bytes']:,} bytes, "
                f"{numbers['tokens']:,} tokens, {numbers['tokens_per_byte']:.4f} tokens a byte",
            )
            for split, numbers in fields["splits"].items()
        ]
    )
