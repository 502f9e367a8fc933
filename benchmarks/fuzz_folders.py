"""Folders that were damaged in any way: each is read, or refused in a line, and never more.

  python benchmarks/fuzz_folders.py RESULTS.jsonl [--cases 10000] [--seed 0] [--kinds a,b]

Models in every format, indices, adapters, int8 weights, tokenizers and data sets, of which bytes,
values of JSON, headers, archives, pickles and whole files are changed. A case holds if nothing but
NeoError comes of it, no code of its pickle runs, and it takes at most twice its files and 300 MB
of memory and ten seconds of a processor. Cases that RESULTS.jsonl holds already are not run again:
the same command goes on. Prints a summary and the cases that do not hold; fails if there are any.
"""

import argparse
import collections
import copy
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax.traverse_util import unflatten_dict
from safetensors.numpy import save

from neo_jax.checkpoints.adapter_files import base_folder
from neo_jax.checkpoints.load import load_int8, load_params
from neo_jax.checkpoints.open_model import open_model, stored_leaves
from neo_jax.checkpoints.peft import describe_adapter, load_adapter
from neo_jax.checkpoints.save import save_int8, save_pretrained
from neo_jax.config import ModelConfig
from neo_jax.data.packing import TokenDataset
from neo_jax.data.prepare import prepare
from neo_jax.errors import NeoError
from neo_jax.model.tensor_table import tensors
from neo_jax.text.tokenizer import load_tokenizer
from neo_jax.transforms.quantize import quantize

CONFIG = ModelConfig(num_layers=2, embed_dim=4, num_heads=2, vocab_size=300, max_length=6)


KINDS = (
    "single", "sharded", "bin", "old_bin", "msgpack", "int8", "adapter", "tokenizer", "data"
)  # fmt: skip
TEXT = "Some words of a text, 12 of them; caf\u00e9.\n"


def make_folders(root: Path) -> dict[str, dict[str, bytes]]:
    """Makes whole folders in an empty one; returns the files of each kind, as bytes."""
    root.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    leaves = {row.path: rng.normal(size=row.shape).astype(np.float32) for row in tensors(CONFIG)}
    params = jax.tree.map(jnp.asarray, unflatten_dict(leaves))
    save_pretrained(root / "single", CONFIG, params)
    save_pretrained(root / "sharded", CONFIG, params, max_shard_bytes=1500)
    save_int8(root / "int8", CONFIG, quantize(CONFIG, params, np.dtype("f4")))
    (root / "text.txt").write_text(TEXT * 200)
    data = root / "data"
    prepare([root / "text.txt"], data, train_tokenizer=270, tokenizer_kind="bpe", progress=False)
    folders = {path.name: _files(path) for path in root.iterdir() if path.is_dir()}
    folders["tokenizer"] = {n: file for n, file in folders["data"].items() if "token" in n}
    config = {"config.json": folders["single"]["config.json"]}
    rows = tensors(CONFIG)
    state = {
        row.hf_name: torch.from_numpy(np.array(row.to("hf", leaves[row.path]))) for row in rows
    }
    state["lm_head.weight"] = state["transformer.wte.weight"]
    for kind, archived in (("bin", True), ("old_bin", False)):
        torch.save(state, file := io.BytesIO(), _use_new_zipfile_serialization=archived)
        folders[kind] = {**config, "pytorch_model.bin": file.getvalue()}
    nested = unflatten_dict({
        tuple(row.places["flax"].name.split("/")): np.array(row.to("flax", leaves[row.path]))
        for row in rows
    })  # fmt: skip
    content = flax.serialization.msgpack_serialize(nested)
    folders["msgpack"] = {**config, "flax_model.msgpack": content}
    lora = {
        f"base_model.model.transformer.h.{i}.attn.attention.q_proj.lora_{part}.weight": rng.normal(
            size=(2, 4) if part == "A" else (4, 2)
        ).astype(np.float32)
        for i in range(2)
        for part in "AB"
    }
    fields = {
        "peft_type": "LORA", "base_model_name_or_path": ".", "r": 2, "lora_alpha": 4,
        "target_modules": ["q_proj"], "bias": "none", "revision": None,
    }  # fmt: skip
    folders["adapter"] = {
        "adapter_config.json": json.dumps(fields).encode(),
        "adapter_model.safetensors": save(lora),
    }
    return folders


def _files(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def read(kind: str, folder: Path) -> None:
    """Reads all that a folder of this kind holds."""
    if kind == "adapter":
        base_folder(folder)
        describe_adapter(folder)
        load_adapter(folder, CONFIG)
    elif kind == "tokenizer":
        tokenizer = load_tokenizer(folder)
        tokenizer.decode(tokenizer.encode(TEXT))
    elif kind == "data":
        TokenDataset.open(folder, length=8, across_documents=False).sequence(0)
    else:
        config, is_int8 = open_model(folder)
        if is_int8:
            load_int8(folder, config, np.dtype("f4"))
            return
        load_params(folder, config)
        with stored_leaves(folder, config) as leaves:
            for leaf in leaves.values():
                leaf.read()


# Changes. Each takes what a file holds, and returns what it is to hold.

NOISE = (b"9999999999", b"-1", b"null", b"[[", b'"', b"{}", b"0", b"NaN", b"\x1b[2J", b"\xff\x00")
ODD = (
    None, True, False, -1, 0, 1, 3, 2**31, 2**63, 10**12, 10**400, 0.5, 1e999, float("nan"), "",
    "x" * 5000, "a\x1b[2J\n\u202e", "a\0b", "../x", "/dev/zero", [], {}, [None], ["global"] * 3,
    {"a": {"b": []}}, [[["global"] * 1000, 10**7]], list(range(3000)), "float16", "gelu",
)  # fmt: skip


def spoil_bytes(rng: np.random.Generator, data: bytes, header: int = 1000) -> bytes:
    """Changes, cuts, doubles and repeats bytes, of the first `header` in most cases."""
    data, end = bytearray(data), header if rng.random() < 0.9 else len(data)
    for _ in range(rng.integers(1, 4)):
        at, kind = int(rng.integers(0, max(1, min(end, len(data))))), rng.integers(0, 6)
        if kind == 0:
            data[at : at + 1] = bytes([rng.integers(0, 256)])
        elif kind == 1:
            data[at : at + 1] = bytes([data[at] ^ (1 << int(rng.integers(0, 8)))]) if data else b""
        elif kind == 2:
            del data[at : at + int(rng.integers(1, 9))]
        elif kind == 3:
            data[at:at] = data[at : at + int(rng.integers(1, 30))]
        elif kind == 4:
            data[at : at + 1] = NOISE[rng.integers(len(NOISE))]
        else:
            data = data[:at] if rng.random() < 0.2 else data[:at] + data[at:][::-1][:3] + data[at:]
    return bytes(data)


def spoil_json(rng: np.random.Generator, data: bytes) -> bytes:
    """Puts an odd value in the place of one, or one under an odd name, or leaves it out."""
    tree = json.loads(data)
    for _ in range(rng.integers(1, 3)):
        here = tree
        while True:
            keys = list(here) if isinstance(here, dict) else range(len(here))
            key = keys[rng.integers(len(keys))]
            if not isinstance(here[key], dict | list) or not here[key] or rng.random() < 0.3:
                break
            here = here[key]
        kind, odd = rng.integers(0, 8), copy.deepcopy(ODD[rng.integers(len(ODD))])
        if kind == 0:
            del here[key]
        elif kind == 1 and isinstance(here, dict):
            here[odd if isinstance(odd, str) else str(odd)[:9]] = here.pop(key)
        else:
            here[key] = odd
        if not tree:
            break
    text = json.dumps(tree).encode()
    if rng.random() < 0.05:
        text = text.replace(b":", b":" + b"[" * int(rng.integers(1, 20000)), 1)
    return text


def spoil_header(rng: np.random.Generator, data: bytes) -> bytes:
    """Spoils the JSON of a safetensors file, whose length stays true."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = spoil_json(rng, data[8:end])
    return len(header).to_bytes(8, "little") + header + data[end:]


def spoil_numbers(rng: np.random.Generator, data: bytes) -> bytes:
    """Puts numbers that are none among the last bytes."""
    odd = np.array([np.nan, np.inf, -np.inf, 1e38], np.float32)[rng.integers(4)].tobytes()
    return data[:-8] + odd + data[-4:]


class Harm:
    """What a pickle may ask for."""

    def __init__(self, call: object, *args: object) -> None:
        self._reduced = call, args

    def __reduce__(self) -> object:
        return self._reduced


MARK = "neo_jax-harm"
HARM = (
    Harm(os.mkdir, MARK), Harm(exec, f"open({MARK!r}, 'w')"), Harm(eval, f"open({MARK!r}, 'w')"),
    Harm(os.system, f"touch {MARK}"), Harm(subprocess.Popen, ["touch", MARK]),
)  # fmt: skip


def spoil_archive(rng: np.random.Generator, data: bytes) -> bytes:
    """Packs an archive anew, with an entry that is spoilt, left out, or a pickle that harms."""
    kind = zipfile.ZIP_DEFLATED if rng.random() < 0.5 else zipfile.ZIP_STORED
    with zipfile.ZipFile(io.BytesIO(data)) as old:
        entries = {name: old.read(name) for name in old.namelist()}
    name = next(name for name in entries if name.endswith("data.pkl"))
    name = name if rng.random() < 0.6 else list(entries)[rng.integers(len(entries))]
    how = rng.integers(0, 6)
    if how == 0:
        del entries[name]
    elif how == 1:
        entries[name] = pickle.dumps({"a": HARM[rng.integers(len(HARM))]}, int(rng.integers(0, 6)))
    elif how == 2:
        entries[name] = entries[name] + b"]" * int(rng.integers(1, 300_000))
    elif how == 3:
        entries[name] = b"\0" * int(rng.integers(1, 1 << 24))
    elif how == 4:
        entries[name] = spoil_bytes(rng, entries[name], 2000)
    with zipfile.ZipFile(file := io.BytesIO(), "w", kind) as new:
        for entry, content in entries.items():
            new.writestr(entry, content)
    return file.getvalue()


def spoil_pickle(rng: np.random.Generator, data: bytes) -> bytes:
    """Puts a pickle that harms, or that asks for much, at the beginning."""
    at = int(rng.integers(0, 600)) if rng.random() < 0.5 else 0
    harm = pickle.dumps(HARM[rng.integers(len(HARM))], int(rng.integers(0, 6)))
    return data[:at] + (harm if rng.random() < 0.7 else b"]" * 20_000) + data[at:]


def spoil_msgpack(rng: np.random.Generator, data: bytes) -> bytes:
    """Puts many small objects, or a huge length, at a place."""
    at, many = int(rng.integers(0, 300)), int(rng.integers(1, 300_000))
    maps = b"\xdd" + many.to_bytes(4, "big") + b"\x80" * many
    objects = (maps, b"\xdf\xff\xff\xff\xff", b"\x91" * 99)
    return data[:at] + objects[rng.integers(3)] + data[at:]


def spoil(rng: np.random.Generator, folder: Path, files: dict[str, bytes]) -> None:
    """Writes a folder with one of its files changed in one of the ways above, or not a file."""
    name = list(files)[rng.integers(len(files))]
    data, changes = files[name], [spoil_bytes]
    changes += {
        ".json": [spoil_json, spoil_json],
        ".safetensors": [spoil_header, spoil_header, spoil_numbers],
        ".msgpack": [spoil_msgpack],
        ".bin": [spoil_archive] * 3 if data[:2] == b"PK" else [spoil_pickle],
    }.get(Path(name).suffix, [])
    for other, content in files.items():
        (folder / other).parent.mkdir(parents=True, exist_ok=True)
        if other != name:
            (folder / other).write_bytes(content)
    path, how = folder / name, rng.integers(0, 40)
    if how == 0:
        os.mkfifo(path)
    elif how == 1:
        path.symlink_to(["nothing", path.name, "/dev/zero", "/dev/null", "."][rng.integers(5)])
    elif how == 2:
        path.mkdir()
    elif how == 3:
        path.write_bytes(files[list(files)[rng.integers(len(files))]])
    elif how > 4:
        path.write_bytes(changes[rng.integers(len(changes))](rng, data))


def refusal(seed: int, case: int, kind: str, folders: dict[str, dict[str, bytes]]) -> str | None:
    """Makes a case in the current folder and reads it; returns why it is refused, None if not."""
    with tempfile.TemporaryDirectory(dir=".") as name:
        spoil(np.random.default_rng([seed, case]), Path(name), folders[kind])
        try:
            read(kind, Path(name))
        except NeoError as error:
            return str(error)
    return None


def check(seed: int, case: int, kind: str, folders: dict[str, dict[str, bytes]]) -> dict[str, Any]:
    """Returns what came of a case, and what it took; runs in a process that may be lost."""
    _clear_peak()
    before, start = _memory("VmRSS"), time.process_time()
    signal.alarm(300)  # of the clock: something hangs
    try:
        message = refusal(seed, case, kind, folders)
        outcome = "read" if message is None else "refused"
        if message is not None and not (message.strip() and message.isprintable()):
            outcome = f"message: {message!r}"
    except BaseException as error:  # some libraries panic
        where = traceback.extract_tb(error.__traceback__)[-1]
        outcome = f"{type(error).__name__} in {Path(where.filename).name}: {error}"[:500]
    signal.alarm(0)
    seconds, megabytes = time.process_time() - start, (_memory("VmHWM") - before) / 1000
    # The largest file that is made here has 17 MB, most have a few kilobytes.
    outcome = f"{megabytes} MB" if megabytes > 300 else outcome
    outcome = f"{seconds} s" if seconds > 10 else outcome
    outcome = "code ran" if Path(MARK).exists() else outcome
    return {"kind": kind, "outcome": outcome, "s": round(seconds, 3), "mb": round(megabytes, 1)}


def _clear_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _memory(name: str) -> int:
    """Returns a line of Linux's account of this process, in kilobytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def main() -> None:
    """Runs the cases that are missing, in processes of their own, and says what came of all."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    kinds, results = options.kinds.split(","), options.results.absolute()
    results.touch()
    while len(lines := results.read_text().splitlines()) < options.cases:
        if options.work:
            _work(results, len(lines), options.cases, options.seed, kinds)
            return
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
        worker = subprocess.run([sys.executable, *sys.argv, "--work"], env=environment, check=False)
        done = len(results.read_text().splitlines())
        if worker.returncode > 0:
            sys.exit(1)
        if done < options.cases:  # it was lost, over this case
            lost = {"kind": kinds[done % len(kinds)], "outcome": "lost", "s": 0, "mb": 0}
            with results.open("a") as file:
                file.write(json.dumps(lost) + "\n")
    found = list(map(json.loads, lines))
    counts = collections.Counter((one["kind"], one["outcome"]) for one in found)
    wrong = [(i, one) for i, one in enumerate(found) if one["outcome"] not in ("read", "refused")]
    for (kind, outcome), number in sorted(counts.items()):
        print(f"{number:>6} {kind:<10} {outcome[:80]}")
    print(f"at most {max(one['mb'] for one in found)} MB and {max(one['s'] for one in found)} s")
    print(*(f"case {i}: {json.dumps(one)}" for i, one in wrong), sep="\n")
    sys.exit(bool(wrong))


def _work(results: Path, first: int, cases: int, seed: int, kinds: Sequence[str]) -> None:
    with tempfile.TemporaryDirectory() as root, results.open("a", buffering=1) as file:
        os.chdir(root)
        folders = make_folders(Path("whole"))
        for case in range(first, cases):
            found = check(seed, case, kinds[case % len(kinds)], folders)
            file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
