"""Texts that a model in training writes, for people to read."""

from neo_jax.axes import Params
from neo_jax.decode import engine
from neo_jax.decode.options import SamplingOptions, make_settings
from neo_jax.model.scan import unstack
from neo_jax.model.transformer import Neo
from neo_jax.text.tokenizer import StreamDecoder, Tokenizer
from neo_jax.training.config import TrainConfig


class Sampler:
    """Continues the prompts of a config; the draws are the same each time, only weights differ."""

    def __init__(self, config: TrainConfig, model: Neo, tokenizer: Tokenizer):
        """Encodes the prompts.

        Raises:
          NeoError: one is empty, or does not fit the context with its continuation.
        """
        self._model = model
        self._tokenizer = tokenizer
        self._length = config.sample_tokens
        self._prompts = [tokenizer.encode(prompt) for prompt in config.prompts]
        self._settings = make_settings(SamplingOptions(), list(range(len(self._prompts))))
        if self._prompts:
            engine.check_prompts(model, self._prompts, self._length)

    def __call__(self, params: Params) -> list[str]:
        """Returns the new text for each prompt by stacked parameters; all processes call this."""
        if not self._prompts:
            return []
        params = unstack(params, self._model.config)
        done = engine.generate(self._model, params, self._prompts, self._length, self._settings)
        texts = []
        for prompt, new in zip(self._prompts, done, strict=True):
            decoder = StreamDecoder(self._tokenizer, prompt)
            texts.append(decoder.push(new.ids) + decoder.flush())
        return texts
