"""neo-jax generate: continue a prompt, or many."""

import contextlib
import dataclasses
import itertools
import sys
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import jax
from tyro.conf import OmitArgPrefixes, Positional, UseAppendAction, arg

from neo_jax import __version__
from neo_jax.checkpoints.checksums import checksums
from neo_jax.cli import UsageError, parse
from neo_jax.cli.cluster import ClusterOptions
from neo_jax.cli.options import (
    TextModelOptions,
    check_output,
    output_lines,
    print_json,
    read_prompts,
    said_in,
    with_features_of,
)
from neo_jax.cli.sample_file import keeps, kept_samples
from neo_jax.decode.options import BeamOptions, SamplingOptions
from neo_jax.devices.processes import is_leader, say
from neo_jax.devices.signals import WATCH
from neo_jax.errors import NeoError
from neo_jax.model.soft_prompt import text_context
from neo_jax.text.generate import fit
from neo_jax.text.options import TextOptions, check_together, pick, read_filter

if TYPE_CHECKING:
    from neo_jax.text.language_model import LanguageModel, Prompt, Sample

    OnFinish = Callable[[int, list[Sample]], None]

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Options(TextOptions):
    """Continues a prompt, or each line of a file, with a GPT-Neo."""

    # the text to continue; "" begins one; - or none is what is piped in
    prompt: Annotated[Positional[tuple[str, ...]], arg(metavar="[PROMPT]")] = ()
    prompts_file: str = ""  # many: .txt, a prompt a line; or .jsonl, {"prompt": ...}, {"ids": ...}
    # .npy, a row for each prompt, or of one prompt for as many texts: what a mapper reads first
    features: str = ""
    # a .jsonl file for the samples, with ids and log-probabilities; an interrupted run goes on
    output: str = ""
    json: bool = False  # print samples as JSON lines
    # a smaller model of the same tokens whose proposals are judged together; or prompt, which
    # looks them up in the text: quicker, with the same distribution
    draft_model: str = ""
    defaults: bool = True  # options that are left out are those of the model's own configuration
    # which model, and how to hold it
    model: OmitArgPrefixes[TextModelOptions] = dataclasses.field(default_factory=TextModelOptions)
    # how tokens are chosen
    sampling: OmitArgPrefixes[SamplingOptions] = dataclasses.field(default_factory=SamplingOptions)
    # search of the likeliest text, instead of sampling
    beams: OmitArgPrefixes[BeamOptions] = dataclasses.field(default_factory=BeamOptions)
    # where a mesh spans several processes; each of them runs the same command
    cluster: OmitArgPrefixes[ClusterOptions] = dataclasses.field(default_factory=ClusterOptions)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_together([self.sampling], self, self.beams, bool(self.draft_model))


def main(args: Sequence[str]) -> None:
    """Runs the verb."""
    options = parse(UseAppendAction[Options], "generate", args)
    if len(options.prompt) > 1:
        words = " ".join(options.prompt)
        raise UsageError(
            f"put a text of several words in quotes, as in: neo-jax generate '{words}'"
        )
    if options.prompt and options.prompts_file:
        raise UsageError(_EITHER)
    prompts: list[Prompt] = (
        list(read_prompts(options.prompts_file, "prompt"))
        if options.prompts_file
        else [*options.prompt]
        if options.prompt not in ((), ("-",))
        else [_piped()]
    )
    check_output(options.output, options.prompts_file)
    with options.cluster.joined(options.model.is_split):
        _generate(prompts, options, said_in(args))


_EITHER = "give either a prompt or --prompts-file, as in: neo-jax generate 'Hello'"


def _piped() -> str:
    """Returns the text on stdin, without the end of its last line."""
    text = ""
    with contextlib.suppress(OSError):  # closed, or not for reading
        text = "" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.read()
    if not text:
        raise UsageError(_EITHER)
    return text.removesuffix("\n")


def _generate(prompts: Sequence["Prompt"], options: Options, said: Container[str]) -> None:
    lm = options.model.load()
    if options.defaults:
        options = _filled(lm, options, said)
    draft: LanguageModel | str | None = options.draft_model or None
    if draft and draft != "prompt":
        model = dataclasses.replace(options.model, model=options.draft_model, revision="")
        draft = model.load()
    shown: dict[tuple[int, ...], Prompt] = {}  # prompts as they were given, where they are longer
    if options.features:
        given = prompts
        lm, prompts = with_features_of(lm, options.features, given)
        given = [*given] * (len(prompts) // len(given))
        shown = {tuple(map(int, ids)): each for ids, each in zip(prompts, given, strict=True)}
    # All at once: no text is written before the last prompt is known to fit.
    cut = 0
    for number, prompt in enumerate(prompts, 1):
        try:
            ids = lm.prompt_ids(prompt)
            cut += len(fit(lm.model, ids, options)) < len(ids)
        except NeoError as error:
            where = f"{options.prompts_file}, prompt {number}: " if options.prompts_file else ""
            raise NeoError(f"{where}{error}") from error
    if cut:
        room = text_context(lm.model) - options.max_new_tokens
        say(f"{cut} of {len(prompts)} prompts cut to their newest {room} tokens")
    plain = not (options.json or options.output)
    one = (
        not draft
        and options.beams.num_beams == 1
        and len(prompts) == options.num_samples == jax.process_count() == 1
        and not shown
    )
    if plain and one and sys.stdout.isatty():
        _stream(lm, prompts[0], options)
    else:
        _write(lm, draft, prompts, options, plain, shown)


def _filled(lm: "LanguageModel", options: Options, said: Container[str]) -> Options:
    """Returns options with the model's defaults where the command says nothing; reports these."""
    sampling, beams = dataclasses.asdict(options.sampling), dataclasses.asdict(options.beams)
    values = {"max_new_tokens": options.max_new_tokens, "stop": options.stop, **sampling, **beams}
    given = {name: value for name, value in values.items() if name in said}
    given |= {"draft": options.draft_model} if options.draft_model else {}
    if line := lm.defaults.report(given):
        say(line)
    taken = values | lm.defaults.fill(given)
    return dataclasses.replace(
        options,
        max_new_tokens=taken["max_new_tokens"],
        stop=taken["stop"],
        sampling=SamplingOptions(**{name: taken[name] for name in sampling}),
        beams=BeamOptions(**{name: taken[name] for name in beams}),
    )


def _stream(lm: "LanguageModel", prompt: "Prompt", options: Options) -> None:
    texts = lm.stream(
        prompt,
        options.max_new_tokens,
        stop=options.stop,
        on_overflow=options.on_overflow,
        filter=options.filter,
        filter_review=options.filter_review,
        **dataclasses.asdict(options.sampling),
    )
    for text in itertools.chain([prompt], _announced(texts)):
        print(text, end="", flush=True)
    print()


def _announced(items: Iterator[T]) -> Iterator[T]:
    """Yields items; a terminal's stderr says what happens until the first is there."""
    shows = is_leader() and sys.stderr.isatty()
    if shows:
        print("\0337 (compiling…)", end="", file=sys.stderr, flush=True)
    for i, item in enumerate(items):
        if shows and i == 0:
            print("\0338\033[J", end="", file=sys.stderr, flush=True)  # back, and clear
        yield item


def _write(
    lm: "LanguageModel",
    draft: "LanguageModel | str | None",
    prompts: Sequence["Prompt"],
    options: Options,
    plain: bool,
    shown: Mapping[tuple[int, ...], "Prompt"],
) -> None:
    drafted = accepted = 0

    def samples(prompts: Sequence["Prompt"], on_finish: "OnFinish") -> Iterator["Sample"]:
        def count(index: int, done: list["Sample"]) -> None:
            nonlocal drafted, accepted
            drafted += sum(sample.drafted or 0 for sample in done)
            accepted += sum(sample.accepted or 0 for sample in done)
            on_finish(index, [named(sample) for sample in done])

        found = lm.samples(
            prompts,
            sampling=options.sampling,
            on_finish=count,
            beams=options.beams,
            draft=draft,
            **pick(vars(options), TextOptions),
        )
        return map(named, found)

    def named(sample: "Sample") -> "Sample":
        prompt = shown.get(tuple(map(int, sample.prompt))) if shown else None
        return dataclasses.replace(sample, prompt=prompt) if prompt else sample

    if keeps(options.output):
        _keep(samples, prompts, options.output, _what_decides(lm, draft, prompts, options))
    else:
        _print(samples(prompts, lambda index, done: None), options.output, plain)
    if drafted:
        say(f"{accepted} of {drafted} drafted tokens taken, {accepted / drafted:.0%}")


def _print(samples: Iterator["Sample"], output: str, plain: bool) -> None:
    """Writes samples one after another, in the order of the prompts."""
    with output_lines(output) as file:
        for sample in _announced(samples):
            if plain:
                new = sample.ids if sample.text is None else sample.text
                print(f"{sample.prompt}{new}", file=file, flush=True)
            else:
                print_json(sample.fields(), file)


def _keep(
    samples: Callable[[Sequence["Prompt"], "OnFinish"], Iterator["Sample"]],
    prompts: Sequence["Prompt"],
    output: str,
    run: Any,
) -> None:
    """Writes samples to a file, and goes on with those that are kept of the same run."""
    with kept_samples(output, run, len(prompts)) as kept:
        there = set(kept.done)
        left = [i for i in range(len(prompts)) if i not in there]
        with show_progress(len(there), len(prompts), is_leader()) as advance:

            def finish(index: int, done: list["Sample"]) -> None:
                kept.add(left[index], [sample.fields() for sample in done])
                WATCH.hint = "; what is done is kept, and the same command goes on from there"
                advance(done)

            for _ in samples([prompts[i] for i in left], finish):
                pass  # it is kept


def _what_decides(
    lm: "LanguageModel",
    draft: "LanguageModel | str | None",
    prompts: Sequence["Prompt"],
    options: Options,
) -> Any:
    """What the samples depend on: the command, the prompts, and all that was loaded."""
    command = dataclasses.asdict(options)
    for name in (
        "output", "json", "batch_size", "prompts_file", "cluster", "filter_review", "features"
    ):  # fmt: skip
        del command[name]
    words = read_filter(dataclasses.replace(options, filter_review=""))
    command["filter"] = words and words.words  # whatever file holds them
    del command["model"]["tokenizer"]  # what it names is loaded
    command["prompt"] = ""  # it is one of the prompts
    for group in (command, command["sampling"]):
        for name in _LATER & group.keys():
            if not group[name]:
                del group[name]
    models = [lm] if isinstance(draft, str | None) else [lm, draft]
    loaded = [
        [
            {n: x for n, x in dataclasses.asdict(each.config).items() if n != "head"},
            str(each.model.dtype),
            str(each.model.cache_dtype),
            checksums(each.params),  # of weights with adapters merged, whatever files they are of
            each.tokenizer and each.tokenizer.decode(list(range(each.tokenizer.vocab_size))),
        ]
        for each in models
    ]
    return [__version__, command, prompts, [lm.prompt_ids(prompt) for prompt in prompts], loaded]


_LATER = frozenset(["presence_penalty", "frequency_penalty", "logit_bias", "ignore_eos", "filter"])
"""Options that a file which was begun before them knows nothing of: off, they change no sample."""


@contextlib.contextmanager
def show_progress(done: int, total: int, show: bool) -> Iterator[Callable[[list["Sample"]], None]]:
    """Shows on stderr how many prompts are done: a bar, or a line now and then."""
    if not show:
        yield lambda samples: None
        return
    if done:
        print(f"{done}/{total} prompts are there; going on", file=sys.stderr)
    begin = last = time.monotonic()
    tokens = 0

    def advance_by(report: Callable[[str], Any], every: float) -> Callable[[list["Sample"]], None]:
        def advance(samples: list["Sample"]) -> None:
            nonlocal done, last, tokens
            done, tokens = done + 1, tokens + sum(len(sample.ids) for sample in samples)
            now = time.monotonic()
            if done == total or now - last >= every:
                last = now
                report(f"{done}/{total} prompts, {tokens / (now - begin):.1f} tokens/s")

        return advance

    if not sys.stderr.isatty():
        yield advance_by(lambda words: print(words, file=sys.stderr, flush=True), _REPORT_EVERY)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(f"{done}/{total} prompts", total=total)
        yield advance_by(lambda words: bar.update(task, description=words, completed=done), every=0)


_REPORT_EVERY = 10.0  # seconds
