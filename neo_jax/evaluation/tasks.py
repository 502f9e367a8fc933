"""Running tasks of lm-evaluation-harness, and what can go wrong with them, in one line."""

import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.task import Task
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table

from neo_jax.errors import NeoError, suggest
from neo_jax.evaluation.harness import NeoLM
from neo_jax.files.paths import check_writable

_RESAMPLES = 1000  # for the standard errors of what is no mean


class _Tasks(TaskManager):
    """The harness's tasks, of which those that cannot be loaded are reported in one line."""

    def load(self, task_list: Any) -> Any:
        try:
            with _quiet():
                return super().load(task_list)
        except NeoError:
            raise
        except Exception as error:  # a hub, a file, a YAML, a function in it: anything may fail
            raise NeoError(
                f"cannot load {', '.join(task_list)}: {_why(error)}; where the data is not to be "
                "had, name files that are here in a task file of --include-path."
            ) from error


def open_tasks(include_path: Sequence[str] = ()) -> TaskManager:
    """Returns the harness's tasks and those of further folders, which take precedence.

    Raises:
      NeoError: a folder that is none.
    """
    include_path = [*map(os.path.expanduser, include_path)]
    for folder in include_path:
        if not Path(folder).is_dir():
            raise NeoError(f"{folder} is no folder; name one that holds task files (.yaml).")
    with _quiet():
        return _Tasks(include_path=include_path or None)


def find_tasks(names: Sequence[str], manager: TaskManager) -> list[str]:
    """Returns the tasks and groups that names and patterns mean, and paths of task files.

    Raises:
      NeoError: one that does not exist.
    """
    found: list[str] = []
    for name in names:
        if name.endswith((".yaml", ".yml")):
            if not Path(name).is_file():
                raise NeoError(f"there is no task file {name}.")
            found.append(name)
            continue
        matched = manager.match_tasks([name])
        if not matched:
            hint = suggest(name, manager.all_tasks)
            hint = hint if "Did you mean" in hint else " python -m lm_eval ls tasks lists them."
            raise NeoError(f"'{name}' is no task of the harness, nor of --include-path.{hint}")
        found += matched
    return found


def run(
    model: NeoLM,
    names: Sequence[str | Task],
    manager: TaskManager,
    *,
    num_fewshot: int | None = None,
    limit: float | None = None,
    gen_kwargs: str = "",
    output: str = "",
) -> dict[str, Any]:
    """Returns what the harness finds: its dictionary of results, with the examples' in "samples".

    Tasks are names that `find_tasks` returned, or loaded. The options are the harness's; it writes
    results_DATE.json and samples_TASK_DATE.jsonl into the folder `output`.

    Raises:
      NeoError: data that cannot be had, a task that fails, what the model cannot do, or an output
        that cannot be written.
    """
    output = os.path.expanduser(output)
    folder = Path(output).parent if output.endswith(".json") else Path(output)
    if output:
        check_writable(folder)
    with _quiet(), _explained():
        tracker = EvaluationTracker(output_path=output or None)
        results = simple_evaluate(
            model=model,
            model_args={"pretrained": str(model.lm.folder)},
            tasks=list(names),
            num_fewshot=num_fewshot,
            batch_size=model.batch_size,
            limit=limit,
            gen_kwargs=gen_kwargs or None,
            bootstrap_iters=_RESAMPLES,
            evaluation_tracker=tracker,
            task_manager=manager,
        )
        if output:
            samples = results.pop("samples")
            tracker.save_results_aggregated(results=results, samples=samples)
            for task in results["configs"]:
                tracker.save_results_samples(task_name=task, samples=samples[task])
            results["samples"] = samples
            # Of what it cannot write the harness only warns.
            written = [file for file in folder.rglob("*") if tracker.date_id in file.name]
            if len(written) < 1 + len(results["configs"]):
                raise NeoError(
                    f"not all results could be written in {output}; run the same command again "
                    "with another --output: finished requests are kept."
                )
    return results


def table(results: dict[str, Any]) -> str:
    """Returns results as the harness prints them."""
    groups = [make_table(results, "groups")] if results.get("groups") else []
    return "\n".join([make_table(results), *groups])


def _why(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Says in one line what fails in a task: in its templates, functions, filters and metrics."""
    try:
        yield
    except NeoError:
        raise
    except Exception as error:
        files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
        package = Path(__file__).parents[1]
        if any(package in Path(file).parents for file in files if file != __file__):
            raise  # from the model: a fault of this package
        raise NeoError(
            f"a task fails in {files[-1]}: {type(error).__name__}: {_why(error)}; correct the task."
        ) from error


@contextlib.contextmanager
def _quiet() -> Any:
    """Keeps stdout for results, the log for warnings, and the harness from forking next to JAX."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    forks = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        logger.setLevel(before)
        if forks is None:
            del os.environ["DISABLE_MULTIPROC"]
