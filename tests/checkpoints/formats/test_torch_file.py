"""checkpoints/formats/torch_file.py: what torch.save may write, what others may put into it."""

import contextlib
import os
import pickle
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch

from neo_jax.checkpoints.formats.torch_file import open_file
from neo_jax.errors import NeoError

NUMBERS = torch.arange(60000, dtype=torch.float32).reshape(300, 200)


def opened(path):
    with contextlib.ExitStack() as files:
        return open_file(path, files)


def refusal(path):
    with pytest.raises(NeoError) as error:
        opened(path)
    assert "\n" not in str(error.value)
    return str(error.value)


@contextlib.contextmanager
def peak():
    """Gives a list that holds, at the end, how many bytes were held at once."""
    traced = []
    tracemalloc.start()
    try:
        yield traced
        traced.append(tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()


def repacked(source, target, change=lambda name, data: data, kind=zipfile.ZIP_DEFLATED):
    """Writes an archive anew, with its entries changed and packed."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", kind) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, change(entry.filename, old.read(entry)))
    return target


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    path = tmp_path_factory.mktemp("torch") / "weights.bin"
    torch.save({"a": NUMBERS, "b": NUMBERS[:, 100:].to(torch.bfloat16), "head": NUMBERS}, path)
    return path


def packed(archive, tmp_path):
    return repacked(archive, tmp_path / "packed.bin")


def partly_packed(archive, tmp_path):
    path = tmp_path / "partly.bin"
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(path, "w") as new:
        for i, entry in enumerate(old.infolist()):
            kind = zipfile.ZIP_DEFLATED if i % 2 else zipfile.ZIP_STORED
            new.writestr(entry.filename, old.read(entry), kind)
    return path


def before_zip(_, tmp_path):
    path = tmp_path / "old.bin"
    state = {"a": NUMBERS, "b": NUMBERS[:, 100:].to(torch.bfloat16), "head": NUMBERS}
    torch.save(state, path, _use_new_zipfile_serialization=False)
    return path


@pytest.mark.parametrize("write", [lambda path, _: path, packed, partly_packed, before_zip])
def test_every_way_to_pack_gives_the_same_numbers(archive, tmp_path, write):
    """What is mapped of a compressed archive is not its numbers."""
    found = opened(write(archive, tmp_path))
    np.testing.assert_array_equal(found["a"].view(), NUMBERS.numpy())
    np.testing.assert_array_equal(found["head"].view(), NUMBERS.numpy())
    bits = NUMBERS[:, 100:].to(torch.bfloat16).view(torch.int16).numpy()
    np.testing.assert_array_equal(found["b"].view().view(np.int16), bits)
    assert {name: stored.dtype for name, stored in found.items()} == {
        "a": "float32", "b": "bfloat16", "head": "float32"
    }  # fmt: skip


def test_what_a_model_is_trained_with(tmp_path):
    """Parameters that require gradients, transposed ones, and ones that share their numbers."""
    torch.save(
        {"a": torch.nn.Parameter(NUMBERS.clone()), "b": torch.nn.Parameter(NUMBERS.clone().T)},
        tmp_path / "a.bin",
    )
    found = opened(tmp_path / "a.bin")
    np.testing.assert_array_equal(found["a"].view(), NUMBERS.numpy())
    np.testing.assert_array_equal(found["b"].view(), NUMBERS.numpy().T)


@pytest.mark.parametrize(
    ("make", "dtype"),
    [
        (lambda x: x.to("meta"), "meta float32"),
        (lambda x: x.to_sparse(), "sparse_coo float32"),
        (lambda x: x.to_sparse_csr(), "sparse_csr float32"),
        (lambda x: x.to(torch.complex64), "complex64"),
        (lambda x: x.to(torch.float8_e4m3fn), "float8_e4m3fn"),
        (lambda x: x.to(torch.int64), "int64"),
        (lambda x: x > 0, "bool"),
        (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), "qint8"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_other_kinds_of_tensors_have_a_name_to_be_refused_by(tmp_path, make, dtype):
    torch.save({"a": make(NUMBERS[:4, :4])}, tmp_path / "a.bin")
    stored = opened(tmp_path / "a.bin")["a"]
    assert (stored.dtype, stored.shape, stored.num_bytes) == (dtype, (4, 4), 0)


def bomb_of(name, piece, repeats):
    """Replaces an entry by a piece that is repeated."""
    return lambda entry, data: piece * repeats if entry.endswith(name) else data


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (bomb_of("data.pkl", b"\x80\x02" + b"0" * 1000, 1100), "more objects than any model"),
        (bomb_of("data.pkl", b"]", 1_100_000), "more objects than any model"),
        (bomb_of("data/0", b"\0" * 1_000_000, 8), "bytes unpack to 8"),
        (bomb_of("byteorder", b"little" * 100_000, 16), "bytes unpack to 9"),
    ],
    ids=["numbers", "lists", "storage", "another entry"],
)
def test_bombs_are_refused_before_they_are_unpacked(
    archive, tmp_path, monkeypatch, change, message
):
    monkeypatch.setattr("neo_jax.checkpoints.formats.torch_file._SMALL_BYTES", 5_000_000)
    path = repacked(archive, tmp_path / "bomb.bin", change)
    with peak() as traced:
        assert message in refusal(path)
    assert traced[0] < 2 * path.stat().st_size + 1_000_000


def test_bombs_without_an_archive(tmp_path, monkeypatch):
    monkeypatch.setattr("neo_jax.checkpoints.formats.torch_file._Pieces.left", 10_000)
    path = tmp_path / "a.bin"
    path.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2) + b"\x80\x02" + b"]" * 1_000_000)
    with peak() as traced:
        assert "it holds more objects than any model" in refusal(path)
    assert traced[0] < 2_000_000


@pytest.mark.parametrize("text", [b"cx" + b"x" * 10_000, b"X\x10\x27\0\0" + b"x" * 10_000])
@pytest.mark.parametrize("archived", [True, False])
def test_long_names_are_refused_before_torch_sees_them(archive, tmp_path, archived, text):
    """torch took minutes over a name of 300,000 characters, searching it with \\S+ x \\S+."""
    pickled = b"\x80\x02" + text + b"\nb\n."
    path = tmp_path / "a.bin"
    if archived:
        repacked(archive, path, lambda name, data: pickled if "data.pkl" in name else data)
    else:
        path.write_bytes(pickled)
    assert "or longer names" in refusal(path)


def test_a_directory_of_a_million_entries(tmp_path, monkeypatch):
    monkeypatch.setattr("neo_jax.checkpoints.formats.torch_file._Pieces.longest", 10_000)
    with zipfile.ZipFile(tmp_path / "a.bin", "w") as file:
        for i in range(300):
            file.writestr(f"{i}", b"")
    assert "it holds more objects than any model" in refusal(tmp_path / "a.bin")


def test_a_tensor_larger_than_its_numbers(tmp_path):
    torch.save({"a": torch.zeros(1).expand(10**12)}, tmp_path / "a.bin")
    assert "its tensors are larger than what it stores of them" in refusal(tmp_path / "a.bin")


class Harm:
    """What a pickle may ask for."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("archived", [True, False])
def test_no_code_runs(tmp_path, archived):
    state = {"a": NUMBERS, "x": Harm(tmp_path / "harm")}
    torch.save(state, tmp_path / "a.bin", _use_new_zipfile_serialization=archived)
    message = refusal(tmp_path / "a.bin")
    assert "holds more than tensors, which could run code" in message
    assert "mkdir" in message
    assert "PyTorch" not in message
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("state", [[NUMBERS], {"models": {"a": NUMBERS}}, {1: NUMBERS}, NUMBERS])
def test_what_is_no_state(tmp_path, state):
    torch.save(state, tmp_path / "a.bin")
    assert "holds no tensors by name; save model.state_dict()" in refusal(tmp_path / "a.bin")


@pytest.mark.parametrize("keep", [0, 3, 500, -2000, -1])
def test_a_file_that_was_cut(archive, tmp_path, keep):
    (tmp_path / "a.bin").write_bytes(archive.read_bytes()[:keep])
    assert "is damaged" in refusal(tmp_path / "a.bin")
