"""Examples with labels: every format, every bad row, and batches of like length."""

import csv
import json

import datasets
import numpy as np
import pytest

from neo_jax.cli import main
from neo_jax.data.examples import Example, Schema, read_examples
from neo_jax.data.labelled import LabelledDataset, labelled_batches, ordered_batches
from neo_jax.data.mixture import Mixture
from neo_jax.data.prepare_labelled import prepare_labelled
from neo_jax.errors import NeoError
from neo_jax.labels import HeadConfig
from neo_jax.text.tokenizer import load_tokenizer

SAME = [Example("The fox, quickly.", "good"), Example('A "dog"', "bad"), Example("I sail", "good")]


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def files(tmp_path):
    rows = [{"label": e.label, "sentence": e.text} for e in SAME]
    lines = [f"{e.text}\t{e.label}\n" for e in SAME]
    write(tmp_path / "named.tsv", "sentence\tlabel\n" + "".join(lines))
    write(tmp_path / "bare.tsv", "".join(lines))
    write(tmp_path / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    with (tmp_path / "quoted.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["sentence", "label"])
        writer.writeheader()
        writer.writerows(rows)
    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "set/train.parquet")
    return tmp_path


@pytest.mark.parametrize("name", ["named.tsv", "bare.tsv", "rows.jsonl", "quoted.csv"])
def test_files_of_all_kinds_hold_the_same(files, name):
    schema = Schema("1", "2") if name == "bare.tsv" else Schema("sentence", "label")
    assert read_examples([files / name], schema) == SAME


def test_a_data_set_of_the_hub_names_its_labels(files):
    """Where it declares them; parquet keeps what the library wrote next to the rows."""
    assert read_examples([f"hf://{files / 'set'}"], Schema("sentence", "label")) == SAME


def test_two_texts_are_one_on_two_lines(tmp_path):
    file = write(tmp_path / "a.jsonl", '{"a": "One.", "b": "Two?", "label": true}\n')
    (example,) = read_examples([file], Schema("a", "label", "b"))
    assert example == Example("One.\nTwo?", "true")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.tsv", "text\tlabel\nx\n", ":2: 1 columns, but the first line has 2"),
        ("a.tsv", "txt\tlabel\nx\ty\n", ":2: there is no column 'text'. Did you mean 'txt'?"),
        ("a.tsv", "text\tlabel\n \ty\n", ":2: 'text' is empty; write a text, or remove the row"),
        ("a.tsv", "text\tlabel\na\tgod\n", ":2: unknown label 'god'. Did you mean 'good'?"),
        ("a.tsv", "text\tlabel\na\t\n", ":2: 'label' is '', which is no label"),
        ("a.jsonl", '{"text": 3, "label": "bad"}\n', ":1: 'text' is 3, not a text"),
        ("a.jsonl", '{"text": "x", "label": null}\n', ":1: 'label' is None, which is no label"),
        ("a.csv", 'text,label\n"a,bad\n', ": unexpected end of data; is it quoted as CSV is?"),
    ],
)
def test_a_bad_row_is_one_line_with_its_place(tmp_path, name, text, message):
    with pytest.raises(NeoError) as error:
        read_examples([write(tmp_path / name, text)], Schema(labels=("bad", "good")))
    assert f"{tmp_path / name}{message}" in str(error.value).replace(":2: unexp", ": unexp")
    assert "\n" not in str(error.value)


def test_some_bad_rows_may_be_left_out(tmp_path, capsys):
    file = write(tmp_path / "a.tsv", "text\tlabel\na\tbad\n\tbad\nb\tgood\nc\n")
    examples = read_examples([file], skip_bad=2)
    assert [example.text for example in examples] == ["a", "b"]
    assert "2 rows are left out: " in capsys.readouterr().err
    with pytest.raises(NeoError, match=r"a.tsv:5: .*\(row 2 of this kind\) --skip-bad 10 leaves"):
        read_examples([file], skip_bad=1)


def test_numbers_and_several_labels(tmp_path):
    file = write(tmp_path / "a.tsv", "text\tlabel\na\t1.5\nb\t-2\n")
    assert [e.label for e in read_examples([file], Schema(problem_type="regression"))] == [
        1.5,
        -2.0,
    ]
    file = write(tmp_path / "b.tsv", "text\tlabel\na\tx,y\nb\t\n")
    found = read_examples([file], Schema(problem_type="multi_label_classification"))
    assert [e.label for e in found] == [("x", "y"), ()]
    with pytest.raises(NeoError, match=r"b.tsv:2: 'label' is 'x,y', not a number"):
        read_examples([file], Schema(problem_type="regression"))


@pytest.fixture
def dataset(tmp_path, tokenizer_folders, text):
    words = text.split()
    rng = np.random.default_rng(0)
    lines = [
        f"{' '.join(rng.choice(words, rng.integers(1, 30)))}\t{'ab'[i % 3 == 0]}" for i in range(50)
    ]
    file = write(tmp_path / "train.tsv", "text\tlabel\n" + "\n".join(lines))
    return prepare_labelled(
        [file], tmp_path / "data", tokenizer_folders["bytes"], held_out=0.3
    ), tmp_path / "data"


def test_every_epoch_has_each_example_once(dataset):
    fields, folder = dataset
    assert fields["splits"]["train"]["balance"]["b"] + fields["splits"]["held_out"]["balance"]["b"]
    data = LabelledDataset.open(folder, "train", 48)
    assert data.head.labels == ("a", "b")
    per_epoch = data.steps(8)
    stream = labelled_batches(data, batch_size=8, seed=3)
    epochs = [[next(stream) for _ in range(per_epoch)] for _ in range(2)]
    for epoch in epochs:
        rows = [
            row[:n].tolist()
            for b in epoch
            for row, n in zip(b["tokens"], b["lengths"], strict=True)
        ]
        weights = np.concatenate([b["weights"] for b in epoch])
        assert weights.sum() == data.num_examples
        found = sorted(row for row, w in zip(rows, weights, strict=True) if w)
        ids = [
            data.tokens[a:b][:48].tolist()
            for a, b in zip(data.offsets, data.offsets[1:], strict=False)
        ]
        assert found == sorted(ids)
        assert {b["tokens"].shape[1] for b in epoch} <= {16, 32, 48}
    assert [b["tokens"].tolist() for b in epochs[0]] != [b["tokens"].tolist() for b in epochs[1]]
    # A run that goes on has the same batches, and each process its rows of them.
    later = labelled_batches(data, batch_size=8, seed=3, start_step=per_epoch + 1, rows=[2, 5])
    np.testing.assert_array_equal(next(later)["tokens"], epochs[1][1]["tokens"][[2, 5]])


def test_evaluation_sees_every_example_once(dataset):
    data = LabelledDataset.open(dataset[1], "held_out", 48)
    found = np.concatenate([examples for examples, _ in ordered_batches(data, 4)])
    assert sorted(found.tolist()) == list(range(data.num_examples))
    widths = [batch["tokens"].shape[1] for _, batch in ordered_batches(data, 4)]
    assert widths == sorted(widths, reverse=True)


def test_labels_in_files(tmp_path, tokenizer_folders, capsys):
    train = write(tmp_path / "train.tsv", "text\tlabel\na\t10\nb\t9\nc\t10\n")
    dev = write(tmp_path / "dev.tsv", "text\tlabel\na\t9\n")
    args = ["prepare", str(train), "--label-field", "label", "--output", str(tmp_path / "data")]
    args += ["--tokenizer", str(tokenizer_folders["bytes"]), "--held-out-files", str(dev)]
    assert main(args) == 0
    out = capsys.readouterr().out
    assert ["9", "1,", "33.3%"] in [line.split() for line in out.splitlines()]
    assert "held_out" in out
    data = LabelledDataset.open(tmp_path / "data", "train", 8)
    assert (data.head.labels, data.labels.tolist()) == (("9", "10"), [1, 0, 1])
    write(dev, "text\tlabel\na\t8\n")
    args[5] = str(tmp_path / "other")
    assert main(args) == 1
    assert "dev.tsv:2: unknown label '8'." in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
    assert main(["prepare", str(train), "--skip-bad", "2", "--tokenizer", "bundled"]) == 2
    assert "--skip-bad goes with --label-field" in capsys.readouterr().err


def test_one_label_is_no_task(tmp_path, tokenizer_folders):
    file = write(tmp_path / "a.tsv", "text\tlabel\na\tx\nb\tx\n")
    with pytest.raises(NeoError, match="all examples have the label x; a classifier needs two"):
        prepare_labelled([file], tmp_path / "data", tokenizer_folders["bytes"])


def words(row):
    return json.dumps({"tokens": ["The", "fox", "ran"], "tags": ["O", "B-X", "O"]} | row)


def question(row):
    answers = {"text": ["fox", "The fox"], "answer_start": [4, 0]}
    return json.dumps({"question": "Who?", "context": "The fox ran.", "answers": answers} | row)


def test_words_have_labels(tmp_path):
    file = write(tmp_path / "a.jsonl", words({"tags": [None, "B-X", -100]}) + "\n")
    (example,) = read_examples([file], Schema.usual("classifier"))
    assert example == ("The fox ran", ([0, 4, 8], ("", "B-X", "")))


@pytest.mark.parametrize(
    ("row", "first"),
    [
        ({}, "fox"),
        ({"answers": [{"text": "fox", "answer_start": 4}]}, "fox"),
        ({"answers": "ran", "answer_start": 8}, "ran"),
        ({"answers": {"text": " fox ", "answer_start": 3}}, "fox"),
    ],
)
def test_answers_of_all_forms(tmp_path, row, first):
    file = write(tmp_path / "a.jsonl", question(row) + "\n")
    (example,) = read_examples([file], Schema.usual("qa_outputs"))
    found = example.label
    assert example.text == "Who?\nThe fox ran."
    assert (found.texts[0], example.text[found.context :]) == (first, "The fox ran.")
    assert example.text[found.start :].startswith(first)
    assert found.texts[1:] == (() if row else ("The fox",))


@pytest.mark.parametrize("answers", [{"text": [], "answer_start": []}, [], None, ""])
def test_questions_without_an_answer(tmp_path, answers, tokenizer_folders):
    file = write(tmp_path / "a.jsonl", question({"answers": answers}) + "\n")
    schema = Schema.usual("qa_outputs")
    (example,) = read_examples([file], schema)
    assert example == ("Who?\nThe fox ran.", (0, 5, ("",)))
    with pytest.raises(NeoError, match="no question has an answer in 'answers'; name another"):
        prepare_labelled([file], tmp_path / "data", tokenizer_folders["bytes"], schema)


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        ("classifier", words({"tokens": "The fox"}), "'tokens' is 'The fox', not a list with an"),
        ("classifier", words({"tags": ["O"]}), "3 'tokens' have 1 'tags'; give one for each"),
        ("classifier", words({"tokens": ["a", " ", "b"]}), "'tokens' has ' ', which is no word"),
        ("classifier", words({"tags": ["O", "", "O"]}), "'tags' is '', which is no label"),
        ("qa_outputs", question({"question": " "}), "'question' is empty; write a text"),
        (
            "qa_outputs",
            question({"answers": {"txt": []}}),
            "'answers' has None, which is no",
        ),
        ("qa_outputs", question({"answers": [3]}), "'answers' has 3, which is no answer"),
        ("qa_outputs", question({"answers": "fox"}), "'fox' does not begin at character None of"),
        (
            "qa_outputs",
            question({"answers": {"text": ["fox"], "answer_start": [-9]}}),
            "the answer 'fox' does not begin at character -9 of 'context'; its answer_start must",
        ),
    ],
)
def test_a_bad_row_of_words_or_answers(tmp_path, kind, row, message):
    file = write(tmp_path / "a.jsonl", row + "\n")
    with pytest.raises(NeoError) as error:
        read_examples([file], Schema.usual(kind))
    assert f"{file}:1: " in str(error.value)
    assert message in str(error.value)


def test_labels_of_lists_of_the_hub_have_names(tmp_path):
    features = datasets.Features(
        {
            "tokens": datasets.List(datasets.Value("string")),
            "tags": datasets.List(datasets.ClassLabel(names=["O", "B-X"])),
        }
    )
    rows = [{"tokens": ["The", "fox"], "tags": [0, 1]}]
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "train.parquet")
    (example,) = read_examples([f"hf://{tmp_path}"], Schema.usual("classifier"))
    assert example.label.labels == ("O", "B-X")


@pytest.mark.parametrize("name", ["bytes", "pieces"])
def test_labels_stand_at_the_first_tokens_of_words(tmp_path, tokenizer_folders, name, capsys):
    second = words({"tokens": ["café", "日本,", "Ishmael"], "tags": ["B-X", None, "I-X"]})
    file = write(tmp_path / "a.jsonl", f"{words({})}\n{second}\n")
    args = ["prepare", str(file), "--head", "classifier", "--output", str(tmp_path / "data")]
    assert main([*args, "--tokenizer", str(tokenizer_folders[name])]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["words", "with", "a", "label", "5"] in lines
    assert ["B-X", "2,", "40.0%"] in lines
    data = LabelledDataset.open(tmp_path / "data", "train", 64)
    assert data.head == HeadConfig("classifier", ("B-X", "I-X", "O"))
    tokenizer = load_tokenizer(tokenizer_folders[name])
    for example, expected in enumerate(
        ([("The", 2), ("fox", 0), ("ran", 2)], [("café", 0), ("Ishmael", 1)])
    ):
        ids = data.tokens[data.offsets[example] : data.offsets[example + 1]].tolist()
        labels = data.labels_of(example)
        places = np.flatnonzero(labels >= 0)
        for place, (word, label) in zip(places, expected, strict=True):
            assert tokenizer.decode(ids[place:]).lstrip().startswith(word)
            assert labels[place] == label
    # What is beyond the length is not read, and counted.
    cut = LabelledDataset.open(tmp_path / "data", "train", int(places[1]))
    assert cut.num_lost >= 1
    (_, batch), *_ = ordered_batches(cut, 2)
    assert (batch["labels"] >= 0).sum() == 5 - cut.num_lost
    assert batch["labels"].shape == batch["tokens"].shape


@pytest.mark.parametrize("name", ["bytes", "pieces"])
def test_answers_are_spans_of_tokens(tmp_path, tokenizer_folders, name):
    rows = [question({}), question({"answers": "ran", "answer_start": 8})]
    file = write(tmp_path / "a.jsonl", "\n".join(rows))
    prepare_labelled([file], tmp_path / "data", tokenizer_folders[name], Schema.usual("qa_outputs"))
    data = LabelledDataset.open(tmp_path / "data", "train", 64)
    tokenizer = load_tokenizer(tokenizer_folders[name])
    assert data.answers == (("fox", "The fox"), ("ran",))
    for example, answer in enumerate(("fox", "ran")):
        ids = data.tokens[data.offsets[example] :].tolist()
        start, last, context = data.labels[example].tolist()
        assert tokenizer.decode(ids[start : last + 1]).strip() == answer
        assert tokenizer.decode(ids[context:]).startswith("The fox ran.")


def test_what_cannot_be_read_is_said(tmp_path, tokenizer_folders):
    """Labels where texts are named, and a length in which no context has room."""
    file = write(tmp_path / "a.jsonl", question({}))
    tokenizer = tokenizer_folders["bytes"]
    prepare_labelled([file], tmp_path / "data", tokenizer, Schema.usual("qa_outputs"))
    with pytest.raises(NeoError, match="data holds examples with labels; train on these alone"):
        Mixture.open(f"{tmp_path / 'data'}=1", length=8)
    with pytest.raises(NeoError, match="length 2 leaves no question room for its context; raise"):
        LabelledDataset.open(tmp_path / "data", "train", 2)


@pytest.mark.parametrize("name", ["bytes", "pieces"])
def test_long_contexts_are_windows(tmp_path, tokenizer_folders, name):
    """And a question without an answer, as each window without it, has its first token as one."""
    context = "The fox ran. " + "And the dog did not mind it at all. " * 6
    rows = [
        question({"context": context, "answers": "dog", "answer_start": context.index("dog")}),
        question({"context": context, "answers": {"text": [], "answer_start": []}}),
        question({}),
        question({"question": "Who? " * 12}),
    ]
    file = write(tmp_path / "a.jsonl", "\n".join(rows))
    fields = prepare_labelled(
        [file], tmp_path / "data", tokenizer_folders[name], Schema.usual("qa_outputs")
    )
    assert fields["splits"]["train"]["unanswerable"] == 1
    tokenizer = load_tokenizer(tokenizer_folders[name])
    whole = LabelledDataset.open(tmp_path / "data", "train", 1000)
    assert whole.questions.tolist() == [0, 1, 2, 3]
    assert whole.labels[1, :2].tolist() == [0, 0]
    assert (whole.num_lost, whole.answers[1]) == (0, ("",))
    length = int(whole.labels[3, 2])  # the last question leaves no room
    data = LabelledDataset.open(tmp_path / "data", "train", length)
    assert data.num_lost == 1
    assert data.lengths.max() <= length
    for row, question_ in enumerate(data.questions):
        ids = data.tokens[data.offsets[row] :][: data.lengths[row]].tolist()
        start, last, first = data.labels[row].tolist()
        expected = whole.tokens[whole.offsets[question_] :][:first].tolist()
        assert ids[:first] == expected[:length]
        if question_ == 3:
            assert (start, last) == (-100, -100)
        else:
            has_answer = start > 0
            answer = tokenizer.decode(ids[start : last + 1]).strip() if has_answer else ""
            assert answer in whole.answers[question_] + ("",)
    for question_ in (0, 1):
        of_it = np.flatnonzero(data.questions == question_)
        assert len(of_it) > 2
        assert bool((data.labels[of_it, 0] > 0).any()) == (question_ == 0)


def test_questions_of_a_context_are_held_out_together(tmp_path, tokenizer_folders):
    rows = [question({"context": f"The fox ran {i // 4} times."}) for i in range(80)]
    file = write(tmp_path / "a.jsonl", "\n".join(rows))
    fields = prepare_labelled(
        [file], tmp_path / "data", tokenizer_folders["bytes"], Schema.usual("qa_outputs"),
        held_out=0.3,
    )  # fmt: skip
    counts = [split["examples"] for split in fields["splits"].values()]
    assert sum(counts) == 80
    assert all(count and count % 4 == 0 for count in counts)


def test_options_that_do_not_go_together(capsys):
    words = ["--head", "classifier"]
    for options, message in (
        ([*words, "--problem-type", "regression"], "is for labels of texts; --head classifier has"),
        ([*words, "--second-text-field", "b"], "--head classifier takes one list of words"),
        ([*words, "--new-tokens", "<|a|>"], "--new-tokens is for texts without labels"),
        (["--head", "score"], "--head score needs --label-field"),
    ):
        assert main(["prepare", "a.jsonl", "--tokenizer", "bundled", *options]) == 2
        assert message in capsys.readouterr().err
