"""A model, its parameters and its tokenizer in one hand."""

import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from neo_jax.axes import Params
from neo_jax.checkpoints import save
from neo_jax.config import ModelConfig, find_preset
from neo_jax.decode.options import BeamOptions, SamplingOptions
from neo_jax.decode.pooling import Pooling
from neo_jax.decode.speculative import Draft
from neo_jax.devices.processes import is_leader
from neo_jax.errors import NeoError, brief, checked
from neo_jax.fields import takes
from neo_jax.files.paths import make_path
from neo_jax.model.transformer import Neo
from neo_jax.text import defaults, generate, inspection, spans
from neo_jax.text.classify import Classification, as_one_text, classification, sequence_logits
from neo_jax.text.defaults import Defaults
from neo_jax.text.generate import Prompt, Sample, fit, make_strategy
from neo_jax.text.options import (
    TextOptions,
    check_names,
    check_together,
    listed,
    names,
    pick,
    read_filter,
    read_options,
    spread,
)
from neo_jax.text.score import Score, score_ids, scored_bytes
from neo_jax.text.tokenizer import Tokenizer
from neo_jax.transforms.quantize import is_quantized


class LanguageModel:
    """A pretrained GPT-Neo. Its pure parts are `model`, `params`, `config` and `tokenizer`.

    `defaults` are the options of its generation_config.json, for texts of which a caller does not
    say more; `lm.defaults = neo_jax.text.defaults.Defaults()` leaves them out.
    """

    def __init__(
        self,
        model: Neo,
        params: Params,
        tokenizer: Tokenizer | None,
        folder: Path,
        defaults: Defaults = Defaults(),  # noqa: B008
    ):
        """Holds what `load` found; `folder` is where."""
        self.defaults = defaults
        self.model = model
        self.params = params
        self.tokenizer = tokenizer
        self.folder = folder

    def __repr__(self) -> str:
        config, sharding = self.config, self.model.sharding
        sizes = sharding.mesh.shape.items() if sharding else ()
        parts = [
            find_preset(config) or config.family.name,
            f"{config.num_params:,} parameters",
            "int8" if is_quantized(self.params) else str(self.model.dtype),
            *(["mesh " + ",".join(f"{axis}={size}" for axis, size in sizes)] if sizes else []),
        ]
        return f"LanguageModel({', '.join(parts)}, {str(self.folder)!r})"

    @property
    def config(self) -> ModelConfig:
        """The shape of the model."""
        return self.model.config

    def encode(self, prompt: Prompt, add_special_tokens: bool = True) -> list[int]:
        """Returns the ids of a text; ids are passed through.

        Args:
          prompt: a text or ids.
          add_special_tokens: whether to add what the tokenizer's files say that a text begins or
            ends with; GPT-2's and GPT-Neo's say nothing.

        Raises:
          NeoError: the checkpoint has no tokenizer files, or the prompt is empty or none.
        """
        if isinstance(prompt, bytes) or not isinstance(prompt, str | Sequence | np.ndarray):
            raise NeoError(f"{brief(prompt)} is not a prompt; give a text or a list of token ids.")
        if isinstance(prompt, str):
            ids = self._tokenizer.encode(prompt, add_special_tokens)
        else:
            ids = [checked("a token id", token, int) for token in prompt]
        if not ids:
            raise NeoError("the prompt is empty; give at least one token.")
        return ids

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Returns the ids that are continued: those of `encode`; of "" the end of text alone.

        Behind the end of one text another begins. Raises as `encode`.
        """
        end = self.tokenizer.eos_id if self.tokenizer else None
        is_empty = isinstance(prompt, str) and not prompt
        return [end] if is_empty and end is not None else self.encode(prompt)

    @overload
    def generate(
        self, prompts: str, max_new_tokens: int | None = ..., *, num_samples: int, **options: Any
    ) -> list[str]: ...
    @overload
    def generate(
        self, prompts: Sequence[Prompt], max_new_tokens: int | None = ..., *, num_samples: int,
        **options: Any,
    ) -> list[list[str]]: ...  # fmt: skip
    @overload
    def generate(self, prompts: str, max_new_tokens: int | None = ..., **options: Any) -> str: ...
    @overload
    def generate(
        self, prompts: Sequence[Prompt], max_new_tokens: int | None = ..., **options: Any
    ) -> list[str]: ...
    @takes(SamplingOptions, BeamOptions, TextOptions)
    def generate(
        self,
        prompts: str | Sequence[Prompt],
        max_new_tokens: int | None = None,
        *,
        num_samples: int | None = None,
        **options: Any,
    ) -> str | list[str] | list[list[str]]:
        """Continues a text, or each of several; returns the new text.

        Args:
          prompts: a text, or a list of texts or lists of ids; "" begins a text.
          max_new_tokens: where to stop at the latest; None is what `defaults` say, or 64.
          num_samples: where given, so many new texts in a list take the place of each one.
          **options: fields of `SamplingOptions`, such as temperature (0 is greedy), top_p and seed;
            of `BeamOptions`, such as num_beams; and what `samples` takes: stop, batch_size,
            on_overflow, draft, num_drafted. What is left out is what `defaults` say, else what
            those classes do.

        Raises:
          NeoError: an empty prompt, unknown options, or more tokens than the context holds.
        """
        self._tokenizer  # noqa: B018  (raises where there is none to write text with)
        many = [prompts] if isinstance(prompts, str) else listed(prompts)
        sampling, others = self._filled(options | {"max_new_tokens": max_new_tokens})
        count = 1 if num_samples is None else num_samples
        found = self.samples(many, sampling=sampling, num_samples=count, **others)
        texts: list[Any] = [sample.text or "" for sample in found]
        if num_samples is not None:
            texts = [texts[first : first + count] for first in range(0, len(texts), count)]
        return texts[0] if isinstance(prompts, str) else texts

    def sample(self, *args: Any, **options: Any) -> list[Sample]:
        """Returns all of `samples`."""
        return list(self.samples(*args, **options))

    @takes(TextOptions)
    def samples(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int | None = None,
        num_samples: int = 1,
        sampling: SamplingOptions | Sequence[SamplingOptions] | None = None,
        *,
        on_finish: Callable[[int, list[Sample]], None] | None = None,
        beams: BeamOptions | None = None,
        draft: "LanguageModel | str | None" = None,
        **options: Any,
    ) -> Iterator[Sample]:
        """Like `generate`, with everything that is known of each completion.

        Sample i of a prompt is drawn with the seed `seed + i`. The samples of a prompt follow each
        other, in the order of the prompts. Without `sampling` all that is None is what `defaults`
        say.

        Args:
          prompts: texts or lists of ids.
          max_new_tokens: where to stop at the latest; None without defaults is 64.
          num_samples: for each prompt, which is read once.
          sampling: options, for all prompts or for each.
          on_finish: called with the index of each prompt and its samples as soon as these are
            there, in any order.
          beams: with more than one, the samples are the best texts that are found, best first.
          draft: a smaller model of the same tokens, or "prompt", whose proposals are judged
            together; the texts are distributed as without it.
          **options: other fields of `TextOptions`: stop (a text, or several, before the first of
            which a completion ends; () is none), batch_size, on_overflow, num_drafted, filter (a
            file of words before which a completion ends), filter_review.

        Raises:
          NeoError: before anything runs, as `generate`; also of counts below 1.
        """
        prompts = listed(prompts)
        check_names(options, names(TextOptions))
        options |= {"max_new_tokens": max_new_tokens}
        if sampling is None:
            searched = vars(beams) if isinstance(beams, BeamOptions) else {}
            sampling, options = self._filled({**options, **searched, "draft": draft})
            beams = options.get("beams", beams)
        options = {name: x for name, x in pick(options, TextOptions).items() if x is not None}
        text = TextOptions(**options | {"num_samples": num_samples})
        beams = BeamOptions() if beams is None else beams
        several = spread(sampling, len(prompts))
        check_together(several, text, beams, draft is not None)
        if text.stop or text.filter:
            self._tokenizer  # noqa: B018  (raises where there is none to read stops with)
        words = read_filter(text)
        return generate.samples(
            self.model,
            self.params,
            self.tokenizer,
            prompts,
            [fit(self.model, self.prompt_ids(prompt), text) for prompt in prompts],
            several,
            text,
            on_finish,
            make_strategy(
                beams,
                Draft(draft.model, draft.params) if isinstance(draft, LanguageModel) else draft,
                text.num_drafted,
            ),
            words,
        )

    @takes(SamplingOptions)
    def stream(
        self, prompt: Prompt, max_new_tokens: int | None = None, **options: Any
    ) -> Iterator[str]:
        """Yields the new text in whole characters as it comes.

        It is sampled as in `generate`; where `defaults` search with beams, the text is greedy.

        Args:
          prompt: a text or ids.
          max_new_tokens: where to stop at the latest; None is what `defaults` say, or 64.
          **options: those of `SamplingOptions`, stop, on_overflow, filter and filter_review; see
            `samples`.

        Raises:
          NeoError: as `generate`.
        """
        read_options(options)
        taken = [*names(SamplingOptions), "stop", "on_overflow", "filter", "filter_review"]
        if wrong := [name for name in options if name not in taken]:
            raise NeoError(f"a stream has no option '{wrong[0]}'; take `generate`.")
        said = options | {"max_new_tokens": max_new_tokens, "num_beams": 1}
        sampling, others = self._filled(said)
        text, tokenizer = TextOptions(**pick(others, TextOptions)), self._tokenizer
        ids = fit(self.model, self.prompt_ids(prompt), text)
        words = read_filter(text)
        return generate.stream(self.model, self.params, tokenizer, ids, sampling, text, words)

    @overload
    def score(self, texts: str, stride: int = ...) -> Score: ...  # type: ignore[overload-overlap]
    @overload
    def score(self, texts: Sequence[Prompt], stride: int = ...) -> list[Score]: ...
    def score(self, texts: str | Sequence[Prompt], stride: int = 0) -> Score | list[Score]:
        """Returns how well a text is predicted, or each of several, of any length.

        Args:
          texts: a text, or a list of texts or lists of ids.
          stride: see `neo_jax.text.score`; matters beyond the context only.
        """
        scores = list(self.scores([texts] if isinstance(texts, str) else texts, stride))
        return scores[0] if isinstance(texts, str) else scores

    def scores(self, texts: Sequence[Prompt], stride: int = 0) -> Iterator[Score]:
        """Like `score`, one at a time as they are computed."""
        texts, stride = listed(texts), checked("stride", stride, int)
        many = [self.encode(text) for text in texts]
        for text, ids, logprobs in zip(
            texts, many, score_ids(self.model, self.params, many, stride), strict=True
        ):
            loss = -float(logprobs.mean(dtype=np.float64)) if len(logprobs) else math.nan
            yield Score(ids, logprobs, loss, scored_bytes(self.tokenizer, text, ids))

    @overload
    def embed(  # type: ignore[overload-overlap]
        self, texts: str, layer: int = ..., pooling: Pooling = ..., normalize: bool = ...
    ) -> np.ndarray: ...
    @overload
    def embed(
        self, texts: Sequence[Prompt], layer: int = ..., pooling: Pooling = ...,
        normalize: bool = ...,
    ) -> list[np.ndarray]: ...  # fmt: skip
    def embed(
        self,
        texts: str | Sequence[Prompt],
        layer: int = -1,
        pooling: Pooling = "",
        normalize: bool = False,
    ) -> np.ndarray | list[np.ndarray]:
        """Returns hidden states as features, float32 [T, D] for a text, or for each of several.

        Args:
          texts: a text, or a list of texts or lists of ids, each within the context.
          layer: 0 is the embedding, i the output of block i, -1 the final LayerNorm's.
          pooling: "mean", "last" or "weighted" by position, for one vector [D] a text.
          normalize: divide each vector by its length.

        Raises:
          NeoError: no such layer or pooling, or more tokens than the context holds.
        """
        many = [self.encode(t) for t in ([texts] if isinstance(texts, str) else listed(texts))]
        states = inspection.hidden_states(self.model, self.params, many, layer, pooling, normalize)
        return states[0] if isinstance(texts, str) else states

    @overload
    def classify(self, texts: str, batch_size: int = ...) -> Classification: ...
    @overload
    def classify(self, texts: Sequence[Any], batch_size: int = ...) -> list[Classification]: ...
    def classify(
        self, texts: str | Sequence[Any], batch_size: int = 0
    ) -> Classification | list[Classification]:
        """Returns what a classifier says of a text, or of each of several.

        Args:
          texts: a text, or a list of texts, of pairs of texts, or of lists of ids. Of more tokens
            than the context holds the first are read, as in training.
          batch_size: rows of a forward pass; 0 is as many as have some thousand tokens together.

        Raises:
          NeoError: the model is no classifier of texts, or a text is empty.
        """
        many = [texts] if isinstance(texts, str) else listed(texts)
        ids = [self.encode(as_one_text(text))[: self.config.max_length] for text in many]
        logits = sequence_logits(self.model, self.params, ids, batch_size)
        found = [classification(row, self.config.head) for row in logits]
        return found[0] if isinstance(texts, str) else found

    def classify_tokens(self, texts: Sequence[str | Sequence[str]]) -> list[list[spans.WordLabel]]:
        """Returns what a classifier of words says of each word of texts, or of lists of words.

        Raises as `neo_jax.text.spans.label_words`.
        """
        return spans.label_words(self.model, self.params, self._tokenizer, listed(texts))

    def answer(self, question: str, context: str, **options: Any) -> spans.FoundAnswer:
        """Returns the part of a context that answers a question best; all else as `answers`."""
        return self.answers([(question, context)], **options)[0]

    def answers(
        self, questions: Sequence[tuple[str, str]], **options: Any
    ) -> list[spans.FoundAnswer]:
        """Returns the answers of pairs of question and context, see `text.spans.find_answers`."""
        pairs = listed(questions)
        return spans.find_answers(self.model, self.params, self._tokenizer, pairs, **options)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes a folder that `load` reads, and transformers too unless weights are int8.

        Args:
          folder: made where it does not exist; what it holds of a model is replaced.

        Raises:
          NeoError: the folder cannot be written.
        """
        write = save.save_int8 if is_quantized(self.params) else save.save_pretrained
        write(folder, self.config, self.params, tokenizer=self.tokenizer)
        if is_leader():
            self.defaults.save(make_path(folder))

    def attention(self, text: Prompt, layer: int) -> np.ndarray:
        """Returns what the heads of a layer attend to, float32 [N, T, T].

        Entry [n, t, s] is the share that the value of token s has in what head n gives for token
        t: 0 where t does not see s; over s they sum to 1.

        Args:
          text: a text or ids, within the context.
          layer: from 0; `config.layer_types[layer]` says whether it is global or local.

        Raises:
          NeoError: no such layer, or more tokens than the context holds.
        """
        return inspection.attention(self.model, self.params, self.encode(text), layer)

    def _filled(self, options: dict[str, Any]) -> tuple[SamplingOptions, dict[str, Any]]:
        """Returns what a caller says, and what `defaults` say of the rest; see `read_options`."""
        if self.defaults.ignored:
            ignored = ", ".join(self.defaults.ignored)
            warnings.warn(f"{defaults.FILE} has {ignored}, which is not followed.", stacklevel=3)
        unsaid = [n for n in ("max_new_tokens", "stop", "draft") if options.get(n, 0) is None]
        said = {name: value for name, value in options.items() if name not in unsaid}
        return read_options(self.defaults.fill(said))

    @property
    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise NeoError(
                f"{self.folder} holds no tokenizer; give prompts as token ids, or add its "
                "tokenizer.json, vocab.json and merges.txt, or .model file."
            )
        return self.tokenizer
