"""data/hugging_face.py: data sets that `datasets` loads, here from folders."""

import importlib.util
import json
import os

import numpy as np
import pyarrow.parquet
import pytest

from neo_jax.data.prepare import prepare
from neo_jax.data.sources import find_sources
from neo_jax.errors import NeoError

TEXTS = [f"document {i} of the data set, naïve café" for i in range(50)]


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def folder(tmp_path):
    """A data set with a split of Parquet files and one of JSON lines."""
    folder = tmp_path / "set"
    folder.mkdir()
    for i in range(2):
        part = {"text": TEXTS[25 * i : 25 * i + 25], "body": [""] * 25, "meta": [{"set": "x"}] * 25}
        pyarrow.parquet.write_table(pyarrow.table(part), folder / f"train-{i}.parquet")
    rest = {"text": ["", ""], "body": ["a", "b"], "meta": [{"set": "x"}] * 2}
    pyarrow.parquet.write_table(pyarrow.table(rest), folder / "test.parquet")
    return folder


def documents(*names, text_field="text"):
    return [text for source in find_sources(names, text_field) for text in source.documents()]


def test_a_data_set_is_read_in_order(folder):
    assert documents(f"hf://{folder}") == TEXTS
    assert documents(f"hf://{folder}::train", f"hf://{folder}:default") == 2 * TEXTS
    assert documents(f"hf://{folder}::test", text_field="body") == ["a", "b"]


def test_it_gives_the_same_data_set_as_files(folder, tmp_path, tokenizer_folders):
    lines = [json.dumps({"text": text}) + "\n" for text in TEXTS]
    (tmp_path / "in.jsonl").write_text("".join(lines))
    results = []
    for name, out in ((f"hf://{folder}", "one"), (tmp_path / "in.jsonl", "two")):
        results.append(prepare([name], tmp_path / out, tokenizer_folders["bytes"], held_out=0.2))
        tokens = np.fromfile(tmp_path / out / "train" / "tokens.bin", "<u2")
        results[-1]["ids"] = tokens.tolist()
    assert results[0] == results[1]


def test_the_version_changes_with_the_files(folder):
    (before,) = find_sources([f"hf://{folder}"])
    assert find_sources([f"hf://{folder}"])[0].version == before.version
    os.utime(folder / "train-0.parquet", (1, 1))
    assert find_sources([f"hf://{folder}"])[0].version != before.version


def test_what_cannot_be_read(folder, tmp_path, monkeypatch, capfd):
    def refused(name, text_field="text"):
        with pytest.raises(NeoError) as error:
            documents(name, text_field=text_field)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert f"cannot load hf://{tmp_path}/nowhere: " in refused(f"hf://{tmp_path}/nowhere")
    assert "cannot load hf://" in refused(f"hf://{folder}:french")
    assert "Bad split: dev. Available splits: ['train', 'test']" in refused(f"hf://{folder}::dev")
    assert "row 0 has no text 'meta'; name another --text-field of: text, body, meta." in refused(
        f"hf://{folder}", "meta"
    )
    (folder / "train-1.parquet").write_bytes(b"PAR1 is not enough")
    assert f"cannot read hf://{folder}: " in refused(f"hf://{folder}")
    assert capfd.readouterr() == ("", "")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "datasets" else find_spec(name)
    )
    assert "install it: pip install 'neo_jax[datasets]'" in refused(f"hf://{folder}")
