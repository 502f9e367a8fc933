"""Writes held_out.jsonl.xz: the documents of the corpus that the bundled model never saw.

python tests/corpora/make_held_out.py
"""

import json
import lzma
from pathlib import Path

from neo_jax.data.prepare import is_held_out

HELD_OUT = 0.03  # as in configs/bundled.py


def main() -> None:
    folder = Path(__file__).parent
    with lzma.open(folder / "corpus.jsonl.xz", "rt", encoding="utf-8") as corpus:
        kept = [line for line in corpus if is_held_out(json.loads(line)["text"], HELD_OUT)]
    with lzma.open(folder / "held_out.jsonl.xz", "wt", encoding="utf-8", preset=9) as file:
        file.writelines(kept)


if __name__ == "__main__":
    main()
