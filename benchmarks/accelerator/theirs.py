"""`transformers` on the same device: PyTorch as it comes, and compiled by `torch.compile`."""

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from accelerator.rows import Row
from accelerator.sizes import Sizes
from neo_jax.config import ModelConfig

_REPEATS = 3
_DTYPE = "bfloat16"


class Case(NamedTuple):
    """What transformers does with a model."""

    model: str
    task: str  # "decode" or "prefill"
    batch: int
    length: int  # tokens of the prompt
    how: str  # "plain", or "compiled"


def cases(sizes: Sizes, how: str) -> dict[str, Case]:
    """Returns what transformers does, by name; what matters most comes first."""
    prompt = sizes.room - sizes.new_tokens
    found = [
        Case(model, "decode", batch, prompt, how)
        for batch in sizes.batches
        for model in sizes.training
    ]
    found += [Case(model, "prefill", *sizes.prefill, how) for model in sizes.training]
    return {f"{each.model} {each.task} batch {each.batch} {how}": each for each in found}


def start(sizes: Sizes, wanted: Sequence[Case], at_once: int) -> Callable[[Case], Row]:
    """Returns what gives the row of a case."""
    return functools.partial(_measure, sizes)


def make_theirs(config: ModelConfig, dtype: Any) -> Any:
    """Returns GPT-Neo in a shape, its weights drawn on the GPU, or where there is none the CPU."""
    import torch
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    fields = config.to_hf()
    del fields["attention_layers"]  # follows from attention_types
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        torch.manual_seed(0)
        model = GPTNeoForCausalLM(GPTNeoConfig(**fields, attn_implementation="eager"))
    model.generation_config.eos_token_id = None
    return model.to(dtype).eval()


@functools.lru_cache(maxsize=1)
def _model(config: ModelConfig) -> Any:
    import torch

    return make_theirs(config, getattr(torch, _DTYPE))


def _measure(sizes: Sizes, case: Case) -> Row:
    import torch

    config = sizes.models[case.model]
    model = _model(config)
    shape = (case.batch, case.length)
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, config.vocab_size, shape))
    ids, new = ids.to(model.device), sizes.new_tokens
    with torch.no_grad():
        if case.task == "prefill":
            seconds = _prefill_seconds(model, ids, case.how)
        elif case.how == "plain":
            seconds = _decode_seconds(model, ids, new)
        else:
            seconds = _compiled_decode_seconds(model, ids, new)
    tokens = case.batch * (case.length if case.task == "prefill" else 1)
    row = case._asdict() | {"seconds": seconds, "tokens_per_second": tokens / seconds}
    return row | {"torch": torch.__version__, "dtype": _DTYPE}


def _prefill_seconds(model: Any, ids: Any, how: str) -> float:
    """Returns the time to the first new token."""
    forward = model.forward if how == "plain" else _compiled(model, "default")
    return _median_seconds(lambda: forward(ids, use_cache=True, logits_to_keep=1).logits)


def _decode_seconds(model: Any, ids: Any, new: int) -> float:
    """Returns the time of a token of `generate`: of many, less one after the same prompt."""

    def generate(count: int) -> Callable[[], Any]:
        mask = ids.new_ones(ids.shape)
        options = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        return lambda: model.generate(ids, attention_mask=mask, **options)

    return (_median_seconds(generate(new)) - _median_seconds(generate(1))) / (new - 1)


def _compiled_decode_seconds(model: Any, ids: Any, new: int) -> float:
    """Returns the time of a token with a static cache and a graph a step.

    `generate` compiles no GPT-Neo: its window mask does not fit a static cache. So this is the
    speed of a text that is not quite GPT-Neo's.
    """
    import torch
    from transformers import StaticCache

    step = _compiled(model, "reduce-overhead")
    cache = StaticCache(config=model.config, max_cache_len=ids.shape[1] + new)
    token = model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
    position = ids.new_full((1, 1), ids.shape[1])
    times = []
    for _ in range(new):
        start = time.perf_counter()
        torch.compiler.cudagraph_mark_step_begin()
        logits = step(token, past_key_values=cache, position_ids=position).logits
        token, position = logits[:, -1:].argmax(-1).clone(), position + 1
        _wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times[new // 2 :])  # the first compile, and record graphs


def _compiled(model: Any, mode: str) -> Any:
    import torch

    torch._dynamo.reset()
    if not torch.cuda.is_available():  # where the script is tested: traced, and not compiled
        return torch.compile(model.forward, backend="eager", dynamic=False)
    return torch.compile(model.forward, mode=mode, dynamic=False)


def _median_seconds(run: Callable[[], Any]) -> float:
    times = []
    for _ in range(_REPEATS + 1):
        start = time.perf_counter()
        run()
        _wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])  # the first warms up


def _wait() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
