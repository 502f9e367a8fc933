"""How a model is loaded: the options that `neo_jax.load` and the command line share."""

import dataclasses
from typing import Literal, get_args

from neo_jax.config import Kernel
from neo_jax.fields import check, choice

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
CacheDtype = Literal["auto", "float32", "bfloat16", "float16", "int8"]
Quantize = Literal["none", "int8"]


@dataclasses.dataclass(frozen=True)
class LoadOptions:
    """Which model, and how to hold it.

    Raises:
      NeoError: a value is none of those that the option takes.
    """

    # a folder, also gs:// or a run's; a hub name such as EleutherAI/gpt-neo-1.3B; gpt-neo-125m,
    # gpt-neo-1.3b, gpt-neo-2.7b, distilgpt2, gpt2, gpt2-medium, gpt2-large, gpt2-xl; else bundled
    model: str = ""
    revision: str = ""  # of a hub repository: a branch, tag or commit
    # auto: float32 on CPUs, float16 on GPUs without bfloat16 (such as a T4), else bfloat16
    dtype: Dtype = choice("auto", get_args(Dtype))
    # int8: weights in a quarter of float32's bytes
    quantize: Quantize = choice("none", get_args(Quantize))
    # of keys and values of a sequence being generated; auto: float32 on CPUs, else as dtype
    cache_dtype: CacheDtype = choice("auto", get_args(CacheDtype))
    kernel: Kernel = choice("auto", get_args(Kernel))  # attention
    mesh: str = ""  # devices, as in fsdp=4,model=2; -1 takes what is left
    rules: str = ""  # a strategy: data, fsdp, tensor, fsdp+tensor, decode; or embed:fsdp,...

    def __post_init__(self) -> None:
        check(self)

    @property
    def is_split(self) -> bool:
        """Whether the model is sharded over a mesh."""
        return bool(self.mesh or self.rules)
