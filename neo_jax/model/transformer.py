"""GPT-Neo: a pre-norm decoder whose layers alternate between global and local attention; GPT-2.

Pure functions of parameters and arrays: a cache goes in, a cache comes out. Facts of the forward
pass follow transformers' `modeling_gpt_neo.py` and EleutherAI's Mesh-TensorFlow original.

    x = wte[tokens] + wpe[positions]
    x = x + attention(ln_1(x));  x = x + mlp(ln_2(x))      for each layer
    logits = ln_f(x) wte^T

GPT-2 (`modeling_gpt2.py`) differs by fields of the config: `qkv_bias`, `scale_attention`, and only
global layers; where the head is not tied, by a table of its own in the place of wte.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.nn.initializers import normal
from jax.typing import DTypeLike

from neo_jax import axes
from neo_jax.axes import Array, Float, Int, Params
from neo_jax.config import ModelConfig
from neo_jax.model import alike
from neo_jax.model import cache as caching
from neo_jax.model.cache import Cache, LayerCache
from neo_jax.model.initializers import zeros_beyond
from neo_jax.model.layers import Einsum, Embed, LayerNorm, linear
from neo_jax.model.soft_prompt import declare_virtual, place_virtual
from neo_jax.ops.attention import Kernel, Mask, attend
from neo_jax.ops.gelu import ACTIVATIONS
from neo_jax.ops.matmul import settled_gradient
from neo_jax.ops.rounding import cast
from neo_jax.sharding.rules import Sharding, constrain, filled

# How activations are sharded: None stays whole, ... is for the compiler to choose.
RESIDUAL_STREAM = (axes.BATCH, axes.LENGTH, None)
QUERIES = (axes.BATCH, axes.HEADS, ..., axes.HEAD_DIM)
MLP_HIDDEN = (axes.BATCH, ..., axes.MLP)
LOGITS = (axes.BATCH, ..., axes.VOCAB)


class Output(NamedTuple):
    """What a forward pass gives."""

    logits: Float[Array, "B T V"]
    cache: Cache  # what each layer attended to; without a cache as input, the sequence itself
    hidden_states: tuple[Float[Array, "B T D"], ...]  # the embedding, each block but the last, ln_f


class Attention(nn.Module):
    """Multi-head attention, in GPT-Neo without scaling and without biases of q, k and v."""

    config: ModelConfig
    window: int | None
    dtype: DTypeLike = jnp.float32
    kernel: Kernel = "auto"
    sharding: Sharding | None = None

    def setup(self) -> None:
        """Declares the four linear maps."""
        embed, heads, bias = (axes.EMBED,), (axes.HEADS, axes.HEAD_DIM), self.config.qkv_bias
        self.q_proj = linear(self, "q_proj", embed, heads, bias)
        self.k_proj = linear(self, "k_proj", embed, heads, bias)
        self.v_proj = linear(self, "v_proj", embed, heads, bias)
        self.out_proj = linear(self, "out_proj", heads, embed)

    def queries(self, x: Float[Array, "B T D"]) -> Float[Array, "B N T H"]:
        """Returns what keys are multiplied by."""
        return self._of_heads(self.q_proj, x, self.config.scale_attention)

    def _of_heads(self, linear: Einsum, x: Array, scaled: bool = False) -> Array:
        y = linear("btd,nhd->btnh", x) * (self.config.head_dim**-0.5 if scaled else 1.0)
        return constrain(self.sharding, cast(y.swapaxes(1, 2), self.dtype), QUERIES, linear.name)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        cache: LayerCache | None,
        segment_starts: Int[Array, "B T"] | None = None,
        query_indices: Int[Array, "B K"] | None = None,
    ) -> tuple[Float[Array, "B K D"], LayerCache]:
        """Returns the attention's output, of the requested tokens or all, and keys and values."""
        q = self.queries(_at(x, query_indices))
        k, v = self._of_heads(self.k_proj, x), self._of_heads(self.v_proj, x)
        aligned = cache is None and query_indices is None  # the sequence is its own cache
        new = LayerCache(k, v, positions)
        cache = caching.extend(cache, k, v, positions, self.sharding) if cache else new
        of_queries, starts = (_at(each, query_indices) for each in (positions, segment_starts))
        mask = Mask(of_queries, cache.positions, self.window, aligned, starts)
        cache = cache if aligned else caching.place(self.sharding, cache)
        y = attend(q, cache.k, cache.v, mask, self.kernel if aligned else "auto", self.sharding)
        return self.out_proj("btnh,dnh->btd", y.swapaxes(1, 2)), cache


class MLP(nn.Module):
    """Two linear maps with an activation between them."""

    config: ModelConfig
    dtype: DTypeLike = jnp.float32
    sharding: Sharding | None = None

    def setup(self) -> None:
        """Declares the two linear maps."""
        self.c_fc = linear(self, "c_fc", (axes.EMBED,), (axes.MLP,))
        self.c_proj = linear(self, "c_proj", (axes.MLP,), (axes.EMBED,))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Returns c_proj(activation(c_fc(x)))."""
        x = ACTIVATIONS[self.config.activation](self.c_fc("btd,fd->btf", x))
        x = constrain(self.sharding, x, MLP_HIDDEN, "c_fc's output")
        return self.c_proj("btf,df->btd", x)


class Block(nn.Module):
    """One layer: attention and MLP, each behind a LayerNorm and added to the residual stream."""

    config: ModelConfig
    window: int | None
    dtype: DTypeLike = jnp.float32
    kernel: Kernel = "auto"
    sharding: Sharding | None = None
    dropout: float = 0.0

    def setup(self) -> None:
        """Declares the parts, named as in Hugging Face's checkpoints."""
        config, sharding = self.config, self.sharding
        self.ln_1 = LayerNorm(config.norm_epsilon, sharding)
        self.attn = Attention(config, self.window, self.dtype, self.kernel, sharding)
        self.ln_2 = LayerNorm(config.norm_epsilon, sharding)
        self.mlp = MLP(config, self.dtype, sharding)
        self.drop = nn.Dropout(self.dropout)

    def queries(self, x: Float[Array, "B T D"]) -> Float[Array, "B N T H"]:
        """Returns the queries of the block's heads."""
        return self.attn.queries(self.ln_1(x))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        cache: LayerCache | None,
        segment_starts: Int[Array, "B T"] | None = None,
        query_indices: Int[Array, "B K"] | None = None,
    ) -> tuple[Float[Array, "B K D"], LayerCache]:
        """Returns the stream of the requested tokens or all, and keys and values."""
        x = settled_gradient(x)
        attended, cache = self.attn(self.ln_1(x), positions, cache, segment_starts, query_indices)
        keep_all = not self.has_rng("dropout")
        x = settled_gradient(_at(x, query_indices) + self.drop(attended, deterministic=keep_all))
        return x + self.drop(self.mlp(self.ln_2(x)), deterministic=keep_all), cache


class Neo(nn.Module):
    """The language model. Holds no state: `Neo(config).apply({"params": params}, tokens)`.

    Attributes:
      config: the shape.
      dtype: operands of products. The residual stream, LayerNorm, softmax and logits are float32
        whatever it is.
      kernel: which attention implementation.
      sharding: how activations are sharded; None on one device.
      dropout: the share of the embedding's and of each branch's outputs that is dropped wherever
        `apply` is given a "dropout" key; without one nothing is.
      cache_dtype: of the keys and values that decoding goes on from, int8 or a floating-point type;
        None stands for `dtype`.
      virtual_tokens: rows of a table `prompt_embeddings`, [rows, D], for ids from vocab_size on.
      soft_prompt: how many of these begin every text that is generated or scored.
    """

    config: ModelConfig
    dtype: DTypeLike = jnp.float32
    kernel: Kernel = "auto"
    sharding: Sharding | None = None
    dropout: float = 0.0
    cache_dtype: DTypeLike | None = None
    virtual_tokens: int = 0
    soft_prompt: int = 0

    def setup(self) -> None:
        """Declares the embeddings, the layers h_0, h_1, ... and the final LayerNorm."""
        config, dtype, sharding = self.config, self.dtype, self.sharding
        width = config.embed_dim
        init = zeros_beyond(config.vocab_size, normal(0.02))
        vocab = (config.padded_vocab_size, width, axes.VOCAB, init, dtype, sharding)
        self.wte = Embed(*vocab)
        self.lm_head = self.wte if config.tied_head else Embed(*vocab)
        self.wpe = Embed(config.max_length, width, axes.POSITIONS, normal(0.01), dtype, sharding)
        self.prompt_embeddings = declare_virtual(self)
        self.h = [make_block(self, i) for i in range(config.num_layers)]
        self.ln_f = LayerNorm(config.norm_epsilon, sharding)
        self.drop = nn.Dropout(self.dropout)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        cache: Cache | None = None,
        prefix: Float[Array, "B K D"] | None = None,
    ) -> Output:
        """Returns logits for the token after each token.

        Args:
          tokens: ids, in [0, vocab_size), and of virtual tokens.
          positions: the absolute position of each token, -1 for padding; 0, 1, 2, ... if None.
            Without a cache a row's positions run on without gaps.
          cache: what earlier calls returned; None for a sequence that starts here.
          prefix: embeddings in the place of those of the first K tokens, whose ids do not matter.
        """
        hidden_states, cache = self._hidden_states(tokens, positions, cache, None, prefix)
        logits = self.unembed(hidden_states[-1])[..., : self.config.vocab_size]
        return Output(logits, cache, hidden_states)

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        cache: Cache | None = None,
        query_indices: Int[Array, "B K"] | None = None,
    ) -> tuple[Float[Array, "B K D"], Cache]:
        """Like a call, but stops before the output head: returns ln_f's output and the cache.

        The output is of all tokens, or of those at `query_indices`; the last layer skips the rest.
        """
        hidden_states, cache = self._hidden_states(tokens, positions, cache, query_indices)
        return hidden_states[-1], cache

    def unembed(self, x: Float[Array, "B T D"]) -> Float[Array, "B T Vp"]:
        """Returns output logits, float32, for ln_f's output, over the padded vocabulary.

        Logits of the padding are -inf: no draw, maximum or sum ever notices them.
        """
        logits = constrain(self.sharding, self.lm_head.attend(x), LOGITS, "logits")
        if logits.shape[-1] == self.config.vocab_size:
            return logits
        exists = jnp.arange(logits.shape[-1]) < self.config.vocab_size
        return jnp.where(exists[None, None], logits, -jnp.inf)

    def embed(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        prefix: Float[Array, "B K D"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Int[Array, "B T"]]:
        """Returns what the first block reads, and the positions."""
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        x = place_virtual(self, self.wte(tokens), tokens, prefix) + self.wpe(positions)
        return self.drop(x, deterministic=not self.has_rng("dropout")), positions

    def _hidden_states(
        self, tokens: Array, positions: Any, cache: Any, indices: Any, prefix: Any = None
    ) -> tuple[tuple[Array, ...], Cache]:
        indexed, length = positions is None or cache is not None, tokens.shape[1]
        if not cache:
            tokens, positions = filled(self.sharding, tokens, positions)
        x, positions = self.embed(tokens, positions, prefix)
        # Kernels that know only indices take what is before position 0 for another document.
        segment_starts = None if indexed else jnp.zeros_like(positions)
        # Tokens that are appended to a cache are too few to be split.
        place = RESIDUAL_STREAM if cache is None else (axes.BATCH, None, None)
        hidden_states, caches = [], []
        for i, block in enumerate(self.h):
            x = constrain(self.sharding, x, place, "the residual stream")
            hidden_states.append(x)
            here = indices if i == len(self.h) - 1 else None
            of_layer = cache[i] if cache else None
            x, layer_cache = alike.call(block, x, positions, of_layer, segment_starts, here)
            caches.append(layer_cache)
        hidden_states.append(self.ln_f(x))
        return tuple(x[:, :length] for x in hidden_states), tuple(caches)


def _at(x: Any, indices: Array | None) -> Any:
    """Returns the entries [B, K, ...] of [B, T, ...] at these indices; None is all."""
    return x if x is None or indices is None else jax.vmap(lambda row, i: row[i])(x, indices)


def make_block(model: Neo, layer: int) -> Block:
    """Returns the module of a layer, without its parameters."""
    window = model.config.window(layer)
    return Block(model.config, window, model.dtype, model.kernel, model.sharding, model.dropout)


def init_params(model: Neo, key: Array) -> Params:
    """Draws parameters with Mesh-TensorFlow's initialisation, float32; pure, may be jitted."""
    return nn.meta.unbox(boxed_params(model, key))


def boxed_params(model: Neo, key: Array) -> Params:
    """Draws parameters, each in a box with its logical axes."""
    # A single token is not sharded, and a kernel may be one of devices that are not here.
    alone = model.clone(sharding=None, kernel="auto")
    method = Neo.hidden if model.config.tied_head else Neo.__call__
    return alone.init(key, jnp.zeros((1, 1), jnp.int32), method=method)["params"]
