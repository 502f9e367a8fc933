"""neo-jax plan: what a step takes of devices that need not be here."""

import contextlib
import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import OmitArgPrefixes, arg

from neo_jax.checkpoints.options import LoadOptions
from neo_jax.cli import UsageError, parse
from neo_jax.cli.options import print_json, write_picture
from neo_jax.cli.train import load_config
from neo_jax.config import PRESETS, ModelConfig, preset
from neo_jax.files.figure import check_available
from neo_jax.model.scan import Remat
from neo_jax.training.config import TrainConfig

if TYPE_CHECKING:
    from neo_jax.tools.plan.serving import Served
    from neo_jax.tools.plan.steps import Step
    from neo_jax.tools.plan.topology import Topology

_COMPILED = 3  # meshes of a search
_PREFIX_CACHE = 256  # MB, as `serve` has it


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """For which devices, and how to report."""

    topology: str = "v5e:4x4"  # a TPU and its shape in chips, as in 2*v5e:16x16 (slices), or cpu:8
    search: bool = False  # rank every mesh that divides, and compile the best three
    json: bool = False  # print JSON
    picture: str = ""  # draw into this PNG file


@dataclasses.dataclass(frozen=True)
class StepOptions(LoadOptions):
    """Plans a training, prefill or decoding step of a model, or a server."""

    model: str = ""  # a preset such as gpt-neo-2.7b, a folder or a hub name; else the bundled one
    mesh: str = ""  # as in fsdp=4,model=2; else what the rules say, or fsdp=-1
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    # serve: how many sequences a server can write at a time, and how fast
    step: Literal["train", "prefill", "decode", "serve"] = "train"
    # sequences of a step, over all devices; 0 is one for each device, of a server as many as fit
    batch: int = 0
    length: int = 0  # tokens of each, or slots of its cache; 0 is the model's whole context
    remat: Remat = "full"  # of training: computed again in the backward pass: none, products, full
    accumulation: int = 1  # of training: parts of a batch, one after another
    plan: OmitArgPrefixes[PlanOptions] = dataclasses.field(default_factory=PlanOptions)


@dataclasses.dataclass(frozen=True)
class ConfigOptions:
    """Plans the step that `neo-jax train CONFIG` runs; each field of the config is an option."""

    config: Annotated[TrainConfig, arg(name="")]
    plan: OmitArgPrefixes[PlanOptions]


def main(args: Sequence[str]) -> None:
    """Runs the verb."""
    options: StepOptions | ConfigOptions
    if args and not args[0].startswith("-"):
        default = ConfigOptions(load_config(args[0]), PlanOptions())
        options = parse(ConfigOptions, "plan", args[1:], default=default)
    else:
        options = parse(StepOptions, "plan", args, default=StepOptions())
    if options.plan.picture:
        check_available()
    _start_jax(options.plan.topology)
    from neo_jax.tools.plan import report
    from neo_jax.tools.plan.plan import make_plan
    from neo_jax.tools.plan.search import search
    from neo_jax.tools.plan.topology import find_topology

    topology = find_topology(options.plan.topology)
    build = functools.partial(_step, options, topology)
    chosen = options if isinstance(options, StepOptions) else options.config
    if options.plan.search:
        kind = options.step if isinstance(options, StepOptions) else "train"
        found = search(build, topology, kind, _COMPILED)
        fields = {"topology": topology.name, "ranking": report.describe_ranking(found)}
        lines = report.ranking_lines(found)
        draw = functools.partial(report.draw_ranking, found, topology.name)
    elif isinstance(options, StepOptions) and options.step == "serve":
        servers = _servers(options, topology)
        fields, lines = report.describe_servers(servers), report.server_lines(servers)
        draw = functools.partial(report.draw, servers[-1].plan)
    else:
        plan = make_plan(
            build(chosen.mesh or ("" if chosen.rules else "fsdp=-1"), chosen.rules), topology
        )
        fields, lines = report.describe(plan), report.lines(plan)
        draw = functools.partial(report.draw, plan)
    if options.plan.json:
        print_json(fields)
    else:
        print(*lines, sep="\n")
    if options.plan.picture:
        write_picture(options.plan.picture, draw())


def _start_jax(topology: str) -> None:
    """Lets JAX start with as many CPU devices as are requested, and without what else is here."""
    import jax

    with contextlib.suppress(RuntimeError):  # it has started: `find_topology` says so
        jax.config.update("jax_platforms", "cpu")
        wanted = re.fullmatch(r"cpu:(\d+)", topology)
        if wanted:
            number = max(int(wanted[1]), jax.config.jax_num_cpu_devices)
            jax.config.update("jax_num_cpu_devices", number)


def _servers(options: StepOptions, topology: "Topology") -> Sequence["Served"]:
    """Returns servers of several numbers of sequences, or of the one that is requested."""
    from neo_jax.tools.plan.serving import plan_server, served

    mesh = options.mesh or ("" if options.rules else "fsdp=-1")

    def build(rows: int) -> "Step":
        return _step(dataclasses.replace(options, batch=rows), topology, mesh, options.rules)

    prefix_bytes = 10**6 * _PREFIX_CACHE
    if options.batch:
        return [served(build(options.batch), topology, prefix_bytes)]
    return plan_server(build, topology, prefix_bytes)


def _step(
    options: StepOptions | ConfigOptions, topology: "Topology", mesh: str, rules: str
) -> "Step":
    """Returns the step that is requested, on a mesh."""
    import jax.numpy as jnp

    from neo_jax.checkpoints.load import cached_dtype
    from neo_jax.devices.memory import check_batch
    from neo_jax.model.transformer import Neo
    from neo_jax.sharding.rules import make_sharding
    from neo_jax.tools.plan import steps

    sharding = make_sharding(mesh, rules, topology.devices)
    assert sharding is not None
    if isinstance(options, ConfigOptions):
        return steps.training_step(_with_model(options.config), sharding)
    model = _model(options.model, options.revision)
    if min(options.batch, options.length, options.accumulation - 1) < 0:
        raise UsageError("--batch and --length must be 0 or more, --accumulation at least 1.")
    batch = options.batch or len(topology.devices) * options.accumulation
    length = options.length or model.max_length
    check_batch(batch, length)
    if options.step == "train":
        if options.quantize != "none" or options.cache_dtype != "auto":
            raise UsageError(
                "--quantize and --cache-dtype are for --step prefill, decode and serve."
            )
        config = TrainConfig(
            data="",
            output="",
            steps=1,
            batch_size=batch,
            model=model,
            length=length,
            dtype=options.dtype,
            kernel=options.kernel,
            remat=options.remat,
            accumulation=options.accumulation,
        )
        return steps.training_step(config, sharding)
    if length > model.max_length:
        raise UsageError(f"--length {length} exceeds the model's context of {model.max_length}.")
    kinds = {"prefill": steps.prefill_step, "decode": steps.decode_step, "serve": steps.serve_step}
    cached = cached_dtype(options.cache_dtype, topology.devices[0])
    dtype = jnp.dtype(options.dtype)
    neo = Neo(model, dtype, options.kernel, sharding, cache_dtype=cached)
    return kinds[options.step](neo, batch, length, options.quantize)


def _model(name: str, revision: str = "") -> ModelConfig:
    """Returns the model of a name, those of published checkpoints without a look at the hub."""
    published = name.rpartition("/")[2].lower()
    if published in PRESETS:
        return preset(published)
    from neo_jax.checkpoints import hub, open_model

    return open_model.read_config(hub.resolve(name or None, revision=revision or None))


def _with_model(config: TrainConfig) -> TrainConfig:
    """Returns a config that says its model, also where that is a checkpoint's."""
    if not config.pretrained:
        return config
    return config.with_model(_model("" if config.pretrained == "bundled" else config.pretrained))
