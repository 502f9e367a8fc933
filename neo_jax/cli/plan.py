"""neo-jax plan: what a step takes of devices that need not be here."""

import contextlib
import dataclasses
import functools
import itertools
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import OmitArgPrefixes, arg

from neo_jax.checkpoints.options import LoadOptions
from neo_jax.cli import UsageError, parse
from neo_jax.cli.options import check_picture, print_json, write_picture
from neo_jax.cli.train import load_config
from neo_jax.config import PRESETS, ModelConfig, preset
from neo_jax.model.scan import Remat
from neo_jax.training.config import TrainConfig

if TYPE_CHECKING:
    from neo_jax.tools.plan.estimate import Choice
    from neo_jax.tools.plan.plan import Plan
    from neo_jax.tools.plan.search import Candidate
    from neo_jax.tools.plan.serving import Served
    from neo_jax.tools.plan.steps import Step
    from neo_jax.tools.plan.topology import Topology

_COMPILED = 3  # ways of a search that fit
_PREFIX_CACHE = 256  # MB, as `serve` has it


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """For which devices, and how to report."""

    topology: str = "v5e:4x4"  # a TPU and its shape in chips, as in 2*v5e:16x16 (slices), or cpu:8
    # rank every mesh that divides, of training with every remat, accumulation, kernel and splitting
    # of sequences too, by arithmetic; compile the best three
    search: bool = False
    memory: float = 0.0  # of a search: GB of a device that a step may take; 0 is all that it has
    arithmetic: bool = False  # compile nothing: what arithmetic says, within seconds
    # which tensor and which line each collective is of, what fills the memory, what would avoid it
    explain: bool = False
    compare: tuple[str, ...] = ()  # in place of a plan: JSON of plans, next to each other
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
    check_picture(options.plan.picture)
    if options.plan.compare:
        _tell_all(options.plan, _compared(options.plan.compare))
        return
    if options.plan.explain and (options.plan.search or options.plan.arithmetic):
        raise UsageError("--explain is of one compiled plan: leave --search and --arithmetic out.")
    _start_jax(options.plan)
    from neo_jax.tools.plan.topology import find_topology

    topology = find_topology(options.plan.topology)
    trained = isinstance(options, ConfigOptions) or options.step == "train"
    if options.plan.arithmetic and not trained:
        raise UsageError("--arithmetic is for --step train.")
    if options.plan.search or options.plan.arithmetic:
        report = _ranked(options, topology, trained)
    elif isinstance(options, StepOptions) and options.step == "serve":
        report = _served(options, topology)
    else:
        report = _planned(options, topology)
    _tell_all(options.plan, report)


_Report = tuple[dict[str, Any], Iterable[str], Callable[[], bytes]]
"""What is told: fields for JSON, lines for people, and what draws a picture."""


def _tell_all(options: PlanOptions, report: _Report) -> None:
    fields, lines, draw = report
    if options.json:
        print_json(fields)
    else:
        print(*lines, sep="\n")
    if options.picture:
        write_picture(options.picture, draw())


def _compared(paths: Sequence[str]) -> _Report:
    from neo_jax.tools.plan import compare

    if len(paths) < 2:
        raise UsageError("--compare takes two files or more, as plan --json writes them.")
    plans = compare.read_plans(paths)
    return compare.describe(plans), compare.lines(plans), functools.partial(compare.draw, plans)


def _explained(plan: "Plan", report: _Report) -> _Report:
    """Adds to the report of a plan what it sends and holds, and from which lines."""
    from neo_jax.tools.plan import explain_report
    from neo_jax.tools.plan.explanation import explain_plan

    fields, lines, _ = report
    found = explain_plan(plan)
    lines = itertools.chain(lines, [""], explain_report.lines(found))
    draw = functools.partial(explain_report.draw, found)
    return {**fields, "explanation": explain_report.describe(found)}, lines, draw


def _planned(options: StepOptions | ConfigOptions, topology: "Topology") -> _Report:
    from neo_jax.tools.plan import report
    from neo_jax.tools.plan.plan import make_plan

    plan = make_plan(_step(options, topology, *_strategy(options)), topology)
    told = report.describe(plan), report.lines(plan), functools.partial(report.draw, plan)
    return _explained(plan, told) if options.plan.explain else told


def _served(options: StepOptions, topology: "Topology") -> _Report:
    from neo_jax.tools.plan import report

    servers = _servers(options, topology)
    plan = servers[-1].plan
    draw = functools.partial(report.draw, plan)
    told = report.describe_servers(servers), report.server_lines(servers), draw
    return _explained(plan, told) if options.plan.explain else told


def _ranked(options: StepOptions | ConfigOptions, topology: "Topology", trained: bool) -> _Report:
    """Ranks ways to run the step, by arithmetic and the best by the compiler too."""
    from neo_jax.sharding.rules import make_sharding
    from neo_jax.tools.plan import ranking
    from neo_jax.tools.plan.search import estimated, search, search_training
    from neo_jax.tools.plan.steps import training_step

    number = 0 if options.plan.arithmetic else _COMPILED
    limit = 1e9 * options.plan.memory
    if not trained:
        build = functools.partial(_step, options, topology)
        found = search(build, topology, number, _tell)
    else:
        config = _train_config(options, len(topology.devices))

        def build_choice(choice: "Choice") -> "Step":
            sharding = make_sharding(choice.mesh, choice.rules, topology.devices)
            assert sharding is not None
            return training_step(choice.applied(config), sharding)

        if options.plan.search:
            found = search_training(config, build_choice, topology, number, limit, _tell)
        else:
            sharding = make_sharding(*_strategy(options), topology.devices)
            assert sharding is not None
            found = [estimated(config, sharding, topology)]
    fields = {"topology": topology.name, **ranking.describe_ranking(found)}
    draw = functools.partial(ranking.draw_ranking, found, topology.name)
    return fields, ranking.ranking_lines(found), draw


def _tell(candidate: "Candidate") -> None:
    how = candidate.choice.options if candidate.choice else f"--mesh {candidate.mesh}"
    print(f"compiling {how} ...", file=sys.stderr)


def _strategy(options: StepOptions | ConfigOptions) -> tuple[str, str]:
    """Returns mesh and rules as they are requested, or fsdp over all devices."""
    chosen = options if isinstance(options, StepOptions) else options.config
    return chosen.mesh or ("" if chosen.rules else "fsdp=-1"), chosen.rules


def _start_jax(options: PlanOptions) -> None:
    """Lets JAX start with as many CPU devices as are requested, and without what else is here."""
    import jax

    if options.explain:  # a kept program of the same operations may be of other lines
        jax.config.update("jax_compilation_cache_include_metadata_in_key", True)
    with contextlib.suppress(RuntimeError):  # it has started: `find_topology` says so
        jax.config.update("jax_platforms", "cpu")
        wanted = re.fullmatch(r"cpu:(\d+)", options.topology)
        if wanted:
            number = max(int(wanted[1]), jax.config.jax_num_cpu_devices)
            jax.config.update("jax_num_cpu_devices", number)


def _servers(options: StepOptions, topology: "Topology") -> Sequence["Served"]:
    """Returns servers of several numbers of sequences, or of the one that is requested."""
    from neo_jax.tools.plan.serving import plan_server, served

    def build(rows: int) -> "Step":
        return _step(dataclasses.replace(options, batch=rows), topology, *_strategy(options))

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
    from neo_jax.model.transformer import Neo
    from neo_jax.sharding.rules import make_sharding
    from neo_jax.tools.plan import steps

    sharding = make_sharding(mesh, rules, topology.devices)
    assert sharding is not None
    if isinstance(options, ConfigOptions) or options.step == "train":
        return steps.training_step(_train_config(options, len(topology.devices)), sharding)
    model = _model(options.model, options.revision)
    batch, length = _batch(options, model, len(topology.devices))
    if length > model.max_length:
        raise UsageError(f"--length {length} exceeds the model's context of {model.max_length}.")
    kinds = {"prefill": steps.prefill_step, "decode": steps.decode_step, "serve": steps.serve_step}
    cached = cached_dtype(options.cache_dtype, topology.devices[0])
    dtype = jnp.dtype(options.dtype)
    neo = Neo(model, dtype, options.kernel, sharding, cache_dtype=cached)
    return kinds[options.step](neo, batch, length, options.quantize)


def _train_config(options: StepOptions | ConfigOptions, num_devices: int) -> TrainConfig:
    """Returns what `train` would be given."""
    if isinstance(options, ConfigOptions):
        return _with_model(options.config)
    if options.quantize != "none" or options.cache_dtype != "auto":
        raise UsageError("--quantize and --cache-dtype are for --step prefill, decode and serve.")
    model = _model(options.model, options.revision)
    batch, length = _batch(options, model, num_devices)
    return TrainConfig(
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


def _batch(options: StepOptions, model: ModelConfig, num_devices: int) -> tuple[int, int]:
    """Returns the sequences of a step and their length, checked."""
    from neo_jax.devices.memory import check_batch

    if min(options.batch, options.length, options.accumulation - 1) < 0:
        raise UsageError("--batch and --length must be 0 or more, --accumulation at least 1.")
    batch = options.batch or num_devices * options.accumulation
    length = options.length or model.max_length
    check_batch(batch, length)
    return batch, length


def _model(name: str, revision: str = "") -> ModelConfig:
    """Returns the model of a name, those of published checkpoints without a look at the hub."""
    published = name.rpartition("/")[2].lower()
    if published in PRESETS:
        return preset(published)
    from neo_jax.checkpoints import hub, open_model

    return open_model.read_config(hub.resolve(name or None, revision=revision or None))


def _with_model(config: TrainConfig) -> TrainConfig:
    """Returns a config with the model of its checkpoint, the head that its data is for, and steps.

    Data that is not here yet is taken for texts.
    """
    if config.pretrained:
        name = "" if config.pretrained == "bundled" else config.pretrained
        config = config.with_model(_model(name))
    from neo_jax.data.labelled import is_labelled
    from neo_jax.files.paths import is_remote
    from neo_jax.training.labelled import open_split, with_labels

    if config.data and not is_remote(config.data) and is_labelled(config.data):
        config = with_labels(config, open_split(config, "train"))
    return config if config.steps else dataclasses.replace(config, steps=1, epochs=0)
