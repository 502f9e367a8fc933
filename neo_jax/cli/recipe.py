"""neo-jax recipe: examples, a run of training, answers and their scores, by one config."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from tyro.conf import OmitArgPrefixes, arg

from neo_jax.cli import UsageError, explain, parse
from neo_jax.cli.cluster import ClusterOptions
from neo_jax.cli.eval import print_columns
from neo_jax.cli.generate import show_progress
from neo_jax.cli.options import print_json
from neo_jax.cli.sample_file import kept_samples
from neo_jax.cli.train import load_config, load_defined, names
from neo_jax.errors import NeoError
from neo_jax.evaluation.recipes import (
    Recipe,
    draw,
    nearest_answers,
    prepare_examples,
    scores,
    table,
)
from neo_jax.files import figure
from neo_jax.files.paths import is_remote, make_path, write_whole
from neo_jax.training.config import TrainConfig

if TYPE_CHECKING:
    from neo_jax.evaluation.made_examples import Row
    from neo_jax.text.generate import Sample


@dataclasses.dataclass(frozen=True)
class Options:
    """Prepares examples, trains on them, has questions answered, and scores the answers.

    Each field of the config is an option. A config is a program that runs. What was interrupted
    goes on where it was: give the same command again.
    """

    config: Annotated[TrainConfig, arg(name="")]
    # what is learned, and how answers are judged
    recipe: OmitArgPrefixes[Recipe]
    # where a mesh spans several processes; each of them runs the same command
    cluster: OmitArgPrefixes[ClusterOptions]
    json: bool = False  # print an object, not a table


def main(args: Sequence[str]) -> None:
    """Runs the verb."""
    if not args or args[0].startswith("-"):
        if "-h" in args or "--help" in args:
            print(
                "usage: neo-jax recipe CONFIG [OPTIONS]\n\n"
                "CONFIG is a .py file that defines `config` and `recipe`, or one of: "
                f"{', '.join(_recipes())}\n"
                "A .py file is a program that runs: take it from people you trust.\n"
                "neo-jax recipe CONFIG --help lists every field and its value."
            )
            return
        raise UsageError(f"name a recipe first: one of {', '.join(_recipes())}, or a .py file.")
    recipe = load_defined(args[0], "recipe", Recipe, _recipes)
    default = Options(load_config(args[0]), recipe, ClusterOptions())
    options = parse(Options, "recipe", args[1:], default=default)
    if is_remote(options.config.output):
        raise UsageError("a recipe's --output is a folder on disk.")
    from neo_jax.devices.compilation_cache import enable_compilation_cache
    from neo_jax.training.checkpoint import SaveError

    enable_compilation_cache()
    try:
        then = ": training goes on from its newest checkpoint"
        with options.cluster.joined(bool(options.config.mesh or options.config.rules), then):
            _run(options)
    except SaveError as error:
        os._exit(explain(error))  # the usual way out would wait for orbax's threads


def _recipes() -> list[str]:
    """Returns the configs that have a recipe."""
    found = []
    for name in names():
        with contextlib.suppress(NeoError):
            load_defined(name, "recipe", Recipe)
            found.append(name)
    return found


def _run(options: Options) -> None:
    from neo_jax.devices.processes import is_leader, say
    from neo_jax.training.loop import run

    recipe, folder = options.recipe, make_path(options.config.output)
    config = dataclasses.replace(options.config, data=str(folder / "data"))
    tests = prepare_examples(recipe, config, folder)
    outcome = run(config)
    step = int(outcome.state.step)
    if not outcome.is_done:
        say(f"stopped after step {step}; the same command goes on from there")
        return
    answers = {"nearest": nearest_answers(recipe, folder, tests)}
    if config.pretrained:
        answers["before"] = _answers(options, config.pretrained, 0, tests)
    answers["after"] = _answers(options, str(folder / "model"), step, tests)
    found = scores(recipe, tests, answers)
    fields = {
        "task": recipe.task,
        "pretrained": config.pretrained,
        "step": step,
        "scores": [dataclasses.asdict(score) for score in found],
    }
    if not is_leader():
        return
    write_whole(folder / "results.json", json.dumps(fields, indent=1) + "\n")
    if figure.AVAILABLE:
        title = f"{recipe.task}: %, {len(tests)} questions"
        figure.write(folder / "results.png", draw(found, title))
    if options.json:
        print_json(fields)
    else:
        print_columns(table(found))


def _answers(options: Options, model: str, step: int, tests: Sequence["Row"]) -> list[str]:
    """Returns a model's likeliest answers, and keeps them in the folder of the run."""
    from neo_jax.decode.options import SamplingOptions
    from neo_jax.devices.processes import barrier, is_leader, say
    from neo_jax.text.load import load

    config, path = options.config, make_path(options.config.output) / f"answers-{step}.jsonl"
    if not path.is_file():
        say(f"answers of {model}")
        lm = load(model, mesh=config.mesh, rules=config.rules)
        with kept_samples(str(path), [model, step], len(tests)) as kept:
            there = set(kept.done)
            left = [i for i in range(len(tests)) if i not in there]
            with show_progress(len(there), len(tests), is_leader()) as advance:

                def finish(index: int, done: list["Sample"]) -> None:
                    row = tests[left[index]]
                    kept.add(left[index], [{**row._asdict(), "answer": done[0].text}])
                    advance(done)

                prompts = [tests[i].prompt for i in left]
                for _ in lm.samples(
                    prompts,
                    options.recipe.max_new_tokens,
                    sampling=SamplingOptions(temperature=0.0),
                    stop=(),
                    on_overflow="truncate",
                    on_finish=finish,
                ):
                    pass  # it is kept
        barrier("answered")
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["answer"] for line in lines]
