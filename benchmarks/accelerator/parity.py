"""Greedy texts and logits of this package on the device against `transformers` there, float32."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from accelerator.rows import Row
from accelerator.sizes import Sizes, Texts
from accelerator.theirs import make_theirs
from neo_jax.config import ModelConfig
from neo_jax.decode import engine
from neo_jax.decode.options import SamplingOptions, make_settings
from neo_jax.model import tensor_table
from neo_jax.model.transformer import Neo

TOLERANCE = 5e-5
"""Of the largest difference of logits over the largest logit."""

_BATCH = 4


def start(sizes: Sizes, wanted: Sequence[Texts], at_once: int) -> Callable[[Texts], Row]:
    """Returns what gives the row of texts."""
    return _compare


def _compare(case: Texts) -> Row:
    import torch

    config, length, new = case
    jax.local_devices()  # JAX takes its memory first
    theirs = make_theirs(config, torch.float32)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2)  # else the likeliest token is the newest again
    params = _params(config, theirs.state_dict())
    prompts = np.random.default_rng(0).integers(0, config.vocab_size, (_BATCH, length))
    ids = torch.from_numpy(prompts).to(theirs.device)
    with torch.no_grad():
        texts = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False,
            pad_token_id=0,
        )  # fmt: skip
        expected = theirs(texts).logits.float().cpu().numpy()
    texts = texts.cpu().numpy()
    model = Neo(config)
    logits = np.asarray(jax.jit(model.apply)({"params": params}, jnp.asarray(texts)).logits)
    off = float(np.abs(logits - expected).max())
    settings = make_settings(SamplingOptions(temperature=0.0), [0] * _BATCH)
    done = engine.generate(model, params, prompts.tolist(), new, settings)
    ours = np.array([completion.ids for completion in done])
    same, gap = _agreement(ours, texts[:, length:], expected[:, length - 1 :])
    row = {
        "tokens": ours.size,
        "same": same,
        "gap": gap,
        "logits_off": off / float(np.abs(expected).max()),
        "tolerance": TOLERANCE,
        "distinct": len(np.unique(ours)),
    }
    if not row["logits_off"] <= TOLERANCE:
        row["failed"] = f"logits are off by {row['logits_off']:.2g} of the largest"
    elif gap > 2 * off:
        row["failed"] = f"{same} of {ours.size} tokens are the same; no tie: {gap:.2g} apart"
    return row


def _agreement(ours: np.ndarray, theirs: np.ndarray, logits: np.ndarray) -> tuple[int, float]:
    """Returns how many tokens are the same, and the largest gap of logits where texts part."""
    differs, gap = ours != theirs, 0.0
    for row in np.flatnonzero(differs.any(axis=1)):
        first = int(np.argmax(differs[row]))
        at = logits[row, first]
        gap = max(gap, float(at[theirs[row, first]] - at[ours[row, first]]))
    return int((~differs).sum()), gap


def _params(config: ModelConfig, state: Any) -> Any:
    """Returns their weights as ours, rows of zeros beyond the vocabulary included."""
    leaves = {}
    for tensor in tensor_table.tensors(config):
        array = tensor.of("hf", state[tensor.hf_name].cpu().numpy())
        fill = [(0, all_ - here) for all_, here in zip(tensor.shape, array.shape, strict=True)]
        leaves[tensor.path] = jnp.asarray(np.pad(array, fill))
    return unflatten_dict(leaves)
