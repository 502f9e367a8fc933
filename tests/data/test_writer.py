"""data/{writer,atomic_folder,tokenizing}.py: what was stopped goes on, to the same bytes."""

import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from neo_jax.cli import main
from neo_jax.data import text_file, tokenizing, writer
from neo_jax.data.atomic_folder import staging
from neo_jax.data.prepare import prepare
from neo_jax.errors import NeoError
from neo_jax.files.paths import find_files
from neo_jax.text.tokenizer import BytePairTokenizer


class Bytes:
    """Ids are UTF-8 bytes; calls `stop` in the batch of this number, counts what it encodes."""

    vocab_size, eos_id = 257, 256

    def __init__(self, stop_at=-1, stop=None):
        self.batches = self.documents = 0
        self._stop_at, self._stop = stop_at, stop

    def encode_batch(self, texts):
        if self.batches == self._stop_at:
            self._stop()
        self.batches += 1
        self.documents += len(texts)
        return [list(text.encode()) for text in texts]

    def save(self, folder):
        pass


def fail(error):
    def stop():
        raise error

    return stop


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch):
    monkeypatch.setattr(tokenizing, "_BATCH_DOCUMENTS", 7)
    monkeypatch.setattr(writer, "_SECONDS", 0.0)


@pytest.fixture
def inputs(tmp_path):
    """Three files of forty documents, every fifth of them empty; and a small one."""
    folder = tmp_path / "in"
    folder.mkdir()
    for name in "abc":
        texts = [f"{name} {i} " * (i % 9) if i % 5 else "" for i in range(40)]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"{name}.jsonl").write_text(lines)
    (folder / "d.txt").write_text("the end")
    return folder


@pytest.fixture
def whole(inputs, tmp_path):
    """What comes of it without a break, as the bytes of every file."""
    prepare([inputs], tmp_path / "whole", Bytes(), held_out=0.2)
    return contents(tmp_path / "whole")


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in find_files(folder)}


def stopped(inputs, out, batch, error, **options):
    with pytest.raises(type(error)) as caught:
        prepare([inputs], out, Bytes(batch, fail(error)), held_out=0.2, **options)
    return str(caught.value)


DOCUMENTS = 85  # with text
HOPE = "the same command goes on from there"


@pytest.mark.parametrize("seconds", [0.0, 1000.0])
@pytest.mark.parametrize("batch", [1, 2, 5, 9])
def test_it_goes_on_where_it_was(inputs, whole, tmp_path, monkeypatch, capsys, batch, seconds):
    monkeypatch.setattr(writer, "_SECONDS", seconds)
    out = tmp_path / "out"
    assert stopped(inputs, out, batch, KeyboardInterrupt()) == HOPE
    assert not out.exists()
    assert HOPE in stopped(inputs, out, 1, NeoError("no."))
    assert stopped(inputs, out, 1, RuntimeError("a fault of ours")) == "a fault of ours"
    capsys.readouterr()
    rest = Bytes()
    prepare([inputs], out, rest, held_out=0.2)
    assert contents(out) == whole
    done = 7 * (batch + 2)
    assert rest.documents == DOCUMENTS - done
    assert capsys.readouterr().err == f"goes on after {done} documents\n"
    assert sorted(os.listdir(tmp_path)) == ["in", "out", "whole"]


@pytest.mark.parametrize("size", [None, 30])
def test_pairs_go_on_too(tmp_path, size):
    """Also where a part is shorter than it was."""
    lines = [json.dumps({"prompt": "ab" * (i % 7 + 1), "completion": str(i)}) for i in range(80)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    prepare([tmp_path / "in.jsonl"], tmp_path / "whole", Bytes(), held_out=0.2)
    for batch in (5, 2):
        stopped(tmp_path / "in.jsonl", tmp_path / "out", batch, KeyboardInterrupt())
    if size:
        os.truncate(partial(tmp_path) / "parts" / "3.json", size)
    rest = Bytes()
    prepare([tmp_path / "in.jsonl"], tmp_path / "out", rest, held_out=0.2)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert "train/prompts.npy" in contents(tmp_path / "out")
    texts = rest.documents // 2  # prompt and completion
    assert texts == 80 - 7 * 7 if size is None else 80 - 7 * 7 < texts < 80


def test_what_stops_at_once_leaves_nothing(inputs, whole, tmp_path):
    assert stopped(inputs, tmp_path / "out", 0, KeyboardInterrupt()) == ""
    assert sorted(os.listdir(tmp_path)) == ["in", "whole"]


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import test_writer as t
t.tokenizing._BATCH_DOCUMENTS = 7
t.writer._SECONDS = 0.0
stop = lambda: os.kill(os.getpid(), signal.SIGKILL)
t.prepare([{inputs!r}], {out!r}, t.Bytes(8, stop), held_out=0.2)
"""


def test_killed_before_anything_was_kept(inputs, whole, tmp_path, capsys):
    (partial(tmp_path) / "parts").mkdir(parents=True)
    prepare([inputs], tmp_path / "out", Bytes(), held_out=0.2)
    assert contents(tmp_path / "out") == whole
    assert capsys.readouterr().err == ""


def test_killed(inputs, whole, tmp_path):
    out = tmp_path / "out"
    here = str(Path(__file__).parent)
    script = KILLED.format(tests=here, inputs=str(inputs), out=str(out))
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": root}, capture_output=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    rest = Bytes()
    prepare([inputs], out, rest, held_out=0.2)
    assert contents(out) == whole
    assert rest.documents == DOCUMENTS - 8 * 7


def test_a_long_document_is_begun_again(inputs, tmp_path, monkeypatch, tokenizer_folders):
    """Wherever it was stopped, what was written of it is cut off, in either split."""
    text = "a long text, in pieces " * 200
    for i, name in enumerate(("a_long.txt", "c_long.txt", "e.jsonl", "f.txt")):
        data = f"{i} {text}"
        (inputs / name).write_text(json.dumps({"text": data}) if "json" in name else data)
    monkeypatch.setattr(text_file, "PART", 300)
    monkeypatch.setattr(tokenizing, "_BATCH_CHARACTERS", 1000)
    encode, batches, stop_at = BytePairTokenizer.encode_batch, itertools.count(), -1

    def encode_batch(tokenizer, texts):
        if next(batches) == stop_at:
            raise KeyboardInterrupt
        return encode(tokenizer, texts)

    monkeypatch.setattr(BytePairTokenizer, "encode_batch", encode_batch)
    fields = prepare([inputs], tmp_path / "whole", tokenizer_folders["bytes"], held_out=0.5)
    assert all(split["lengths"]["longest"] > 500 for split in fields["splits"].values())
    for stop_at in range(2, next(batches), 7):  # noqa: B007  (encode_batch looks at it)
        batches = itertools.count()
        with pytest.raises(KeyboardInterrupt):
            prepare([inputs], tmp_path / "out", tokenizer_folders["bytes"], held_out=0.5)
        assert not (tmp_path / "out").exists()
        assert partial(tmp_path).exists()
        prepare([inputs], tmp_path / "out", tokenizer_folders["bytes"], held_out=0.5)
        assert contents(tmp_path / "out") == contents(tmp_path / "whole")
        shutil.rmtree(tmp_path / "out")


def test_stopped_within_the_first_document(
    inputs, tmp_path, monkeypatch, capsys, tokenizer_folders
):
    """There is nothing to go on from, nor another input than before."""
    (inputs / "a.txt").write_text("a long text, in pieces " * 200)
    monkeypatch.setattr(text_file, "PART", 300)
    monkeypatch.setattr(tokenizing, "_BATCH_CHARACTERS", 1000)
    encode, batches = tokenizing._encode, itertools.count()
    monkeypatch.setattr(
        tokenizing,
        "_encode",
        lambda *args: encode(*args) if next(batches) != 3 else fail(KeyboardInterrupt())(),
    )
    with pytest.raises(KeyboardInterrupt):
        prepare([inputs / "a.txt"], tmp_path / "out", tokenizer_folders["bytes"])
    assert not partial(tmp_path).exists()
    prepare([inputs / "a.txt"], tmp_path / "out", tokenizer_folders["bytes"])
    assert capsys.readouterr().err == ""


def test_a_damaged_input_can_be_replaced(inputs, whole, tmp_path):
    good = (inputs / "b.jsonl").read_text()
    lines = good.splitlines(keepends=True)
    (inputs / "b.jsonl").write_text("".join(lines[:30]) + "{\n")
    out = tmp_path / "out"
    with pytest.raises(NeoError, match=rf"b.jsonl:31: not valid JSON \(.*\)\. \({HOPE}\)$"):
        prepare([inputs], out, Bytes(), held_out=0.2)
    (inputs / "b.jsonl").write_text(good)
    rest = Bytes()
    prepare([inputs], out, rest, held_out=0.2)
    assert contents(out) == whole
    assert rest.documents == DOCUMENTS - 28  # four batches are of a.jsonl alone


def change_an_input(inputs):
    (inputs / "a.jsonl").write_text('{"text": "another"}\n')


def add_an_input_before(inputs):
    (inputs / "_.txt").write_text("new")


@pytest.mark.parametrize("change", [change_an_input, add_an_input_before])
def test_other_inputs_start_over(inputs, tmp_path, capsys, change):
    out = tmp_path / "out"
    stopped(inputs, out, 8, KeyboardInterrupt())
    change(inputs)
    prepare([inputs], out, Bytes(), held_out=0.2)
    assert capsys.readouterr().err.startswith("starts over: inputs, tokenizer or options")
    prepare([inputs], tmp_path / "new", Bytes(), held_out=0.2)
    assert contents(out) == contents(tmp_path / "new")


def test_other_options_start_over(inputs, tmp_path):
    class Other(Bytes):
        eos_id = 255

    others = (Other(), 0.2, "text"), (Bytes(), 0.0, "text"), (Bytes(), 0.3, "text")
    for i, (tokenizer, held_out, text_field) in enumerate(others):
        options = {"held_out": held_out, "text_field": text_field}
        out, new = tmp_path / f"out-{i}", tmp_path / f"new-{i}"
        stopped(inputs, out, 8, KeyboardInterrupt())
        prepare([inputs], out, tokenizer, **options)
        prepare([inputs], new, tokenizer, **options)
        assert contents(out) == contents(new)


def test_another_tokenizer_starts_over(inputs, tmp_path, tokenizer_folders, capsys):
    out = tmp_path / "out"
    for kind in ("pieces", "bytes"):
        (inputs / "e.jsonl").write_text("{")
        with pytest.raises(NeoError, match=r"e.jsonl:1"):
            prepare([inputs], out, tokenizer_folders[kind])
    assert "starts over" in capsys.readouterr().err
    (inputs / "e.jsonl").write_text("")
    prepare([inputs], out, tokenizer_folders["bytes"])
    prepare([inputs], tmp_path / "new", tokenizer_folders["bytes"])
    assert contents(out) == contents(tmp_path / "new")
    assert not (out / "tokenizer.model").exists()


def test_a_trained_tokenizer_is_kept(inputs, tmp_path, monkeypatch):
    options = {"train_tokenizer": 280, "tokenizer_kind": "bpe", "held_out": 0.2}
    prepare([inputs], tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        patch.setattr(tokenizing, "_encode", lambda *_: fail(KeyboardInterrupt())())
        with pytest.raises(KeyboardInterrupt, match=HOPE):
            prepare([inputs], tmp_path / "out", **options)
    with monkeypatch.context() as patch:
        patch.setattr("neo_jax.data.prepare._TRAINERS", {})
        prepare([inputs], tmp_path / "out", **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def partial(tmp_path):
    return tmp_path / ".out.partial"


@pytest.mark.parametrize("name", [".8.json", "8.json"])
def test_a_part_that_was_not_finished(inputs, whole, tmp_path, name):
    stopped(inputs, tmp_path / "out", 8, KeyboardInterrupt())
    (partial(tmp_path) / "parts" / name).write_text('["0123')
    rest = Bytes()
    prepare([inputs], tmp_path / "out", rest, held_out=0.2)
    assert contents(tmp_path / "out") == whole
    assert rest.documents == DOCUMENTS - 8 * 7


@pytest.mark.parametrize(
    ("name", "size"), [("data/train/tokens.bin", 1000), ("parts/5.json", 40), ("parts/5.json", 0)]
)
def test_files_shorter_than_they_were(inputs, whole, tmp_path, name, size):
    stopped(inputs, tmp_path / "out", 8, KeyboardInterrupt())
    os.truncate(partial(tmp_path) / name, size)
    rest = Bytes()
    prepare([inputs], tmp_path / "out", rest, held_out=0.2)
    assert contents(tmp_path / "out") == whole
    assert DOCUMENTS - 8 * 7 < rest.documents < DOCUMENTS


def test_a_full_disk(inputs, whole, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(NeoError, match=r"cannot write .*out: File too large; make room, or"):
            prepare([inputs], tmp_path / "out", Bytes(), held_out=0.2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    rest = Bytes()
    prepare([inputs], tmp_path / "out", rest, held_out=0.2)
    assert contents(tmp_path / "out") == whole
    assert rest.documents < DOCUMENTS


def test_a_failure_at_the_very_end(inputs, whole, tmp_path, monkeypatch):
    """Nothing is tokenized again."""
    out, rename = tmp_path / "out", Path.rename
    with monkeypatch.context() as patch:

        def broken(path, to):
            if path == partial(tmp_path) / "data":
                raise OSError(5, "Input/output error")
            return rename(path, to)

        patch.setattr(Path, "rename", broken)
        with pytest.raises(NeoError, match=rf"cannot write .*out: Input/output error; .* \({HOPE}"):
            prepare([inputs], out, Bytes(), held_out=0.2)
    assert not out.exists()
    rest = Bytes()
    prepare([inputs], out, rest, held_out=0.2)
    assert contents(out) == whole
    assert rest.documents == 0
    assert sorted(os.listdir(tmp_path)) == ["in", "out", "whole"]


def test_a_folder_that_may_not_be_written(inputs, tmp_path):
    if os.getuid() == 0:
        (tmp_path / "file").write_text("")
        where = tmp_path / "file" / "out"  # the super-user may write anywhere else
    else:
        (tmp_path / "closed").mkdir(mode=0o500)
        where = tmp_path / "closed" / "out"
    with pytest.raises(NeoError, match=r"cannot write in "):
        prepare([inputs], where, Bytes())


def test_one_process_at_a_time(inputs, tmp_path):
    with (
        staging(tmp_path / "out"),
        pytest.raises(NeoError, match=r"another process is writing .*/out; wait for it"),
    ):
        prepare([inputs], tmp_path / "out", Bytes())


def test_ctrl_c_says_what_to_do(inputs, tmp_path, monkeypatch, capsys, tokenizer_folders):
    encode = tokenizing._encode
    calls = iter(range(10))
    monkeypatch.setattr(
        tokenizing,
        "_encode",
        lambda *args: encode(*args) if next(calls) < 3 else fail(KeyboardInterrupt())(),
    )
    args = ["prepare", str(inputs), "--output", str(tmp_path / "out"), "--tokenizer"]
    assert main([*args, str(tokenizer_folders["bytes"])]) == 130
    assert capsys.readouterr().err == f"neo-jax: interrupted; {HOPE}\n"


def test_the_cloud_goes_on_too(inputs, whole, cloud, bucket):
    out = f"gs://{bucket}/data"
    stopped(inputs, out, 8, KeyboardInterrupt())
    assert not cloud.names(bucket)
    rest = Bytes()
    prepare([inputs], out, rest, held_out=0.2)
    assert {name: cloud[f"{bucket}/data/{name}"] for name in cloud.names(f"{bucket}/data")} == whole
    assert rest.documents == DOCUMENTS - 8 * 7


def test_an_upload_that_was_killed_is_done_again(inputs, whole, cloud, bucket):
    """What is there then is no data set; a data set is not replaced."""
    cloud[f"{bucket}/data/train/tokens.bin"] = b"half of them"
    cloud[f"{bucket}/data/train/prompts.npy"] = b"of other inputs"
    prepare([inputs], f"gs://{bucket}/data", Bytes(), held_out=0.2)
    assert {name: cloud[f"{bucket}/data/{name}"] for name in cloud.names(f"{bucket}/data")} == whole
    with pytest.raises(NeoError, match="data holds a data set already; choose another output, or"):
        prepare([inputs], f"gs://{bucket}/data", Bytes(), held_out=0.2)


def test_cores_and_batches_change_nothing(inputs, tmp_path, monkeypatch, tokenizer_folders):
    results = []
    for kind in ("bytes", "pieces"):
        for parallel, size in (("false", 1), ("true", 7), ("true", 1000)):
            monkeypatch.setenv("TOKENIZERS_PARALLELISM", parallel)
            monkeypatch.setattr(tokenizing, "_BATCH_DOCUMENTS", size)
            out = tmp_path / f"{kind}-{parallel}-{size}"
            prepare([inputs], out, tokenizer_folders[kind], held_out=0.2)
            results.append(contents(out))
    assert results[0] == results[1] == results[2]
    assert results[3] == results[4] == results[5]
