"""neo-jax info: what a checkpoint holds."""

import dataclasses
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax.numpy as jnp
from tyro.conf import Positional, arg

from neo_jax.checkpoints import hub, open_model
from neo_jax.checkpoints.adapter_files import adapter_kind, is_adapter
from neo_jax.checkpoints.peft import describe_adapter
from neo_jax.checkpoints.prefix_mapper import KIND, describe_mapper
from neo_jax.checkpoints.prompt_tuning import KINDS, describe_soft_prompt
from neo_jax.cli import UsageError, parse
from neo_jax.cli.options import print_json, print_table
from neo_jax.config import PRESETS, ModelConfig, preset
from neo_jax.devices.memory import bytes_text, tree_bytes
from neo_jax.model.cache import sequence_bytes
from neo_jax.model.tensor_table import tensors
from neo_jax.sharding.rules import Sharding, make_sharding
from neo_jax.text.tokenizer import has_tokenizer, load_tokenizer
from neo_jax.tools.layout_report import describe, lines
from neo_jax.transforms.quantize import quantized_shapes


@dataclasses.dataclass(frozen=True)
class Options:
    """Tells what a checkpoint, an adapter or a preset holds, without reading its weights."""

    # a folder, also gs://, hub name or preset; else the bundled model
    name: Annotated[Positional[str], arg(metavar="[MODEL]")] = ""
    model: str = ""  # the same, as other verbs take it
    revision: str = ""  # of a hub repository
    mesh: str = ""  # show how everything would be laid out on these devices, as in fsdp=4,model=2
    rules: str = ""  # by this strategy: a name such as fsdp+tensor, or embed:fsdp,heads:model
    json: bool = False  # print JSON


def main(args: Sequence[str]) -> None:
    """Runs the verb."""
    options = parse(Options, "info", args)
    if options.name and options.model:
        raise UsageError(f"name one model: {options.name}, or --model {options.model}.")
    name, folder, is_int8 = options.name or options.model, None, False
    if name in PRESETS:
        config = preset(name)
    else:
        folder = hub.resolve(name or None, revision=options.revision or None)
        if is_adapter(folder):
            _print_adapter(folder, options)
            return
        config, is_int8 = _of_a_run(folder) or open_model.open_model(folder)
    fields = _describe(config, folder, name, is_int8)
    sharding = _sharding(options.mesh, options.rules)
    if options.json:
        print_json(fields | ({"sharding": describe(config, sharding)} if sharding else {}))
        return
    placement = ["", *lines(config, sharding)] if sharding else []
    print_table([(name.replace("_", " "), _format(v, name)) for name, v in fields.items()])
    print(*placement, sep="\n", end="\n" if placement else "")


def _print_adapter(folder: Path, options: Options) -> None:
    kinds = {KIND: describe_mapper, **dict.fromkeys(KINDS, describe_soft_prompt)}
    fields = kinds.get(adapter_kind(folder), describe_adapter)(folder)
    if options.mesh or options.rules:
        raise UsageError(
            f"an adapter is laid out as its model is; name that: {fields['base_model']}"
        )
    if options.json:
        print_json(fields)
        return
    print_table([(name.replace("_", " "), _format(v)) for name, v in fields.items()])


def _of_a_run(folder: Path) -> tuple[ModelConfig, bool] | None:
    """Returns the model of a run of neo-jax train, or of one of its checkpoints; never of int8."""
    if (folder / "config.json").is_file():
        return None
    from neo_jax.training.snapshot import find_checkpoint, read_model

    found = find_checkpoint(folder)
    return (read_model(found)[0], False) if found else None


def _sharding(mesh: str, rules: str) -> Sharding | None:
    """Returns a strategy over devices that need not be there, unless a size is left open."""
    sizes = re.findall(r"=([0-9]+)", mesh)
    open_ended = not sizes or "-1" in mesh
    return make_sharding(mesh, rules, None if open_ended else math.prod(map(int, sizes)))


def _describe(config: ModelConfig, folder: Path | None, name: str, is_int8: bool) -> dict[str, Any]:
    local = sum(kind == "local" for kind in config.layer_types)
    fields: dict[str, Any] = {
        "model": str(folder or name),
        "family": config.family.name,
        "parameters": config.num_params,
        **_weight_bytes(config),
        **{field.name: getattr(config, field.name) for field in dataclasses.fields(config)},
        "head": config.head.kind,
        **({"labels": [*config.head.labels]} if config.head.is_classifier else {}),
        "global_layers": config.num_layers - local,
        "local_layers": local,
        **_cache_bytes(config),
    }
    if folder is not None:
        if not (folder / "config.json").is_file():  # a run
            dtypes = ["float32"]
        else:
            dtypes = ["int8"] if is_int8 else open_model.stored_dtypes(folder, config)
        fields["dtype"] = "+".join(dtypes)
        fields["tokenizer"] = None
        if has_tokenizer(folder):
            tokenizer = load_tokenizer(folder)
            fields["tokenizer"] = f"{type(tokenizer).__name__}, {tokenizer.vocab_size} tokens"
    return fields


def _weight_bytes(config: ModelConfig) -> dict[str, int]:
    """Returns what the weights take in each dtype that a model is loaded in."""
    count = sum(math.prod(tensor.shape) for tensor in tensors(config))  # padded, as in memory
    sizes = {name: count * jnp.dtype(name).itemsize for name in _FLOATS}
    sizes["int8"] = tree_bytes(quantized_shapes(config, jnp.bfloat16), tiled=False)
    return {f"weight_bytes_{name}": size for name, size in sizes.items()}


_FLOATS = ("float32", "bfloat16")


def _cache_bytes(config: ModelConfig) -> dict[str, int]:
    """Returns what the cache of one sequence takes a token, and for the whole context."""
    fields = {}
    for dtype in ("float32", "bfloat16", "int8"):
        memory = sequence_bytes(config, config.max_length, jnp.dtype(dtype))
        fields[f"cache_bytes_per_token_{dtype}"] = memory.per_token
        fields[f"cache_bytes_per_token_{dtype}_beyond_window"] = memory.per_token_beyond_window
        fields[f"cache_bytes_{dtype}"] = memory.per_sequence
    return fields


def _format(value: Any, name: str = "") -> str:
    if "_bytes" in name:
        return bytes_text(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple | list):
        return ", ".join(map(str, value))
    return "none" if value is None else str(value)
