"""neo-jax bench: how fast a model runs here, next to what the devices can do."""

import dataclasses
import functools
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from tyro.conf import OmitArgPrefixes

from neo_jax.cli import UsageError, parse
from neo_jax.cli.options import ModelOptions, check_picture, print_json, write_picture
from neo_jax.config import PRESETS, ModelConfig, preset
from neo_jax.model.scan import Remat

if TYPE_CHECKING:
    from neo_jax.tools.benchmark.run import Measurement, Setup

_LENGTH = 256  # of short texts


@dataclasses.dataclass(frozen=True)
class Options:
    """Times prefill, decoding and training steps of a model on the devices that are here.

    It also measures how fast these multiply and read memory, and reports what share of that each
    step reaches. `--model` also takes a preset such as gpt-neo-125m, whose weights are drawn.
    """

    batch: tuple[int, ...] = (1, 8)  # sequences of a step, over all devices
    length: tuple[int, ...] = ()  # tokens of each; else 256 and, without --quick, the whole context
    steps: tuple[Literal["prefill", "decode", "train"], ...] = ("prefill", "decode", "train")
    quick: bool = False  # short texts, a minute
    seconds: float = 0.0  # a step begins only if it would end in so many; 0 is 600, or 60 if quick
    remat: Remat = "none"  # of training: computed again in the backward pass: none, products, full
    json: bool = False  # print JSON
    picture: str = ""  # draw a roofline into this PNG file
    # which model, and how to hold it
    model: OmitArgPrefixes[ModelOptions] = dataclasses.field(default_factory=ModelOptions)


def main(args: Sequence[str]) -> None:
    """Runs the verb."""
    options = parse(Options, "bench", args)
    check_picture(options.picture)
    if not options.batch or min(options.batch) < 1 or not options.steps or options.seconds < 0:
        raise UsageError("--batch takes numbers of at least 1, --steps names, --seconds 0 or more.")
    from neo_jax.tools.benchmark import report
    from neo_jax.tools.benchmark.run import bench

    setup = _setup(options)
    print("measuring the devices", file=sys.stderr, flush=True)
    result = bench(setup, _report)
    if options.json:
        print_json(report.describe(result))
    else:
        print(*report.lines(result), sep="\n")
    if options.picture:
        write_picture(options.picture, report.draw(result))


def _setup(options: Options) -> "Setup":
    from neo_jax.checkpoints.load import compute_dtype
    from neo_jax.devices.compilation_cache import enable_compilation_cache
    from neo_jax.devices.memory import check_batch
    from neo_jax.model.transformer import Neo
    from neo_jax.sharding.rules import make_sharding
    from neo_jax.tools.benchmark.run import MIN_LENGTH, Setup, random_params

    chosen = options.model
    if chosen.quantize != "none" or chosen.cache_dtype != "auto":
        raise UsageError("bench measures models of floats, without --quantize and --cache-dtype.")
    config, drawn = _config(chosen)
    context = config.max_length
    usual = {min(_LENGTH, context), min(_LENGTH, context) if options.quick else context}
    lengths = options.length or tuple(usual)
    if not MIN_LENGTH <= min(lengths) <= max(lengths) <= context:
        raise UsageError(f"--length takes {MIN_LENGTH} to {context} tokens, the model's context.")
    check_batch(max(options.batch), max(lengths))
    enable_compilation_cache()
    sharding = make_sharding(chosen.mesh, chosen.rules, default="decode")
    model = Neo(config, compute_dtype(chosen.dtype), chosen.kernel, sharding)
    return Setup(
        f"{chosen.model}, random weights" if drawn else chosen.model or "the bundled model",
        model,
        functools.partial(random_params, model) if drawn else lambda: chosen.load().params,
        make_sharding(chosen.mesh, chosen.rules),
        options.steps,
        options.batch,
        lengths,
        options.remat,
        options.seconds or (60.0 if options.quick else 600.0),
    )


def _config(chosen: ModelOptions) -> tuple[ModelConfig, bool]:
    """Returns the shape of a model, and whether it is a preset, whose weights are to be drawn."""
    if chosen.model in PRESETS:
        return preset(chosen.model), True
    from neo_jax.checkpoints import adapter_files, hub, open_model

    folder = hub.resolve(chosen.model or None, revision=chosen.revision or None)
    return open_model.read_config(adapter_files.base_folder(folder)), False


def _report(step: "Measurement") -> None:
    what = step.note or f"{step.tokens_per_second:,.1f} tokens/s"
    print(f"{step.kind} {step.batch} x {step.length}: {what}", file=sys.stderr, flush=True)
