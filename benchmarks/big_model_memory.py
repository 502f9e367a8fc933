"""Anonymous memory of generating with, and of converting, a large checkpoint; prints figures.

    python benchmarks/big_model_memory.py [--preset gpt-neo-2.7b] [--convert]

The checkpoint is float32 zeros, a sparse file; it is used as bfloat16 on the CPU, as by `generate
--dtype bfloat16` or `convert --dtype bfloat16`. RssAnon (Linux) leaves out the mapped file.
"""

import argparse
import json
import math
import re
import tempfile
import threading
from pathlib import Path

from neo_jax.config import preset
from neo_jax.model.tensor_table import tensors


def write(folder, config):
    """A checkpoint of zeros that takes no room on the disk."""
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    header, end = {}, 0
    for row in tensors(config):
        place = row.places["hf"]
        size = 4 * math.prod(place.whole)
        if row.hf_name not in header:
            header[row.hf_name] = {
                "dtype": "F32", "shape": place.whole, "data_offsets": (end, end + size)
            }  # fmt: skip
            end += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def peak_of(function):
    """Runs a function; returns the most anonymous memory meanwhile, in bytes, and its result."""
    peak, done = 0, threading.Event()

    def watch():
        nonlocal peak
        while not done.wait(0.02):
            status = Path("/proc/self/status").read_text()
            peak = max(peak, 1024 * int(re.search(r"RssAnon:\s+(\d+)", status)[1]))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        result = function()
    finally:
        done.set()
        thread.join()
    return peak, result


def main():
    """Measures in this process; converting in one of its own."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--preset", default="gpt-neo-2.7b")
    parser.add_argument("--convert", action="store_true")
    options = parser.parse_args()
    config = preset(options.preset)
    target = 2 * config.num_params
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "theirs").mkdir()
        write(folder / "theirs", config)
        if options.convert:
            from neo_jax.cli import main as cli

            command = ["convert", str(folder / "theirs"), str(folder / "ours")]
            peak, status = peak_of(lambda: cli([*command, "--dtype", "bfloat16"]))
            assert status == 0
            print(f"converting peaks at {peak / 1e9:.2f} GB, the result is {target / 1e9:.2f} GB")
            return
        import neo_jax

        before, _ = peak_of(lambda: None)
        loading, lm = peak_of(lambda: neo_jax.load(folder / "theirs", dtype="bfloat16"))
        running, _ = peak_of(lambda: lm.sample([[1, 2, 3]], 4))
        print(f"the parameters are {target / 1e9:.2f} GB; before loading {before / 1e9:.2f} GB")
        print(f"loading peaks at {loading / 1e9:.2f} GB, generating at {running / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
