"""Plans of the published sizes by the TPU's own compiler; writes the tables of docs/plans.md.

  python benchmarks/plan_table.py            # compiles what is missing, then writes
  python benchmarks/plan_table.py --only 'gpt-neo-1.3b .*v5e:4x4'

Each row is one command, `neo-jax plan ROW --json`, whose answer is a line of build/plans.jsonl.
What is there already is not compiled again, and what is not there stays in the document as it is. A
row takes a minute or more of a core.
"""

import argparse
import contextlib
import io
import json
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from neo_jax.cli import main as neo_jax
from neo_jax.config import preset

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "plans.md"

Row = dict[str, Any]

# GPT-Neo 13B, as configs/ of EleutherAI/gpt-neo has it, by the fields of another config.
_13B = "gpt-neo-2.7b --model.num-layers 40 --model.embed-dim 5120 --model.mlp-dim 20480 "
_13B += "--model.num-heads 40 --model.head-dim 128"
_SINGLE = "v5e:1x1"
_CHIPS = {_SINGLE: 1, "v5e:2x4": 8, "v5e:4x4": 16, "v4:2x2x1": 4, "v5p:2x2x2": 8, "v6e:4x4": 16}
_ROWS_A_CHIP = {"gpt-neo-125m": 8, "gpt-neo-1.3b": 4, "gpt-neo-2.7b": 4}


def training() -> Iterator[str]:
    """Yields the arguments of every training row."""
    for model, rows in _ROWS_A_CHIP.items():
        for topology, chips in _CHIPS.items():
            mesh, batch = f"fsdp={chips}", rows * chips
            yield f"--model {model} --topology {topology} --mesh {mesh} --batch {batch}"
    for topology, mesh in (("v5e:16x16", "data=16,fsdp=16"), ("v5p:8x8x8", "data=8,fsdp=64")):
        yield f"--model gpt-neo-2.7b --topology {topology} --mesh {mesh} --batch 1024"
    for topology, mesh in (("v5e:16x16", "fsdp=256"), ("v5p:8x8x8", "data=8,fsdp=64")):
        yield f"{_13B} --topology {topology} --mesh {mesh} --batch-size 1024"


def tensor() -> Iterator[str]:
    """Yields training rows whose heads are split too."""
    for model in ("gpt-neo-1.3b", "gpt-neo-2.7b"):
        for topology in ("v5e:4x4", "v5p:2x2x2"):
            chips, rows = _CHIPS[topology], _ROWS_A_CHIP[model]
            yield (
                f"--model {model} --topology {topology} --mesh fsdp={chips // 2},model=2 "
                f"--rules fsdp+tensor --batch {rows * chips}"
            )


def decoding() -> Iterator[str]:
    """Yields a step of decoding for every size, batch and slice."""
    for model in _ROWS_A_CHIP:
        for topology, chips in ((_SINGLE, 1), ("v5e:2x2", 4)):
            for batch in (8, 64):
                yield (
                    f"--model {model} --step decode --topology {topology} --mesh model={chips} "
                    f"--rules decode --batch {batch}"
                )


def tuning() -> Iterator[str]:
    """Yields ways to train what has been trained before on the one chip of a Colab v5e-1."""
    one = f"--topology {_SINGLE} --mesh data=1"
    full, lora = f"finetune-1.3b {one}", f"lora-2.7b {one}"
    small = f"{full} --pretrained EleutherAI/gpt-neo-125m"
    yield f"{small} --batch-size 8 --accumulation 1 --remat none"
    yield f"{small} --batch-size 64 --accumulation 4"
    for optimizer in ("adamw", "lion", "adafactor"):
        yield f"{full} --batch-size 1 --accumulation 1 --optimizer.name {optimizer}"
    yield f"{full} --batch-size 8 --accumulation 1 --optimizer.name adafactor"
    yield f"{full} --batch-size 16 --accumulation 16 --optimizer.name adafactor"
    yield f"{lora} --pretrained EleutherAI/gpt-neo-1.3B --batch-size 16 --accumulation 4"
    yield f"{lora} --batch-size 16 --accumulation 16"
    yield f"{lora} --batch-size 16 --accumulation 4"
    everything = "q_proj k_proj v_proj out_proj c_fc c_proj"
    yield f"{lora} --batch-size 16 --accumulation 16 --lora.targets {everything}"


SECTIONS = {"training": training, "tensor": tensor, "decoding": decoding, "tuning": tuning}


def plan(arguments: str) -> Row:
    """Runs a command; returns what it prints."""
    out, err, start = io.StringIO(), io.StringIO(), time.process_time()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = neo_jax(["plan", *arguments.split(), "--json"])
    if status:
        raise SystemExit(f"neo-jax plan {arguments}: {err.getvalue()}")
    return {**json.loads(out.getvalue()), "cpu_seconds": time.process_time() - start}


def read(path: Path) -> dict[str, Row]:
    """Returns the rows that there are, by their arguments."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {row["arguments"]: row for row in map(json.loads, lines)}


def cells(section: str, row: Row) -> dict[str, str]:
    """Returns what a table tells of a row."""
    memory, roof = row["memory"], row["roofline_ms"] or {}
    limit = f"{memory['total'] / 1e9:.1f} of {memory['capacity'] / 1e9:.1f}"
    told = {"`neo-jax plan ...`": f"`{row['arguments']}`", "fits": "yes" if row["fits"] else "no"}
    if section == "moved":
        sent, need = sum(each["wire_bytes"] for each in row["collectives"]), needed(row)
        told |= {"sends, GB": f"{sent / 1e9:.2f}", "needs, GB": f"{need / 1e9:.2f}"}
        return told | {"ratio": f"{sent / need:.2f}"}
    told["GB a chip"] = limit
    if section == "tuning":
        parts = sum(memory["parts"].values())
        told["of it state"] = f"{parts / 1e9:.1f}"
    if section == "decoding":
        read_once = memory["parts"]["parameters"] + memory["parts"]["cache"]
        told["temporaries of the cache"] = told["traffic"] = told["tokens/s"] = "-"
        if roof:
            told["temporaries of the cache"] = (
                f"{memory['temporaries'] / memory['parts']['cache']:.1%}"
            )
            told["traffic"] = f"{row['memory_traffic'] / read_once:.2f}"
            told["tokens/s"] = f"{row['tokens_per_second']:,.0f}"
    else:
        flops = row["flops"]
        whole = flops["program"] or flops["useful"] + flops["repeated"]
        told["useful FLOPs"] = f"{flops['useful'] / whole:.2f}"
        told["MFU"] = f"{row['mfu']:.0%}" if roof else "-"
    sent = sum(each["wire_bytes"] for each in row["collectives"])
    told["sends, GB"] = f"{sent / 1e9:.3g}" if roof else "-"
    slowest = max((name for name in roof if name != "step"), key=roof.get, default="")
    told["step, ms"] = f"{roof['step']:.4g} ({slowest})" if roof else "-"
    return told | {"CPU s": f"{row['cpu_seconds']:.0f}"}


def needed(row: Row) -> float:
    """Returns the bytes that a chip must send in a training step.

    Parameters in bfloat16 forward and backward, gradients in float32 once; and along model the sums
    of activations in float32, two a layer forward, one of them again, two backward, three of the
    embedding and the head.
    """
    config = preset(re.search(r"--model (\S+)", row["arguments"])[1])
    fsdp, model = row["mesh"]["fsdp"], row["mesh"].get("model", 1)
    weights = (2 * 2 + 4) * row["parameters"] / model * (fsdp - 1) / fsdp
    activations = 4 * row["tokens"] // fsdp * config.embed_dim
    return weights + 2 * (model - 1) / model * activations * (5 * config.num_layers + 3)


def table(section: str, names: list[str], rows: dict[str, Row], old: str) -> str:
    """Returns a section's rows as Markdown; of those that are not there, what the old table has."""
    lines = dict(re.findall(r"^(\| `(.*?)` \|.*)$", line)[0][::-1] for line in old.splitlines()[2:])
    told = {name: cells(section, rows[name]) for name in names if name in rows}
    lines |= {name: _line(row.values()) for name, row in told.items()}
    head = list(next(iter(told.values())))
    body = [lines[name] for name in names if name in lines]
    return "\n".join([_line(head), _line(["---"] * len(head)), *body])


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def write(rows: dict[str, Row]) -> None:
    """Puts the rows into the document's tables, each behind its mark."""
    text = DOCUMENT.read_text()
    both = [*training(), *tensor()]
    moved = [each for each in both if re.search(r"-(1.3b|2.7b) .*(v5e:4x4|v5p:2x2x2)", each)]
    for section, names in {**{k: list(v()) for k, v in SECTIONS.items()}, "moved": moved}.items():
        mark = f"<!-- {section} -->"
        if mark in text and any(name in rows for name in names):
            before, _, after = text.partition(mark)
            old = re.match(r"\n*((?:\|.*\n)*)\n*", after)
            new = table(section, names, rows, old[1])
            text = f"{before}{mark}\n\n{new}\n\n{after[old.end() :]}".rstrip() + "\n"
    DOCUMENT.write_text(text)


def main() -> None:
    """Compiles what is missing, and writes what there is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=ROOT / "build" / "plans.jsonl")
    parser.add_argument("--sections", nargs="*", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--only", default="", help="a regular expression; compiles rows that match")
    args = parser.parse_args()
    args.results.parent.mkdir(parents=True, exist_ok=True)
    there = read(args.results)
    for section in args.sections:
        for arguments in SECTIONS[section]():
            if arguments in there or not re.search(args.only, arguments):
                continue
            row = {"section": section, "arguments": arguments, **plan(arguments)}
            with args.results.open("a") as file:
                print(json.dumps(row), file=file)
            print(f"{row['cpu_seconds']:6.1f} s  fits {row['fits']}  {arguments}", flush=True)
    write(read(args.results))


if __name__ == "__main__":
    main()
