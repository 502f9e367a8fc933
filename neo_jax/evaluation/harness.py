"""lm-evaluation-harness: its model interface over ours, and its command line with that registered.

    python -m neo_jax.evaluation.harness --model_args pretrained=FOLDER --tasks lambada_openai

takes the harness's own arguments. `--model_args` are the options of `neo_jax.load`; a mesh of
several axes is written as JSON: '{"pretrained": "gpt-neo-1.3b", "mesh": "data=2,model=4"}'.
"""

import dataclasses
import json
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from neo_jax.decode.sampling import SamplingOptions
from neo_jax.distributed import is_leader
from neo_jax.errors import NeoError, suggest
from neo_jax.evaluation import answers
from neo_jax.evaluation.continuations import Request, score_continuations
from neo_jax.language_model import LanguageModel, load
from neo_jax.scoring import token_logprobs

_NEW_TOKENS = 256  # where a task does not say, as the harness's other models have it
_GENERATED_TOGETHER = 16
_SAMPLING = {field.name for field in dataclasses.fields(SamplingOptions)}


@register_model("neo_jax")
class NeoLM(TemplateLM):
    """A GPT-Neo as the harness sees one.

    Args:
      pretrained: see `neo_jax.load`, as for the next ones; a loaded model is taken as it is.
      revision: of a hub repository.
      dtype: "auto", "float32" or "bfloat16".
      kernel: the attention implementation.
      mesh: devices to split the model over.
      rules: how it is split.
      quantize: "none" or "int8".
      cache: a file of finished requests, or "none".
      batch_size: requests of one forward pass; "auto" is as many as have some thousand tokens.
      max_batch_size: not used, as the next one; the harness tells them to every model.
      device: JAX chooses.

    Raises:
      NeoError: what `neo_jax.load` raises, or a batch size that is none.
    """

    def __init__(
        self,
        pretrained: str | LanguageModel = "",
        revision: str = "",
        dtype: str = "auto",
        kernel: str = "auto",
        mesh: str = "",
        rules: str = "",
        quantize: str = "none",
        cache: str = "",
        batch_size: str | int = "auto",
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        """Loads the model."""
        super().__init__()
        self.batch_size = batch_size
        self._rows = 0 if str(batch_size).startswith("auto") else _whole(batch_size)
        if isinstance(pretrained, LanguageModel):
            self.lm = pretrained
        else:
            self.lm = load(
                pretrained or None,
                revision=revision or None,
                dtype=dtype,
                kernel=kernel,  # type: ignore[arg-type]
                mesh=mesh,
                rules=rules,
                quantize=quantize,  # type: ignore[arg-type]
            )
        self._answers = _open_answers(cache, self.lm)

    @property
    def max_length(self) -> int:
        """The context, in tokens."""
        return self.lm.config.max_length

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
        """Returns (log p in nats, is greedy) of each request's continuation after its context."""
        pairs = [self._pair(request) for request in requests]
        return self._loglikelihood_tokens(
            [(request.args, *pair) for request, pair in zip(requests, pairs, strict=True)],
            disable_tqdm=disable_tqdm,
        )

    def _pair(self, request: Any) -> Request:
        context, continuation = request.args
        if context:
            pair = Request(*self._encode_pair(context, continuation))
        else:
            start, ids = self.prefix_token_id, self.tok_encode(continuation)
            pair = Request([start], ids[1:] if ids[:1] == [start] else ids)
        where = f"task '{request.task_name}', example {request.doc_id}"
        if not pair.context or not pair.continuation:
            raise NeoError(
                f"{where}: the continuation {continuation!r} is empty; correct the task."
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
        pairs = [Request(context, continuation) for _, context, continuation in requests]
        cut = sum(len(p.context) + len(p.continuation) > self.max_length + 1 for p in pairs)
        if cut:
            _tell(f"{cut} of {len(pairs)} contexts are too long and lose their beginning.")

        def compute(missing: list[Request]) -> Iterator[tuple[int, Any]]:
            return score_continuations(self.lm.model, self.lm.params, missing, self._rows)

        keys = [("loglikelihood", *pair) for pair in pairs]
        found = self._finish(keys, pairs, compute, disable_tqdm)
        return [(logprob, greedy) for logprob, greedy in found]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Returns log p in nats of each whole text, by windows that share one token."""
        texts = [[self.prefix_token_id, *self.tok_encode(request.args[0])] for request in requests]

        def compute(missing: list[list[int]]) -> Iterator[tuple[int, float]]:
            scores = token_logprobs(
                self.lm.model, self.lm.params, missing, self.max_length, self._rows
            )
            return ((i, float(row.sum(dtype="float64"))) for i, row in enumerate(scores))

        keys = [("loglikelihood_rolling", ids) for ids in texts]
        return self._finish(keys, texts, compute, disable_tqdm)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Returns how the model goes on, up to the first stop string; greedily unless told."""
        asked = [self._generation(request) for request in requests]

        def compute(missing: list[Any]) -> Iterator[tuple[int, str]]:
            groups = defaultdict(list)
            for i, (_, options) in enumerate(missing):
                groups[options].append(i)
            for said, members in groups.items():
                options = json.loads(said)
                samples = self.lm.samples(
                    [missing[i][0] for i in members],
                    options["new"],
                    sampling=SamplingOptions(**options["sampling"]),
                    stop=options["stops"],
                    batch_size=self._rows or _GENERATED_TOGETHER,
                )
                yield from ((i, s.text or "") for i, s in zip(members, samples, strict=True))

        keys = [("generate_until", ids, options) for ids, options in asked]
        return self._finish(keys, asked, compute, disable_tqdm)

    def _generation(self, request: Any) -> tuple[list[int], str]:
        """The prompt's ids as far as there is room for them, and the options as JSON."""
        prompt, wanted = request.args
        where = f"task '{request.task_name}'"
        options = dict(wanted)
        stops = options.pop("until", None) or []
        new = options.pop("max_gen_toks", _NEW_TOKENS)
        if not 0 < new < self.max_length:
            raise NeoError(
                f"{where} asks for {new} new tokens, the model's context is {self.max_length}; "
                "give for example --gen-kwargs max_gen_toks=64."
            )
        sampling = {"temperature": 0.0, "top_p": 1.0}
        if not options.pop("do_sample", options.get("temperature", 0) > 0):
            options.pop("temperature", None)
        for name, value in options.items():
            if name not in _SAMPLING:
                raise NeoError(f"{where} asks for '{name}'.{suggest(name, _SAMPLING)}")
            sampling[name] = value
        ids = self.tok_encode(prompt)[-(self.max_length - new) :] or [self.prefix_token_id]
        stops = [stops] if isinstance(stops, str) else [stop for stop in stops if stop]
        return ids, json.dumps({"stops": stops, "new": new, "sampling": sampling}, sort_keys=True)

    def _finish(
        self,
        keys: Sequence[answers.Request],
        asked: Sequence[Any],
        compute: Callable[[list[Any]], Iterator[tuple[int, Any]]],
        quiet: bool,
    ) -> list[Any]:
        """Returns the answer to all that is asked, of which what is not on disk is computed."""
        known = self._answers
        found = [known.find(key) if known else None for key in keys]
        missing = [i for i, answer in enumerate(found) if answer is None]
        bar = tqdm(total=len(keys), initial=len(keys) - len(missing), disable=quiet)
        for i, answer in compute([asked[i] for i in missing]):
            found[missing[i]] = answer
            if known:
                known.add(keys[missing[i]], answer)
            bar.update()
        bar.close()
        return found

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes of the model beside its results."""
        model = self.lm.model
        return {
            "model_num_parameters": sum(x.size for x in jax.tree.leaves(self.lm.params)),
            "model_dtype": str(jax.numpy.dtype(model.dtype)),
            "model_mesh": str(dict(model.sharding.mesh.shape)) if model.sharding else "",
        }


def _whole(batch_size: str | int) -> int:
    if not str(batch_size).isdecimal() or not int(batch_size):
        raise NeoError(f"the batch size '{batch_size}' is neither auto nor a whole number from 1.")
    return int(batch_size)


def _open_answers(cache: str, lm: LanguageModel) -> answers.Answers | None:
    if cache == "none" or jax.process_count() > 1:
        return None
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(cache) if cache else Path(home) / "neo_jax" / "answers.sqlite"
    return answers.Answers(path, answers.fingerprint(lm.model, lm.params))


def _tell(line: str) -> None:
    if is_leader():
        print(line, file=sys.stderr, flush=True)


def main() -> int:
    """Runs the harness's command line; returns the exit status."""
    from lm_eval.__main__ import cli_evaluate

    # Its bootstrap forks, which beside JAX's threads may never end.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    args = sys.argv[1:]
    command = args[:1] if args[:1] in (["run"], ["ls"], ["validate"]) else ["run"]
    rest = args[1:] if args[:1] == command else args
    if command == ["run"]:
        for option, short, default in (
            ("--model", "-M", "neo_jax"),
            ("--batch_size", "-b", "auto"),
        ):
            if not any(arg.split("=")[0] in (option, short) for arg in rest):
                rest = [option, default, *rest]
    sys.argv[1:] = [*command, *rest]
    try:
        cli_evaluate()
    except NeoError as error:
        print(f"neo-jax: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
