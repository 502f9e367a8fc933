"""neo-jax generate: continue a prompt, or many."""

import dataclasses
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
from tyro.conf import OmitArgPrefixes, Positional

from neo_jax.cli import UsageError, parse
from neo_jax.cli.cluster import ClusterOptions
from neo_jax.cli.options import ModelOptions, check_output, output_lines, print_json, read_prompts
from neo_jax.decode.engine import check_prompts
from neo_jax.decode.sampling import SamplingOptions
from neo_jax.distributed import is_leader

if TYPE_CHECKING:
    from neo_jax.language_model import LanguageModel, Prompt


@dataclasses.dataclass(frozen=True)
class Options:
    """Continues a prompt, or each line of a file, with a GPT-Neo."""

    prompt: Positional[str] = ""  # the text to continue
    prompts_file: str = ""  # many: .txt, a prompt a line; or .jsonl, {"prompt": ...}, {"ids": ...}
    output: str = ""  # a .jsonl file for the samples, with ids and log-probabilities
    json: bool = False  # print samples as JSON lines
    max_new_tokens: int = 64  # where to stop at the latest
    num_samples: int = 1  # for each prompt; sample i has the seed plus i
    batch_size: int = 8  # prompts of a file that are generated together
    model: OmitArgPrefixes[ModelOptions] = dataclasses.field(default_factory=ModelOptions)
    sampling: OmitArgPrefixes[SamplingOptions] = dataclasses.field(default_factory=SamplingOptions)
    cluster: OmitArgPrefixes[ClusterOptions] = dataclasses.field(default_factory=ClusterOptions)


def main(args: Sequence[str]) -> None:
    """Runs the verb."""
    options = parse(Options, "generate", args)
    if bool(options.prompt) == bool(options.prompts_file):
        raise UsageError("give either a prompt or --prompts-file, as in: neo-jax generate 'Hello'")
    if options.num_samples < 1 or options.batch_size < 1:
        raise UsageError("--num-samples and --batch-size must be at least 1.")
    prompts: list[Prompt] = (
        list(read_prompts(options.prompts_file, "prompt"))
        if options.prompts_file
        else [options.prompt]
    )
    check_output(options.output)
    with options.cluster.joined(options.model.is_split):
        _generate(prompts, options)


def _generate(prompts: Sequence["Prompt"], options: Options) -> None:
    lm = options.model.load()
    # All at once: no text is written before the last prompt is known to fit.
    check_prompts(lm.model, [lm.encode(prompt) for prompt in prompts], options.max_new_tokens)
    plain = not (options.json or options.output)
    one = len(prompts) == options.num_samples == jax.process_count() == 1
    if plain and one and sys.stdout.isatty():
        _stream(lm, options)
    else:
        _write(lm, prompts, options, plain)


def _stream(lm: "LanguageModel", options: Options) -> None:
    print(options.prompt, end="", flush=True)
    sampling = dataclasses.asdict(options.sampling)
    for text in lm.stream(options.prompt, options.max_new_tokens, **sampling):
        print(text, end="", flush=True)
    print()


def _write(lm: "LanguageModel", prompts: Sequence["Prompt"], options: Options, plain: bool) -> None:
    with output_lines(options.output) as file:
        for first in range(0, len(prompts), options.batch_size):
            batch = prompts[first : first + options.batch_size]
            samples = lm.sample(
                batch, options.max_new_tokens, options.num_samples, options.sampling
            )
            for sample in samples:
                if plain:
                    new = sample.ids if sample.text is None else sample.text
                    print(f"{sample.prompt}{new}", file=file, flush=True)
                else:
                    print_json(dataclasses.asdict(sample), file)
            done = min(first + options.batch_size, len(prompts))
            if options.output and is_leader():
                print(f"{done}/{len(prompts)} prompts", file=sys.stderr)
