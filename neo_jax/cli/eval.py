"""neo-jax eval: how well a model predicts texts, and does the tasks of the harness."""

import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tyro.conf import OmitArgPrefixes

from neo_jax.cli import parse
from neo_jax.cli.cluster import ClusterOptions
from neo_jax.cli.eval_glue import run_glue
from neo_jax.cli.eval_noise import run_noise
from neo_jax.cli.options import TextModelOptions, check_picture, print_json, write_picture
from neo_jax.errors import NeoError, suggest
from neo_jax.evaluation.noise import NoiseOptions
from neo_jax.evaluation.tune_options import TuneOptions
from neo_jax.fields import check, number
from neo_jax.model.soft_prompt import text_context

if TYPE_CHECKING:
    from neo_jax.evaluation.harness import NeoLM
    from neo_jax.evaluation.texts import Total
    from neo_jax.text.language_model import LanguageModel

_SUITES = ("model-card",)


@dataclasses.dataclass(frozen=True)
class Options:
    """Evaluates a model: on texts, or on tasks of lm-evaluation-harness.

    Tasks need pip install 'neo_jax[eval]'. Their finished requests are kept on disk: a run that was
    interrupted goes on. Task files are programs: the functions that they name (!function) run here,
    so take them from people you trust.
    """

    text: tuple[str, ...] = ()  # files, folders or globs of .txt or .jsonl (The Pile's), also .zst
    wikitext: bool = False  # --text names WikiText's raw files, to detokenize as the harness does
    by_position: bool = False  # --text also by how many tokens of its document come before a token
    # tokens from window to window beyond the context; 0 is half the context
    stride: int = number(0, least=0)
    tasks: str = ""  # tasks and groups of the harness, as in lambada_openai,piqa
    # The folder of GLUE's or SuperGLUE's archives, a sub-folder a task, or "hub". A model is
    # fine-tuned on each task there, or on those of --tasks; with --num-fewshot it is only asked.
    glue: str = ""
    superglue: str = ""
    suite: str = ""  # model-card: the benchmarks of GPT-Neo's, next to what was published
    data: tuple[str, ...] = ()  # files of the suite's benchmarks, as in lambada=test.jsonl
    picture: str = ""  # a PNG of the results of the suite, of GLUE, or with noise
    include_path: str = ""  # a folder of further task files
    num_fewshot: int = -1  # examples before each question; -1 is as the task says
    # examples of each task, or a share of them where below 1; 0 is all
    limit: float = number(0.0, least=0)
    gen_kwargs: str = ""  # of generation, in the place of the tasks', as in max_gen_toks=64,seed=1
    output: str = ""  # a folder for results and samples, as the harness writes them
    cache: str = ""  # a file of finished requests; none keeps none; else ~/.cache/neo_jax
    # rows of a forward pass; 0 is as many as have some thousand tokens
    batch_size: int = number(0, least=0)
    json: bool = False  # print an object, not a table
    # of GLUE and SuperGLUE: how a model is fine-tuned on each task
    tune: OmitArgPrefixes[TuneOptions] = dataclasses.field(default_factory=TuneOptions)
    # of --text and --tasks: how well with noise
    noise: OmitArgPrefixes[NoiseOptions] = dataclasses.field(default_factory=NoiseOptions)
    # which model, and how to hold it
    model: OmitArgPrefixes[TextModelOptions] = dataclasses.field(default_factory=TextModelOptions)
    # where a mesh spans several processes; each of them runs the same command
    cluster: OmitArgPrefixes[ClusterOptions] = dataclasses.field(default_factory=ClusterOptions)

    def __post_init__(self) -> None:
        """Checks what goes together; raises `NeoError`."""
        is_glue = bool(self.glue or self.superglue)
        tasks = self.tasks and not is_glue
        if sum(map(bool, (self.text, tasks, self.suite, self.glue, self.superglue))) != 1:
            raise NeoError(
                "give either --text FILE or --tasks, as in: neo-jax eval --tasks piqa; or "
                "--suite model-card, or --glue FOLDER"
            )
        if self.tasks and not named_tasks(self.tasks):
            raise NeoError("--tasks names no task; write it as in --tasks piqa,lambada_openai.")
        if self.suite and self.suite not in _SUITES:
            raise NeoError(f"no suite is called '{self.suite}'.{suggest(self.suite, _SUITES)}")
        if self.data and not self.suite:
            raise NeoError("--data goes with --suite model-card.")
        if self.picture and not (self.suite or is_glue or self.noise.perturb):
            raise NeoError("--picture goes with --suite model-card, --glue or --perturb.")
        if self.noise.perturb and not (self.text or tasks):
            raise NeoError("--perturb goes with --text or --tasks.")
        if self.noise.perturb and self.by_position:
            raise NeoError("--by-position goes without --perturb.")
        if self.suite and self.gen_kwargs:
            raise NeoError("--gen-kwargs goes with --tasks; nothing of the suite is generated.")
        if self.by_position and not self.text:
            raise NeoError("--by-position goes with --text.")
        if self.wikitext and not self.text:
            raise NeoError("--wikitext goes with --text; among --tasks it is wikitext.")
        check(self)


def main(args: Sequence[str]) -> None:
    """Runs the verb."""
    options = parse(Options, "eval", args)
    is_glue = bool(options.glue or options.superglue)
    if not (options.text or is_glue):
        check_harness()
    check_picture(options.picture)
    run = _texts if options.text else _suite if options.suite else _tasks
    run = run_glue if is_glue else run_noise if options.noise.perturb else run
    with options.cluster.joined(options.model.is_split):
        run(options)


def check_harness() -> None:
    """Checks that the harness is installed.

    Raises:
      NeoError: it is not.
    """
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise NeoError(
            f"tasks need lm-evaluation-harness ({error}); pip install 'neo_jax[eval]'."
        ) from error


def _texts(options: Options) -> None:
    from neo_jax.evaluation.texts import Total, measure, read_documents, start_of_text

    lm = options.model.load()
    documents = read_documents(options.text, options.wikitext)
    totals: dict[str, Total] = {}
    everything = Total()
    for subset, total in measure(lm, documents, options.stride, options.batch_size):
        for each in (totals.setdefault(subset, Total()), everything):
            each.add(total)
    totals = {**(totals if len(totals) > 1 else {}), "all": everything}
    context = text_context(lm.model)
    how = {
        "model": options.model.model or "bundled",
        "context": context,
        "stride": options.stride or context // 2,
        "first_token_scored": bool(start_of_text(lm)),
        "wikitext": options.wikitext,
    }
    if options.json:
        subsets = {name: _fields(total) for name, total in totals.items()}
        after = {"by_position": _by_position(everything)} if options.by_position else {}
        print_json({**how, "subsets": subsets, **after})
        return
    head = ["", "documents", "tokens", "words", "bytes", "bits/byte", "ppl/token", "ppl/word"]
    print_columns([head, *([name, *_cells(total)] for name, total in totals.items())])
    first = "predicted from the end-of-text token" if how["first_token_scored"] else "not scored"
    print(f"context {context}, stride {how['stride']}; the first token of a document is {first}")
    if options.by_position:
        rows = [[f"{row['first']}-{row['last']}", str(row["tokens"]), f"{row['loss']:.4f}"]
                for row in _by_position(everything)]  # fmt: skip
        print_columns([["tokens before", "tokens", "nats/token"], *rows])


def _by_position(total: "Total") -> list[dict[str, Any]]:
    """Returns the loss, nats a token, by how many tokens of its document come before a token."""
    from neo_jax.evaluation.texts import SHORTEST

    return [
        {
            "first": last // 2 + 1 if last > SHORTEST else 1,
            "last": last,
            "tokens": tokens,
            "loss": total.nats_after[last] / tokens,
        }
        for last, tokens in sorted(total.tokens_after.items())
    ]


def _fields(total: "Total") -> dict[str, Any]:
    values = {
        "documents": total.documents,
        "tokens": total.tokens,
        "words": total.words,
        "bytes": total.num_bytes,
        "bits_per_byte": total.bits_per_byte,
        "token_perplexity": total.token_perplexity,
        "word_perplexity": total.word_perplexity,
    }
    return {k: v if math.isfinite(v) else None for k, v in values.items()}


def _cells(total: "Total") -> list[str]:
    counts = (total.documents, total.tokens, total.words, total.num_bytes)
    perplexities = (total.token_perplexity, total.word_perplexity)
    return [
        *map(str, counts),
        f"{total.bits_per_byte:.4f}",
        *(f"{perplexity:.6g}" for perplexity in perplexities),
    ]


def print_columns(rows: Sequence[Sequence[str]]) -> None:
    """Prints rows with their cells below each other, all but the first to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *rest in rows:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        print("  ".join([first.ljust(widths[0]), *cells]).rstrip())


def _tasks(options: Options) -> None:
    from neo_jax.evaluation import tasks

    names, manager = open_named(options)
    results = _run(options, options.model.load(), names, manager)
    if options.json:
        _print_results(results)
    else:
        print(tasks.table(results))


def open_named(options: Options) -> tuple[list[str], Any]:
    """Returns the tasks that are named, and the manager that knows them; raises as `find_tasks`."""
    from neo_jax.evaluation import tasks

    manager = tasks.open_tasks([options.include_path] if options.include_path else [])
    return tasks.find_tasks(named_tasks(options.tasks), manager), manager


def named_tasks(text: str) -> list[str]:
    """Returns the names of a list with commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def _suite(options: Options) -> None:
    from neo_jax.evaluation import card, reference_results, suite, tasks

    files = suite.read_data(options.data)
    manager = tasks.open_tasks([options.include_path] if options.include_path else [])
    loaded, left_out = suite.load_tasks(manager, files)
    for name, why in left_out.items():
        print(f"{name} is left out: {why}", file=sys.stderr)
    lm = options.model.load()
    results = _run(options, lm, list(loaded.values()), manager)
    beside = reference_results.find_published(lm.config)
    rows = card.rows(results, beside)
    if options.json:
        _print_results({**results, "model_card": card.describe(rows, beside, left_out)})
    else:
        print_columns(card.table(rows, beside))
        print(card.footer(beside))
    if options.picture:
        title = (options.model.model or "bundled").rstrip("/").rpartition("/")[2]
        write_picture(options.picture, card.draw(rows, beside, title))


def _run(
    options: Options, lm: "LanguageModel", names: Sequence[Any], manager: Any
) -> dict[str, Any]:
    """Returns the harness's results, of tasks or of their names."""
    from neo_jax.evaluation.harness import NeoLM

    model = NeoLM(lm, cache=options.cache, batch_size=options.batch_size or "auto")
    return run_tasks(options, model, names, manager, options.output)


def run_tasks(
    options: Options, model: "NeoLM", names: Sequence[Any], manager: Any, output: str
) -> dict[str, Any]:
    """Returns the harness's results of a model, which are written into a folder if one is named."""
    from neo_jax.evaluation import tasks

    results = tasks.run(
        model,
        names,
        manager,
        num_fewshot=None if options.num_fewshot < 0 else options.num_fewshot,
        limit=options.limit or None,
        gen_kwargs=options.gen_kwargs,
        output=output,
    )
    results.pop("samples", None)
    return results


def _print_results(results: dict[str, Any]) -> None:
    from lm_eval.utils import handle_non_serializable

    json.dump(results, sys.stdout, ensure_ascii=False, default=handle_non_serializable)
    print()
