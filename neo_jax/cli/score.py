"""neo-jax score: log-probabilities of given texts."""

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tyro.conf import OmitArgPrefixes

from neo_jax.cli import UsageError, parse
from neo_jax.cli.cluster import ClusterOptions
from neo_jax.cli.options import (
    TextModelOptions,
    check_output,
    output_lines,
    print_json,
    read_prompts,
    with_features_of,
)
from neo_jax.devices.processes import say
from neo_jax.model.soft_prompt import text_context

if TYPE_CHECKING:
    from neo_jax.text.language_model import Prompt


@dataclasses.dataclass(frozen=True)
class Options:
    """Scores every line of a file: the log-probability of each token after the first, in nats.

    Prints a summary on stderr. A text longer than the context is scored by windows.
    """

    input: str = ""  # .jsonl, {"text": ...} or {"ids": [...]} a line; or .txt, a text a line
    output: str = ""  # a .jsonl file; stdout if not given
    json: bool = False  # print JSON lines, as it does anyway
    features: str = ""  # .npy, a row for each text: what a model's mapper reads before it
    stride: int = 0  # tokens from window to window beyond the context; 0 is half the context
    # which model, and how to hold it
    model: OmitArgPrefixes[TextModelOptions] = dataclasses.field(default_factory=TextModelOptions)
    # where a mesh spans several processes; each of them runs the same command
    cluster: OmitArgPrefixes[ClusterOptions] = dataclasses.field(default_factory=ClusterOptions)


def main(args: Sequence[str]) -> None:
    """Runs the verb."""
    options = parse(Options, "score", args)
    if not options.input:
        raise UsageError("name a file, as in: neo-jax score --input texts.jsonl")
    if options.stride < 0:
        raise UsageError("--stride must be 0 (half the context) or more.")
    texts = read_prompts(options.input, "text")
    check_output(options.output, options.input)
    with options.cluster.joined(options.model.is_split):
        _score(texts, options)


def _score(texts: Sequence["Prompt"], options: Options) -> None:
    lm = options.model.load()
    if options.features:
        lm, texts = with_features_of(lm, options.features, texts)
    tokens = num_bytes = 0
    nats = 0.0
    with output_lines(options.output) as file:
        for score in lm.scores(texts, options.stride):
            bits = score.bits_per_byte
            line = {
                "ids": [token for token in score.ids if token < lm.config.vocab_size],
                "logprobs": [round(float(p), 6) for p in score.logprobs],
                "loss": score.loss if math.isfinite(score.loss) else None,
                "bits_per_byte": bits if math.isfinite(bits) else None,
            }
            print_json(line, file)
            tokens += len(score.logprobs)
            num_bytes += score.num_bytes
            nats -= float(score.logprobs.sum(dtype="float64"))
    loss = nats / max(tokens, 1)
    summary = f"{len(texts)} texts, {tokens} scored tokens, loss {loss:.4f} nats a token"
    if num_bytes:
        summary += f", {nats / math.log(2) / num_bytes:.4f} bits a byte over {num_bytes} bytes"
    context = text_context(lm.model)
    stride = options.stride or context // 2
    say(f"{summary}; context {context}, stride {stride}")
