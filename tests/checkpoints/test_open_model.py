import copy
import dataclasses
import json
import os
import tempfile
import tracemalloc
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from flax.traverse_util import flatten_dict, unflatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch_file
from transformers import GPTNeoConfig, GPTNeoForCausalLM

from neo_jax.checkpoints import host_device, load, open_model, save
from neo_jax.checkpoints.load import load_params
from neo_jax.checkpoints.open_model import read_config
from neo_jax.checkpoints.save import save_pretrained
from neo_jax.config import ModelConfig
from neo_jax.errors import NeoError, NeoWarning
from neo_jax.model.tensor_table import tensors
from neo_jax.model.transformer import Neo

CONFIG = ModelConfig(
    num_layers=3,
    embed_dim=32,
    num_heads=4,
    vocab_size=96,
    max_length=64,
    window_size=16,
    attention_types=("global", "global", "local"),
    eos_token_id=95,
)
INDEX = "model.safetensors.index.json"


def random_params(config, dtype=np.float32):
    rng = np.random.default_rng(0)
    params = {row.path: rng.normal(size=row.shape).astype(dtype) for row in tensors(config)}
    for name in ("wte",) if config.tied_head else ("wte", "lm_head"):
        params[name, "embedding"][config.vocab_size :] = 0
    return unflatten_dict(params)


def hf_tensors(config, dtype=np.float32):
    rng = np.random.default_rng(1)
    return {
        row.hf_name: rng.normal(size=row.places["hf"].shape).astype(dtype)
        for row in tensors(config)
    }


def stored(folder):
    """All tensors of a folder's safetensors files, as (dtype, shape, bytes)."""
    return {
        name: (array.dtype.name, array.shape, array.tobytes())
        for path in sorted(Path(folder).glob("*.safetensors"))
        for name, array in load_file(path).items()
    }


def assert_same(params, expected):
    params, expected = flatten_dict(params), flatten_dict(expected)
    assert params.keys() == expected.keys()
    for path, array in params.items():
        assert array.dtype == expected[path].dtype, path
        np.testing.assert_array_equal(np.asarray(array), np.asarray(expected[path]), str(path))


def write(folder, arrays, config=CONFIG):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    save_file(arrays, folder / "model.safetensors")
    return folder


def header(path):
    """The header of a safetensors file and where its data begin."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:start]), start


def assert_well_formed(path):
    """Beyond what the library demands: every tensor lies aligned, and there is one."""
    fields, start = header(path)
    assert fields.pop("__metadata__") == {"format": "pt"}
    assert start % 8 == 0
    assert fields
    for name, entry in fields.items():
        width = {"F32": 4, "F16": 2, "BF16": 2}[entry["dtype"]]
        assert entry["data_offsets"][0] % width == 0, name


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    assert text.endswith((".", "?", ".)"))
    return text


@pytest.fixture(scope="module")
def hf_model():
    torch.manual_seed(0)
    fields = CONFIG.to_hf()
    for derived in ("attention_layers", "architectures"):
        del fields[derived]
    model = GPTNeoForCausalLM(GPTNeoConfig(**fields))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "model", hf_tensors(CONFIG))


@pytest.fixture
def sharded(tmp_path):
    save_pretrained(tmp_path / "sharded", CONFIG, random_params(CONFIG), max_shard_bytes=40_000)
    return tmp_path / "sharded"


# Between transformers and us.


@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 20_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_to_us_and_back_is_exact(hf_model, tmp_path, dtype, max_shard_bytes):
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    hf_model.to(dtype).save_pretrained(theirs, max_shard_size=max_shard_bytes)
    assert (theirs / INDEX).exists() == (max_shard_bytes < 100_000)

    config = read_config(theirs)
    assert config == CONFIG
    save_pretrained(ours, config, load_params(theirs, config), max_shard_bytes=max_shard_bytes)
    assert stored(ours) == stored(theirs)
    assert (ours / INDEX).exists() == (theirs / INDEX).exists()

    loaded, report = GPTNeoForCausalLM.from_pretrained(ours, output_loading_info=True)
    assert not any(report.values()), report
    assert loaded.dtype == dtype
    for name, tensor in hf_model.to(dtype).state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_saved_config_is_what_transformers_writes(hf_model, tmp_path):
    hf_model.float().save_pretrained(tmp_path / "theirs")
    save_pretrained(tmp_path / "ours", CONFIG, random_params(CONFIG))
    for name in ("config.json", "generation_config.json"):
        theirs = json.loads((tmp_path / "theirs" / name).read_text())
        ours = json.loads((tmp_path / "ours" / name).read_text())
        assert ours == {key: theirs[key] for key in ours}
    assert GPTNeoConfig.from_pretrained(tmp_path / "ours").dtype == torch.float32


def test_a_bare_model_with_stale_buffers_and_a_tied_head_loads(tmp_path):
    arrays = hf_tensors(CONFIG)
    expected = load_params(write(tmp_path / "plain", arrays), CONFIG)
    arrays = {name.removeprefix("transformer."): array for name, array in arrays.items()}
    for i in range(CONFIG.num_layers):
        arrays[f"h.{i}.attn.attention.bias"] = np.ones((1, 1, 64, 64), np.bool_)
        arrays[f"h.{i}.attn.attention.masked_bias"] = np.array(-1e9, np.float32)
    arrays["lm_head.weight"] = arrays["wte.weight"]
    assert_same(load_params(write(tmp_path / "bare", arrays), CONFIG), expected)

    del arrays["wte.weight"]  # of tied tensors, safetensors.torch.save_model keeps one
    assert_same(load_params(write(tmp_path / "head", arrays), CONFIG), expected)


def test_stale_buffers_with_the_prefix_are_ignored(tmp_path):
    arrays = hf_tensors(CONFIG)
    expected = load_params(write(tmp_path / "plain", arrays), CONFIG)
    arrays["transformer.h.0.attn.attention.bias"] = np.ones((1, 1, 64, 64), np.uint8)
    assert_same(load_params(write(tmp_path / "stale", arrays), CONFIG), expected)


# Our own round trip.


PATTERNS = [("global",), ("local",), ("global", "local"), ("local", "global", "global")]


@settings(max_examples=40)
@given(
    gpt2=st.booleans(),
    tied=st.booleans(),
    pattern=st.sampled_from(PATTERNS),
    heads=st.integers(1, 3),
    head_dim=st.integers(1, 4),
    sizes=st.tuples(*[st.integers(1, 9)] * 3),
    units=st.integers(1, 3),
    dtype=st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16]),
    max_shard_bytes=st.integers(1, 2000),
)
def test_round_trip_of_any_shape(
    gpt2, tied, pattern, heads, head_dim, sizes, units, dtype, max_shard_bytes
):
    """Ours to files and back, and the files once more: the same numbers, the same bytes."""
    mlp, vocab, length = sizes
    pattern = ("global",) if gpt2 else pattern
    config = ModelConfig(
        num_layers=units * len(pattern),
        embed_dim=heads * head_dim,
        num_heads=heads,
        mlp_dim=mlp,
        vocab_size=vocab,
        max_length=length,
        attention_types=pattern,
        qkv_bias=gpt2,
        scale_attention=gpt2,
        tied_head=tied or not gpt2,
    )
    params = random_params(config, dtype)
    with tempfile.TemporaryDirectory() as folder:
        first, second = Path(folder) / "first", Path(folder) / "second"
        save_pretrained(first, config, params, max_shard_bytes=max_shard_bytes)
        assert read_config(first) == config
        loaded = load_params(first, config)
        assert_same(loaded, params)
        save_pretrained(second, config, loaded, max_shard_bytes=max_shard_bytes)
        for path in first.iterdir():
            assert (second / path.name).read_bytes() == path.read_bytes()
        for path in first.glob("*.safetensors"):
            assert_well_formed(path)


def test_small_blocks_and_batches_change_nothing(folder, monkeypatch):
    expected = load_params(folder, CONFIG)
    monkeypatch.setattr(host_device, "_BLOCK_BYTES", 300)
    monkeypatch.setattr(load, "_BATCH_BYTES", 5000)
    assert_same(load_params(folder, CONFIG), expected)


def test_mixed_dtypes_survive(tmp_path):
    config = dataclasses.replace(CONFIG, embed_dim=3, num_heads=1, head_dim=3, vocab_size=97)
    params = random_params(config, ml_dtypes.bfloat16)
    params["ln_f"]["scale"] = params["ln_f"]["scale"].astype(np.float32)
    save_pretrained(tmp_path, config, params)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"
    assert_same(load_params(tmp_path, config), params)
    assert_well_formed(tmp_path / "model.safetensors")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", jax.numpy.bfloat16])
def test_dtypes_are_cast_when_read_and_when_written(folder, tmp_path, dtype):
    params = load_params(folder, CONFIG)
    cast = jax.tree.map(lambda array: np.asarray(array).astype(dtype), params)
    assert_same(load_params(folder, CONFIG, dtype=dtype), cast)
    save_pretrained(tmp_path / "cast", CONFIG, params, dtype=dtype)
    assert_same(load_params(tmp_path / "cast", CONFIG), cast)


def test_float64_is_read_as_what_jax_holds(tmp_path):
    arrays = hf_tensors(CONFIG, np.float64)
    params = load_params(write(tmp_path / "double", arrays), CONFIG)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}


@pytest.mark.parametrize("dtype", ["int8", "floaty", "bool", "complex64"])
def test_a_dtype_that_is_no_float_is_refused(folder, tmp_path, dtype):
    with pytest.raises(NeoError, match=f"{dtype}.*no floating-point type") as error:
        load_params(folder, CONFIG, dtype=dtype)
    one_line(error)
    with pytest.raises(NeoError, match="no floating-point type"):
        save_pretrained(tmp_path / "out", CONFIG, random_params(CONFIG), dtype=dtype)


# Placement.


def test_without_shardings_arrays_are_uncommitted_on_the_default_device(folder):
    device = jax.devices()[3]
    with jax.default_device(device):
        params = load_params(folder, CONFIG)
    for leaf in jax.tree.leaves(params):
        assert leaf.devices() == {device}
        assert not leaf.committed


def test_shardings_are_honoured_and_slices_copied_once(folder, tmp_path, monkeypatch):
    mesh = Mesh(np.asarray(jax.devices()[:8]).reshape(2, 2, 2), ("data", "fsdp", "model"))
    rules = {"embed": "fsdp", "heads": "model", "mlp": "model"}
    specs = {row.path: PartitionSpec(*map(rules.get, row.axes)) for row in tensors(CONFIG)}
    shardings = {path: NamedSharding(mesh, spec) for path, spec in specs.items()}
    expected = load_params(folder, CONFIG)

    copied = []
    copy = host_device.copy

    def counting_copy(view, *args):
        copied.append(view.size)
        return copy(view, *args)

    monkeypatch.setattr(host_device, "copy", counting_copy)
    params = load_params(folder, CONFIG, shardings=unflatten_dict(shardings))
    assert sum(copied) == CONFIG.num_params
    monkeypatch.undo()

    save_pretrained(tmp_path / "again", CONFIG, params)
    assert stored(tmp_path / "again") == stored(folder)
    # The host copy that JAX keeps with an array it has read would double the memory of a save.
    assert all(leaf._npy_value is None for leaf in jax.tree.leaves(params))

    assert_same(params, expected)
    for path, leaf in flatten_dict(params).items():
        assert leaf.sharding == shardings[path]
        assert leaf.committed


def test_shardings_cast_too(folder):
    sharding = NamedSharding(Mesh(np.asarray(jax.devices()[:1]), ("data",)), PartitionSpec())
    shardings = unflatten_dict({row.path: sharding for row in tensors(CONFIG)})
    params = load_params(folder, CONFIG, dtype="bfloat16", shardings=shardings)
    assert_same(params, load_params(folder, CONFIG, dtype="bfloat16"))


@pytest.mark.parametrize("replicated", [False, True])
def test_overwriting_the_file_does_not_change_the_parameters(folder, replicated):
    shardings = None
    if replicated:
        sharding = NamedSharding(Mesh(np.asarray(jax.devices()), ("data",)), PartitionSpec())
        shardings = unflatten_dict({row.path: sharding for row in tensors(CONFIG)})
    # JAX on a CPU aliases what is aligned to 64 bytes: make it so.
    path = folder / "model.safetensors"
    fields, start = header(path)
    data = path.read_bytes()[start:]
    text = json.dumps(fields).encode()
    text += b" " * (-(len(text) + 8) % 64)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)

    params = load_params(folder, CONFIG, shardings=shardings)
    before = jax.tree.map(np.array, params)
    with path.open("r+b") as file:
        file.write(b"\0" * path.stat().st_size)
    assert_same(params, before)


def test_saving_holds_one_tensor_at_a_time(tmp_path):
    config = ModelConfig(num_layers=24, embed_dim=128, num_heads=4, vocab_size=512, max_length=64)
    params = random_params(config)
    tracemalloc.start()
    try:
        save_pretrained(tmp_path, config, params)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    largest = 4 * 128 * 512
    assert peak < 4 * largest < config.num_params * 4 / 10


# Files that are not as they should be.


def failed_load(folder, config=CONFIG):
    with pytest.raises(NeoError) as error:
        load_params(folder, config)
    text = one_line(error)
    assert str(folder) in text
    return text


def test_no_weights(folder):
    (folder / "model.safetensors").rename(folder / "model.h5")
    assert "holds no model.safetensors, no pytorch_model.bin, no flax" in failed_load(folder)


@pytest.mark.parametrize("keep", [0, 4, 20, 500, -1])
def test_a_truncated_file(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert "model.safetensors is damaged or cut short" in failed_load(folder)


@pytest.mark.parametrize(
    "content",
    [
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        (2).to_bytes(8, "little") + b"[]",
        (9).to_bytes(8, "little") + b'{"a": nul',
        (1 << 62).to_bytes(8, "little") + b"{}",
    ],
)
def test_a_corrupt_header(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    assert "download or copy it again" in failed_load(folder)


@pytest.mark.parametrize("offsets", [[0, 1 << 40], [8, 4], [-4, 0], [0, 4]])
def test_offsets_outside_the_file(folder, offsets):
    name = "transformer.wte.weight"
    header = json.dumps({name: {"dtype": "F32", "shape": [2], "data_offsets": offsets}}).encode()
    content = len(header).to_bytes(8, "little") + header + bytes(8)
    (folder / "model.safetensors").write_bytes(content)
    assert "damaged" in failed_load(folder)


def test_an_unreadable_file(folder):
    (folder / "model.safetensors").unlink()
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "x.safetensors"}}))
    (folder / "x.safetensors").mkdir()
    assert "x.safetensors is no file, but a folder" in failed_load(folder)


def test_missing_tensors(tmp_path):
    arrays = hf_tensors(CONFIG)
    del arrays["transformer.h.1.ln_1.bias"], arrays["transformer.ln_f.weight"]
    text = failed_load(write(tmp_path / "model", arrays))
    assert "lacks 2 of 43 tensors, the first transformer.h.1.ln_1.bias" in text


def test_unexpected_tensors(tmp_path):
    arrays = hf_tensors(CONFIG) | {"more.weight": np.ones((2, 32), np.float32)}
    text = failed_load(write(tmp_path / "model", arrays))
    assert "1 tensors" in text
    assert "more.weight" in text


# Names as training programs write them, and what they write next to the model.


@pytest.mark.parametrize("own_head", [True, False])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod."])
def test_names_with_the_prefixes_of_wrappers(tmp_path, prefix, own_head):
    arrays = hf_tensors(CONFIG)
    plain = write(tmp_path / "plain", arrays)
    arrays["lm_head.weight"] = arrays["transformer.wte.weight"][:: -1 if own_head else 1].copy()
    folder = write(tmp_path / "wrapped", {f"{prefix}{name}": x for name, x in arrays.items()})
    assert read_config(folder) == dataclasses.replace(CONFIG, tied_head=not own_head)
    params = load_params(folder, read_config(folder))
    head = params.pop("lm_head") if own_head else params["wte"]
    table = np.asarray(head["embedding"])[: CONFIG.vocab_size]
    np.testing.assert_array_equal(table, arrays["lm_head.weight"])
    assert_same(params, load_params(plain, CONFIG))


def test_a_module_that_was_compiled_within_the_model(tmp_path):
    arrays = hf_tensors(CONFIG)
    renamed = {name.replace("h.1.", "h.1._orig_mod."): x for name, x in arrays.items()}
    folder = write(tmp_path / "wrapped", renamed)
    assert_same(load_params(folder, CONFIG), load_params(write(tmp_path / "plain", arrays), CONFIG))


def test_one_parameter_with_a_prefix_and_without(tmp_path):
    arrays = hf_tensors(CONFIG)
    arrays["model.transformer.ln_f.bias"] = arrays["transformer.ln_f.bias"] + 1
    text = failed_load(write(tmp_path / "model", arrays))
    assert "holds both model.transformer.ln_f.bias and transformer.ln_f.bias, which are" in text


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_weights_within_the_checkpoint_of_a_training_program(tmp_path, key):
    arrays = hf_tensors(CONFIG)
    plain = write(tmp_path / "plain", arrays)
    folder = write(tmp_path / "nested", {})
    (folder / "model.safetensors").unlink()
    state = {f"model.{name}": torch.from_numpy(x) for name, x in arrays.items()}
    torch.save({"epoch": 3, key: state, "lr": 1e-3}, folder / "pytorch_model.bin")
    assert_same(load_params(folder, read_config(folder)), load_params(plain, CONFIG))


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_head_next_to_the_model_is_left_out_and_named(tmp_path, prefix):
    """As trl's AutoModelForCausalLMWithValueHead saves it."""
    arrays = hf_tensors(CONFIG)
    plain = write(tmp_path / "plain", arrays)
    arrays |= {"v_head.summary.weight": np.ones((1, 32)), "v_head.summary.bias": np.ones(1)}
    folder = write(tmp_path / "wrapped", {f"{prefix}{name}": x for name, x in arrays.items()})
    with pytest.warns(NeoWarning, match=r"safetensors: v_head\.\* left out: 2 tensors of a head"):
        params = load_params(folder, read_config(folder))
    assert_same(params, load_params(plain, CONFIG))


@pytest.mark.parametrize("kind", ["SequenceClassification", "TokenClassification"])
def test_a_classifier_whose_config_does_not_say_so_is_the_model_below(hf_model, tmp_path, kind):
    """What its config.json says of it is in model/test_heads.py."""
    model = getattr(transformers, f"GPTNeoFor{kind}")(copy.deepcopy(hf_model.config))
    model.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    del fields["architectures"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    head = "score" if kind.startswith("S") else "classifier"
    with pytest.warns(NeoWarning, match=rf"{head}\.\* left out: [12] tensors of a head next to"):
        params = load_params(tmp_path, read_config(tmp_path))
    expected = model.transformer.wte.weight.detach().numpy()
    np.testing.assert_array_equal(params["wte"]["embedding"][: CONFIG.vocab_size], expected)
    assert head not in params


def test_a_config_of_another_depth(folder):
    assert "lacks" in failed_load(folder, dataclasses.replace(CONFIG, num_layers=6))
    shallow = dataclasses.replace(CONFIG, num_layers=1, attention_types=("global",))
    assert "26 tensors" in failed_load(folder, shallow)


def test_a_wrong_shape(folder):
    text = failed_load(folder, dataclasses.replace(CONFIG, max_length=65))
    assert "transformer.wpe.weight is [64, 32], but config.json asks for [65, 32]" in text


def test_an_untied_head_of_another_size(tmp_path):
    arrays = hf_tensors(CONFIG) | {"lm_head.weight": np.ones((2, 32), np.float32)}
    assert "lm_head.weight is [2, 32]" in failed_load(write(tmp_path / "model", arrays))


@pytest.mark.parametrize("dtype", [np.int8, np.bool_, np.int64])
def test_weights_that_are_no_floats(tmp_path, dtype):
    arrays = hf_tensors(CONFIG)
    arrays["transformer.ln_f.bias"] = arrays["transformer.ln_f.bias"].astype(dtype)
    text = failed_load(write(tmp_path / "model", arrays))
    assert "transformer.ln_f.bias is stored as" in text


def test_a_missing_shard(sharded):
    (sharded / "model-00002-of-00005.safetensors").unlink()
    text = failed_load(sharded)
    assert "names model-00002-of-00005.safetensors, which is not there" in text


def test_a_truncated_shard(sharded):
    path = sharded / "model-00003-of-00005.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert f"{path} is damaged" in failed_load(sharded)


def test_an_index_that_names_what_its_shard_lacks(sharded):
    index = json.loads((sharded / INDEX).read_text())
    name = "transformer.wte.weight"
    index["weight_map"][name] = "model-00002-of-00005.safetensors"
    (sharded / INDEX).write_text(json.dumps(index))
    assert f"says that model-00002-of-00005.safetensors holds {name}" in failed_load(sharded)


@pytest.mark.parametrize(
    "content", ["{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "[]", "{"]
)
def test_a_damaged_index(sharded, content):
    (sharded / INDEX).write_text(content)
    assert INDEX in failed_load(sharded)


def test_an_index_reads_nothing_outside_its_folder(tmp_path, sharded):
    outside = write(tmp_path, hf_tensors(CONFIG)) / "model.safetensors"
    for shard in ("../model.safetensors", str(outside)):
        (sharded / INDEX).write_text(json.dumps({"weight_map": {"transformer.wte.weight": shard}}))
        assert "no weight_map of file names" in failed_load(sharded)


@pytest.mark.parametrize("name", ["model.safetensors", INDEX, "config.json", "pytorch_model.bin"])
@pytest.mark.parametrize("link", [True, False])
def test_files_that_are_none(tmp_path, folder, name, link):
    """A broken link was passed over, and the next format loaded; a pipe was waited for."""
    weights = folder / "model.safetensors"
    weights.rename(tmp_path / weights.name)
    (folder / name).unlink(missing_ok=True)
    if link:
        (folder / name).symlink_to("nothing")
    else:
        os.mkfifo(folder / name)
    with pytest.raises(NeoError, match=f"{name} is (a link to nothing|no file)"):
        load_params(folder, read_config(folder))


@pytest.mark.parametrize("shard", ["x" * 5000, "a\0b", "..", ".", "a/b", None, 5, ["a"]])
def test_names_of_shards_that_are_none(sharded, shard):
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["transformer.wte.weight"] = shard
    (sharded / INDEX).write_text(json.dumps(index))
    failed_load(sharded)


# Numbers that are none.


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, ml_dtypes.bfloat16])
def test_weights_that_are_not_finite(tmp_path, dtype, number):
    arrays = hf_tensors(CONFIG, dtype)
    arrays["transformer.h.1.mlp.c_fc.weight"][-1, -1] = number
    folder = write(tmp_path / "model", arrays)
    message = f"h.1.mlp.c_fc.weight holds NaN or infinite numbers, as {np.dtype(dtype).name}"
    if dtype != np.float64:  # which JAX makes float32 of
        assert message in failed_load(folder)
    with pytest.raises(NeoError, match=message), open_model.stored_leaves(folder, CONFIG) as leaves:
        leaves["h_1", "mlp", "c_fc", "kernel"].read()


def test_weights_that_are_not_finite_on_one_device_of_a_mesh(tmp_path):
    arrays = hf_tensors(CONFIG)
    arrays["transformer.h.1.mlp.c_fc.weight"][-1, -1] = np.nan
    mesh = Mesh(np.asarray(jax.devices()), ("model",))
    rules = {"mlp": "model"}
    shardings = {
        row.path: NamedSharding(mesh, PartitionSpec(*map(rules.get, row.axes)))
        for row in tensors(CONFIG)
    }
    folder = write(tmp_path / "model", arrays)
    with pytest.raises(NeoError, match=r"c_fc\.weight holds NaN or infinite numbers, as float32"):
        load_params(folder, CONFIG, shardings=unflatten_dict(shardings))


def test_weights_that_a_narrow_dtype_cannot_hold(tmp_path):
    """float16 ends at 65504: a greater weight became infinite."""
    arrays = hf_tensors(CONFIG)
    arrays["transformer.ln_f.bias"][3] = 70_000
    folder = write(tmp_path / "model", arrays)
    load_params(folder, CONFIG, dtype="bfloat16")
    with pytest.raises(NeoError, match=r"ln_f\.bias holds NaN or infinite numbers, as float16"):
        load_params(folder, CONFIG, dtype="float16")


def test_the_largest_numbers_are_finite(tmp_path):
    arrays = hf_tensors(CONFIG)
    for i, array in enumerate(arrays.values()):
        array[...] = np.finfo(np.float32).max * (-1) ** i
    params = load_params(write(tmp_path / "model", arrays), CONFIG)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


# Output heads that config.json does not speak of.


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("own", [True, False])
def test_an_output_head_of_its_own_counts(hf_model, tmp_path, form, own):
    """transformers keeps what is stored, though config.json says that the head is the table."""
    hf_model.config.save_pretrained(tmp_path)
    state = {name: tensor.clone() for name, tensor in hf_model.state_dict().items()}
    if own:
        state["lm_head.weight"] = state["lm_head.weight"].flip(0)
    if form == "bin":
        torch.save(state, tmp_path / "pytorch_model.bin")
    else:
        save_torch_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"]
    theirs = GPTNeoForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    torch.testing.assert_close(theirs.lm_head.weight, state["lm_head.weight"], atol=0, rtol=0)
    config = read_config(tmp_path)
    assert config == dataclasses.replace(CONFIG, tied_head=not own)
    params = load_params(tmp_path, config)
    tokens = np.arange(20)[None]
    ours = Neo(config).apply({"params": params}, jax.numpy.asarray(tokens)).logits
    with torch.no_grad():
        logits = theirs(torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(ours, logits, rtol=1e-4, atol=1e-3 * np.abs(logits).max())


@pytest.mark.parametrize("own", [True, False])
def test_an_output_head_next_to_a_bare_model(tmp_path, own):
    """Its tensors are named without "transformer."."""
    arrays = {n.removeprefix("transformer."): a for n, a in hf_tensors(CONFIG).items()}
    table = arrays["wte.weight"]
    arrays["lm_head.weight"] = table[::-1].copy() if own else table.copy()
    folder = write(tmp_path / "model", arrays)
    config = read_config(folder)
    assert config.tied_head != own
    params = load_params(folder, config)
    head = params["lm_head" if own else "wte"]["embedding"][: CONFIG.vocab_size]
    np.testing.assert_array_equal(np.asarray(head), arrays["lm_head.weight"])


def test_one_parameter_under_two_names(tmp_path):
    arrays = hf_tensors(CONFIG)
    arrays["wte.weight"] = arrays["transformer.wte.weight"] + 1
    assert "wte.weight, which are one parameter" in failed_load(write(tmp_path / "m", arrays))


def test_read_config_names_what_is_wrong(tmp_path):
    with pytest.raises(NeoError, match=r"holds no config\.json") as error:
        read_config(tmp_path)
    one_line(error)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(NeoError, match=r"config\.json: model_type is 'bert'") as error:
        read_config(tmp_path)
    one_line(error)


# Saving.


class FakeTokenizer:
    def save(self, folder):
        (Path(folder) / "tokenizer.json").write_text("{}")


class BrokenTokenizer:
    def save(self, folder):
        raise RuntimeError("crash")


def test_the_tokenizer_is_saved_too(tmp_path):
    save_pretrained(tmp_path / "new" / "deep", CONFIG, random_params(CONFIG), tokenizer=None)
    save_pretrained(
        tmp_path / "new" / "deep", CONFIG, random_params(CONFIG), tokenizer=FakeTokenizer()
    )
    assert sorted(os.listdir(tmp_path / "new" / "deep")) == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip


@pytest.mark.parametrize("sizes", [(None, 40_000), (40_000, None), (40_000, 60_000)])
def test_a_second_save_replaces_the_first(tmp_path, sizes):
    first, second = random_params(CONFIG), random_params(CONFIG, ml_dtypes.bfloat16)
    for params, size in zip((first, second), sizes, strict=True):
        save_pretrained(tmp_path, CONFIG, params, max_shard_bytes=size or 1 << 40)
    assert_same(load_params(tmp_path, CONFIG), second)
    save_pretrained(tmp_path / "alone", CONFIG, second, max_shard_bytes=sizes[1] or 1 << 40)
    assert {path.name for path in tmp_path.iterdir()} - {"alone"} == {
        path.name for path in (tmp_path / "alone").iterdir()
    }


def test_a_crash_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    first = random_params(CONFIG)
    save_pretrained(tmp_path, CONFIG, first)
    files = sorted(os.listdir(tmp_path))
    second = jax.tree.map(lambda array: array + 1, first)
    with pytest.raises(RuntimeError, match="crash"):
        save_pretrained(tmp_path, CONFIG, second, tokenizer=BrokenTokenizer())

    calls = []

    def crash(view, dtype, _):
        calls.append(view)
        if len(calls) == 9:
            raise OSError(28, "No space left on device")
        return np.array(view, dtype)

    monkeypatch.setattr(save, "copy", crash)
    with pytest.raises(NeoError, match=r"cannot save to .*: No space left on device") as error:
        save_pretrained(tmp_path, CONFIG, second, max_shard_bytes=40_000)
    one_line(error)
    monkeypatch.undo()
    assert sorted(os.listdir(tmp_path)) == files
    assert_same(load_params(tmp_path, CONFIG), first)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NeoError, match="cannot save to") as error:
        save_pretrained(tmp_path / "file", CONFIG, random_params(CONFIG))
    one_line(error)


def test_parameters_that_the_config_does_not_describe(tmp_path):
    params = random_params(CONFIG)
    for path, leaf, message in [
        (("ln_f", "bias"), None, "no leaf ln_f/bias"),
        (("ln_f", "bias"), np.ones(3, np.float32), r"ln_f/bias is \(3,\).* asks for \(32,\)"),
        (("ln_f", "bias"), "low rank", "ln_f/bias is a str; merge it"),
        (("ln_f", "bias"), np.ones(32, np.int8), "int8.*no floating-point type"),
        (("ln_f", "extra"), np.ones(3, np.float32), "a leaf ln_f/extra that its config has not"),
    ]:
        leaves = flatten_dict(params)
        leaves[path] = leaf
        if leaf is None:
            del leaves[path]
        with pytest.raises(NeoError, match=message) as error:
            save_pretrained(tmp_path / "out", CONFIG, unflatten_dict(leaves))
        one_line(error)
    assert not (tmp_path / "out").exists()
