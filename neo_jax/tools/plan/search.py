"""How to run a step best: every choice that can be, ranked on paper, the best few compiled.

Of training the choices are meshes, what is computed again, accumulation, the blocks of attention
and sequences split over devices; of the other steps meshes and rules.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence

from neo_jax.axes import BATCH, EMBED, LOGICAL_AXES
from neo_jax.devices.chips import OLD_TPUS
from neo_jax.errors import NeoError
from neo_jax.ops.attention import Kernel
from neo_jax.sharding.rules import Sharding, make_sharding
from neo_jax.tools.plan.collectives import Traffic
from neo_jax.tools.plan.estimate import (
    Choice,
    choice_of,
    choices,
    estimated_memory,
    estimated_phases,
    obstacle,
)
from neo_jax.tools.plan.hlo_cost import Work
from neo_jax.tools.plan.plan import Plan, capacity, make_plan
from neo_jax.tools.plan.predict import Phase, Prediction, predict
from neo_jax.tools.plan.steps import Step
from neo_jax.tools.plan.topology import Topology
from neo_jax.training.config import TrainConfig

Build = Callable[[str, str], Step]
"""Builds a step for a mesh and rules, or raises `NeoError` where these cannot split it."""

BuildChoice = Callable[[Choice], Step]
"""Builds a training step."""

KERNELS: tuple[Kernel, ...] = ("auto", "splash-256", "splash-1024")
"""Attention's kernels of a TPU, by the side of their blocks: 512, 256, 1024."""

_MORE = 3  # times as many are compiled at most, where what was compiled does not fit


Watch = Callable[["Candidate"], None]
"""Is told what is compiled next."""


def _watch_nothing(candidate: "Candidate") -> None:
    pass


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to run a step, what it takes on paper, and a plan where one was made."""

    mesh: str
    rules: str
    memory: float  # bytes of a device
    times: Prediction
    limit: float  # of memory; NaN where it is not known
    sent: float = 0.0  # bytes that a device sends in a step
    choice: Choice | None = None  # of training
    plan: Plan | None = None

    @property
    def seconds(self) -> float:
        """Of a step; NaN where the chip is not known."""
        return self.times.step

    @property
    def fits(self) -> bool:
        """Whether it keeps to the limit; the compiler's word counts where there is one."""
        refused = self.plan is not None and not self.plan.fits
        return not refused and not self.memory > self.limit

    @property
    def best(self) -> "Candidate":
        """With the figures of the compiled program in the place of estimates, if there is one."""
        plan = self.plan
        if plan is None:
            return self
        nothing = Prediction(math.inf, 0, 0, 0, 0)
        sent = float(sum(row.wire_bytes for row in plan.traffic))
        return dataclasses.replace(
            self, memory=plan.memory.total, times=plan.prediction or nothing, sent=sent
        )

    @property
    def order(self) -> tuple[bool, float]:
        """What to rank by: what fits comes first, then by time, or if unknown by what is sent."""
        best = self.best
        return not best.fits, best.sent if math.isnan(best.seconds) else best.seconds


def search_training(
    config: TrainConfig,
    build: BuildChoice,
    topology: Topology,
    num_compiled: int,
    limit: float = 0,
    watch: Watch = _watch_nothing,
) -> list[Candidate]:
    """Ranks every way to run a training step; compiled ones come first.

    `limit` is of the memory of a device in bytes; 0 is all that it has. A choice that the compiler
    refuses, or whose step takes more than the limit, gives its place to the next.

    Raises:
      NeoError: nothing can split the step.
    """
    most = min(limit or math.inf, capacity(topology))
    has_splash = not topology.is_here and topology.devices[0].device_kind not in OLD_TPUS
    free = config.kernel == "auto" and config.dtype == "bfloat16" and has_splash
    kernels = KERNELS if free else (config.kernel,)
    found = [
        _on_paper(config, choice, topology, most)
        for choice in choices(config, len(topology.devices), kernels)
    ]
    if not found:
        some = Choice(fsdp=len(topology.devices))
        raise NeoError(
            f"no mesh of {len(topology.devices)} devices splits the step ({some.mesh}: "
            f"{obstacle(config, some)}); choose another batch."
        )
    found.sort(key=lambda each: each.order)
    return _compiled(found, lambda each: build(_choice(each)), topology, num_compiled, watch)


def estimated(config: TrainConfig, sharding: Sharding, topology: Topology) -> Candidate:
    """Returns a training step on a mesh as arithmetic has it.

    Raises:
      NeoError: rules that arithmetic does not know, or a mesh that cannot split the step.
    """
    choice = choice_of(config, sharding.mesh.shape)
    known = make_sharding(choice.mesh, choice.rules, topology.devices)
    lacks = {axis: size for axis, size in sharding.mesh.shape.items() if size > 1}
    if known is None or any(
        set(sharding.mesh_axes(axis)) & lacks.keys() != set(known.mesh_axes(axis)) & lacks.keys()
        for axis in LOGICAL_AXES
    ):
        raise NeoError(
            f"arithmetic knows the rules of {choice.rules} alone on this mesh; leave out "
            "--arithmetic, or give these rules."
        )
    reason = obstacle(config, choice)
    if reason:
        raise NeoError(f"mesh {choice.mesh} cannot split the step: {reason}; choose another.")
    return _on_paper(config, choice, topology, capacity(topology))


def _on_paper(config: TrainConfig, choice: Choice, topology: Topology, limit: float) -> Candidate:
    made = estimated_phases(config, choice)
    return Candidate(
        choice.mesh, choice.rules, estimated_memory(config, choice),
        predict(topology.chip, made), limit, _sent_by(made), choice,
    )  # fmt: skip


def _choice(candidate: Candidate) -> Choice:
    assert candidate.choice is not None
    return candidate.choice


def _sent_by(phases: Sequence[Phase]) -> float:
    return float(sum(row.wire_bytes for phase in phases for row in phase.traffic))


def search(
    build: Build, topology: Topology, num_compiled: int, watch: Watch = _watch_nothing
) -> list[Candidate]:
    """Ranks every mesh and rules for a step that is not of training; compiled ones come first.

    Raises:
      NeoError: no mesh splits the step; the message is that of the last that was tried.
    """
    found = []
    devices = len(topology.devices)
    error = NeoError(f"no mesh of data, fsdp and model has {devices} devices.")
    divisors = [size for size in range(1, devices + 1) if devices % size == 0]
    for data, model, names in itertools.product(divisors, divisors, ("fsdp+tensor", "decode")):
        if devices % (data * model) == 0:
            mesh = Choice(data, devices // (data * model), model).mesh
            try:
                found.append(_estimate(build(mesh, names), mesh, names, topology))
            except NeoError as reason:
                error = reason
    if not found:
        raise error
    found.sort(key=lambda each: each.order)
    return _compiled(
        found, lambda each: build(each.mesh, each.rules), topology, num_compiled, watch
    )


def _compiled(
    found: list[Candidate],
    build: Callable[[Candidate], Step],
    topology: Topology,
    number: int,
    watch: Watch,
) -> list[Candidate]:
    """Compiles the first, until so many fit; returns them in their new order, before the others."""
    made: list[Candidate] = []
    for tried, each in enumerate(found):
        enough = sum(one.best.fits for one in made) >= number
        if enough or tried >= _MORE * number:
            break
        try:
            step = build(each)
        except NeoError:  # arithmetic let through what the strategy cannot split
            continue
        watch(each)
        made.append(dataclasses.replace(each, plan=make_plan(step, topology)))
    names = {(each.mesh, each.rules, each.choice) for each in made}
    others = [each for each in found if (each.mesh, each.rules, each.choice) not in names]
    return [*sorted(made, key=lambda each: each.order), *others]


def pareto(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Returns those than which none is both faster and smaller on paper, the fastest first."""
    front: list[Candidate] = []
    known = [each for each in candidates if math.isfinite(each.seconds)]
    for each in sorted(known, key=lambda each: (each.seconds, each.memory)):
        if not front or each.memory < front[-1].memory:
            front.append(each)
    return front


def by_mesh(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Returns of each mesh the first, and all that were compiled."""
    seen: set[tuple[str, str]] = set()
    first = []
    for each in candidates:
        if each.plan or (each.mesh, each.rules) not in seen:
            first.append(each)
        seen.add((each.mesh, each.rules))
    return first


def _estimate(step: Step, mesh: str, rules: str, topology: Topology) -> Candidate:
    if step.rows % step.sharding.num_shards(BATCH):
        raise NeoError(f"{step.rows} sequences do not divide over mesh {mesh}; choose others.")
    held = sum(step.part_bytes(tiled=not topology.is_here).values())
    flops = 2 * step.model.config.num_params * step.tokens / step.mesh.size
    sent = _sent(step)
    times = 2 * step.model.config.num_layers
    traffic = Traffic("all-reduce", ("model",), times if sent else 0, round(sent))
    phase = Phase([(1, Work(flops, held))], [traffic])
    memory = capacity(topology)
    return Candidate(mesh, rules, held, predict(topology.chip, [phase]), memory, sent)


def _sent(step: Step) -> float:
    """Returns the bytes that a device sends: sums of activations after each branch."""
    config, shape = step.model.config, step.mesh.shape
    new_tokens = 1 if step.kind in ("decode", "serve") else step.length
    rows = step.tokens / new_tokens / step.sharding.num_shards(BATCH)
    branch = 4 * rows * new_tokens * config.embed_dim  # float32, what a device has of it
    axes = ["model", *(["fsdp"] if step.sharding.mesh_axes(EMBED) else [])]
    each = 2 * sum((shape[axis] - 1) / shape[axis] for axis in axes) * branch
    return 2 * config.num_layers * each  # two branches of a layer
