"""The benchmarks of GPT-Neo's model card: their tasks, from the hub or from files that are here."""

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from neo_jax.data.sources import json_lines
from neo_jax.errors import NeoError, reason, suggest
from neo_jax.evaluation.reference_results import BENCHMARKS
from neo_jax.evaluation.texts import read_documents, read_pages
from neo_jax.files.compression import unpacked_name
from neo_jax.files.paths import make_path

# What the harness's tasks of The Pile's subsets are.
_PILE = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [
        {"metric": "word_perplexity"},
        {"metric": "byte_perplexity"},
        {"metric": "bits_per_byte"},
    ],
}


def read_data(words: Sequence[str]) -> dict[str, str]:
    """Returns the files of benchmarks by name, of words such as "lambada=test.jsonl".

    Raises:
      NeoError: a word of another form, a name that is unknown or there twice.
    """
    files: dict[str, str] = {}
    for word in words:
        name, equals, file = word.partition("=")
        if not equals or not file:
            raise NeoError(f"--data {word} names no file; write it as in --data lambada=FILE.")
        if name not in BENCHMARKS:
            raise NeoError(f"--data {word}: no benchmark '{name}'.{suggest(name, BENCHMARKS)}")
        if name in files:
            raise NeoError(f"--data names {name} twice; put the lines into one file.")
        files[name] = file
    return files


def load_tasks(
    manager: TaskManager, files: Mapping[str, str]
) -> tuple[dict[str, Task], dict[str, str]]:
    """Returns the task of each benchmark that can be had, and why the others cannot.

    Without a file the harness fetches the data; The Pile is left out then, without a word. Of the
    files see `read_data`.

    Raises:
      NeoError: a file that cannot be read, or has other lines than the task needs; no data at all.
    """
    loaded = {name: _load_file(manager, name, file) for name, file in files.items()}
    left_out: dict[str, str] = {}
    for name, benchmark in BENCHMARKS.items():
        if name in files or name == "pile":
            continue
        try:
            loaded[name] = manager.load([benchmark.task])["tasks"][benchmark.task]
        except NeoError as error:
            left_out[name] = f"{reason(error.__cause__ or error).rstrip('.')}; {_advice(name)}"
    if not loaded:
        name, why = next(iter(left_out.items()))
        raise NeoError(f"no benchmark's data can be had; of {name}: {why}")
    return {name: loaded[name] for name in BENCHMARKS if name in loaded}, left_out


def _advice(name: str) -> str:
    return f"give --data {name}=FILE, JSON lines with {', '.join(BENCHMARKS[name].fields)}."


def _load_file(manager: TaskManager, name: str, file: str) -> Task:
    """The harness's own task, with a file's examples as its test split."""
    read_examples(name, file)  # what is wrong with it is reported before the harness sees it
    task = BENCHMARKS[name].task
    known = _PILE if name == "pile" else {"include": str(manager.task_index[task].yaml_path)}
    config = {
        **known,
        "task": task,
        "dataset_path": file,
        "dataset_name": None,
        "dataset_kwargs": {"name": name, "file": file},
        "training_split": None,
        "validation_split": None,
        "test_split": "test",
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.yaml"
        lines = [f"{key}: {json.dumps(value)}" for key, value in config.items()]
        lines.append(f"custom_dataset: !function {__name__}.{read_examples.__name__}")
        path.write_text("\n".join(lines))
        try:
            return manager.load([str(path)])["tasks"][task]
        except NeoError as error:
            why = reason(error.__cause__ or error).rstrip(".")
            raise NeoError(f"{file} is not what {task} reads: {why}; correct it.") from error


def read_examples(name: str, file: str, **_: Any) -> dict[str, datasets.Dataset]:
    """Returns the examples of a benchmark in a file as the harness takes them.

    It has JSON lines; or is WikiText's raw file; or what `read_documents` reads of The Pile.

    Raises:
      NeoError: a file that cannot be read, is empty, or has other lines than the task needs.
    """
    examples = list(_examples(name, file))
    if not examples:
        raise NeoError(f"{file} is empty; {_advice(name)}")
    try:
        return {"test": datasets.Dataset.from_list(examples)}
    except (TypeError, ValueError) as error:  # values of several kinds, says Arrow
        raise NeoError(
            f"{file}: the lines differ in kind ({reason(error)}); correct it."
        ) from error


def _examples(name: str, file: str) -> Iterator[dict[str, Any]]:
    if name == "pile":
        yield from ({"text": document.text} for document in read_documents([file]))
    elif name == "wikitext" and not unpacked_name(file).endswith(".jsonl"):
        yield from ({"page": page} for page in read_pages(file))
    else:
        wanted = BENCHMARKS[name].fields
        for where, fields in json_lines(make_path(file)):
            for field in wanted:
                if field not in fields:
                    raise NeoError(f"{where}: no '{field}'; {name} needs {', '.join(wanted)}.")
            yield {field: fields[field] for field in wanted}
