"""Files that were damaged in any way: a clear error or a correct load, and never more."""

import tracemalloc

import flax.serialization
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file

from neo_jax.config import ModelConfig
from neo_jax.errors import NeoError
from neo_jax.names import tensors
from neo_jax.pretrained import read_config, save_pretrained, stored_leaves

CONFIG = ModelConfig(num_layers=2, embed_dim=4, num_heads=2, vocab_size=5, max_length=6)


def random_params(rng):
    leaves = {row.path: rng.normal(size=row.shape).astype(np.float32) for row in tensors(CONFIG)}
    return unflatten_dict(leaves)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder for each format, and its files as bytes."""
    params, root = random_params(np.random.default_rng(0)), tmp_path_factory.mktemp("whole")
    save_pretrained(root / "single", CONFIG, params)
    save_pretrained(root / "sharded", CONFIG, params, max_shard_bytes=1500)
    save_pretrained(root / "msgpack", CONFIG, params)
    arrays = load_file(root / "msgpack" / "model.safetensors")
    (root / "msgpack" / "model.safetensors").unlink()
    leaves = flatten_dict(params)
    nested = unflatten_dict({
        tuple(row.places["flax"].name.split("/")): np.ascontiguousarray(
            row.to("flax", leaves[row.path])
        )
        for row in tensors(CONFIG)
    })  # fmt: skip
    assert len(arrays) == len(tensors(CONFIG))
    data = flax.serialization.msgpack_serialize(nested)
    (root / "msgpack" / "flax_model.msgpack").write_bytes(data)
    return {
        folder.name: {path.name: path.read_bytes() for path in folder.iterdir()}
        for folder in root.iterdir()
    }


NOISE = (b"9999999999", b"-1", b"null", b"[[", b'"', b"{}", b"0")


def mutated(rng, data, header):
    """Some bytes changed, cut, doubled or repeated; of the first `header` bytes in most cases."""
    data, end = bytearray(data), header if rng.random() < 0.9 else len(data)
    for _ in range(rng.integers(1, 4)):
        at, kind = int(rng.integers(0, max(1, min(end, len(data))))), rng.integers(0, 6)
        if kind == 0:
            data[at : at + 1] = bytes([rng.integers(0, 256)])
        elif kind == 1:
            data[at : at + 1] = bytes([data[at] ^ (1 << int(rng.integers(0, 8)))]) if data else b""
        elif kind == 2:
            del data[at : at + int(rng.integers(1, 9))]
        elif kind == 3:
            data[at:at] = data[at : at + int(rng.integers(1, 30))]
        elif kind == 4:
            data[at : at + 1] = rng.choice(
                [b"9999999999", b"-1", b"null", b"[[", b'"', b"{}", b"0"]
            )
        else:
            data = data[:at] if rng.random() < 0.2 else data[:at] + data[at:][::-1][:3] + data[at:]
    return bytes(data)


TARGETS = (
    ("single", "model.safetensors", 700),
    ("single", "config.json", 900),
    ("sharded", "model.safetensors.index.json", 900),
    ("sharded", "config.json", 700),
    ("msgpack", "flax_model.msgpack", 800),
)


def test_two_thousand_five_hundred_damaged_files(files, tmp_path):
    """Each ends in a NeoError of one line, or is read; reading takes no more than the files do."""
    rng = np.random.default_rng(1)
    outcomes = {"read": 0, "refused": 0}
    refusals = []
    size = sum(map(len, files["sharded"].values()))
    for kind, name, header in TARGETS:
        folder = tmp_path / f"{kind}-{name}"
        folder.mkdir()
        for file, data in files[kind].items():
            (folder / file).write_bytes(data)
        for i in range(500):
            (folder / name).write_bytes(mutated(rng, files[kind][name], header))
            tracemalloc.start() if i % 10 == 0 else None
            try:
                config = read_config(folder)
                with stored_leaves(folder, config) as leaves:
                    for path, leaf in leaves.items():
                        assert leaf.read().ndim == (
                            2 if path[-1] == "embedding" else leaf.read().ndim
                        )
                outcomes["read"] += 1
            except NeoError as error:
                outcomes["refused"] += 1
                refusals.append(str(error))
            if i % 10 == 0:
                assert tracemalloc.get_traced_memory()[1] < 100 * size
                tracemalloc.stop()
    assert all(len(words.strip().splitlines()) == 1 and "\n" not in words for words in refusals)
    assert min(outcomes.values()) > 50
