"""neo-jax eval --glue and --superglue: files of every task, metrics, submissions, a whole run."""

import json

import numpy as np
import pytest
from sklearn.metrics import f1_score, matthews_corrcoef

from neo_jax.cli import main
from neo_jax.errors import NeoError
from neo_jax.evaluation import glue, glue_table
from neo_jax.evaluation.glue_tasks import TASKS, at_hand, find_splits, read_rows, submission
from neo_jax.labels import HeadConfig

# A line of each file, as in the archives.
FILES = {
    "CoLA/train.tsv": "gj04\t1\t\tThe fox runs.\ngj04\t0\t*\tFox the the.\n",
    "CoLA/dev.tsv": "gj04\t1\t\tA dog sells cups.\n",
    "CoLA/test.tsv": "index\tsentence\n0\tThe dog.\n1\tDog the.\n",
    "SST-2/train.tsv": "sentence\tlabel\ngood fox \t1\nbad dog \t0\n",
    "SST-2/dev.tsv": "sentence\tlabel\na good \"dog\t1\n",
    "MRPC/train.tsv": "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\tA fox.\tFox.\n",
    "MRPC/dev.tsv": "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n0\t7\t8\tA fox.\tA dog.\n",
    "STS-B/train.tsv": "index\tgenre\tsentence1\tsentence2\tscore\n0\tx\tA fox.\tA dog.\t1.6\n",
    "STS-B/dev.tsv": "index\tgenre\tsentence1\tsentence2\tscore\n0\tx\tA fox.\tA fox.\t5.0\n",
    "MNLI/train.tsv": "index\tsentence1\tsentence2\tlabel1\tgold_label\n"
                      "0\tA fox.\tA dog.\tneutral\tneutral\n",
    "MNLI/dev_matched.tsv": "index\tsentence1\tsentence2\tlabel1\tlabel2\tgold_label\n"
                            "0\tm\tm\tneutral\tneutral\tentailment\n",
    "MNLI/dev_mismatched.tsv": "index\tsentence1\tsentence2\tlabel1\tlabel2\tgold_label\n"
                               "0\tmm\tmm\tneutral\tneutral\tcontradiction\n",
    "BoolQ/train.jsonl": '{"question": "is it", "passage": "It is.", "idx": 0, "label": true}\n',
    "BoolQ/val.jsonl": '{"question": "is it", "passage": "No.", "idx": 1, "label": false}\n',
    "COPA/train.jsonl": '{"premise": "It fell.", "choice1": "I pushed it.", "choice2": "I sat.", '
                        '"question": "cause", "label": 0, "idx": 3}\n',
    "COPA/val.jsonl": '{"premise": "It fell.", "choice1": "I sat.", "choice2": "It broke.", '
                      '"question": "effect", "label": 1, "idx": 4}\n',
    "MultiRC/val.jsonl": '{"idx": 0, "passage": {"text": "A fox.", "questions": [{"question": '
                         '"Who?", "idx": 5, "answers": [{"text": "a fox", "idx": 8, "label": 1}, '
                         '{"text": "a dog", "idx": 9, "label": 0}]}]}}\n',
    "WiC/val.jsonl": '{"word": "cup", "sentence1": "A cup.", "sentence2": "It cups.", "idx": 0, '
                     '"label": false, "start1": 2}\n',
    "WSC/val.jsonl": '{"text": "The fox saw it.", "target": {"span1_text": "the fox", '
                     '"span2_text": "it", "span1_index": 0}, "idx": 0, "label": true}\n',
}  # fmt: skip


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    root = tmp_path_factory.mktemp("archive")
    for name, text in FILES.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return str(root)


def row_of(archive, task, split="dev"):
    return read_rows(task, find_splits(task, archive)[split][0])


def test_what_is_at_hand(archive, tmp_path):
    assert at_hand("glue", archive) == ("cola", "sst2", "mrpc", "stsb", "mnli", "mnli_mm")
    assert at_hand("superglue", archive) == ("boolq", "copa", "multirc", "wic", "wsc")
    with pytest.raises(NeoError, match="has no task of glue: it holds folders such as CoLA/"):
        at_hand("glue", str(tmp_path))
    with pytest.raises(NeoError, match="is no folder; name one with a sub-folder a task, or 'hub'"):
        at_hand("glue", str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("task", "split", "text", "label"),
    [
        ("cola", "train", "The fox runs.", "acceptable"),
        ("cola", "test", "The dog.", None),
        ("sst2", "dev", 'a good "dog', "positive"),
        ("mrpc", "train", "A fox.\nFox.", "equivalent"),
        ("stsb", "dev", "A fox.\nA fox.", 5.0),
        ("mnli", "dev", "m\nm", "entailment"),
        ("mnli_mm", "dev", "mm\nmm", "contradiction"),
        ("boolq", "dev", "No.\nis it", "false"),
        ("copa", "train", "It fell because i pushed it.", "right"),
        ("multirc", "dev", "A fox.\nWho?\na fox", "true"),
        ("wic", "dev", "cup: A cup.\nIt cups.", "false"),
        ("wsc", "dev", "The fox saw it.\nit: the fox", "true"),
    ],
)
def test_a_row_of_each_task(archive, task, split, text, label):
    first = row_of(archive, task, split)[0]
    assert (first.text, first.label) == (text, label)
    if TASKS[task].answers:
        assert first.prompt.endswith("Answer:")


def test_wrong_files_are_named(tmp_path):
    path = tmp_path / "dev.tsv"
    path.write_text("sentence\tlabel\na\t7\n")
    with pytest.raises(NeoError, match=r"dev.tsv:2: '7' is no label of SST-2: negative, positive"):
        read_rows("sst2", path)
    with pytest.raises(NeoError, match=r"dev.tsv:2: is no example of RTE"):
        read_rows("rte", path)


def test_official_metrics(archive):
    rng = np.random.default_rng(0)
    rows = [*row_of(archive, "cola", "train")] * 20
    head = HeadConfig("score", TASKS["cola"].labels)
    logits = rng.normal(size=(40, 2)).astype(np.float32)
    scores = glue.measure_task("cola", rows, logits, head)
    labels, found = [int(r.label == "acceptable") for r in rows], logits.argmax(axis=1)
    assert scores["matthews"] == pytest.approx(matthews_corrcoef(labels, found))
    rows = [row._replace(group=i // 2) for i, row in enumerate([*row_of(archive, "multirc")] * 20)]
    scores = glue.measure_task("multirc", rows, logits, HeadConfig("score", ("false", "true")))
    labels = np.array([1, 0] * 20)
    assert scores["f1"] == pytest.approx(f1_score(labels, found))
    both = (labels == found).reshape(-1, 2).all(axis=1).mean()
    assert scores["exact_match"] == pytest.approx(both)
    head = HeadConfig("score", ("wrong", "right"))
    logits = np.array([[0, 1], [0, 2]], np.float32)  # the second is likelier, and right
    assert glue.measure_task("copa", row_of(archive, "copa"), logits, head)["choices"] == 1


def test_files_for_the_server(archive):
    rows = row_of(archive, "cola", "test")
    assert submission("cola", rows, [1, 0]) == ("CoLA.tsv", "index\tprediction\n0\t1\n1\t0\n")
    rows = row_of(archive, "mnli_mm")
    assert submission("mnli_mm", rows, [2])[1].splitlines()[1] == "0\tcontradiction"
    assert submission("stsb", row_of(archive, "stsb"), [5.2])[1].splitlines()[1] == "0\t5.000"
    name, text = submission("boolq", row_of(archive, "boolq"), [1])
    assert (name, json.loads(text)) == ("BoolQ.jsonl", {"idx": 1, "label": "true"})
    text = submission("copa", row_of(archive, "copa"), [0, 1])[1]
    assert json.loads(text) == {"idx": 4, "label": 1}
    text = submission("multirc", row_of(archive, "multirc"), [1, 0])[1]
    answers = json.loads(text)["passage"]["questions"][0]
    assert answers == {"idx": 5, "answers": [{"idx": 8, "label": 1}, {"idx": 9, "label": 0}]}


def test_a_run_over_two_seeds(archive, checkpoints, tmp_path, capsys):
    """One task, fine-tuned twice; given again, the command trains nothing."""
    options = ["eval", "--glue", archive, "--tasks", "cola", "--model", str(checkpoints["bytes"])]
    options += ["--seeds", "2", "--epochs", "1", "--train-batch-size", "2", "--length", "16"]
    options += ["--output", str(tmp_path / "out"), "--picture", str(tmp_path / "glue.png")]
    assert main(options) == 0
    out = capsys.readouterr().out
    assert "CoLA  matthews" in out.replace("Matthews", "matthews")
    assert "76.80" in out
    folder = tmp_path / "out" / "cola" / "seed-1"
    assert set(json.loads((folder / "scores.json").read_text())) == {"matthews", "accuracy"}
    assert (folder / "submission" / "CoLA.tsv").read_text().startswith("index\tprediction\n0\t")
    assert not (folder / "model").exists()
    assert (tmp_path / "glue.png").stat().st_size > 5000
    before = (folder / "metrics.jsonl").stat().st_mtime_ns
    assert main([*options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (folder / "metrics.jsonl").stat().st_mtime_ns == before
    assert [len(row["seeds"]) for row in found["rows"]] == [2, 2]
    assert found["rows"][1]["published"] == 76.8


def test_a_model_that_is_only_asked(archive, checkpoints, capsys):
    options = ["eval", "--superglue", archive, "--num-fewshot", "1", "--seeds", "2", "--json"]
    assert main([*options, "--model", str(checkpoints["bytes"]), "--tasks", "copa,boolq"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["task"], row["metric"]) for row in rows][:2] == [
        ("copa", "choices"), ("copa", "accuracy"),
    ]  # fmt: skip
    assert all(0 <= row["mean"] <= 100 and row["train"] == 0 for row in rows)


def test_one_set_is_divided(archive, tmp_path):
    (tmp_path / "sst2").mkdir()
    lines = [f"a {i} fox\t{i % 2}" for i in range(40)]
    (tmp_path / "sst2" / "dev.tsv").write_text("\n".join(lines) + "\n")
    rows, is_divided = glue._read("sst2", str(tmp_path), 0)
    assert is_divided
    assert len(rows["train"]) + len(rows["dev"]) == 40
    assert 4 < len(rows["dev"]) < 20


def test_the_table_says_what_its_figures_are():
    results = [
        glue.TaskResult("sst2", 10, 5, ({"accuracy": 0.8}, {"accuracy": 0.9})),
        glue.TaskResult("mrpc", 10, 5, ({"f1": 0.6, "accuracy": 0.7},), is_divided=True),
    ]
    rows = glue_table.entries(results)
    assert rows[0]["mean"] == pytest.approx(85)
    assert rows[0]["sd"] == pytest.approx(100 * np.std([0.8, 0.9], ddof=1))
    assert rows[0]["difference"] == pytest.approx(85 - 91.2)
    assert glue_table.average(rows) == pytest.approx((85 + 65) / 2)
    assert "MRPC: one set is here" in glue_table.footer(rows)
    lines = glue_table.table(rows)
    assert {len(line) for line in lines} == {9}


def test_a_wrong_task_is_named(archive, capsys):
    assert main(["eval", "--glue", archive, "--tasks", "colla"]) == 1
    assert "no task 'colla' of glue is in" in capsys.readouterr().err
    assert main(["eval", "--glue", archive, "--text", "x"]) == 2
