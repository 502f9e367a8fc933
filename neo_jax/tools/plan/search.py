"""Which mesh is best: every one that divides, ranked by arithmetic, the best few compiled."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator

from neo_jax.axes import BATCH, EMBED
from neo_jax.errors import NeoError
from neo_jax.tools.plan.plan import Plan, Roofline, capacity, make_plan
from neo_jax.tools.plan.steps import Step
from neo_jax.tools.plan.topology import Topology

Build = Callable[[str, str], Step]
"""Builds a step for a mesh and rules, or raises `NeoError` where these cannot split it."""

# How often weights are multiplied: forward, in training again, and backward twice.
_PASSES = {"train": 4, "prefill": 1, "decode": 1, "serve": 1}


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A mesh and rules, what they would take by arithmetic, and a plan where one was made."""

    mesh: str
    rules: str
    memory: float  # bytes of a device
    sent: float  # bytes that a device sends in a step
    seconds: float  # of a step; NaN where the chip is not known
    fits: bool
    plan: Plan | None = None

    @property
    def best(self) -> "Candidate":
        """With the figures of the compiled program in the place of estimates, if there is one."""
        plan = self.plan
        if plan is None:
            return self
        seconds = plan.roofline.step if plan.roofline else math.inf
        sent = sum(row.wire_bytes for row in plan.traffic)
        return Candidate(self.mesh, self.rules, plan.memory.total, sent, seconds, plan.fits, plan)

    @property
    def order(self) -> tuple[bool, float]:
        """What to rank by: what fits comes first, then by time, or if unknown by what is sent."""
        best = self.best
        return not best.fits, best.sent if math.isnan(best.seconds) else best.seconds


def search(build: Build, topology: Topology, kind: str, num_compiled: int) -> list[Candidate]:
    """Ranks every mesh of a topology; the best are compiled and come first.

    The kind of step decides the rules that are tried.

    Raises:
      NeoError: no mesh splits the step; the message is that of the last that was tried.
    """
    found = []
    error = NeoError(f"no mesh of data, fsdp and model has {len(topology.devices)} devices.")
    rules = ("fsdp+tensor",) if kind == "train" else ("fsdp+tensor", "decode")
    for mesh, names in itertools.product(_meshes(len(topology.devices)), rules):
        try:
            found.append(_estimate(build, mesh, names, topology))
        except NeoError as reason:
            error = reason
    if not found:
        raise error
    found.sort(key=lambda each: each.order)
    best = [
        dataclasses.replace(each, plan=make_plan(build(each.mesh, each.rules), topology))
        for each in found[:num_compiled]
    ]
    return [*sorted(best, key=lambda each: each.order), *found[num_compiled:]]


def _meshes(num_devices: int) -> Iterator[str]:
    """Yields every mesh of data, fsdp and model that has so many devices."""
    divisors = [size for size in range(1, num_devices + 1) if num_devices % size == 0]
    for data, model in itertools.product(divisors, divisors):
        if num_devices % (data * model) == 0:
            yield f"data={data},fsdp={num_devices // (data * model)},model={model}"


def _estimate(build: Build, mesh: str, rules: str, topology: Topology) -> Candidate:
    step = build(mesh, rules)
    if step.rows % step.sharding.num_shards(BATCH):
        raise NeoError(f"{step.rows} sequences do not divide over mesh {mesh}; choose others.")
    held = step.part_bytes(tiled=not topology.is_here)
    config, chip = step.model.config, topology.chip
    # A sequence's activations of one layer's input, float32.
    layer = 4 * step.rows // step.sharding.num_shards(BATCH) * step.length * config.embed_dim
    memory = float(sum(held.values()))
    if step.kind == "train":
        memory += held["parameters"] + layer * config.num_layers  # gradients; what is saved
    products = 2 * _PASSES[step.kind] * config.num_params * step.tokens / step.mesh.size
    moved = sum(held.values()) * (2 if step.kind == "train" else 1)  # the state is read and written
    sent = _sent(step)
    least = Roofline(
        products / chip.peak_flops,
        moved / chip.memory_bandwidth,
        sent / (2 * chip.link_bandwidth),
        network=0.0,
    )
    return Candidate(mesh, rules, memory, sent, least.step, not memory > capacity(topology))


def _sent(step: Step) -> float:
    """Returns the bytes that a device sends.

    Training gathers weights in bfloat16 forward and backward and scatters gradients in float32
    along fsdp, sums these along data, and sums activations after each branch along model.
    """
    config, shape, training = step.model.config, step.mesh.shape, step.kind == "train"
    data, fsdp, model = (shape[name] for name in ("data", "fsdp", "model"))
    weights = config.num_params / model
    sent = 0.0
    if training:
        sent += (2 * 2 + 4) * weights * (fsdp - 1) / fsdp
        sent += 2 * 4 * weights / fsdp * (data - 1) / data
    new_tokens = 1 if step.kind in ("decode", "serve") else step.length
    rows = step.tokens / new_tokens / step.sharding.num_shards(BATCH)
    branch = 4 * rows * new_tokens * config.embed_dim  # float32, what a device has of it
    sums = _PASSES[step.kind] * (2 if training else 1) * config.num_layers
    sent += sums * 2 * branch * (model - 1) / model
    if not training and step.sharding.mesh_axes(EMBED):
        sent += sums * 2 * branch * (fsdp - 1) / fsdp
    return sent
