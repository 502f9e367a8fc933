"""The forward pass with JAX's sharding in types, next to the same with constraints and to ours.

    python benchmarks/explicit_sharding.py            # writes docs/explicit_sharding.*
    python benchmarks/explicit_sharding.py --said     # adds the errors of another version of JAX

GPT-Neo's forward pass is written out twice, as one would write it for one mesh: `explicit` for axes
of `AxisType.Explicit`, where each array's type says how it is split, and `auto` with constraints
for the compiler. Both are compared with `Neo` in numbers on eight CPU devices, and compiled for
eight v5e chips: what devices send, and lines of code. `MISTAKES` are then made in both: what
explicit axes say of them, without a device, and what the compiler does with them in silence.

Each version of JAX adds what it says; all else is of the version that ran last.
"""

import argparse
import ast
import contextlib
import inspect
import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, reshard
from jax.sharding import PartitionSpec as P
from marked_tables import fill

from neo_jax.config import ModelConfig
from neo_jax.model.declared import logical_axes
from neo_jax.model.transformer import Neo, init_params
from neo_jax.sharding.rules import make_sharding
from neo_jax.tools.plan.compilation import compile_for
from neo_jax.tools.plan.explanation import explain_text
from neo_jax.tools.plan.topology import find_topology

jax.config.update("jax_num_cpu_devices", 8)

ROOT = Path(__file__).parents[1]
DOCUMENT, RESULTS = (ROOT / "docs" / f"explicit_sharding.{kind}" for kind in ("md", "json"))

MESHES = {"fsdp=2,model=4": (2, 4), "fsdp=8": (8, 1)}
AXES = ("fsdp", "model")
FLOAT32 = {"precision": jax.lax.Precision.HIGHEST}


def is_tuple(node: Any) -> bool:
    """Whether a node of a tree is one of logical axes, or a parameter and its PartitionSpec."""
    return isinstance(node, tuple)


def norm(params: Any, x: jax.Array, epsilon: float) -> jax.Array:
    """LayerNorm over the last axis."""
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = jnp.square(centred).mean(axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + epsilon) * params["scale"] + params["bias"]


def attend(q: jax.Array, k: jax.Array, v: jax.Array, window: int | None) -> jax.Array:
    """Softmax attention without scaling, of [B, N, T, H]; needs no word of sharding in either."""
    logits = jnp.einsum("bnth,bnsh->bnts", q, k, **FLOAT32)
    index = jnp.arange(q.shape[2])
    away = index[:, None] - index[None]
    seen = (away >= 0) & (away < (window or len(index)))
    weights = jax.nn.softmax(jnp.where(seen[None, None], logits, jnp.finfo(jnp.float32).min))
    return jnp.einsum("bnts,bnsh->bnth", weights, v, **FLOAT32)


def explicit(config: ModelConfig, params: Any, tokens: jax.Array) -> jax.Array:
    """Returns logits; how parameters are split is in their types."""

    def whole(weight):
        spec = jax.typeof(weight).sharding.spec
        return reshard(weight, P(*(None if axis == "fsdp" else axis for axis in spec)))

    def product(equation, x, weight, to=None):
        return jnp.einsum(equation, x, whole(weight), out_sharding=to, **FLOAT32)

    stream = P("fsdp", None, None)
    params = {**params, "wte": whole(params["wte"]["embedding"])}
    x = params["wte"].at[tokens].get(out_sharding=stream)
    x = x + whole(params["wpe"]["embedding"])[None, : tokens.shape[1]]
    for i in range(config.num_layers):
        layer = params[f"h_{i}"]
        attention, mlp = layer["attn"], layer["mlp"]
        normed = norm(jax.tree.map(whole, layer["ln_1"]), x, config.norm_epsilon)
        q, k, v = (
            product("btd,nhd->bnth", normed, attention[name]["kernel"])
            for name in ("q_proj", "k_proj", "v_proj")
        )
        y = attend(q, k, v, config.window(i))
        x = x + product("bnth,dnh->btd", y, attention["out_proj"]["kernel"], stream)
        x = x + whole(attention["out_proj"]["bias"])
        normed = norm(jax.tree.map(whole, layer["ln_2"]), x, config.norm_epsilon)
        hidden = product("btd,fd->btf", normed, mlp["c_fc"]["kernel"])
        hidden = jax.nn.gelu(hidden + mlp["c_fc"]["bias"], approximate=True)
        x = x + product("btf,df->btd", hidden, mlp["c_proj"]["kernel"], stream)
        x = x + whole(mlp["c_proj"]["bias"])
    x = norm(jax.tree.map(whole, params["ln_f"]), x, config.norm_epsilon)
    return product("btd,vd->btv", x, params["wte"])


def auto(config: ModelConfig, specs: Any, mesh: Mesh, params: Any, tokens: jax.Array) -> jax.Array:
    """Returns logits; the compiler places what no constraint does."""

    def constrain(x, *axes):
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*axes)))

    def whole(weight, spec):
        return constrain(weight, *(None if axis == "fsdp" else axis for axis in spec))

    def product(equation, x, weight, spec):
        return jnp.einsum(equation, x, whole(weight, spec), **FLOAT32)

    def vectors(tree):
        return jax.tree.map(lambda pair: whole(*pair), tree, is_leaf=is_tuple)

    stream, heads = ("fsdp", None, None), ("fsdp", "model", None, None)
    params = jax.tree.map(lambda leaf, spec: (leaf, spec), params, specs)
    table = (whole(*params["wte"]["embedding"]), P("model", None))
    x = table[0][tokens] + whole(*params["wpe"]["embedding"])[None, : tokens.shape[1]]
    for i in range(config.num_layers):
        x = constrain(x, *stream)
        layer = params[f"h_{i}"]
        attention, mlp = layer["attn"], layer["mlp"]
        normed = norm(vectors(layer["ln_1"]), x, config.norm_epsilon)
        q, k, v = (
            constrain(product("btd,nhd->bnth", normed, *attention[name]["kernel"]), *heads)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        y = attend(q, k, v, config.window(i))
        x = x + constrain(product("bnth,dnh->btd", y, *attention["out_proj"]["kernel"]), *stream)
        x = x + whole(*attention["out_proj"]["bias"])
        normed = norm(vectors(layer["ln_2"]), x, config.norm_epsilon)
        hidden = product("btd,fd->btf", normed, *mlp["c_fc"]["kernel"])
        hidden = constrain(hidden, "fsdp", None, "model")
        hidden = jax.nn.gelu(hidden + mlp["c_fc"]["bias"][0], approximate=True)
        x = x + constrain(product("btf,df->btd", hidden, *mlp["c_proj"]["kernel"]), *stream)
        x = x + whole(*mlp["c_proj"]["bias"])
    x = norm(vectors(params["ln_f"]), x, config.norm_epsilon)
    return constrain(product("btd,vd->btv", x, *table), "fsdp", None, "model")


# Small programs with a mistake each: arguments as shape and axes, and the function.
X, HEADS = ((8, 64, 512), ("fsdp", None, None)), ((8, 64, 8, 64), ("fsdp", None, "model", None))
ROW = ((8,), ("fsdp",))
MISTAKES: dict[str, tuple[list[tuple[tuple[int, ...], tuple]], Callable[..., Any]]] = {
    "a sum over heads that nobody places": (
        [HEADS, ((512, 8, 64), (None, "model", None))],
        lambda y, w: jnp.einsum("btnh,dnh->btd", y, w),
    ),
    "two branches in two layouts": (
        [X, ((8, 64, 512), ("model", None, None))],
        lambda x, y: x + y,
    ),
    "a weight that is used without being gathered": (
        [X, ((2048, 512), ("model", "fsdp"))],
        lambda x, w: jnp.einsum("btd,fd->btf", x, w),
    ),
    "a look-up in a table whose rows are split": (
        [((50304, 512), ("model", None)), ((8, 64), ("fsdp", None))],
        lambda table, ids: table[ids.astype(int)],
    ),
    "a vocabulary that does not divide": (
        [X, ((50257, 512), ("model", None))],
        lambda x, w: jnp.einsum("btd,vd->btv", x, w),
    ),
    "an axis of queries, keys and values that is cut": (
        [((8, 64, 1536), ("fsdp", None, "model"))],
        lambda x: jnp.split(x, 3, axis=-1),
    ),
    "heads cut where shards are not": (
        [((8, 64, 1536), ("fsdp", None, "model"))],
        lambda x: x.reshape(8, 64, 3, 8, 64),
    ),
    "a row of a cache that is read by its number": (
        [((8, 8, 2048, 64), ("fsdp", "model", None, None)), ((), ())],
        lambda cache, row: jax.lax.dynamic_slice_in_dim(cache, row.astype(int), 1),
    ),
    "a token of each row that is written by its number": (
        [((8, 8, 2048, 64), ("fsdp", "model", None, None)), ROW],
        lambda cache, slots: cache.at[jnp.arange(8), :, slots.astype(int)].set(0.0),
    ),
    "the likeliest tokens of a split vocabulary": (
        [((8, 50304), ("fsdp", "model"))],
        lambda logits: jax.lax.top_k(logits, 20),
    ),
    "a loop whose state changes its layout": (
        [X, ((512, 512), (None, "model"))],
        lambda x, w: jax.lax.scan(lambda x, _: (jnp.einsum("btd,de->bte", x, w), None), x, None, 4),
    ),
}


def make_mesh(sizes: tuple[int, int], kind: AxisType, devices: Any) -> Mesh:
    """Returns a mesh of two axes of a type."""
    return Mesh(np.array(devices).reshape(sizes), AXES, axis_types=(kind,) * 2)


def typed(mesh: Mesh) -> contextlib.AbstractContextManager:
    """Within, arrays of a mesh with explicit axes have types that say how they are split."""
    is_explicit = AxisType.Explicit in mesh.axis_types
    return jax.set_mesh(mesh) if is_explicit else contextlib.nullcontext()


def placed(mesh: Mesh | AbstractMesh, arguments: Any) -> list[jax.ShapeDtypeStruct]:
    """Returns the arguments of a mistake."""
    return [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*axes)))
        for shape, axes in arguments
    ]


def said(arguments: Any, function: Callable[..., Any]) -> str:
    """Returns what explicit axes say of a mistake, or how they type what comes out."""
    mesh = AbstractMesh((2, 4), AXES, axis_types=(AxisType.Explicit,) * 2)
    try:
        with jax.sharding.use_abstract_mesh(mesh):
            out = jax.jit(function).trace(*placed(mesh, arguments)).jaxpr.out_avals
    except Exception as error:  # whatever it is, it is what a reader of the page would meet
        return f"{type(error).__name__}: {str(error).strip()}"
    return f"no error: {', '.join(map(str, out))}"


def sent(lowered: jax.stages.Lowered, shape: dict[str, int], topology: Any) -> dict[str, int]:
    """Returns bytes that a device sends by kind and mesh axis, as a TPU's compiler has it."""
    found: dict[str, int] = {}
    for row in explain_text(compile_for(lowered, topology).text, shape).moved:
        name = f"{row.kind} {'+'.join(row.axes)}"
        found[name] = found.get(name, 0) + row.wire_bytes
    return dict(sorted(found.items()))


def silent(arguments: Any, function: Callable[..., Any], topology: Any) -> dict[str, int] | str:
    """Returns what the compiler moves where a mistake is made without types."""
    mesh = make_mesh((2, 4), AxisType.Auto, topology.devices)
    try:
        lowered = jax.jit(function).lower(*placed(mesh, arguments))
        return sent(lowered, dict(mesh.shape), topology)
    except ValueError as error:
        return f"{type(error).__name__}: {str(error).strip()}"


class Programs:
    """The three forward passes of a model on a mesh, of the same parameters."""

    def __init__(self, config: ModelConfig, name: str, devices: Any):
        """Lays out parameters as fsdp+tensor does; `name` is of `MESHES`."""
        rules = "fsdp+tensor" if "model" in name else "fsdp"
        sharding = make_sharding(name, rules, devices)
        assert sharding is not None
        self.ours = Neo(config, sharding=sharding, kernel="dense")
        self.shapes = jax.eval_shape(lambda: init_params(self.ours, jax.random.key(0)))
        self.specs = jax.tree.map(
            lambda axes: P(*(next(iter(sharding.mesh_axes(axis)), None) for axis in axes)),
            logical_axes(self.ours),
            is_leaf=is_tuple,
        )
        order = sharding.mesh.devices.reshape(-1)
        kinds = (AxisType.Explicit, AxisType.Auto)
        self.meshes = [make_mesh(MESHES[name], kind, order) for kind in kinds]
        self.config = config

    def functions(self) -> dict[str, tuple[Mesh, Callable[..., Any]]]:
        """Returns each by its name, with the mesh of its arguments."""
        with_types, plain = self.meshes

        def by_neo(params, tokens):
            return self.ours.apply({"params": params}, tokens).logits

        def by_auto(params, tokens):
            return auto(self.config, self.specs, plain, params, tokens)

        return {
            "explicit": (with_types, lambda params, tokens: explicit(self.config, params, tokens)),
            "auto": (plain, by_auto),
            "neo_jax": (self.ours.sharding.mesh, by_neo),
        }

    def places(self, mesh: Mesh) -> tuple[Any, NamedSharding]:
        """Returns where parameters and tokens are."""
        params = jax.tree.map(lambda spec: NamedSharding(mesh, spec), self.specs)
        return params, NamedSharding(mesh, P("fsdp", None))


def largest_difference(name: str) -> dict[str, float]:
    """Returns how far logits are from ours, at most, on eight CPU devices in float32."""
    config = ModelConfig(
        num_layers=4, embed_dim=64, num_heads=4, vocab_size=96, max_length=64, window_size=8
    )
    programs = Programs(config, name, jax.devices())
    params = jax.jit(lambda: init_params(programs.ours.clone(sharding=None), jax.random.key(0)))()
    tokens = np.random.default_rng(0).integers(0, 96, (8, 32), np.int32)
    results = {}
    for kind, (mesh, function) in programs.functions().items():
        arguments = jax.device_put((params, tokens), programs.places(mesh))
        with typed(mesh):
            results[kind] = np.asarray(jax.jit(function)(*arguments))[..., : config.vocab_size]
    ours = results.pop("neo_jax")
    return {kind: float(abs(each - ours).max()) for kind, each in results.items()}


def traffic(name: str, topology: Any) -> dict[str, dict[str, int]]:
    """Returns what each sends: two layers of width 512, a batch of 8 sequences of 256 tokens."""
    config = ModelConfig(
        num_layers=2, embed_dim=512, num_heads=8, vocab_size=2048, max_length=256, window_size=64
    )
    programs, found = Programs(config, name, topology.devices), {}
    for kind, (mesh, function) in programs.functions().items():
        places, rows = programs.places(mesh)
        params = jax.tree.map(
            lambda leaf, place: leaf.update(sharding=place), programs.shapes, places
        )
        tokens = jax.ShapeDtypeStruct((8, 256), jnp.int32, sharding=rows)
        with typed(mesh):
            lowered = jax.jit(function).lower(params, tokens)
        found[kind] = sent(lowered, dict(mesh.shape), topology)
    return found


def code(function: Callable[..., Any]) -> dict[str, int]:
    """Returns lines of a function without its docstring, and those that place something."""
    lines = ast.unparse(ast.parse(textwrap.dedent(inspect.getsource(function)))).splitlines()[2:]
    places = ("constrain(", "whole(", "vectors(", "out_sharding", ", stream)", "P(")
    return {"lines": len(lines), "placing": sum(any(p in line for p in places) for line in lines)}


def megabytes(found: dict[str, int] | str) -> str:
    """Returns bytes that are sent as a cell of a table."""
    if isinstance(found, str):
        return f"{found.partition(':')[0]}, an error too"
    rows = [f"{size / 1e6:.2f} MB {name}" for name, size in found.items() if size >= 5e3]
    return ", ".join(rows) or "nothing"


def tables(fields: dict[str, Any]) -> dict[str, str]:
    """Returns the tables of the page by name, as Markdown."""
    sums = ["| mesh | written | sends, MB | of it |", "| --- | --- | --- | --- |"]
    for mesh, kinds in fields["traffic"].items():
        for kind, found in kinds.items():
            total = sum(found.values()) / 1e6
            sums.append(f"| `{mesh}` | {kind} | {total:.1f} | {megabytes(found)} |")
    wrong = ["| mistake | explicit says | auto moves in silence |", "| --- | --- | --- |"]
    for name, row in fields["mistakes"].items():
        said = list(row["said"].values())[-1]
        kind = "nothing" if said.startswith("no error") else f"`{said.partition(':')[0]}`"
        wrong.append(f"| {name} | {kind} | {megabytes(row['silent'])} |")
    words = []
    for name, row in fields["mistakes"].items():
        for version, said in row["said"].items():
            words.append(f"{name} (jax {version})\n{textwrap.indent(said, '    ')}\n")
    lines = "\n".join(
        f"- `{name}`: {each['lines']} lines, of which {each['placing']} place something."
        for name, each in fields["code"].items()
    )
    return {
        "traffic": "\n".join(sums),
        "code": lines,
        "mistakes": "\n".join(wrong),
        "words": "```\n" + "\n".join(words) + "```",
    }


def write(fields: dict[str, Any]) -> None:
    """Writes the JSON, and the tables into the page behind their marks."""
    RESULTS.write_text(json.dumps(fields, indent=1) + "\n")
    fill(DOCUMENT, tables(fields))


def main() -> None:
    """Measures all, and adds what this version of JAX says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--said", action="store_true", help="only what this version of JAX says")
    only_said = parser.parse_args().said
    fields = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    topology = find_topology("v5e:2x4")
    mistakes = fields.setdefault("mistakes", {})
    for name, (arguments, function) in MISTAKES.items():
        row = mistakes.setdefault(name, {"said": {}})
        row["said"][jax.__version__] = said(arguments, function)
        if not only_said:
            row["silent"] = silent(arguments, function, topology)
        print(name, json.dumps(row), flush=True)
    if not only_said:
        fields["code"] = {each.__name__: code(each) for each in (explicit, auto)}
        fields["difference"] = {name: largest_difference(name) for name in MESHES}
        fields["traffic"] = {name: traffic(name, topology) for name in MESHES}
    write(fields)


if __name__ == "__main__":
    main()
