"""How fast `prepare` makes a data set, over `tokenizers`' own encode_batch of the same documents.

  python benchmarks/prepare_throughput.py [--text FILE ...] [--tokenizer FOLDER]
      [--megabytes 16] [--rounds 5]

The text is read, as files that `prepare` takes, and repeated to so many megabytes of documents in
a .jsonl.zst; the default is the corpus of the tests, with a byte-level BPE of 8192 tokens that is
trained on it. The two take turns; the ratio is the median over rounds of megabytes a second of
`prepare` (from the compressed file to the finished folder) over those of encode_batch, which has
the documents in memory, all of them in one call. The bound is 0.8. Wants a quiet machine.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path

import tokenizers
import zstandard

from neo_jax.data.prepare import prepare
from neo_jax.data.sources import TextFile, find_sources
from neo_jax.data.tokenizer_training import train_byte_pairs

CORPUS = Path(__file__).parents[1] / "tests" / "corpora" / "corpus.jsonl.xz"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", nargs="+", default=[str(CORPUS)])
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--megabytes", type=float, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    found = [document for source in find_sources(options.text) for document in source.documents()]
    given = [each.text if isinstance(each, TextFile) else each for each in found]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.tokenizer is None:
            train_byte_pairs(given, 8192, folder / "tokenizer")
        source = options.tokenizer or folder / "tokenizer"
        texts, size = [], 0.0
        for text in itertools.cycle(given):
            if size >= options.megabytes:
                break
            texts.append(text)
            size += len(text.encode()) / 1e6
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / "text.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
        theirs = tokenizers.Tokenizer.from_file(str(source / "tokenizer.json"))
        rates = ([], [])
        for i in range(options.rounds):
            start = time.perf_counter()
            prepare([folder / "text.jsonl.zst"], folder / f"out-{i}", source)
            between = time.perf_counter()
            theirs.encode_batch(texts)
            end = time.perf_counter()
            rates[0].append(size / (between - start))
            rates[1].append(size / (end - between))
    ratio = statistics.median(a / b for a, b in zip(*rates, strict=True))
    ours, own = map(statistics.median, rates)
    print(
        f"{ratio:.2f} times: {ours:.2f} MB/s over {own:.2f} MB/s; {len(texts)} documents, "
        f"{size:.1f} MB"
    )


if __name__ == "__main__":
    main()
