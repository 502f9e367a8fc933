"""A training step of our models on paper: whether a choice of how to run it can be, and what then.

Memory is counted in what stays (parameters, optimizer, gradients), what the backward pass keeps of
each layer, and what one layer and a block of logits take.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import get_args

from neo_jax.model.scan import Remat
from neo_jax.ops.attention import Kernel
from neo_jax.ops.tuning import LOSS_TOKENS
from neo_jax.tools.plan.arithmetic import Setup, Shape, again, phases, shape_of
from neo_jax.tools.plan.kernels import block_side
from neo_jax.tools.plan.predict import Phase
from neo_jax.training.config import TrainConfig

_OPTIMIZER_BYTES = {"adamw": 8, "lion": 4, "adafactor": 0}  # of float32 moments of a parameter
_FLOAT = 4  # bytes of float32
_SHORT = 2  # and of bfloat16


@dataclasses.dataclass(frozen=True)
class Choice:
    """How a step is run: what a search decides. Its fields are options of `plan` and `train`."""

    data: int = 1
    fsdp: int = 1
    model: int = 1
    context: int = 1
    remat: Remat = "full"
    accumulation: int = 1
    kernel: Kernel = "auto"

    @property
    def mesh(self) -> str:
        """As --mesh takes it."""
        sizes = {"data": self.data, "fsdp": self.fsdp, "model": self.model}
        sizes |= {"context": self.context} if self.context > 1 else {}
        return ",".join(f"{name}={size}" for name, size in sizes.items())

    @property
    def rules(self) -> str:
        """As --rules takes it."""
        return "context" if self.context > 1 else "fsdp+tensor"

    @property
    def options(self) -> str:
        """All of it, as the command line takes it."""
        return (
            f"--mesh {self.mesh} --rules {self.rules} --remat {self.remat} "
            f"--accumulation {self.accumulation} --kernel {self.kernel}"
        )

    def applied(self, config: TrainConfig) -> TrainConfig:
        """Returns a config that runs so."""
        return dataclasses.replace(
            config, mesh=self.mesh, rules=self.rules, remat=self.remat,
            accumulation=self.accumulation, kernel=self.kernel,
        )  # fmt: skip


def choice_of(config: TrainConfig, mesh: Mapping[str, int]) -> Choice:
    """Returns what a config and the sizes of a mesh say."""
    return Choice(
        **mesh, remat=config.remat, accumulation=config.accumulation, kernel=config.kernel
    )


def obstacle(config: TrainConfig, choice: Choice) -> str:
    """Returns why a choice cannot split a step, "" where it can."""
    model, rows = config.model, choice.data * choice.fsdp * choice.accumulation
    for name, size, parts in (
        ("sequences", config.batch_size, rows),
        ("heads", model.num_heads, choice.model),
        ("mlp", model.mlp_dim, choice.model),
        ("vocab", model.padded_vocab_size, choice.model),
        ("embed", model.embed_dim, choice.fsdp * choice.context),
        ("tokens of a sequence", config.sequence_length, choice.context),
    ):
        if size % parts:
            return f"{size} {name} do not divide over {parts}"
    return ""


def setup_of(config: TrainConfig, choice: Choice) -> Setup:
    """Returns what a device does."""
    shape = shape_of(config.model)
    rows = config.batch_size // choice.accumulation // (choice.data * choice.fsdp)
    return Setup(
        rows, config.sequence_length, choice.data, choice.fsdp, choice.model, choice.context,
        accumulation=choice.accumulation, again=again(choice.remat, shape),
        side=block_side(choice.kernel),
        frozen=config.is_frozen,
    )  # fmt: skip


def estimated_phases(config: TrainConfig, choice: Choice) -> list[Phase]:
    """Returns what a device does in a step."""
    return phases(shape_of(config.model), setup_of(config, choice))


def estimated_memory(config: TrainConfig, choice: Choice) -> float:
    """Returns the most bytes of a device at a time."""
    shape, setup = shape_of(config.model), setup_of(config, choice)
    split = choice.fsdp * choice.context * choice.model
    held = shape.params / split
    if config.is_frozen:
        state = held * _SHORT
    else:
        copies = 2 if choice.accumulation > 1 else 1  # of gradients
        state = held * (_FLOAT * (1 + copies) + _OPTIMIZER_BYTES[config.optimizer.name])
    tokens = setup.rows * setup.length / setup.context
    kept = shape.num_layers * tokens * _kept(shape, choice)
    logits = _FLOAT * min(tokens, LOSS_TOKENS) * shape.vocab_size / choice.model * shape.writes
    gathered = 2 * _SHORT * shape.layer_params / choice.model  # of this layer, and of the next
    table = (_SHORT + _FLOAT) * shape.vocab_size * shape.embed_dim / choice.model
    return state + kept + tokens * _working(shape, choice) + logits + gathered + table


def _widths(shape: Shape, choice: Choice) -> tuple[float, float, float]:
    split = choice.model
    return shape.embed_dim, (shape.width + 2 * shape.kv_width) / split, shape.mlp_dim / split


def _kept(shape: Shape, choice: Choice) -> float:
    """Returns the bytes of a token that a layer keeps for the backward pass."""
    embed, qkv, mlp = _widths(shape, choice)
    kept = _FLOAT * embed  # what goes into the layer
    if choice.remat != "full":
        kept += _SHORT * (qkv + mlp) + _FLOAT * 2 * embed  # of products, two of them summed up
    if choice.remat == "none":
        kept += _SHORT * (shape.width / choice.model + 2 * embed + 2 * mlp) + _FLOAT * 2 * embed
    return kept


def _working(shape: Shape, choice: Choice) -> float:
    """Returns the bytes of a token while a layer runs backward."""
    embed, qkv, mlp = _widths(shape, choice)
    return _SHORT * (2 * qkv + 4 * mlp) + _FLOAT * 4 * embed


def choices(
    config: TrainConfig, num_devices: int, kernels: Sequence[Kernel] = ("auto",)
) -> list[Choice]:
    """Returns every choice that can split a step over so many devices."""
    found = []
    for mesh in _meshes(num_devices):
        for remat in get_args(Remat):
            for parts in _parts(config, mesh):
                for kernel in kernels if mesh.context == 1 else kernels[:1]:
                    found.append(
                        dataclasses.replace(mesh, remat=remat, accumulation=parts, kernel=kernel)
                    )
    return [choice for choice in found if not obstacle(config, choice)]


def _parts(config: TrainConfig, mesh: Choice) -> list[int]:
    """Returns the powers of two that divide a device's sequences."""
    rows = config.batch_size // (mesh.data * mesh.fsdp)
    return [2**n for n in range(rows.bit_length()) if rows % 2**n == 0] if rows else []


def _meshes(num_devices: int) -> list[Choice]:
    divisors = [size for size in range(1, num_devices + 1) if num_devices % size == 0]
    return [
        Choice(data, num_devices // (data * model * context), model, context)
        for data in divisors
        for model in divisors
        for context in divisors
        if num_devices % (data * model * context) == 0
    ]
