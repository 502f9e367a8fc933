"""What a training run is. A file in `configs/` holds one, called `config`."""

import dataclasses
from typing import Literal

from neo_jax.config import ModelConfig
from neo_jax.devices.memory import check_batch
from neo_jax.errors import NeoError
from neo_jax.fields import check, choice, number
from neo_jax.model.scan import Remat
from neo_jax.ops.attention import Kernel
from neo_jax.transforms.lora import LoraConfig
from neo_jax.transforms.soft_prompt import SoftPromptConfig


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its schedule, the defaults as GPT-Neo was trained."""

    name: Literal["adamw", "adafactor", "lion"] = "adamw"
    learning_rate: float = number(6e-4, least=0)  # at the end of the linear warm-up
    schedule: Literal["cosine", "linear", "constant"] = "cosine"  # what follows the warm-up
    warmup_steps: int = number(3000, least=0)
    final_fraction: float = number(0.1, least=0)  # of the learning rate, at the last step
    beta1: float = number(0.9, least=0, below=1)  # not of Adafactor
    beta2: float = number(0.95, least=0, below=1)  # not of Adafactor
    epsilon: float = number(1e-8, above=0)  # of AdamW
    # On kernels and embeddings, not on biases and LayerNorms.
    weight_decay: float = number(0.0, least=0)
    clip_norm: float = number(1.0, least=0)  # of the whole gradient; 0 is off

    def __post_init__(self) -> None:
        check(self, "optimizer.")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run. The same config gives the same batches and the same model."""

    # A folder that `neo-jax prepare` wrote, also gs://; several with their shares of the sequences
    # as in "pile=0.7,books=0.3".
    data: str
    output: str  # the run's folder, also gs://: checkpoints, metrics.jsonl, at the end model/
    # 0 where `epochs` says how many
    steps: int = number(least=0, words="be at least 1, not {}, or epochs given")
    batch_size: int = number(least=1)  # sequences of a step, over all devices
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    # A checkpoint to start from, which gives the model: a folder, a hub name or "bundled".
    pretrained: str = ""
    # Rows added to the vocabulary of `pretrained`, each the mean of those that are there.
    new_tokens: int = number(0, least=0)
    # What positions get that model.max_length adds to those of `pretrained`: its table again and
    # again ("repeated"), or the whole table stretched ("interpolated").
    new_positions: Literal["repeated", "interpolated"] = choice(
        "repeated", ("repeated", "interpolated")
    )
    # Adapters of low rank, in the place of all weights.
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    # Or virtual tokens before every text.
    soft_prompt: SoftPromptConfig = dataclasses.field(default_factory=SoftPromptConfig)
    length: int = 0  # tokens of a sequence; 0 is the model's whole context
    across_documents: bool = True  # whether tokens see the documents before theirs in a sequence
    seed: int = 0  # of the initial weights and of the order of the data
    # Of products; weights stay float32. Gradients are too small for float16: take float32 on GPUs
    # without bfloat16.
    dtype: Literal["bfloat16", "float32"] = choice("bfloat16", ("bfloat16", "float32"))
    kernel: Kernel = "auto"  # attention
    remat: Remat = "none"  # computed again in the backward pass, to save memory: products, full
    # Repeats of attention_types that the program writes out; 0 chooses.
    unroll: int = number(0, least=0)
    accumulation: int = number(1, least=1)  # parts of a batch, computed one after another
    dropout: float = number(0.0, least=0, below=1)  # of the embedding and of each branch's output
    z_loss: float = 1e-4  # weight of log(sum(exp(logits)))^2; the reported loss is without it
    # Steps in a row without finite gradients, after which a run stops.
    max_skipped: int = number(10, least=1)
    mesh: str = ""  # as in "data=2,fsdp=-1"; empty is one device, unless the rules have a name
    rules: str = ""  # a strategy such as "fsdp+tensor", or as in "embed:fsdp,heads:model"
    log_every: int = number(10, least=1)  # steps between lines of metrics.jsonl
    # Steps between evaluations on the held-out split; 0 is never.
    eval_every: int = number(500, least=0)
    # Passes over the training data, in the place of steps; each ends with an evaluation.
    epochs: int = number(0, least=0)
    # Evaluations in a row without a better one, after which a run ends; 0 is never.
    patience: int = number(0, least=0)
    # What the best epoch of a classifier is chosen by: accuracy, f1, macro_f1, matthews, pearson or
    # spearman; of words accuracy, macro_f1 or entity_f1, of answers squad_f1 or squad_em; "" is
    # what is usual for its labels.
    metric: str = ""
    save_every: int = number(500, least=1)  # steps between checkpoints
    # Checkpoints kept, the newest ones; the best by evaluation stays too.
    keep: int = number(2, least=1)
    # Checkpoints of multiples of so many steps stay for good; 0 is none.
    keep_every: int = number(0, least=0)
    prompts: tuple[str, ...] = ()  # continued at each evaluation, into samples.jsonl
    sample_tokens: int = 64  # of each continuation
    tensorboard: bool = False  # event files in output/tensorboard
    wandb: str = ""  # a project of Weights & Biases; empty is none
    profile: int = number(0, least=0)  # steps to trace into output/profile, soon after the start

    def __post_init__(self) -> None:
        check(self)
        if bool(self.steps) == bool(self.epochs):
            given = "both steps and epochs are given; leave one out."
            none = f"steps must be at least 1, not {self.steps}, or epochs given."
            raise NeoError(given if self.steps else none)
        if self.batch_size % self.accumulation:
            raise NeoError(
                f"batch_size {self.batch_size} does not divide into accumulation "
                f"{self.accumulation}; make it a multiple."
            )
        if self.lora.rank and self.soft_prompt.tokens:
            raise NeoError(
                "lora.rank and soft_prompt.tokens are two adapters; set one of them to 0."
            )
        if not self.pretrained:  # else the model is known when the checkpoint is
            self.check_length()

    def check_length(self) -> None:
        """Checks that sequences fit the model.

        Raises:
          NeoError: they are longer than its context, hold no text, or their tokens are too many.
        """
        if self.sequence_length > self.model.max_length:
            raise NeoError(
                f"length {self.length} exceeds the model's context of {self.model.max_length}; "
                "shorten it, or raise model.max_length."
            )
        if self.soft_prompt.tokens >= self.sequence_length:
            raise NeoError(
                f"soft_prompt.tokens {self.soft_prompt.tokens} leave a sequence of "
                f"{self.sequence_length} no room for a text; take fewer, or raise length."
            )
        check_batch(self.batch_size, self.sequence_length)

    def with_model(self, model: ModelConfig) -> "TrainConfig":
        """Returns the config of a run that starts from a checkpoint of this model.

        The vocabulary grows by `new_tokens`, positions up to the config's own model.max_length.

        Raises:
          NeoError: the config describes another model, or its length does not fit.
        """
        model = dataclasses.replace(model, vocab_size=model.vocab_size + self.new_tokens)
        wanted, positions = self.model, model.max_length
        # The default is no request for as many positions, unless sequences are to have so many.
        if wanted == ModelConfig() and not positions < self.length == wanted.max_length:
            wanted = model
        others = [dataclasses.replace(each, max_length=1) for each in (ModelConfig(), model)]
        if dataclasses.replace(wanted, max_length=1) not in others:
            raise NeoError(
                f"model is another than that of the checkpoint {self.pretrained}; leave all of it "
                "but max_length out of the config, or leave out pretrained."
            )
        if wanted.max_length < positions:
            raise NeoError(
                f"model.max_length {wanted.max_length} is below the {positions} positions of "
                f"{self.pretrained}; leave it out, and set length for shorter sequences."
            )
        if wanted.max_length > positions and self.is_frozen:
            raise NeoError(
                "adapters do not train embeddings, so the positions that model.max_length adds "
                "would never be learned; leave it out, or train all weights."
            )
        model = dataclasses.replace(model, max_length=wanted.max_length)
        config = dataclasses.replace(self, model=model)
        config.check_length()
        return config

    @property
    def is_frozen(self) -> bool:
        """Whether the model itself is not trained, but an adapter."""
        return bool(self.lora.rank or self.soft_prompt.tokens)

    @property
    def sequence_length(self) -> int:
        """Tokens of a sequence."""
        return self.length or self.model.max_length
