"""A first hour without a network: a whole GPT-Neo 125M, fine-tuned on a text by three commands.

  python benchmarks/first_hour.py [--device-is-slow]

The hub is a folder, in which EleutherAI/gpt-neo-125M has the published shape and weights that are
drawn, and a tokenizer learned from the text: what the commands take is as it will be, what the
model writes is not. With --device-is-slow the run is the one that configs/finetune_125m.py has for
CPUs.
"""

import argparse
import dataclasses
import functools
import json
import lzma
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
PREPARE = "prepare my.txt --tokenizer EleutherAI/gpt-neo-125M --held-out 0.03"
TRAIN = "train finetune-125m --data data --output runs/x"
GENERATE = 'generate "It was" --model runs/x'
SLOW = "--steps 50 --batch-size 2 --length 256 --optimizer.warmup-steps 5 --dtype float32"


def make_hub(root: Path, text: Path) -> None:
    """Writes a cache of the hub's library that holds the model."""
    import jax

    from neo_jax.checkpoints.save import save_pretrained
    from neo_jax.config import preset
    from neo_jax.data.tokenizer_training import train_byte_pairs
    from neo_jax.model.declared import param_shapes
    from neo_jax.model.transformer import Neo

    repository = root / "models--EleutherAI--gpt-neo-125M"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    tokenizer = train_byte_pairs([text.read_text()], 8192, repository / "tokenizer")
    config = dataclasses.replace(preset("gpt-neo-125m"), eos_token_id=tokenizer.eos_id)
    shapes = param_shapes(Neo(config))
    draw = functools.partial(np.random.default_rng(0).standard_normal, dtype=np.float32)

    def init(path, leaf):
        name = path[-1].key
        return {"scale": np.ones, "bias": np.zeros}.get(name, lambda s, _: 0.02 * draw(s))(
            leaf.shape, np.float32
        )

    params = jax.tree.map_with_path(init, shapes)
    save_pretrained(repository / "snapshots" / ("0" * 40), config, params, tokenizer=tokenizer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device-is-slow", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with lzma.open(ROOT / "tests/corpora/corpus.jsonl.xz", "rt", encoding="utf-8") as lines:
            book = max((json.loads(line)["text"] for line in lines), key=len)[:1_000_000]
        (folder / "my.txt").write_text(book)
        make_hub(folder / "hub", folder / "my.txt")
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(folder / "hub")}
        train = f"{TRAIN} {SLOW}" if options.device_is_slow else TRAIN
        for command in (PREPARE, train, GENERATE):
            print(f"$ neo-jax {command}", flush=True)
            start = time.monotonic()
            words = [sys.executable, "-m", "neo_jax", *shlex.split(command)]
            subprocess.run(words, cwd=folder, env=environment, check=True)
            print(f"({time.monotonic() - start:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
