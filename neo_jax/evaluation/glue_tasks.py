"""The tasks of GLUE and SuperGLUE: what their files hold, what is reported, how models are asked.

Wang et al., 2018 and 2019. Examples become texts with labels: of COPA each choice is one that is
right or wrong, and of MultiRC each answer; ReCoRD, whose answers are spans, is not among them.
Questions to a language model without fine-tuning are those of lm-evaluation-harness.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from neo_jax.data.examples import table_rows
from neo_jax.data.hugging_face import HubDataset
from neo_jax.data.sources import json_lines
from neo_jax.errors import NeoError, brief
from neo_jax.files.paths import make_path
from neo_jax.labels import ProblemType
from neo_jax.text.classify import as_one_text

HUB = "hub"
"""In the place of a folder: the data sets of the Hugging Face hub."""


class Row(NamedTuple):
    """An example, or one choice of a question."""

    text: str
    label: str | float | None  # None in a test set
    index: Any  # what a submission calls it
    group: Any  # equal for the choices of a question
    prompt: str  # what a language model is asked
    choice: str = ""  # what may follow, where each row is a choice of its own


class Task(NamedTuple):
    """A task; texts name the columns of one text or two, each by all names that files have."""

    suite: str  # "glue" or "superglue"
    title: str  # and the folder of its files
    texts: tuple[tuple[str, ...], ...]
    labels: tuple[str, ...]  # in the order of the hub's
    metrics: tuple[str, ...]  # the official ones, the first of which chooses the best epoch
    template: str = ""  # {a} and {b} are the texts; "" cannot be asked
    answers: tuple[str, ...] = ()  # of a language model, for each label
    codes: tuple[str, ...] = ()  # what files have in the place of labels
    bare: Mapping[str, str] = {}
    rows: Callable[[dict[str, Any]], list[dict[str, Any]]] | None = None  # of nested examples
    dev: str = ""  # the name of its development set, where it is another than usual

    @property
    def problem_type(self) -> ProblemType:
        """What its labels are."""
        return "regression" if len(self.labels) == 1 else "single_label_classification"


_NO_YES, _TRUE_FALSE = (" no", " yes"), (" True", " False")
_ENTAILMENT = ("entailment", "not_entailment")
_BOOLEAN = ("false", "true")


def _copa(row: dict[str, Any]) -> list[dict[str, Any]]:
    word = {"cause": "because", "effect": "so"}[row["question"]]
    begin = f"{row['premise'].strip().rstrip('.')} {word}"
    rows = []
    for i in (0, 1):
        choice = row[f"choice{i + 1}"]
        right = None if row.get("label") is None else int(int(row["label"]) == i)
        rows.append({"a": f"{begin} {choice[:1].lower()}{choice[1:]}", "label": right,
                     "idx": row["idx"], "group": row["idx"], "prompt": begin,
                     "choice": f" {choice[:1].lower()}{choice[1:]}"})  # fmt: skip
    return rows


def _multirc(row: dict[str, Any]) -> list[dict[str, Any]]:
    if "passage" not in row:  # the hub's, an answer a row
        index = row["idx"]
        index = (index["paragraph"], index["question"], index["answer"])
        text, answer = f"{row['paragraph']}\n{row['question']}", row["answer"]
        return [{**row, "a": text, "b": answer, "idx": index, "group": index[:2]}]
    return [
        {"a": f"{row['passage']['text']}\n{question['question']}", "b": answer["text"],
         "label": answer.get("label"), "idx": (row["idx"], question["idx"], answer["idx"]),
         "group": (row["idx"], question["idx"])}
        for question in row["passage"]["questions"]
        for answer in question["answers"]
    ]  # fmt: skip


def _wsc(row: dict[str, Any]) -> list[dict[str, Any]]:
    spans = row.get("target", row)
    return [{**row, "a": row["text"], "name": spans["span1_text"], "pronoun": spans["span2_text"],
             "b": f"{spans['span2_text']}: {spans['span1_text']}"}]  # fmt: skip


def _wic(row: dict[str, Any]) -> list[dict[str, Any]]:
    return [{**row, "a": f"{row['word']}: {row['sentence1']}", "b": row["sentence2"]}]


_PAIR = (("#1 String", "sentence1"), ("#2 String", "sentence2"))
_A, _AB = (("a",),), (("a",), ("b",))

TASKS: Mapping[str, Task] = {
    "cola": Task("glue", "CoLA", (("sentence",),), ("unacceptable", "acceptable"),
                 ("matthews", "accuracy"),
                 "{a}\nQuestion: Does this sentence make sense?\nAnswer:", _NO_YES, ("0", "1"),
                 {"sentence": "4", "label": "2"}),
    "sst2": Task("glue", "SST-2", (("sentence",),), ("negative", "positive"), ("accuracy",),
                 "{a}\nQuestion: Is this sentence positive or negative?\nAnswer:",
                 (" negative", " positive"), ("0", "1"), {"sentence": "1", "label": "2"}),
    "mrpc": Task("glue", "MRPC", _PAIR, ("not_equivalent", "equivalent"), ("f1", "accuracy"),
                 "Sentence 1: {a}\nSentence 2: {b}\nQuestion: Do both sentences mean the same "
                 "thing?\nAnswer:", _NO_YES, ("0", "1")),
    "stsb": Task("glue", "STS-B", _PAIR, ("similarity",), ("pearson", "spearman")),
    "qqp": Task("glue", "QQP", (("question1",), ("question2",)), ("not_duplicate", "duplicate"),
                ("f1", "accuracy"),
                "Question 1: {a}\nQuestion 2: {b}\nQuestion: Do both questions ask the same "
                "thing?\nAnswer:", _NO_YES, ("0", "1")),
    "mnli": Task("glue", "MNLI", (("premise", "sentence1"), ("hypothesis", "sentence2")),
                 ("entailment", "neutral", "contradiction"), ("accuracy",),
                 "{a}\nQuestion: {b} True, False or Neither?\nAnswer:",
                 (" True", " Neither", " False"), dev="matched"),
    "mnli_mm": Task("glue", "MNLI", (("premise", "sentence1"), ("hypothesis", "sentence2")),
                    ("entailment", "neutral", "contradiction"), ("accuracy",),
                    "{a}\nQuestion: {b} True, False or Neither?\nAnswer:",
                    (" True", " Neither", " False"), dev="mismatched"),
    "qnli": Task("glue", "QNLI", (("question",), ("sentence",)), _ENTAILMENT, ("accuracy",),
                 "{a}\n{b}\nQuestion: Does this response answer the question?\nAnswer:",
                 (" yes", " no")),
    "rte": Task("glue", "RTE", _PAIR, _ENTAILMENT, ("accuracy",),
                "{a}\nQuestion: {b} True or False?\nAnswer:", _TRUE_FALSE),
    "wnli": Task("glue", "WNLI", _PAIR, ("not_entailment", "entailment"), ("accuracy",),
                 "{a}\nQuestion: {b} True or False?\nAnswer:", (" False", " True"), ("0", "1")),
    "boolq": Task("superglue", "BoolQ", (("passage",), ("question",)), _BOOLEAN, ("accuracy",),
                  "{a}\nQuestion: {b}?\nAnswer:", _NO_YES),
    "cb": Task("superglue", "CB", (("premise",), ("hypothesis",)),
               ("entailment", "contradiction", "neutral"), ("macro_f1", "accuracy"),
               "{a}\nQuestion: {b}. True, False, or Neither?\nAnswer:",
               (" True", " False", " Neither")),
    "copa": Task("superglue", "COPA", _A, ("wrong", "right"), ("choices",), "{prompt}",
                 codes=("0", "1"), rows=_copa),
    "multirc": Task("superglue", "MultiRC", _AB, ("false", "true"), ("f1", "exact_match"),
                    "{a}\nAnswer: {b}\nQuestion: Is this answer correct?\nAnswer:", _NO_YES,
                    ("0", "1"), rows=_multirc),
    "rte_superglue": Task("superglue", "RTE", (("premise",), ("hypothesis",)), _ENTAILMENT,
                          ("accuracy",), "{a}\nQuestion: {b} True or False?\nAnswer:",
                          _TRUE_FALSE),
    "wic": Task("superglue", "WiC", _AB, _BOOLEAN, ("accuracy",),
                "Sentence 1: {sentence1}\nSentence 2: {sentence2}\nQuestion: Is the word "
                "'{word}' used in the same way in the two sentences above?\nAnswer:", _NO_YES,
                rows=_wic),
    "wsc": Task("superglue", "WSC", _AB, _BOOLEAN, ("accuracy",),
                'Passage: {a}\nQuestion: In the passage above, does the pronoun "{pronoun}" refer '
                'to "{name}"?\nAnswer:', _NO_YES, rows=_wsc),
}  # fmt: skip

_LABELS = ("label", "gold_label", "Quality", "is_duplicate", "score")
_INDEX = ("index", "idx", "id")
_ON_HUB = {"glue": "nyu-mll/glue", "superglue": "aps/super_glue"}
_HUB_NAMES = {"mnli_mm": "mnli", "rte_superglue": "rte", "wsc": "wsc.fixed"}


def find_splits(task: str, data: str) -> dict[str, list[Path | str]]:
    """Returns the files of a task's splits in a folder, or their names on the hub.

    Splits are "train", "dev" and "test", those that are there; files are called as in the
    benchmarks' archives, in a folder of the task's name in any spelling.
    """
    spec = TASKS[task]
    if data == HUB:
        base = f"hf://{_ON_HUB[spec.suite]}:{_HUB_NAMES.get(task, task)}"
        end = f"_{spec.dev}" if spec.dev else ""
        names = {"train": "train", "dev": f"validation{end}", "test": f"test{end}"}
        return {split: [f"{base}:{name}"] for split, name in names.items()}
    found: dict[str, list[Path | str]] = {}
    for folder in sorted(make_path(data).iterdir()):
        if not folder.is_dir() or _plain(folder.name) != _plain(spec.title):
            continue
        for path in sorted(folder.iterdir()):
            stem, _, ending = path.name.partition(".")
            words = stem.replace("val", "dev").split("_")
            other = spec.dev and len(words) > 1 and spec.dev not in words
            if ending not in ("tsv", "jsonl") or other:
                continue
            if words[0] in ("train", "dev", "test"):
                found[words[0]] = [path]
    return found


def _plain(name: str) -> str:
    return "".join(char for char in name.lower() if char.isalnum())


def read_rows(task: str, source: Path | str) -> list[Row]:
    """Returns the examples of a split, from a file or the hub.

    Raises:
      NeoError: it cannot be read, or lacks a column, or has a label that is none.
    """
    spec, found = TASKS[task], []
    for number, (where, raw) in enumerate(_raw_rows(spec, source)):
        if isinstance(raw, NeoError):
            raise raw
        try:
            rows = spec.rows(raw) if spec.rows else [raw]
            for row in rows:
                found.append(_row(spec, row, number))
        except (KeyError, TypeError, StopIteration) as error:
            raise NeoError(f"{where}: is no example of {spec.title} ({brief(error)}).") from error
        except NeoError as error:
            raise NeoError(f"{where}: {error}") from error
    if not found:
        raise NeoError(f"{source} holds no examples.")
    return found


def _raw_rows(spec: Task, source: Path | str) -> Any:
    if isinstance(source, str):
        streamed = enumerate(HubDataset(source, "").rows(), 1)
        return ((f"{source}, row {i}", row) for i, row in streamed)
    if source.name.endswith(".jsonl"):
        return json_lines(source)
    with source.open(encoding="utf-8") as file:
        names = file.readline().rstrip("\r\n").split("\t")
    first = spec.texts[0]
    if spec.bare and first[0] not in names:
        back = {number: name for name, number in spec.bare.items()}
        rows = table_rows(source, "\t", has_names=False)
        return ((where, _renamed(row, back)) for where, row in rows)
    return table_rows(source, "\t")


def _renamed(row: Any, names: Mapping[str, str]) -> Any:
    return row if isinstance(row, NeoError) else {names.get(k, k): v for k, v in row.items()}


def _row(spec: Task, row: dict[str, Any], number: int) -> Row:
    texts = [row[next(name for name in names if name in row)] for names in spec.texts]
    label = _label(spec, next((row[name] for name in _LABELS if name in row), None))
    index = next((row[name] for name in _INDEX if name in row), number)
    named = {**row, "a": texts[0], "b": texts[-1]}
    text = as_one_text(texts) if len(texts) > 1 else texts[0]
    prompt = spec.template.format_map(named) if spec.template else ""
    return Row(text, label, index, row.get("group", number), prompt, row.get("choice", ""))


def _label(spec: Task, value: Any) -> str | float | None:
    """Returns a label by its name; None where a test set has none."""
    if value is None or value == -1:
        return None
    if spec.problem_type == "regression":
        return float(value)
    name = str(value).lower() if isinstance(value, bool) else str(value)
    if name in spec.labels:
        return name
    if name in spec.codes:
        return spec.labels[spec.codes.index(name)]
    raise NeoError(f"{brief(value)} is no label of {spec.title}: {', '.join(spec.labels)}.")


def submission(task: str, rows: Sequence[Row], found: Sequence[Any]) -> tuple[str, str]:
    """Returns the name and the text of a file for the benchmark's server.

    Args:
      task: its name.
      rows: of the test set.
      found: a label's number for each, or of a regression a number.
    """
    spec = TASKS[task]
    named = [spec.labels[i] if spec.problem_type != "regression" else i for i in found]
    if spec.suite == "glue":
        file = {"mnli": "MNLI-m.tsv", "mnli_mm": "MNLI-mm.tsv"}.get(task, f"{spec.title}.tsv")
        values = [
            f"{min(max(label, 0.0), 5.0):.3f}" if not isinstance(label, str)
            else spec.codes[spec.labels.index(label)] if spec.codes else label
            for label in named
        ]  # fmt: skip
        lines = [f"{row.index}\t{value}" for row, value in zip(rows, values, strict=True)]
        return file, "\n".join(["index\tprediction", *lines, ""])
    import json

    objects = _superglue_objects(task, rows, named)
    return f"{spec.title}.jsonl", "".join(json.dumps(each) + "\n" for each in objects)


def _superglue_objects(task: str, rows: Sequence[Row], named: Sequence[str]) -> list[Any]:
    if task == "copa":  # of each question the place of the right choice
        places: dict[Any, list[str]] = {}
        for row, label in zip(rows, named, strict=True):
            places.setdefault(row.index, []).append(label)
        return [{"idx": i, "label": labels.index("right")} for i, labels in places.items()]
    if task != "multirc":
        return [{"idx": row.index, "label": n} for row, n in zip(rows, named, strict=True)]
    tree: dict[Any, dict[Any, list[Any]]] = {}
    for row, label in zip(rows, named, strict=True):
        passage, question, answer = row.index
        entry = {"idx": answer, "label": int(label == "true")}
        tree.setdefault(passage, {}).setdefault(question, []).append(entry)
    return [
        {"idx": passage, "passage": {"questions": [
            {"idx": question, "answers": answers} for question, answers in questions.items()
        ]}}
        for passage, questions in tree.items()
    ]  # fmt: skip


@functools.cache
def at_hand(suite: str, data: str) -> tuple[str, ...]:
    """Returns the tasks of a suite whose examples are in a folder, or on the hub.

    Raises:
      NeoError: there is no such folder, or no task in it.
    """
    if data != HUB and not make_path(data).is_dir():
        raise NeoError(f"{data} is no folder; name one with a sub-folder a task, or '{HUB}'.")
    names = [name for name, task in TASKS.items() if task.suite == suite]
    found = tuple(name for name in names if {"train", "dev"} & find_splits(name, data).keys())
    if not found:
        raise NeoError(
            f"{data} has no task of {suite}: it holds folders such as "
            f"{TASKS[names[0]].title}/ with train.tsv and dev.tsv, as in the archives."
        )
    return found
