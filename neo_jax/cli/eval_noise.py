"""neo-jax eval --perturb."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from neo_jax.cli.options import print_json, write_picture
from neo_jax.devices.processes import is_leader

if TYPE_CHECKING:
    from neo_jax.cli.eval import Options
    from neo_jax.evaluation.noise import Noise
    from neo_jax.evaluation.robustness import Values


def run_noise(options: "Options") -> None:
    """Evaluates a model on texts or tasks at every rate of noise, and prints the table."""
    from neo_jax.cli.eval import print_columns
    from neo_jax.evaluation import robustness

    noise = options.noise
    evaluate = _on_texts(options) if options.text else _on_tasks(options)
    found = robustness.curves(noise, evaluate)
    if not is_leader():
        return
    model = options.model.model or "bundled"
    if options.json:
        print_json({"model": model, **robustness.describe(found, noise)})
    else:
        print_columns(robustness.table(found, noise))
    if options.picture:
        title = model.rstrip("/").rpartition("/")[2]
        write_picture(options.picture, robustness.draw(found, noise, title))


def _on_texts(options: "Options") -> "Callable[[Noise, float], Values]":
    from neo_jax.evaluation.robustness import measure_texts
    from neo_jax.evaluation.texts import read_documents

    lm, seed = options.model.load(), options.noise.noise_seed

    def evaluate(noise: "Noise", rate: float) -> "Values":
        documents = read_documents(options.text, options.wikitext)
        return measure_texts(lm, documents, noise, rate, seed, options.stride, options.batch_size)

    return evaluate


def _on_tasks(options: "Options") -> "Callable[[Noise, float], Values]":
    from neo_jax.cli.eval import open_named, run_tasks
    from neo_jax.evaluation.noisy_tasks import NoisyLM, read_values

    names, manager = open_named(options)
    lm, seed = options.model.load(), options.noise.noise_seed

    def evaluate(noise: "Noise", rate: float) -> "Values":
        rows = options.batch_size or "auto"
        model = NoisyLM(lm, noise, rate, seed, cache=options.cache, batch_size=rows)
        folder = options.output and f"{options.output}/{noise}-{rate:g}"
        return read_values(run_tasks(options, model, names, manager, folder))

    return evaluate
