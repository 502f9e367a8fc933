"""Optimised programs of a small GPT-Neo, written as texts that compare two commits.

  python benchmarks/programs.py FOLDER [--only v5e]  writes and hashes each program
  python benchmarks/programs.py --compare BEFORE AFTER  lists the programs that differ

--lowered skips compiling: it writes what compilers get, in seconds. Where that is equal, optimised
programs are equal.

Decoding (a batch of 1 and of 8), prefill and a training step, compiled for one CPU device, for a
mesh of eight, and for TPUs that need not be here. Names, metadata, source locations and ids are
replaced by numbers in the order in which they appear: what is left is what the devices do.
"""

import argparse
import functools
import hashlib
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

from neo_jax.config import ModelConfig  # noqa: E402
from neo_jax.decode import engine  # noqa: E402
from neo_jax.decode.options import SamplingOptions, make_settings  # noqa: E402
from neo_jax.model.declared import param_shapes  # noqa: E402
from neo_jax.model.transformer import Neo  # noqa: E402
from neo_jax.sharding.rules import Sharding, make_sharding  # noqa: E402
from neo_jax.tools.plan import steps  # noqa: E402
from neo_jax.tools.plan.compilation import compile_for  # noqa: E402
from neo_jax.tools.plan.topology import Topology, find_topology  # noqa: E402
from neo_jax.training.config import TrainConfig  # noqa: E402
from neo_jax.training.optimizer import make_optimizer  # noqa: E402
from neo_jax.training.step import abstract_inputs, abstract_state, make_step  # noqa: E402
from neo_jax.transforms.quantize import quantized_shapes  # noqa: E402

CONFIG = ModelConfig(num_layers=4, embed_dim=256, num_heads=4, vocab_size=1000, max_length=256,
                     window_size=64, eos_token_id=0)  # fmt: skip
MESH = "data=2,fsdp=2,model=2"
LENGTH = 128
TOPOLOGIES = {"cpu:1": "", "cpu:8": MESH, "v5e:2x4": MESH}  # and the mesh; none is one device


def training(sharding: Sharding | None, dtype: str) -> jax.stages.Lowered:
    """Returns the training step."""
    if sharding:
        return steps.training_step(_train_config(dtype), sharding).trace().lower()
    config = _train_config(dtype)
    model = Neo(config.model, jnp.dtype(dtype))
    optimizer = make_optimizer(config.optimizer, config.steps)
    batch, frozen = abstract_inputs(config, model)
    step = make_step(model, optimizer, config)
    return step.lower(abstract_state(model, optimizer, config.lora), batch, frozen)


def _train_config(dtype: str) -> TrainConfig:
    return TrainConfig("data", "output", 10, 8, CONFIG, length=LENGTH, dtype=dtype)


def decoding(
    kind: str, sharding: Sharding | None, dtype: str, batch: int, quantize: Any = "none"
) -> jax.stages.Lowered:
    """Returns a step of decoding, or prefill."""
    model = Neo(CONFIG, jnp.dtype(dtype), sharding=sharding)
    if sharding:
        make = steps.decode_step if kind == "decode" else steps.prefill_step
        return make(model, batch, LENGTH, quantize).trace().lower()
    if quantize == "int8":
        params = quantized_shapes(CONFIG, model.dtype)
    else:
        shapes = param_shapes(model)
        params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, model.dtype), shapes)
    rows = jax.ShapeDtypeStruct((batch,), jnp.int32)
    tokens = jax.ShapeDtypeStruct((batch, LENGTH), jnp.int32)
    settings = jax.eval_shape(lambda: make_settings(SamplingOptions(), [0] * batch))
    arguments = (params, tokens, rows, rows, settings)
    if kind == "prefill":
        return engine.prefill.lower(model, LENGTH, *arguments)
    state = jax.eval_shape(functools.partial(engine.prefill, model, LENGTH), *arguments)
    step = engine.run.on(model)
    return step.lower(model, params, state, jax.ShapeDtypeStruct((), jnp.int32))


def programs(only: str) -> Iterator[tuple[str, jax.stages.Lowered, Topology]]:
    """Yields the name of each program, the program, and what to compile it for."""
    for name, mesh in TOPOLOGIES.items():
        topology = find_topology(name)
        sharding = make_sharding(mesh, "fsdp+tensor", topology.devices) if mesh else None
        for dtype in ("float32", "bfloat16"):
            makers = {"train": functools.partial(training, sharding, dtype)}
            for kind, batch, quantize in [("prefill", 8, "none"), ("decode", 8, "none"),
                                          ("decode", 1, "none"), ("decode", 8, "int8"),
                                          ("decode", 1, "int8")]:  # fmt: skip
                split = sharding if batch > 1 or not sharding else None
                if batch == 1 and sharding:  # a single row is not split
                    split = make_sharding(mesh, "batch:,embed:data+fsdp,heads:model,mlp:model,"
                                          "vocab:model", topology.devices)  # fmt: skip
                makers[f"{kind}-{batch}-{quantize}"] = functools.partial(
                    decoding, kind, split, dtype, batch, quantize
                )
            for program, make in makers.items():
                title = f"{name.replace(':', '-')}-{dtype}-{program}"
                if only in title:
                    yield title, make(), topology


def normalized(text: str) -> str:
    """Returns a program's text without what does not change what it does."""
    text = text[text.index("\n\n") :] if "\nFileNames" in text else text.partition("\n")[2]
    text = re.sub(r"(?ms)^(FileNames|FunctionNames|FileLocations|StackFrames)\n.*?\n\n", "", text)
    text = re.sub(r", (metadata|origin|frontend_attributes)=\{(?:[^{}\"]|\"[^\"]*\"|\{[^}]*\})*\}",
                  "", text)  # fmt: skip
    numbers: dict[str, str] = {}
    count = itertools.count()

    def number(found: re.Match) -> str:
        name = found[0]
        numbers[name] = numbers.get(name) or f"{name[0]}{next(count)}"
        return numbers[name]

    return re.sub(r"[%@][\w.\-#]+|channel_id=\d+", number, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--only", default="", help="a part of the names")
    parser.add_argument("--lowered", action="store_true", help="programs as compilers get them")
    parser.add_argument("--compare", nargs=2, type=Path)
    args = parser.parse_args()
    if args.compare:
        before, after = ({p.name: p.read_text() for p in f.iterdir()} for f in args.compare)
        for name in sorted({*before, *after}):
            if before.get(name) != after.get(name):
                print(name, "differs" if name in before and name in after else "is in one only")
        print(f"{len({*before, *after})} programs compared")
        return
    args.folder.mkdir(parents=True, exist_ok=True)
    for name, lowered, topology in programs(args.only):
        text = lowered.as_text() if args.lowered else compile_for(lowered, topology).text
        text = normalized(text)
        (args.folder / f"{name}.txt").write_text(text)
        print(hashlib.sha256(text.encode()).hexdigest()[:16], name, flush=True)


if __name__ == "__main__":
    main()
