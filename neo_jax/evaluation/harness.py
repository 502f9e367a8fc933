"""lm-evaluation-harness: its model interface over ours, and its command line with that registered.

    python -m neo_jax.evaluation.harness --model_args pretrained=FOLDER --tasks lambada_openai

takes the harness's own arguments. `--model_args` are the options of `neo_jax.load`; a mesh of
several axes is written as JSON: '{"pretrained": "gpt-neo-1.3b", "mesh": "data=2,model=4"}'.
"""

import dataclasses
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from neo_jax.checkpoints.options import LoadOptions
from neo_jax.decode.options import BeamOptions, SamplingOptions
from neo_jax.devices.processes import say
from neo_jax.errors import NeoError, brief, checked, suggest
from neo_jax.evaluation.loglikelihood import Continuation, score_continuations
from neo_jax.evaluation.response_cache import Answers, Form, Question, fingerprint
from neo_jax.files.paths import cache_folder, make_path
from neo_jax.model.soft_prompt import text_context
from neo_jax.text.language_model import LanguageModel
from neo_jax.text.load import load
from neo_jax.text.options import TextOptions, check_together, read_options, reseeded
from neo_jax.text.score import score_ids

_NEW_TOKENS = 256  # where a task does not say, as the harness's other models have it
_GENERATED_TOGETHER = 16
_NEW_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_DRAWN = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}  # transformers', where a text is drawn


@register_model("neo_jax")
class NeoLM(TemplateLM):
    """A GPT-Neo as the harness sees one.

    Args:
      pretrained: see `neo_jax.load`; a loaded model is taken as it is.
      cache: a file of finished requests, or "none".
      batch_size: requests of one forward pass; "auto" is as many as have some thousand tokens.
      max_batch_size: not used, as the next one; the harness gives them to every model.
      device: JAX chooses.
      options: the other arguments of `neo_jax.load`.

    Raises:
      NeoError: what `neo_jax.load` raises, an unknown option, a batch size that is none, or the
        model is a classifier.
    """

    def __init__(
        self,
        pretrained: str | LanguageModel = "",
        cache: str = "",
        batch_size: str | int = "auto",
        max_batch_size: int | None = None,
        device: str | None = None,
        **options: Any,
    ) -> None:
        """Loads the model."""
        super().__init__()
        known = {field.name for field in dataclasses.fields(LoadOptions)} - {"model"}
        for name in options:
            if name not in known:
                raise NeoError(f"the model has no option '{name}'.{suggest(name, known)}")
        self.batch_size = batch_size
        self._rows = 0 if str(batch_size).startswith("auto") else _whole(batch_size)
        if isinstance(pretrained, LanguageModel):
            self.lm = pretrained
        else:
            self.lm = load(pretrained or None, **options)
        self.lm.config.head.check_writes()
        self._answers: Answers | None = None
        if cache != "none" and jax.process_count() == 1:
            path = make_path(cache) if cache else cache_folder() / "answers.sqlite"
            model = fingerprint(self.lm.model, self.lm.params, self.lm.tokenizer)
            self._answers = Answers(path, model)

    @property
    def max_length(self) -> int:
        """The context, in tokens."""
        return text_context(self.lm.model)

    @property
    def eot_token_id(self) -> int:
        """The end of text, before which nothing is known."""
        tokenizer = self.lm.tokenizer
        end = tokenizer.eos_id if tokenizer else None
        if end is None:
            raise NeoError(
                f"{self.lm.folder} has no end-of-text token, with which texts begin here; name "
                "one as eos_token in its tokenizer_config.json."
            )
        return end

    @property
    def tokenizer_name(self) -> str:
        """The checkpoint's folder."""
        return str(self.lm.folder).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Returns the ids of a text, without special tokens."""
        return self.lm.encode(string, add_special_tokens=False) if string else []

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[Any]:
        """Returns (log p in nats, is greedy) of each request's continuation after its context.

        They are encoded together, as the harness does it. Where that leaves the continuation no
        token, for its text belongs to the context's last one, it is encoded by itself.
        """
        pairs = [self._pair(request) for request in requests]
        return self._loglikelihood_tokens(
            [(request.args, *pair) for request, pair in zip(requests, pairs, strict=True)],
            disable_tqdm=disable_tqdm,
        )

    def _pair(self, request: Any) -> Continuation:
        context, continuation = request.args
        where = f"task '{request.task_name}', example {request.doc_id}"
        if not continuation:
            raise NeoError(f"{where}: the continuation '' is empty; correct the task.")
        stripped = context.rstrip()
        continuation = context[len(stripped) :] + continuation
        if stripped:
            ids, new = self._encode_pair(stripped, continuation)
            pair = Continuation(ids, new or self.tok_encode(continuation))
        else:
            start, ids = self.prefix_token_id, self.tok_encode(continuation)
            pair = Continuation([start], ids[1:] if ids[:1] == [start] else ids)
        if not pair.continuation:
            raise NeoError(
                f"{where}: the continuation {brief(continuation)} is what a text begins with, and "
                "has no likelihood; correct the task."
            )
        if len(pair.continuation) > self.max_length:
            raise NeoError(
                f"{where}: the continuation has {len(pair.continuation)} tokens, the model's "
                f"context {self.max_length}; take a model with a longer one, or leave it out."
            )
        return pair

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        pairs = [Continuation(context, continuation) for _, context, continuation in requests]
        cut = sum(len(p.context) + len(p.continuation) > self.max_length + 1 for p in pairs)
        if cut:
            say(f"{cut} of {len(pairs)} contexts are too long and lose their beginning.")

        def compute(missing: list[Continuation]) -> Iterator[tuple[int, Any]]:
            return score_continuations(self.lm.model, self.lm.params, missing, self._rows)

        keys = [("loglikelihood", *pair) for pair in pairs]
        found = self._finish(keys, pairs, compute, (float, bool), disable_tqdm)
        return [(logprob, greedy) for logprob, greedy in found]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Returns log p in nats of each whole text, by windows that share one token."""
        texts = [[self.prefix_token_id, *self.tok_encode(request.args[0])] for request in requests]

        def compute(missing: list[list[int]]) -> Iterator[tuple[int, float]]:
            scores = score_ids(self.lm.model, self.lm.params, missing, self.max_length, self._rows)
            return ((i, float(row.sum(dtype="float64"))) for i, row in enumerate(scores))

        keys = [("loglikelihood_rolling", ids) for ids in texts]
        return self._finish(keys, texts, compute, float, disable_tqdm)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Returns how the model goes on, up to the first stop string; greedily by default.

        A request that is drawn and repeated gets another draw each time: the i-th is that of
        `seed + i`.
        """
        wanted = _drawn_apart([self._generation(request) for request in requests])

        def compute(missing: list[_Generation]) -> Iterator[tuple[int, str]]:
            groups = defaultdict(list)
            for i, generation in enumerate(missing):
                groups[repr(generation.arguments)].append(i)
            for members in groups.values():
                samples = self.lm.samples(
                    [missing[i].ids for i in members],
                    sampling=[missing[i].sampling for i in members],
                    batch_size=self._rows or _GENERATED_TOGETHER,
                    **missing[members[0]].arguments,
                )
                yield from ((i, s.text or "") for i, s in zip(members, samples, strict=True))

        keys = [("generate_until", repr(generation)) for generation in wanted]
        return self._finish(keys, wanted, compute, str, disable_tqdm)

    def _generation(self, request: Any) -> "_Generation":
        """What a request means, with the prompt's ids as far as there is room for them."""
        prompt, options = request.args
        where = f"task '{request.task_name}'"
        try:
            sampling, arguments = _read_options(options)
        except NeoError as error:
            raise NeoError(f"{where}: {error}") from error
        new = arguments["max_new_tokens"]
        if not 0 < new < self.max_length:
            raise NeoError(
                f"{where} requests {new} new tokens, the model's context is {self.max_length}; "
                "give for example --gen-kwargs max_gen_toks=64."
            )
        ids = self.tok_encode(prompt)[-(self.max_length - new) :] or [self.prefix_token_id]
        return _Generation(ids, sampling, arguments)

    def _finish(
        self,
        keys: Sequence[Question],
        requests: Sequence[Any],
        compute: Callable[[list[Any]], Iterator[tuple[int, Any]]],
        form: Form,
        quiet: bool,
    ) -> list[Any]:
        """Returns the answers to all requests, of which those that are not on disk are computed."""
        known = self._answers
        found = [known.find(key, form) if known else None for key in keys]
        if known and known.damaged:
            say(f"{known.damaged} finished requests on disk are damaged and computed again.")
            known.damaged = 0
        missing = [i for i, answer in enumerate(found) if answer is None]
        with tqdm(total=len(keys), initial=len(keys) - len(missing), disable=quiet) as bar:
            for i, answer in compute([requests[i] for i in missing]):
                found[missing[i]] = answer
                if known:
                    known.add(keys[missing[i]], answer)
                bar.update()
        return found

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes of the model next to its results."""
        model = self.lm.model
        return {
            "model_num_parameters": sum(x.size for x in jax.tree.leaves(self.lm.params)),
            "model_dtype": str(jax.numpy.dtype(model.dtype)),
            "model_mesh": str(dict(model.sharding.mesh.shape)) if model.sharding else "",
        }


class _Generation(NamedTuple):
    """What a request to go on means; its `repr` tells it from every other."""

    ids: list[int]
    sampling: SamplingOptions
    arguments: dict[str, Any]  # of `LanguageModel.samples`


def _read_options(arguments: Mapping[str, Any]) -> tuple[SamplingOptions, dict[str, Any]]:
    """Returns what arguments of generation mean, by the names that the harness's models take.

    As with its PyTorch model a text is drawn where `do_sample` or else a temperature says so, and
    what is not said is as in transformers.

    Raises:
      NeoError: an unknown name, names that contradict each other, or a value that cannot be.
    """
    options = {name: value for name, value in arguments.items() if value is not None}
    new = checked("max_gen_toks", _one_of(options, _NEW_NAMES, _NEW_TOKENS), int)
    stops = _one_of(options, ("until", "stop"), [])
    stops = stops if isinstance(stops, list | tuple) else [stops]
    draws = options.pop("do_sample", bool(options.get("temperature")))
    if not isinstance(draws, bool):
        raise NeoError(f"do_sample must be true or false, not {brief(draws)}.")
    if draws and options.get("temperature") != 0:
        options = _DRAWN | options
    else:
        options = {n: v for n, v in options.items() if n not in (*_DRAWN, "min_p", "seed")}
        options["temperature"] = 0.0
    sampling, arguments = read_options(options)
    text = TextOptions(max(new, 1), stop=tuple(stop for stop in stops if stop))
    check_together([sampling], text, arguments.get("beams", BeamOptions()), has_draft=False)
    return sampling, {**arguments, "max_new_tokens": new, "stop": text.stop}


def _one_of(options: dict[str, Any], names: Sequence[str], default: Any) -> Any:
    """Takes the value of one of several names of the same out of options."""
    found = {name: options.pop(name) for name in names if name in options}
    first, *others = found or [""]
    for other in others:
        if found[other] != found[first]:
            raise NeoError(
                f"{first} is {brief(found[first])} and {other} {brief(found[other])}, which mean "
                "the same; give one of them, in --gen-kwargs the one that the task has."
            )
    return found.get(first, default)


def _drawn_apart(wanted: Sequence[_Generation]) -> list[_Generation]:
    """Gives equal requests whose texts are drawn a seed each."""
    drawn = Counter[str]()
    apart = []
    for generation in wanted:
        same, sampling = repr(generation), generation.sampling
        if sampling.temperature > 0:
            generation = generation._replace(sampling=reseeded(sampling, drawn[same]))
            drawn[same] += 1
        apart.append(generation)
    return apart


def _whole(batch_size: str | int) -> int:
    if not str(batch_size).isdecimal() or not int(batch_size):
        raise NeoError(f"the batch size '{batch_size}' is neither auto nor a whole number from 1.")
    return int(batch_size)


def main() -> int:
    """Runs the harness's command line; returns the exit status."""
    from lm_eval.__main__ import cli_evaluate

    # Its bootstrap forks, which next to JAX's threads may never end.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    command, *rest = sys.argv[1:] or ["run"]
    if command not in ("run", "ls", "validate"):
        command, rest = "run", sys.argv[1:]
    if command == "run":
        given = {arg.split("=")[0] for arg in rest}
        rest = ["--model", "neo_jax", *rest] if not given & {"--model", "-M"} else rest
        rest = ["--batch_size", "auto", *rest] if not given & {"--batch_size", "-b"} else rest
    sys.argv[1:] = [command, *rest]
    try:
        cli_evaluate()
    except NeoError as error:
        print(f"neo-jax: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
