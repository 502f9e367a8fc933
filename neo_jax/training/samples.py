"""Texts that a model in training writes, for people to read."""

from collections.abc import Callable

from neo_jax.axes import Params
from neo_jax.decode import engine
from neo_jax.decode.options import SamplingOptions, make_settings
from neo_jax.model.scan import unstack
from neo_jax.model.transformer import Neo
from neo_jax.text.tokenizer import StreamDecoder, Tokenizer
from neo_jax.training.config import TrainConfig


def make_sampler(
    config: TrainConfig, model: Neo, tokenizer: Tokenizer
) -> Callable[[Params], list[str]]:
    """Returns what continues the prompts of a config by stacked parameters; all processes call it.

    The draws are the same each time, only weights differ.

    Raises:
      NeoError: a prompt is empty, or does not fit the context with its continuation.
    """
    length, prompts = config.sample_tokens, [tokenizer.encode(text) for text in config.prompts]
    settings = make_settings(SamplingOptions(), list(range(len(prompts))))
    if not prompts:
        return lambda params: []
    engine.check_prompts(model, prompts, length)

    def sample(params: Params) -> list[str]:
        done = engine.generate(model, unstack(params, model.config), prompts, length, settings)
        decoders = [StreamDecoder(tokenizer, prompt) for prompt in prompts]
        pairs = zip(decoders, done, strict=True)
        return [decoder.push(new.ids) + decoder.flush() for decoder, new in pairs]

    return sample
