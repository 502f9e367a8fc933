"""Interrupts commands at random moments: each is to end with one line and exit status 130.

    python benchmarks/interrupts.py [--count 40] [--seed 0] [--verbs generate,train]

Every verb first runs to its end, undisturbed. Then processes of all verbs in turn get SIGINT, as
Ctrl-C sends it, or SIGTERM between their first line and that time, with an empty compilation cache,
so that most are compiling or importing. Prints what became of each; fails where one dies of a
signal, shows anything like a traceback, ends with another status, or lives for 8 seconds more.
`train`, once a step is behind it, is to save and end with 0. At the end the verbs that go on where
they were are left to finish, and their files compared with those of the run without interruptions.

What comes before the first line of the package, while the interpreter starts, is not ours: the
script waits until the process catches SIGTERM (`SigCgt` in /proc).
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
LINE = "neo-jax: interrupted"
CONFIG = """
from neo_jax.config import ModelConfig
from neo_jax.training.config import OptimizerConfig, TrainConfig

config = TrainConfig(
    data={data!r}, output={output!r}, steps=300, batch_size=8, dtype="float32", save_every=50,
    model=ModelConfig(
        num_layers=2, embed_dim=64, num_heads=4, vocab_size=300, max_length=64, window_size=16,
        eos_token_id=1,
    ),
    optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=10), log_every=100,
)
"""


class Commands:
    """The command line of each verb, whose output goes to a folder."""

    def __init__(self, root):
        self._root = root
        corpus = "\n".join(f"{i} times {j} is {i * j}." for i in range(60) for j in range(60))
        (root / "text.txt").write_text(corpus)
        (root / "prompts.txt").write_text("\n".join(f"The {i}th of them" for i in range(12)))
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "HF_HUB_OFFLINE": "1",
            "PYTHONWARNINGS": "ignore",
        }

    def of(self, verb, out):
        """Returns the arguments of a verb."""
        root, text = self._root, self._root / "text.txt"
        if verb == "train":
            data = out.parent / "data"
            if not data.exists():
                self.run(self.of("prepare", data)).wait()
            config = out.with_suffix(".py")
            config.write_text(CONFIG.format(data=str(data), output=str(out)))
        arguments = {
            "info": [],
            "generate": ["The people", "--max-new-tokens", 100, "--temperature", 0.7],
            "samples": ["--prompts-file", root / "prompts.txt", "--output", out],
            "score": ["--input", root / "prompts.txt", "--output", out],
            "eval": ["--text", text],
            "prepare": [text, "--output", out, "--train-tokenizer", 300],
            "train": [out.with_suffix(".py")],
            "plan": ["--topology", "cpu:2", "--mesh", "fsdp=2", "--length", 128],
            "bench": ["--quick", "--seconds", 5],
            "quantize": [root / "model", out],
            "convert": [root / "model", out, "--no-verify"],
        }
        return [{"samples": "generate"}.get(verb, verb), *map(str, arguments[verb])]

    def run(self, arguments):
        """Starts a command with a compilation cache of its own."""
        cache = Path(tempfile.mkdtemp(dir=self._root))
        return subprocess.Popen(
            [sys.executable, "-m", "neo_jax", *arguments],
            env={**self.environment, "XDG_CACHE_HOME": str(cache)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )


VERBS = (
    "info", "generate", "samples", "score", "eval", "prepare", "train", "plan", "bench",
    "quantize", "convert",
)  # fmt: skip


def watches(process):
    """Whether a process has come as far as to catch SIGTERM."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    caught = next(line.split()[1] for line in lines if line.startswith("SigCgt"))
    return int(caught, 16) >> (signal.SIGTERM - 1) & 1


def interrupt(commands, verb, out, number, delay):
    """Interrupts a command after so many seconds; returns what is wrong with its end."""
    process = commands.run(commands.of(verb, out))
    while process.poll() is None and not watches(process):
        time.sleep(0.001)
    time.sleep(delay)
    process.send_signal(number)
    sent = time.monotonic()
    _, err = process.communicate()
    seconds, lines = time.monotonic() - sent, err.splitlines() or [""]
    status = process.returncode
    print(f"{verb:<9} {number.name} {delay:6.2f} s  {status:4} in {seconds:4.1f} s  {lines[-1]}")
    sys.stdout.flush()
    if "Traceback" in err or "Error" in err or "Exception" in err:
        return f"{verb} shows {err}"
    finished = status == 0 and (verb == "train" or seconds < 2)  # it was at its end anyway
    if not (status == 130 or finished) or seconds > 8:
        return f"{verb} ends with {status} after {seconds:.1f} s"
    if status == 130 and not (lines[-1].startswith(LINE) and err.count(LINE) == 1):
        return f"{verb} says {lines[-1]}"
    return ""


def content(path):
    """What an output holds, as bytes by name."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return {file.name: file.read_bytes() for file in files}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbs", default=",".join(VERBS))
    options = parser.parse_args()
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # not as a job in the background has it
    draw, verbs, wrong = random.Random(options.seed), options.verbs.split(","), []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        shutil.copytree(ROOT / "neo_jax" / "bundled", root / "model")
        commands, longest, whole = Commands(root), {}, root / "whole"
        whole.mkdir()
        for verb in verbs:
            process, begin = commands.run(commands.of(verb, whole / verb)), time.monotonic()
            _, err = process.communicate()
            assert process.returncode == 0, err
            longest[verb] = time.monotonic() - begin
            print(f"{verb:<9} takes {longest[verb]:.1f} s", flush=True)
        ours = root / "ours"
        ours.mkdir()
        for i in range(options.count):
            verb = verbs[i % len(verbs)]
            number = draw.choice((signal.SIGINT, signal.SIGINT, signal.SIGTERM))
            delay = draw.uniform(0, 0.5 if i % 3 == 0 else longest[verb])
            wrong += filter(None, [interrupt(commands, verb, ours / verb, number, delay)])
        for verb in {"samples", "score", "prepare"} & set(verbs):
            process = commands.run(commands.of(verb, ours / verb))
            _, err = process.communicate()
            assert process.returncode == 0 or " already; choose " in err, err
            if content(ours / verb) != content(whole / verb):
                wrong.append(f"{verb} wrote something else after it was interrupted")
        left = [path.name for path in ours.iterdir() if "partial" in path.name]
        wrong += [f"{name} is left" for name in left]
    print(*wrong, f"{options.count} interruptions, {len(wrong)} faults", sep="\n")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
