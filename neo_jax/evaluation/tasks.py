"""Running tasks of lm-evaluation-harness, and what can go wrong with them, in one line."""

import contextlib
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table

from neo_jax.errors import NeoError, reason, suggest
from neo_jax.evaluation.harness import NeoLM

_RESAMPLES = 1000  # for the standard errors of what is no mean
Task = str | dict[str, Any]
"""A task's name, the path of its YAML file, or its configuration."""


class _Tasks(TaskManager):
    """The harness's tasks, of which those that cannot be loaded are told in one line."""

    def load(self, task_list: Any) -> Any:
        try:
            return super().load(task_list)
        except NeoError:
            raise
        except Exception as error:  # a hub, a file, a YAML, a function in it: anything may fail
            names = ", ".join(map(name_of, task_list))
            raise NeoError(
                f"cannot load {names}: {reason(error)}. Where the data is not to be had, name "
                "local files: dataset_path: json and dataset_kwargs: {data_files: ...} in a task "
                "file of --include-path, or --data with --suite."
            ) from error


def name_of(task: Task) -> str:
    """Returns the name of a task."""
    return task if isinstance(task, str) else str(task["task"])


def run(
    model: NeoLM,
    tasks: Sequence[Task],
    *,
    include_path: str = "",
    num_fewshot: int | None = None,
    limit: float | None = None,
    gen_kwargs: str = "",
    output: str = "",
) -> dict[str, Any]:
    """Returns what the harness finds: its dictionary of results, with the examples' in "samples".

    Args:
      model: the model.
      tasks: what to run; a name may be a group of tasks, or hold * and ?.
      include_path: a folder of further task files.
      num_fewshot: examples before each question; None is as the task says.
      limit: examples of each task, or a share of them where below 1.
      gen_kwargs: options of generation in the place of the tasks', as in "max_gen_toks=64".
      output: a folder for the harness's files, results_DATE.json and samples_TASK_DATE.jsonl.

    Raises:
      NeoError: an unknown task, data that cannot be had, or what the model cannot do.
    """
    if include_path and not Path(include_path).is_dir():
        raise NeoError(f"{include_path} is no folder; name one that holds task files (.yaml).")
    name = str(model.lm.folder)
    with _quiet():
        manager = _Tasks(include_path=include_path or None)
        tracker = EvaluationTracker(output_path=output or None)
        results = simple_evaluate(
            model=model,
            model_args={"pretrained": name},
            tasks=_known(tasks, manager),
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
    return results


def table(results: dict[str, Any]) -> str:
    """Returns results as the harness prints them."""
    parts = [make_table(results)]
    if results.get("groups"):
        parts.append(make_table(results, "groups"))
    return "\n".join(parts)


def _known(tasks: Sequence[Task], manager: TaskManager) -> list[Task]:
    """Returns the tasks with patterns replaced by what they match.

    Raises:
      NeoError: one that does not exist.
    """
    found: list[Task] = []
    for task in tasks:
        if isinstance(task, dict) or task.endswith((".yaml", ".yml")):
            if isinstance(task, str) and not Path(task).is_file():
                raise NeoError(f"there is no task file {task}.")
            found.append(task)
            continue
        matched = manager.match_tasks([task])
        if not matched:
            hint = suggest(task, manager.all_tasks)
            hint = hint if "Did you mean" in hint else " python -m lm_eval ls tasks lists them."
            raise NeoError(f"'{task}' is no task of the harness, nor of --include-path.{hint}")
        found += matched
    return found


@contextlib.contextmanager
def _quiet() -> Any:
    """Keeps stdout for results, the log for warnings, and the harness from forking beside JAX."""
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
