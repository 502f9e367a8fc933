"""Kills what writes again and again, fills its disk, damages its files; nothing good is lost.

  python benchmarks/kills.py [--jobs train prepare ...] [--kills 6] [--terms 2] [--seed 0]

A job is a command: `train`, `prepare`, `generate --output`, `quantize` and `convert`. Each is run
once by nobody's hand, and then into another output, by as many processes of the same command as it
takes: `--kills` of them get a SIGKILL at a random moment, of training one in three in the middle of
a save; one cannot write more than a few bytes to a file, as on a full disk, and must end with one
line. Training also gets SIGTERMs, after which it exits with 0, and before some of its starts a file
of its newest checkpoint is truncated, removed, or has a bit flipped, or its arrays are away for
some seconds. The last process is left to the end.

Fails unless what is left is, byte for byte, what the undisturbed command left (of training, weights
and every loss; of samples, all but log-probabilities), and everything that was damaged is there.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
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


class Job:
    """One command into one output, by as many processes as it takes."""

    small = 512  # bytes of a file that a full disk still takes

    def __init__(self, folder: Path, name: str, args: Callable[[Path], list[object]]):
        self.output = folder / name
        self._args = list(map(str, args(self.output)))
        self._environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "XDG_CACHE_HOME": str(folder / "cache"),
            "JAX_PLATFORMS": "cpu",
            "PYTHONDONTWRITEBYTECODE": "1",  # what a full disk cuts short would be read again
            "JAX_NUM_CPU_DEVICES": "2",
        }

    def start(self, limit: int = 0) -> subprocess.Popen:
        """Starts a process; with a limit it can write no more bytes to any one file."""

        def limited() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        return subprocess.Popen(
            [sys.executable, "-m", "neo_jax", *self._args],
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=limited if limit else None,
        )

    def is_refused(self, err: str) -> bool:
        """Whether a process found all of its output there already."""
        return " already; choose " in err

    def result(self) -> object:
        """What must not depend on what happened on the way."""
        if self.output.is_dir():
            return _bytes(self.output)
        samples = list(map(json.loads, self.output.read_text().splitlines()))
        for sample in samples:
            del sample["logprobs"]  # whose last digits depend on what else is in a batch
        return samples

    def moment(self, i: int, longest: float, draw: random.Random) -> Callable[[], bool]:
        """Returns a function that says whether it is time for the signal of process `i`."""
        end = time.monotonic() + draw.uniform(0.1, 1.0) * longest
        return lambda: time.monotonic() >= end

    def check(self) -> None:
        """Fails where something is lost on the way."""


class Training(Job):
    """A run of training, whose checkpoints are watched."""

    small = 4096

    def __init__(self, folder: Path, name: str, steps: int, mesh: str):
        config = folder / f"{name}.py"
        fields = {"data": str(folder / "data"), "output": str(folder / name)}
        config.write_text(CONFIG.format(**fields, steps=steps, mesh=mesh))
        super().__init__(folder, name, lambda _: ["train", config])
        self._checkpoints = self.output / "checkpoints"
        self.cut_off = 0  # signals between the start and the commit of a save
        self._damaged: list[dict[str, bytes]] = []  # what was left of checkpoints

    def saves(self) -> set[int]:
        """What has begun and is not committed, each by its inode: a name may come again."""
        folders = self._checkpoints.glob("*.orbax-checkpoint-tmp*")
        return {os.stat(folder).st_ino for folder in folders if folder.exists()}

    def newest(self) -> int:
        """The step of the newest checkpoint that is whole."""
        names = [path.name for path in self._checkpoints.glob("*")]
        return max((int(name) for name in names if name.isdigit()), default=0)

    def moment(self, i: int, longest: float, draw: random.Random) -> Callable[[], bool]:
        if i % 3 == 1:
            return super().moment(i, longest, draw)
        before, leftover = self.newest(), self.saves()
        delay, since = draw.uniform(0, 0.02 if i % 3 == 0 else 0.5), [0.0]

        def due() -> bool:
            saved = self.newest() > before
            if not since[0] and saved and (i % 3 == 2 or self.saves() - leftover):
                since[0] = time.monotonic()
            now = bool(since[0]) and time.monotonic() >= since[0] + delay
            self.cut_off += now and bool(self.saves() - leftover)
            return now

        return due

    def damage(self, i: int, draw: random.Random) -> str:
        """Harms the newest checkpoint where there are two; returns how."""
        steps = [path for path in self._checkpoints.glob("*") if path.name.isdigit()]
        if len(steps) < 2:
            return "nothing"
        folder = max(steps, key=lambda path: int(path.name))
        how = ("truncated", "flipped", "removed", "away")[i % 4]
        if how == "away":
            aside = self.output / "away"
            folder.joinpath("state").rename(aside)
            threading.Timer(8, bring_back, [aside, folder]).start()
            return f"{folder.name}: its state is away for 8 s"
        files = [path for path in (folder / "state").rglob("*") if path.stat().st_size > 99]
        path = max(filter(Path.is_file, files), key=lambda path: path.stat().st_size)
        before, data = _bytes(folder), bytearray(path.read_bytes())
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        if how == "removed":
            path.unlink()
        else:
            path.write_bytes(data if how == "flipped" else data[: len(data) // 2])
        # Where the last process was killed before it saw the damage, it is harmed once more.
        self._damaged = [left for left in self._damaged if left != before] + [_bytes(folder)]
        return f"{folder.name}: {path.name} {how}"

    def check(self) -> None:
        there = [_bytes(path) for path in self._checkpoints.iterdir() if path.is_dir()]
        assert all(left in there for left in self._damaged)

    def result(self) -> object:
        lines = map(json.loads, (self.output / "metrics.jsonl").read_text().splitlines())
        losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
        return losses, (self.output / "model" / "model.safetensors").read_bytes()


def bring_back(state: Path, folder: Path) -> None:
    """Puts the state of a checkpoint where it was, whatever that is called by now."""
    places = [folder, *folder.parent.glob(f"{folder.name}.unreadable*")]
    state.rename(next(place for place in places if place.is_dir()) / "state")


def _bytes(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def finish(job: Job) -> float:
    """Lets a process of a job end by itself; returns how long it took."""
    began = time.monotonic()
    process = job.start()
    _, err = process.communicate()
    assert process.returncode == 0 or job.is_refused(err), err
    return time.monotonic() - began


def fill_disk(job: Job) -> None:
    """Lets a process run into a full disk: it ends with one line, or had nothing left to write."""
    process = job.start(job.small)
    _, err = process.communicate()
    assert process.returncode in (0, 1), (process.returncode, err)
    assert "Traceback" not in err, err
    print(f"  full disk: {err.splitlines()[-1] if err else 'nothing to write'}", flush=True)


def stop(job: Job, i: int, number: signal.Signals, longest: float, draw: random.Random) -> bool:
    """Starts a process and ends it by a signal; returns whether it came before the end."""
    due, process = job.moment(i, longest, draw), job.start()
    while not due() and process.poll() is None:
        time.sleep(0.0005)
    process.send_signal(number)
    _, err = process.communicate()
    ended = process.returncode == -number or (number, process.returncode) == (signal.SIGTERM, 0)
    if ended and not job.is_refused(err):
        print(f"  {number.name}: {err.splitlines()[-1] if err else 'nothing said'}", flush=True)
        return True
    assert process.returncode == 0 or job.is_refused(err), (process.returncode, err)
    return False


def disturb(job: Job, expected: Job, longest: float, options: argparse.Namespace) -> None:
    """Does everything to a job, and compares what it leaves."""
    draw, came = random.Random(options.seed), 0
    stops = [signal.SIGKILL] * options.kills
    if isinstance(job, Training):
        stops += [signal.SIGTERM] * options.terms
        draw.shuffle(stops)
    if not isinstance(job, Training):  # which needs a checkpoint first
        fill_disk(job)
    for i, number in enumerate(stops):
        if isinstance(job, Training) and i % 2:
            print(f"  {job.damage(i // 2, draw)}", flush=True)
        # An interpreter that just starts has no handler for SIGTERM yet.
        moment = 2 if number is signal.SIGTERM else i
        if stop(job, moment, number, longest, draw):
            came += 1
        elif not isinstance(job, Training):  # it was whole before the signal: once more
            assert job.result() == expected.result()
            shutil.rmtree(job.output) if job.output.is_dir() else job.output.unlink()
        if i == len(stops) // 2 and isinstance(job, Training):
            fill_disk(job)
        job.check()
    finish(job)
    job.check()
    assert job.result() == expected.result()
    cut_off = f", {job.cut_off} of them in a save" if isinstance(job, Training) else ""
    print(f"  {came} signals{cut_off}, a full disk: what is left is the same, byte for byte")


def jobs(options: argparse.Namespace, folder: Path, name: str) -> dict[str, Callable[[], Job]]:
    """Returns the jobs, each into an output of this name; later ones use what earlier ones left."""

    def job(args: Callable[[Path], list[object]]) -> Callable[[Path], Job]:
        return lambda verb: Job(folder, f"{name}-{verb}", args)

    text, model = folder / "text.txt", folder / "model"
    each = {
        "prepare": job(
            lambda out: ["prepare", text, "--output", out, "--tokenizer", folder / "data"]
        ),
        "generate": job(
            lambda out: [
                "generate", "--prompts-file", folder / "prompts.txt", "--output", out, "--model",
                model, "--max-new-tokens", 20, "--batch-size", 2,
            ]
        ),
        "quantize": job(lambda out: ["quantize", model, out]),
        "convert": job(lambda out: ["convert", model, out]),
        "train": lambda verb: Training(folder, f"{name}-{verb}", options.steps, options.mesh),
    }  # fmt: skip
    return {verb: lambda verb=verb, make=make: make(verb) for verb, make in each.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = ("prepare", "generate", "quantize", "convert", "train")
    parser.add_argument("--jobs", nargs="+", default=verbs, choices=verbs)
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--terms", type=int, default=2)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--mesh", default="fsdp=2")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = [f"{i} times {j} is {i * j}." for i in range(60) for j in range(60)]
        (folder / "text.txt").write_text(" ".join(corpus))
        (folder / "prompts.txt").write_text("\n".join(corpus[:60]))
        make = ["prepare", folder / "text.txt", "--train-tokenizer", 300]
        finish(Job(folder, "data", lambda out: [*make, "--output", out]))
        if not {"generate", "quantize", "convert"}.isdisjoint(options.jobs):  # which need a model
            seed = Training(folder, "seed", 5, options.mesh)
            finish(seed)
            (seed.output / "model").rename(folder / "model")
        for verb in options.jobs:
            whole = jobs(options, folder, "whole")[verb]()
            longest = finish(whole)
            print(f"{verb}: {longest:.1f} s by itself", flush=True)
            disturb(jobs(options, folder, "killed")[verb](), whole, longest, options)


if __name__ == "__main__":
    main()
