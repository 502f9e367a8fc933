"""What a training run is. A file in `configs/` holds one, called `config`."""

import dataclasses
from typing import Literal

from neo_jax.config import ModelConfig
from neo_jax.devices.memory import check_batch
from neo_jax.errors import NeoError, check_numbers
from neo_jax.model.scan import Remat
from neo_jax.ops.attention import Kernel
from neo_jax.transforms.lora import LoraConfig


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its schedule, the defaults as GPT-Neo was trained."""

    name: Literal["adamw", "adafactor", "lion"] = "adamw"
    learning_rate: float = 6e-4  # at the end of the linear warm-up
    schedule: Literal["cosine", "linear", "constant"] = "cosine"  # what follows the warm-up
    warmup_steps: int = 3000
    final_fraction: float = 0.1  # of the learning rate, at the last step
    beta1: float = 0.9  # not of Adafactor
    beta2: float = 0.95  # not of Adafactor
    epsilon: float = 1e-8  # of AdamW
    weight_decay: float = 0.0  # on kernels and embeddings, not on biases and LayerNorms
    clip_norm: float = 1.0  # of the whole gradient; 0 is off

    def __post_init__(self) -> None:
        check_numbers(self)
        for name, value in dataclasses.asdict(self).items():
            if name in ("beta1", "beta2") and not 0 <= value < 1:
                raise NeoError(f"optimizer.{name} must be at least 0 and below 1, not {value}.")
            if name == "epsilon" and not value > 0:
                raise NeoError(f"optimizer.epsilon must be above 0, not {value}.")
            if not isinstance(value, str) and not value >= 0:
                raise NeoError(f"optimizer.{name} must be 0 or more, not {value}.")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run. The same config gives the same batches and the same model."""

    # A folder that `neo-jax prepare` wrote, also gs://; several with their shares of the sequences
    # as in "pile=0.7,books=0.3".
    data: str
    output: str  # the run's folder, also gs://: checkpoints, metrics.jsonl, at the end model/
    steps: int
    batch_size: int  # sequences of a step, over all devices
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    # A checkpoint to start from, which gives the model: a folder, a hub name or "bundled".
    pretrained: str = ""
    # Rows added to the vocabulary of `pretrained`, each the mean of those that are there.
    new_tokens: int = 0
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    length: int = 0  # tokens of a sequence; 0 is the model's whole context
    across_documents: bool = True  # whether tokens see the documents before theirs in a sequence
    seed: int = 0  # of the initial weights and of the order of the data
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of products; weights stay float32
    kernel: Kernel = "auto"  # attention
    remat: Remat = "none"  # computed again in the backward pass, to save memory: products, full
    unroll: int = 0  # repeats of attention_types that the program writes out; 0 chooses
    accumulation: int = 1  # parts of a batch, computed one after another
    dropout: float = 0.0  # of the embedding and of each branch's output
    z_loss: float = 1e-4  # weight of log(sum(exp(logits)))^2; the reported loss is without it
    max_skipped: int = 10  # steps in a row without finite gradients, after which a run stops
    mesh: str = ""  # as in "data=2,fsdp=-1"; empty is one device, unless the rules have a name
    rules: str = ""  # a strategy such as "fsdp+tensor", or as in "embed:fsdp,heads:model"
    log_every: int = 10  # steps between lines of metrics.jsonl
    eval_every: int = 500  # steps between evaluations on the held-out split; 0 is never
    save_every: int = 500  # steps between checkpoints
    keep: int = 2  # checkpoints kept, the newest ones; the best by evaluation stays too
    # What a run tells beside metrics.jsonl, and what else stays of it:
    keep_every: int = 0  # checkpoints of multiples of so many steps stay for good; 0 is none
    prompts: tuple[str, ...] = ()  # continued at each evaluation, into samples.jsonl
    sample_tokens: int = 64  # of each continuation
    tensorboard: bool = False  # event files in output/tensorboard
    wandb: str = ""  # a project of Weights & Biases; empty is none
    profile: int = 0  # steps to trace into output/profile, soon after the start

    def __post_init__(self) -> None:
        for name in (
            "steps", "batch_size", "accumulation", "max_skipped", "log_every", "save_every", "keep",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise NeoError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if self.batch_size % self.accumulation:
            raise NeoError(
                f"batch_size {self.batch_size} does not divide into accumulation "
                f"{self.accumulation}; make it a multiple."
            )
        if not 0 <= self.dropout < 1:
            raise NeoError(f"dropout must be at least 0 and below 1, not {self.dropout}.")
        for name in ("eval_every", "keep_every", "new_tokens", "profile", "unroll"):
            if getattr(self, name) < 0:
                raise NeoError(f"{name} must be 0 or more, not {getattr(self, name)}.")
        if not self.pretrained:  # else the model is known when the checkpoint is
            self.check_length()

    def check_length(self) -> None:
        """Checks that sequences fit the model.

        Raises:
          NeoError: they are longer than its context, or their tokens too many.
        """
        if self.sequence_length > self.model.max_length:
            raise NeoError(
                f"length {self.length} exceeds the model's context of {self.model.max_length}; "
                "shorten it, or raise model.max_length."
            )
        check_batch(self.batch_size, self.sequence_length)

    @property
    def sequence_length(self) -> int:
        """Tokens of a sequence."""
        return self.length or self.model.max_length
