"""`neo_jax.load(...)`: a model, its parameters and its tokenizer in one hand."""

import dataclasses
import functools
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from neo_jax import adapters, hub, names, pretrained
from neo_jax.attention import Kernel, Mask
from neo_jax.attention.dense import weights as attention_weights
from neo_jax.axes import Array, Params
from neo_jax.config import ModelConfig
from neo_jax.data.tokenizer import StreamDecoder, Tokenizer, has_tokenizer, load_tokenizer
from neo_jax.decode import engine
from neo_jax.decode.sampling import SamplingOptions, make_settings
from neo_jax.distributed import to_host
from neo_jax.errors import NeoError, suggest
from neo_jax.evaluation.scoring import token_logprobs
from neo_jax.model import Neo
from neo_jax.sharding import Sharding, laid_out, make_sharding, padded_rows

Prompt = str | Sequence[int]
"""Text, or token ids."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """One completion of one prompt."""

    prompt: Prompt
    text: str | None  # what was generated, without the prompt; None without a tokenizer
    ids: list[int]  # the new tokens
    logprobs: list[float]  # the model's log p of each, in nats, before temperature and truncation
    finish_reason: str  # "eos" or "length"


@dataclasses.dataclass(frozen=True)
class Score:
    """How well the model predicts one text."""

    ids: list[int]
    logprobs: np.ndarray  # [len(ids) - 1], log p of each token after the first, in nats
    loss: float  # the mean of -logprobs, nats a token
    num_bytes: int  # UTF-8 bytes of the scored tokens; 0 without a tokenizer

    @property
    def bits_per_byte(self) -> float:
        """Bits to encode a byte of the text after its first token; NaN without a tokenizer."""
        if not self.num_bytes:
            return math.nan
        return -float(self.logprobs.sum(dtype=np.float64)) / math.log(2) / self.num_bytes


class LanguageModel:
    """A pretrained GPT-Neo. Its pure parts are `model`, `params`, `config` and `tokenizer`."""

    def __init__(self, model: Neo, params: Params, tokenizer: Tokenizer | None, folder: Path):
        """Holds what `load` found; `folder` is where."""
        self.model = model
        self.params = params
        self.tokenizer = tokenizer
        self.folder = folder

    @property
    def config(self) -> ModelConfig:
        """The shape of the model."""
        return self.model.config

    def encode(self, prompt: Prompt) -> list[int]:
        """Returns the ids of a text; ids are passed through.

        Raises:
          NeoError: the checkpoint has no tokenizer files, or the prompt is empty or none.
        """
        if not isinstance(prompt, str | Sequence | np.ndarray):
            raise NeoError(f"{prompt!r} is not a prompt; give a text or a list of token ids.")
        ids = self._tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if not ids:
            raise NeoError("the prompt is empty; give at least one token.")
        return ids

    @overload
    def generate(self, prompts: str, max_new_tokens: int = ..., **options: Any) -> str: ...
    @overload
    def generate(
        self, prompts: Sequence[Prompt], max_new_tokens: int = ..., **options: Any
    ) -> list[str]: ...
    def generate(
        self, prompts: str | Sequence[Prompt], max_new_tokens: int = 64, **options: Any
    ) -> str | list[str]:
        """Continues a text, or each of several in one batch; returns the new text.

        Args:
          prompts: a text, or a list of texts or lists of ids.
          max_new_tokens: where to stop at the latest.
          **options: the fields of `SamplingOptions`: temperature (0 is greedy), top_k, top_p, seed.

        Raises:
          NeoError: an empty prompt, unknown options, or more tokens than the context holds.
        """
        self._tokenizer  # noqa: B018  (raises where there is none to write text with)
        many = [prompts] if isinstance(prompts, str) else list(prompts)
        texts = [
            s.text or "" for s in self.sample(many, max_new_tokens, sampling=_options(options))
        ]
        return texts[0] if isinstance(prompts, str) else texts

    def sample(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int = 64,
        num_samples: int = 1,
        sampling: SamplingOptions = SamplingOptions(),  # noqa: B008  (immutable)
    ) -> list[Sample]:
        """Like `generate`, with everything that is known of each completion.

        Sample i of a prompt is drawn with the seed `seed + i`. The samples of a prompt follow each
        other, in the order of the prompts.
        """
        _check_list(prompts)
        repeated = [prompt for prompt in prompts for _ in range(num_samples)]
        ids = [self.encode(prompt) for prompt in repeated]
        seeds = [(sampling.seed + i) % 2**32 for _ in prompts for i in range(num_samples)]
        settings = make_settings(sampling, seeds)
        done = engine.generate(self.model, self.params, ids, max_new_tokens, settings)
        return [
            Sample(prompt, self._new_text(start, new.ids), *new)
            for prompt, start, new in zip(repeated, ids, done, strict=True)
        ]

    def stream(self, prompt: Prompt, max_new_tokens: int = 64, **options: Any) -> Iterator[str]:
        """Yields the new text in whole characters as it comes; options as in `generate`."""
        sampling = _options(options)
        ids = self.encode(prompt)
        decoder = StreamDecoder(self._tokenizer, ids)
        settings = make_settings(sampling, [sampling.seed])
        for token in engine.stream(self.model, self.params, ids, max_new_tokens, settings):
            text = decoder.push([token])
            if text:
                yield text
        rest = decoder.flush()
        if rest:
            yield rest

    def score(self, texts: Sequence[Prompt], stride: int = 0) -> list[Score]:
        """Returns how well each text is predicted; texts may be longer than the context.

        Args:
          texts: texts or ids.
          stride: see `neo_jax.evaluation.scoring`; matters beyond the context only.
        """
        return list(self.scores(texts, stride))

    def scores(self, texts: Sequence[Prompt], stride: int = 0) -> Iterator[Score]:
        """Like `score`, one at a time as they are computed."""
        _check_list(texts)
        many = [self.encode(text) for text in texts]
        for text, ids, logprobs in zip(
            texts, many, token_logprobs(self.model, self.params, many, stride), strict=True
        ):
            loss = -float(logprobs.mean(dtype=np.float64)) if len(logprobs) else math.nan
            yield Score(ids, logprobs, loss, self._num_bytes(text, ids))

    def embed(self, texts: Sequence[Prompt], layer: int = -1) -> list[np.ndarray]:
        """Returns hidden states as features, float32 [T, D] for each text.

        Args:
          texts: texts or ids, each within the context.
          layer: 0 is the embedding, i the output of block i, -1 the final LayerNorm's.
        """
        if not -self.config.num_layers - 1 <= layer <= self.config.num_layers:
            raise NeoError(f"layer {layer} is not one of 0 to {self.config.num_layers}, or -1.")
        _check_list(texts)
        features = []
        for ids in map(self.encode, texts):
            states = _hidden_state(self.model, layer, self.params, self._padded(ids))
            features.append(to_host(states[0, : len(ids)]))
        return features

    def attention(self, text: Prompt, layer: int) -> np.ndarray:
        """Returns what the heads of a layer attend to, float32 [N, T, T].

        Entry [n, t, s] is how much of the value of token s head n adds up for token t: 0 where t
        does not see s, and 1 in sum over s.

        Args:
          text: a text or ids, within the context.
          layer: from 0; `config.layer_types[layer]` says whether it is global or local.

        Raises:
          NeoError: no such layer, or more tokens than the context holds.
        """
        if not 0 <= layer < self.config.num_layers:
            raise NeoError(f"layer {layer} is not one of 0 to {self.config.num_layers - 1}.")
        ids = self.encode(text)
        weights = _attention(self.model, layer, self.params, self._padded(ids))
        return to_host(weights[0, :, : len(ids), : len(ids)])

    def _padded(self, ids: list[int]) -> np.ndarray:
        """Returns ids as a batch of a length that rarely compiles anew, padded on the right."""
        engine.check_tokens(self.model, ids)
        width = engine.bucket(len(ids), engine.MIN_PREFILL, self.config.max_length)
        padded = np.zeros((padded_rows(self.model.sharding, 1), width), np.int32)
        padded[0, : len(ids)] = ids
        return padded

    @property
    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise NeoError(
                f"{self.folder} holds no tokenizer; give prompts as token ids, or add its "
                "tokenizer.json, vocab.json and merges.txt, or .model file."
            )
        return self.tokenizer

    def _new_text(self, prompt: list[int], new: list[int]) -> str | None:
        if self.tokenizer is None:
            return None
        decoder = StreamDecoder(self.tokenizer, prompt)
        return decoder.push(new) + decoder.flush()

    def _num_bytes(self, text: Prompt, ids: list[int]) -> int:
        if self.tokenizer is None:
            return 0
        whole = text if isinstance(text, str) else self.tokenizer.decode(ids)
        # A character that the first token leaves unfinished is for the others to predict.
        first = self.tokenizer.decode(ids[:1]).rstrip("\ufffd")
        return len(whole.encode()) - len(first.encode())


def load(
    model: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
    dtype: str = "auto",
    mesh: str = "",
    rules: str = "",
    sharding: Sharding | None = None,
    kernel: Kernel = "auto",
) -> LanguageModel:
    """Loads a checkpoint in Hugging Face's format.

    Where it is an adapter in PEFT's format, the model that it names is loaded, and the adapter
    merged into it.

    Args:
      model: a folder, also gs://bucket/folder; a hub name such as "EleutherAI/gpt-neo-1.3B"; or
        None for the bundled model.
      revision: of the hub repository: a branch, tag or commit.
      token: for gated or private repositories; else HF_TOKEN or the stored login is used.
      dtype: "float32", "bfloat16", or "auto": float32 on CPUs, bfloat16 on TPUs and GPUs.
      mesh: how to split the model, as in "fsdp=4,model=2"; empty for one device.
      rules: how the mesh splits it, "tensor" or "embed:fsdp,heads:model"; see
        `neo_jax.sharding`. Empty is "decode", as far as the mesh has its axes.
      sharding: a strategy in the place of the two texts.
      kernel: the attention implementation.

    Raises:
      NeoError: whatever is wrong with the name, the files or the mesh, in one line.
    """
    enable_compilation_cache()
    sharding = sharding or make_sharding(mesh, rules, default="decode")
    folder = hub.resolve(model, revision=revision, token=token)
    base = adapters.base_folder(folder, token=token)
    config = pretrained.read_config(base)
    compute = compute_dtype(dtype)
    shardings = None
    if sharding:
        table = names.tensors(config)
        shardings = unflatten_dict(
            {t.path: sharding.named(t.axes, t.shape, "/".join(t.path)) for t in table}
        )
    params = pretrained.load_params(base, config, dtype=compute, shardings=shardings)
    if base != folder:
        params = adapters.apply_adapter(folder, config, params, shardings)
    params = lay_out(config, params)
    home = folder if has_tokenizer(folder) else base
    tokenizer = load_tokenizer(home) if has_tokenizer(home) else None
    return LanguageModel(Neo(config, compute, kernel, sharding), params, tokenizer, folder)


def lay_out(config: ModelConfig, params: Params) -> Params:
    """Gives parameters the order of axes in which their devices read them best; consumes them."""
    leaves = flatten_dict(params)
    for tensor in names.tensors(config):
        leaf = leaves[tensor.path]
        place = laid_out(leaf.sharding, tensor.axes)
        if place is not leaf.sharding:
            leaves[tensor.path] = jax.device_put(leaf, place, donate=True)
    return unflatten_dict(leaves)


def enable_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache folder, if it can be written.

    Where JAX was told another folder, or to keep none, that counts.
    """
    chosen = jax.config.values
    if not chosen["jax_compilation_cache_dir"] and chosen["jax_enable_compilation_cache"]:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(home) / "neo_jax" / "xla"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            return
        if not os.access(folder, os.W_OK):
            return  # JAX would warn of every program that it cannot keep
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def compute_dtype(name: str) -> np.dtype:
    """Returns the dtype of products that `load` means by a name.

    Raises:
      NeoError: no dtype of this name.
    """
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if name not in ("float32", "bfloat16"):
        raise NeoError(f"dtype '{name}' is not one of auto, float32, bfloat16.")
    return jnp.dtype(name)


def _check_list(prompts: Sequence[Prompt]) -> None:
    if isinstance(prompts, str):  # a sequence too, of characters
        raise NeoError("this takes several: give a list of prompts, as in ['one text'].")


def _options(options: dict[str, Any]) -> SamplingOptions:
    known = [field.name for field in dataclasses.fields(SamplingOptions)]
    for name in options:
        if name not in known:
            raise NeoError(f"unknown option '{name}'.{suggest(name, known)}")
    return SamplingOptions(**options)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _hidden_state(model: Neo, layer: int, params: Params, tokens: Array) -> Array:
    return model.apply({"params": params}, tokens).hidden_states[layer]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _attention(model: Neo, layer: int, params: Params, tokens: Array) -> Array:
    (_, sequence), seen = model.apply(
        {"params": params}, tokens, method=Neo.encode, mutable=["intermediates"]
    )
    (queries,) = seen["intermediates"][f"h_{layer}"]["attn"]["queries"]
    positions = sequence[layer].positions
    mask = Mask(positions, positions, model.config.window(layer))
    return attention_weights(queries, sequence[layer].k, mask)
