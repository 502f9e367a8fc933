"""Measures the bundled model: bits a byte on held-out documents, and its own words.

  python benchmarks/bundled_quality.py [--model FOLDER] [--samples 20] [--show 2]

  bits a byte    of the documents that training never saw; the bound is 1.9
  known words    share of generated words that occur in the training text; the bound is 95 %
  longest copy   the longest run of words of a sample that stands in the training text, in words;
                 the bound is 12

Samples are 200 tokens long, drawn with the default options, each from its own opening and seed.
"""

import argparse
import json
import lzma
import re
from pathlib import Path

import neo_jax
from neo_jax.data.prepare import is_held_out
from neo_jax.decode.options import SamplingOptions
from neo_jax.evaluation.texts import Total, measure, read_documents

TEXT = Path(__file__).parents[1] / "tests" / "corpora"
HELD_OUT = 0.03  # as in configs/bundled.py
OPENINGS = [
    "The people of the United States", "It was a cold morning", "My dear Emma,",
    "The whale rose", "I have the honor to report", "She had never been", "In the beginning",
    "Captain Ahab looked", "The Congress will", "No man can", "There was a time when",
    "Mr. Knightley smiled", "Our relations with Great Britain", "The young ladies",
    "The ship sailed", "We must not forget", "Upon the whole,", "The Secretary of the Treasury",
    "It is a truth", "At last they",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=None)
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--show", type=int, default=2)
    args = parser.parse_args()
    lm = neo_jax.load(args.model)
    texts = read(TEXT / "corpus.jsonl.xz")
    training = [text for text in texts if not is_held_out(text, HELD_OUT)]

    total = Total()
    for _, document in measure(lm, read_documents([str(TEXT / "held_out.jsonl.xz")])):
        total.add(document)
    print(f"bits a byte    {total.bits_per_byte:.4f} over {total.num_bytes} bytes")

    openings = [OPENINGS[i % len(OPENINGS)] for i in range(args.samples)]
    samples = [
        lm.sample([opening], 200, sampling=SamplingOptions(seed=i))[0]
        for i, opening in enumerate(openings)
    ]
    read_words = [words(text) for text in training]
    known = {word for text in read_words for word in text}
    generated = [word for sample in samples for word in words(sample.text)[:-1]]
    share = sum(word in known for word in generated) / len(generated)
    print(f"known words    {share:.2%} of {len(generated)}")
    joined = " | ".join(f" {' '.join(text)} " for text in read_words)
    longest = [longest_copy(words(sample.prompt + sample.text), joined) for sample in samples]
    print(f"longest copy   {max(longest)} words; by sample {longest}")
    for sample in samples[: args.show]:
        print(f"\n{sample.prompt}{sample.text}")


def longest_copy(text: list[str], training: str) -> int:
    """Returns the most words in a row of `text` that stand in a row in the training text."""
    best = 0
    for start in range(len(text)):
        while (
            start + best < len(text) and f" {' '.join(text[start : start + best + 1])} " in training
        ):
            best += 1
    return best


def words(text: str) -> list[str]:
    """Returns the words of a text in lower case, without punctuation."""
    return re.findall(r"[a-z]+(?:'[a-z]+)*", text.lower())


def read(path: Path) -> list[str]:
    with lzma.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


if __name__ == "__main__":
    main()
