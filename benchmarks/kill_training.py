"""Kills training again and again, and compares what is left with a run that nobody touched.

  python benchmarks/kill_training.py [--kills 20] [--terms 3] [--mesh fsdp=2] [--seed 0]

Each kill is a SIGKILL at a random moment: one in three between the start of the process and its
first steps, one after its first save, one in a save. Each term is a SIGTERM, after which the
process is to exit with 0. Every process is started by the same command; the last one is left to
the end.

Prints how many kills fell between the start and the commit of a save (orbax's temporary folder is
there), then fails unless the weights are bit-identical to those of the run without kills, and so
is the loss of every step.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONFIG = """
from neo_jax.config import ModelConfig
from neo_jax.training.config import OptimizerConfig, TrainConfig

config = TrainConfig(
    data={data!r},
    output={output!r},
    steps={steps},
    batch_size=8,
    model=ModelConfig(
        num_layers=2, embed_dim=64, num_heads=4, vocab_size=300, max_length=64, window_size=16,
        eos_token_id=1,
    ),
    optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=10, weight_decay=0.1),
    dtype="float32",
    mesh={mesh!r},
    log_every=1,
    eval_every=25,
    save_every=5,
)
"""


class Run:
    """One run into one folder, by as many processes as it takes."""

    def __init__(self, folder: Path, name: str, steps: int, mesh: str):
        self.output = folder / name
        self._config = folder / f"{name}.py"
        data = str(folder / "data")
        self._config.write_text(
            CONFIG.format(data=data, output=str(self.output), steps=steps, mesh=mesh)
        )
        self._environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "XDG_CACHE_HOME": str(folder / "cache"),
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "2",
        }

    def start(self) -> subprocess.Popen:
        command = [sys.executable, "-m", "neo_jax", "train", str(self._config)]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=self._environment, stdout=pipe, stderr=pipe, text=True)

    def saves(self) -> set[int]:
        """What has begun and is not committed, each by its inode: a name may come again."""
        folders = (self.output / "checkpoints").glob("*.orbax-checkpoint-tmp*")
        return {os.stat(folder).st_ino for folder in folders if folder.exists()}

    def newest(self) -> int:
        """The step of the newest checkpoint that is whole."""
        names = [path.name for path in (self.output / "checkpoints").glob("*")]
        return max((int(name) for name in names if name.isdigit()), default=0)

    def losses(self) -> dict[int, float]:
        lines = map(json.loads, (self.output / "metrics.jsonl").read_text().splitlines())
        return {line["step"]: line["loss"] for line in lines if "loss" in line}

    def weights(self) -> bytes:
        return (self.output / "model" / "model.safetensors").read_bytes()


def stop(run: Run, number: signal.Signals, delay: float, moment: str) -> bool:
    """Starts a process, waits for a moment, waits `delay` seconds, and sends a signal.

    Returns whether that was between the start and the commit of a save.
    """
    before, leftover = run.newest(), run.saves()
    process = run.start()

    def due() -> bool:
        saved = run.newest() > before
        return moment == "start" or (saved and (moment == "later" or run.saves() - leftover))

    while not due():
        assert process.poll() is None, process.communicate()
        time.sleep(0.0005)
    time.sleep(delay)
    process.send_signal(number)
    _, err = process.communicate()
    expected = -number if number is signal.SIGKILL else 0
    assert process.returncode == expected, (process.returncode, err)
    last = err.splitlines()[-1] if err else "it had not begun"
    cut_off = bool(run.saves() - leftover)
    saving = ", in a save" if cut_off else ""
    print(
        f"{number.name} {moment} + {delay:.2f} s, checkpoint {run.newest()}{saving}: {last}",
        flush=True,
    )
    return cut_off


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--terms", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--mesh", default="fsdp=2")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = " ".join(f"{i} times {j} is {i * j}." for i in range(60) for j in range(60))
        (folder / "text.txt").write_text(corpus)
        prepare = ["prepare", folder / "text.txt", "--output", folder / "data"]
        command = [sys.executable, "-m", "neo_jax", *prepare, "--train-tokenizer", "300"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run(list(map(str, command)), env=environment, check=True, capture_output=True)

        whole = Run(folder, "whole", options.steps, options.mesh)
        began = time.monotonic()
        process = whole.start()
        while not whole.newest():
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        first = time.monotonic() - began
        assert process.wait() == 0, process.communicate()
        print(f"without kills: {time.monotonic() - began:.1f} s, {first:.1f} s to the first save")

        run, cut_off = Run(folder, "killed", options.steps, options.mesh), 0
        stops = [signal.SIGKILL] * options.kills + [signal.SIGTERM] * options.terms
        draw.shuffle(stops)
        for i, number in enumerate(stops):
            moment = ("saving", "start", "later")[i % 3]
            if number is signal.SIGTERM and moment == "start":
                moment = "later"  # an interpreter that just starts has no handler yet
            longest = {"saving": 0.02, "start": first / 2, "later": 0.5}[moment]
            cut_off += stop(run, number, draw.uniform(0, longest), moment)
        last = run.start()
        _, err = last.communicate()
        assert last.returncode == 0, err
        assert run.losses() == whole.losses()
        assert run.weights() == whole.weights()
        print(
            f"{options.kills} kills, {cut_off} of them between the start and the commit of a save, "
            f"and {options.terms} terms: the weights are bit-identical, and all losses equal"
        )


if __name__ == "__main__":
    main()
