"""How a model is fine-tuned on the tasks of a benchmark."""

import dataclasses
from typing import Literal

from neo_jax.fields import check, number


@dataclasses.dataclass(frozen=True)
class TuneOptions:
    """How a model is fine-tuned on each task; as transformers' run_glue.py where not said."""

    seeds: int = number(3, least=1)  # runs of each task, of seeds 0, 1, ...
    epochs: int = number(3, least=1)  # of which the best on the development set counts
    learning_rate: float = number(2e-5, above=0)  # 5e-4 suits the bundled model
    train_batch_size: int = number(32, least=1)
    length: int = number(128, least=1)  # tokens that are read of an example
    # Of branches' outputs; with it each seed compiles programs of its own.
    dropout: float = number(0.0, least=0, below=1)
    lora_rank: int = number(0, least=0)  # of adapters, in the place of all weights
    train_dtype: Literal["float32", "bfloat16"] = "float32"  # of products
    keep_models: bool = False  # leave the weights of every run

    def __post_init__(self) -> None:
        check(self)
