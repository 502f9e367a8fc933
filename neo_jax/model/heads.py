"""Heads that classify: a linear map from the last LayerNorm's output to the logits of labels.

As transformers' GPTNeoForSequenceClassification, ...ForTokenClassification and
...ForQuestionAnswering, and GPT-2's. The parameters of a head stand next to the model's, under the
name of its kind: {"score": {"kernel": [C, D]}}; `score` has no bias, the others have.
"""

import jax.numpy as jnp
from jax.nn.initializers import normal

from neo_jax.axes import FEATURES, LABELS, Array, Float, Int, Params
from neo_jax.model.layers import Einsum
from neo_jax.model.transformer import Neo


def init_head(model: Neo, key: Array) -> Params:
    """Draws the parameters of the head of a model's config, float32: a tree to add to the model's.

    Kernels are drawn as transformers does, with a standard deviation of 0.02; biases are zeros.
    """
    x = jnp.zeros((1, 1, model.config.embed_dim))
    head = _head(model.clone(sharding=None))
    params = head.init(key, "btd,cd->btc", x)["params"]
    return {model.config.head.kind: {name: box.unbox() for name, box in params.items()}}


def head_logits(model: Neo, params: Params, x: Float[Array, "B K D"]) -> Float[Array, "B K C"]:
    """Returns the logits of the labels, float32, for ln_f's output.

    The parameters may be canonical or stacked, with the head's among them.
    """
    own = params[model.config.head.kind]
    return _head(model).apply({"params": own}, "btd,cd->btc", x)


def classify_sequences(
    model: Neo,
    params: Params,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"] | None = None,
) -> Float[Array, "B C"]:
    """Returns the logits of texts, read off their last tokens wherever padding stands.

    Args:
      model: a classifier of texts, whose head is `score`.
      params: canonical.
      tokens: ids; those of padding are any.
      positions: of each token in its text, -1 for padding, on the left or the right; 0, 1, 2, ...
        if None: then no row is padded.
    """
    shape = tokens.shape
    given = jnp.broadcast_to(jnp.arange(shape[1]), shape) if positions is None else positions
    hidden, _ = model.apply(
        {"params": params}, tokens, given, query_indices=last_tokens(given)[:, None],
        method=Neo.hidden,
    )  # fmt: skip
    return head_logits(model, params, hidden)[:, 0]


def last_tokens(positions: Int[Array, "B T"]) -> Int[Array, "B"]:
    """Returns the index in each row of the last token that is no padding."""
    index = jnp.broadcast_to(jnp.arange(positions.shape[1]), positions.shape)
    return jnp.argmax(jnp.where(positions >= 0, index, -1), axis=1)


def classify_tokens(
    model: Neo,
    params: Params,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T C"]:
    """Returns the logits of every token; of a head `qa_outputs` C is 2, start and end of an answer.

    Of the arguments see `classify_sequences`.
    """
    hidden, _ = model.apply({"params": params}, tokens, positions, method=Neo.hidden)
    return head_logits(model, params, hidden)


def _head(model: Neo) -> Einsum:
    head, width = model.config.head, model.config.embed_dim
    return Einsum(
        (len(head.labels), width),
        (LABELS, FEATURES),
        normal(0.02),
        (LABELS,) if head.has_bias else (),
        model.dtype,
        model.sharding,
    )
