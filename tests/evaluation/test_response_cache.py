"""evaluation/response_cache.py: finished requests on disk."""

import contextlib
import sqlite3
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from neo_jax.errors import NeoError
from neo_jax.evaluation import response_cache
from neo_jax.evaluation.response_cache import Answers, fingerprint
from neo_jax.model.transformer import Neo
from neo_jax.sharding.rules import make_sharding
from neo_jax.text.tokenizer import load_tokenizer


def test_an_answer_is_found_by_its_model_and_its_request(tmp_path):
    path = tmp_path / "new" / "answers.sqlite"
    answers = Answers(path, "a")
    answers.add(("score", [1, 2], [3]), [-1.5, True])
    answers.add(("text", [1, 2]), "so it goes")
    assert answers.find(("score", [1, 2], [3])) == [-1.5, True]
    for other in (("score", [1], [2, 3]), ("score", [1, 2, 3]), ("text", [1, 2], [3])):
        assert answers.find(other) is None
    again = Answers(path, "a")  # while the other is open, as after a kill
    assert again.find(("text", (1, 2))) == "so it goes"
    assert Answers(path, "b").find(("text", [1, 2])) is None


def test_a_file_that_is_something_else(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("no database at all, but a text of some length " * 100)
    with pytest.raises(NeoError, match=r"cannot keep .*notes\.txt: file is not"):
        Answers(path, "a")
    with pytest.raises(NeoError, match="name another file with --cache, or none"):
        Answers(path / "inside", "a")


@pytest.fixture
def path(tmp_path):
    """A file with one answer."""
    path = tmp_path / "answers.sqlite"
    answers = Answers(path, "a")
    answers.add(("score", [1]), [-1.5, True])
    answers.close()
    return path


def rewrite(path, answer):
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute("UPDATE answers SET answer = ?", (answer,))


def stored(path):
    with contextlib.closing(sqlite3.connect(path)) as database:
        return database.execute("SELECT answer FROM answers").fetchone()[0]


def assert_damaged(path):
    """What is there is no answer, and the next one takes its place."""
    answers = Answers(path, "a")
    assert answers.find(("score", [1])) is None
    assert answers.damaged == 1
    answers.add(("score", [1]), [-2.5, False])
    assert answers.find(("score", [1])) == [-2.5, False]
    assert answers.damaged == 1
    answers.close()


@pytest.mark.parametrize(
    "answer",
    ["[1,", "{}", "[]", '[NaN,"yes"]', "[-1.5, true]", "[" * 100_000, b"\xff\xfe", 5, -1.5, ""],
)
def test_an_answer_that_somebody_else_wrote(path, answer):
    rewrite(path, answer)
    assert_damaged(path)


def test_a_flipped_character_is_seen(path):
    whole = stored(path)
    for place, character in enumerate(whole):
        rewrite(path, whole[:place] + chr(ord(character) ^ 1) + whole[place + 1 :])
        answers = Answers(path, "a")
        assert answers.find(("score", [1])) is None, place
        answers.close()


def test_an_answer_of_another_request(path):
    """Rows that changed places: their keys are another's."""
    answers = Answers(path, "a")
    answers.add(("score", [2]), [-9.0, False])
    whole = stored(path)
    answers.close()
    rewrite(path, whole)
    answers = Answers(path, "a")
    assert [answers.find(("score", [i])) for i in (1, 2)].count(None) == 1


@pytest.mark.parametrize(
    ("answer", "form", "other"),
    [(-1.5, float, str), ("it", str, float), ([-1.5, True], (float, bool), (float, float))],
)
def test_an_answer_of_another_form(path, answer, form, other):
    """As only a file that was made to deceive holds one: whole, but not what was requested."""
    answers = Answers(path, "a")
    answers.add(("score", [1]), answer)
    assert answers.find(("score", [1]), form) == answer
    assert answers.find(("score", [1]), other) is None
    answers.add(("score", [1]), {"it": [answer]})
    assert answers.find(("score", [1]), form) is None
    assert answers.damaged == 2


def test_a_damaged_file_never_ends_in_a_traceback(path):
    """Bytes are overwritten, or the end is missing: an answer, none, or an error of one line."""
    whole = path.read_bytes()
    damaged = [whole[:size] for size in range(0, len(whole), 997)]
    damaged += [whole[:i] + b"\xff" * 64 + whole[i + 64 :] for i in range(0, len(whole), 499)]
    for data in [b"no database" * 100, b"SQLite format 3\0" + bytes(200), *damaged]:
        path.write_bytes(data)
        with contextlib.suppress(NeoError):
            answers = Answers(path, "a")
            assert answers.find(("score", [1])) in (None, [-1.5, True])
            answers.add(("score", [2]), [-1.0, False])


ADDING = """
import sys
from pathlib import Path
from neo_jax.evaluation.response_cache import Answers

answers, me = Answers(Path(sys.argv[1]), "a"), sys.argv[2]
for i in range(300):
    answers.add((me, [i]), [float(i), True])
    assert answers.find((me, [i])) == [float(i), True]
"""


def test_two_processes_at_once(tmp_path):
    path = tmp_path / "new" / "answers.sqlite"
    processes = [subprocess.Popen([sys.executable, "-c", ADDING, path, name]) for name in "xy"]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    answers = Answers(path, "a")
    for name in "xy":
        found = [answers.find((name, [i])) for i in range(300)]
        assert found == [[float(i), True] for i in range(300)]


def test_whatever_decides_an_answer_counts(tiny, tokenizer_folders, monkeypatch):
    model, params = tiny
    same = model.clone(dtype=jnp.dtype("float32"), cache_dtype="float32")
    assert fingerprint(same, params) == fingerprint(model, params)
    words, pieces = (load_tokenizer(tokenizer_folders[name]) for name in ("bytes", "pieces"))
    prints = [
        fingerprint(model, params),
        fingerprint(model.clone(dtype=jnp.bfloat16), params),
        fingerprint(model.clone(kernel="dense"), params),
        fingerprint(model.clone(cache_dtype=jnp.int8), params),
        fingerprint(model.clone(cache_dtype=jnp.bfloat16), params),
        fingerprint(model.clone(sharding=make_sharding("model=2")), params),
        fingerprint(model, params, words),
        fingerprint(model, params, pieces),
    ]
    with jax.default_matmul_precision("bfloat16"):
        prints.append(fingerprint(model, params))
    for module in ("neo_jax", "jax", "jaxlib"):
        with monkeypatch.context() as patch:
            patch.setattr(f"{module}.__version__", "another")
            prints.append(fingerprint(model, params))
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    prints.append(fingerprint(model, params))
    assert len(set(prints)) == len(prints)
    assert fingerprint(model, params, words) == fingerprint(model, params, words)


def test_every_weight_counts_and_where_it_lies_does_not(tiny):
    model, params = tiny
    original = fingerprint(model, params)
    assert fingerprint(model, params) == original
    kernel = params["h_1"]["mlp"]["c_fc"]["kernel"]
    for changed in (
        kernel.at[3, 5].add(1e-7),
        kernel.at[jnp.array([3, 4])].set(kernel[jnp.array([4, 3])]),  # the same numbers
    ):
        mlp = {**params["h_1"]["mlp"], "c_fc": {**params["h_1"]["mlp"]["c_fc"], "kernel": changed}}
        other = {**params, "h_1": {**params["h_1"], "mlp": mlp}}
        assert fingerprint(model, other) != original
    sharding = make_sharding("fsdp=2,model=4")
    where = jax.sharding.NamedSharding(sharding.mesh, jax.P("model"))
    split = jax.tree.map(lambda x: jax.device_put(x, where) if x.shape[0] % 4 == 0 else x, params)
    assert fingerprint(model, split) == original
    assert fingerprint(Neo(model.config, jnp.bfloat16), params) != original


def test_an_answer_that_nests_too_deeply_is_damaged(path):
    """One whose checksum is right, as somebody who knows the format can write it."""
    with contextlib.closing(sqlite3.connect(path)) as database:
        key = database.execute("SELECT key FROM answers").fetchone()[0]
    said = b"[" * 100_000
    rewrite(path, (response_cache._check(key, said) + said).decode())
    assert_damaged(path)
