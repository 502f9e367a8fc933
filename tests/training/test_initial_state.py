"""training/initial_state.py and training by LoRA: whole runs from a pretrained checkpoint."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file
from transformers import AutoTokenizer, GPTNeoForCausalLM

import neo_jax
from neo_jax.config import ModelConfig
from neo_jax.data.prepare import prepare
from neo_jax.errors import NeoError
from neo_jax.model.scan import stack, unstack
from neo_jax.model.transformer import Neo
from neo_jax.text.tokenizer import load_tokenizer
from neo_jax.training import loop
from neo_jax.training.checkpoint import Checkpoints
from neo_jax.training.initial_state import find_pretrained, first_state, load_stacked
from neo_jax.training.loop import train
from neo_jax.training.optimizer import make_optimizer
from neo_jax.transforms.lora import LoraConfig, add_adapters, init_adapters

LORA = LoraConfig(rank=4, alpha=8.0, targets=("q_proj", "v_proj", "c_fc"))


@pytest.fixture
def tuning(config, checkpoints):
    """`config` as a run of LoRA from a checkpoint whose model is for it to say."""
    return dataclasses.replace(
        config, model=ModelConfig(), pretrained=str(checkpoints["pieces"]), lora=LORA
    )


@pytest.fixture(scope="module")
def finished(six_steps, checkpoints, tmp_path_factory):
    """An uninterrupted run of LoRA, with all that it may tell: its config and final state."""
    config = dataclasses.replace(
        six_steps,
        model=ModelConfig(),
        pretrained=str(checkpoints["pieces"]),
        lora=LORA,
        output=str(tmp_path_factory.mktemp("finished") / "run"),
        eval_every=6,
        prompts=("The quick",),
        sample_tokens=5,
    )
    return config, train(config)


def losses(config, name="loss"):
    lines = map(json.loads, (Path(config.output) / "metrics.jsonl").read_text().splitlines())
    return [line[name] for line in lines if name in line]


def assert_identical(ours, theirs):
    ours, theirs = map(jax.tree.leaves_with_path, (ours, theirs))
    assert len(ours) == len(theirs)
    for (path, a), (_, b) in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), jax.tree_util.keystr(path))


def test_only_adapters_are_trained_and_kept(finished):
    config, state = finished
    model = find_pretrained(config)[0].model
    shapes = jax.eval_shape(lambda key: init_adapters(model, LORA, key), jax.random.key(0))
    assert jax.tree.map(np.shape, state.params) == jax.tree.map(lambda leaf: leaf.shape, shapes)
    size = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    kept = sum(leaf.size for leaf in jax.tree.leaves(state))
    assert 3 * size < kept < 3 * size + 10  # they and the two moments of Adam
    for path, leaf in flatten_dict(state.params).items():
        assert np.asarray(leaf).any(), path
    with Checkpoints(Path(config.output) / "checkpoints") as checkpoints:
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
        )
        restored = checkpoints.restore_latest(abstract, find_pretrained(config)[0])
    assert_identical(restored, state)


def test_adapters_learn(tuning):
    optimizer = dataclasses.replace(tuning.optimizer, learning_rate=2e-2)
    config = dataclasses.replace(tuning, steps=60, save_every=60, optimizer=optimizer)
    train(config)
    assert losses(config)[-1] < losses(config)[0] - 0.3


def test_what_a_run_leaves(finished, checkpoints):
    """model/ is the base with adapter/ merged into it, and neither is the base."""
    config, _ = finished
    output = Path(config.output)
    merged, adapted, base = map(
        neo_jax.load, (output / "model", output / "adapter", checkpoints["pieces"])
    )
    assert merged.config == adapted.config == base.config
    before = flatten_dict(base.params)
    for path, leaf in flatten_dict(merged.params).items():
        np.testing.assert_allclose(leaf, flatten_dict(adapted.params)[path], rtol=0, atol=1e-7)
        changed = len(path) > 2 and path[-1] == "kernel" and path[-2] in LORA.targets
        assert np.array_equal(leaf, before[path]) != changed, path
    samples = json.loads((output / "samples.jsonl").read_text())
    assert merged.sample(["The quick"], 5)[0].text == samples["text"]
    tokens = torch.arange(40).reshape(2, 20)
    theirs = GPTNeoForCausalLM.from_pretrained(checkpoints["pieces"], attn_implementation="eager")
    theirs = peft.PeftModel.from_pretrained(theirs, output / "adapter").eval()
    with torch.no_grad():
        logits = theirs(tokens).logits.numpy()
    ours = merged.model.apply({"params": merged.params}, jnp.asarray(tokens.numpy())).logits
    np.testing.assert_allclose(ours, logits, rtol=0, atol=1e-5 * np.abs(logits).max())


def test_a_run_in_bfloat16_leaves_float32(tuning, checkpoints):
    """What is merged is not rounded; the rest are the weights that products had."""
    config, folder = find_pretrained(dataclasses.replace(tuning, dtype="bfloat16"))
    frozen = load_stacked(Neo(config.model), folder, jnp.bfloat16)
    adapters = init_adapters(config.model, LORA, jax.random.key(0))
    adapters = jax.tree.map(lambda leaf: leaf + 0.01, adapters)
    loop._export(config, unstack(add_adapters(frozen, adapters, LORA.scale), config.model), None)
    model = Path(tuning.output) / "model"
    found, base = (load_file(f / "model.safetensors") for f in (model, checkpoints["pieces"]))
    assert {array.dtype for array in found.values()} == {np.dtype(np.float32)}
    assert json.loads((model / "config.json").read_text())["dtype"] == "float32"
    for name, array in found.items():
        rounded = base[name].astype(jnp.bfloat16).astype(np.float32)
        adapted = any(f"{target}.weight" in name for target in LORA.targets)
        assert np.array_equal(array, rounded) != adapted, name


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(
    tuning, finished, monkeypatch, checkpoints, tmp_path
):
    config, whole = finished

    class Killed(BaseException):
        """What a signal does to a run."""

    def dying(*args, **options):
        yield from (
            batch for _, batch in zip(range(5), all_batches(*args, **options), strict=False)
        )
        raise Killed

    all_batches = loop.batches
    monkeypatch.setattr(loop, "batches", dying)
    with pytest.raises(Killed):
        train(tuning)
    monkeypatch.undo()
    state = train(tuning)
    assert_identical(state, whole)
    assert losses(tuning) == losses(config)
    files = [Path(c.output) / "adapter" / "adapter_model.safetensors" for c in (config, tuning)]
    assert files[0].read_bytes() == files[1].read_bytes()
    other = dataclasses.replace(tuning, lora=dataclasses.replace(LORA, rank=2))
    with pytest.raises(NeoError, match=r"trains other adapters \(lora.rank 4 -> 2\); choose"):
        train(other)
    # Nor do adapters go on with another model of the same shape.
    base = tmp_path / "base"
    shutil.copytree(checkpoints["pieces"], base)
    weights = load_file(base / "model.safetensors")
    weights["transformer.h.1.mlp.c_fc.weight"][3, 4] += 1e-6
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(NeoError, match="trains adapters of another model than the one in pretr"):
        train(dataclasses.replace(tuning, pretrained=str(base)))


def test_parts_of_a_batch_on_a_mesh(tuning, finished):
    split = dataclasses.replace(tuning, accumulation=2, mesh="data=2,fsdp=2,model=2")
    train(split)
    np.testing.assert_allclose(losses(split), losses(finished[0]), rtol=1e-5)


def test_all_weights_from_a_checkpoint(tuning, checkpoints):
    """Each step is small, so the weights stay near those of the checkpoint; all move."""
    config = dataclasses.replace(tuning, lora=LoraConfig(), steps=2, mesh="fsdp=8")
    state = train(config)
    base = neo_jax.load(checkpoints["pieces"])
    start = stack(base.params, base.config)
    for path, leaf in flatten_dict(state.params).items():
        change = np.abs(np.asarray(leaf) - flatten_dict(start)[path]).max()
        assert 0 < change < 0.01, path
    assert not (Path(config.output) / "adapter").exists()


@pytest.mark.parametrize("mesh", ["", "fsdp=4,model=2"])
def test_a_frozen_model_has_the_dtype_of_products(tuning, checkpoints, mesh):
    config, folder = find_pretrained(tuning)
    model = Neo(config.model, sharding=loop.make_sharding(mesh))
    params = load_stacked(model, folder, jnp.bfloat16)
    base = neo_jax.load(checkpoints["pieces"], dtype="bfloat16")
    assert_identical(params, stack(base.params, base.config))
    kernel = params["unit_0"]["mlp"]["c_fc"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == ((1, 64, 8) if mesh else (1, 128, 32))


@pytest.mark.parametrize("mesh", ["", "fsdp=4,model=2"])
def test_new_tokens_begin_as_the_mean_of_all(tuning, checkpoints, mesh):
    config = dataclasses.replace(tuning, lora=LoraConfig(), new_tokens=60, mesh=mesh)
    config, folder = find_pretrained(config)
    assert config.model.vocab_size == 387  # a further block of 128 rows
    model = Neo(config.model, sharding=loop.make_sharding(mesh))
    optimizer = make_optimizer(config.optimizer, config.steps)
    params = jax.device_get(first_state(config, model, optimizer, folder).params)
    base = neo_jax.load(checkpoints["pieces"])
    before = np.asarray(base.params["wte"]["embedding"])[:327]
    table = params["wte"].pop("embedding")
    assert table.shape == (512, 32)
    np.testing.assert_array_equal(table[:327], before)
    mean = np.broadcast_to(before.mean(axis=0), (60, 32))
    np.testing.assert_allclose(table[327:387], mean, rtol=0, atol=1e-7)
    assert not table[387:].any()
    start = jax.device_get(stack(base.params, base.config))
    del start["wte"]["embedding"]
    assert_identical(params, start)


def test_new_tokens_from_text_to_a_model(tuning, checkpoints, tokenizer_folders, tmp_path):
    lines = [{"text": f"<|user|>The fox and the dog {i}.<|bot|>It is so."} for i in range(60)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    new = ["<|user|>", "<|bot|>", *(f"<|{i}|>" for i in range(8))]  # seven ids were free
    with pytest.raises(NeoError, match="a SentencePiece tokenizer takes no new tokens; leave"):
        prepare(
            [tmp_path / "in.jsonl"], tmp_path / "no", tokenizer_folders["pieces"], new_tokens=new
        )
    source = checkpoints["bytes"]
    for wrong in ("", "<|endoftext|>"):
        with pytest.raises(NeoError, match="cannot be a new token: it is empty or there"):
            load_tokenizer(source).add_tokens([wrong])
    fields = prepare([tmp_path / "in.jsonl"], tmp_path / "data", source, new_tokens=new)
    assert fields["vocab_size"] == 330
    config = dataclasses.replace(
        tuning, data=str(tmp_path / "data"), pretrained=str(source), lora=LoraConfig(), steps=2
    )
    with pytest.raises(NeoError, match=r"the model one of 327; set new_tokens to 3, or prepare"):
        train(config)
    train(dataclasses.replace(config, new_tokens=3, mesh="fsdp=8"))
    folder = Path(config.output) / "model"
    theirs = GPTNeoForCausalLM.from_pretrained(folder)
    assert theirs.get_input_embeddings().weight.shape == (330, 32)
    lm = neo_jax.load(folder)
    assert lm.config.vocab_size == 330
    ids = lm.encode("<|user|>The fox<|bot|>")
    assert (ids[0], ids[-1]) == (320, 321)
    assert AutoTokenizer.from_pretrained(folder)("<|user|>The fox<|bot|>")["input_ids"] == ids


@pytest.mark.parametrize("mesh", ["", "fsdp=2,context=2"])
@pytest.mark.parametrize("how", ["repeated", "interpolated"])
def test_a_longer_context_begins_with_the_positions_that_were_learned(
    tuning, checkpoints, mesh, how
):
    longer = ModelConfig(max_length=190)
    config = dataclasses.replace(
        tuning, lora=LoraConfig(), model=longer, new_positions=how, mesh=mesh,
        rules=mesh and "length:context,embed:fsdp",
    )  # fmt: skip
    config, folder = find_pretrained(config)
    base = neo_jax.load(checkpoints["pieces"])
    assert config.model == dataclasses.replace(base.config, max_length=190)
    assert config.sequence_length == 190
    model = Neo(config.model, sharding=loop.make_sharding(mesh, config.rules))
    optimizer = make_optimizer(config.optimizer, config.steps)
    params = jax.device_get(first_state(config, model, optimizer, folder).params)
    before = np.asarray(base.params["wpe"]["embedding"])
    table = params["wpe"].pop("embedding")
    expected = np.concatenate([before, before, before])[:190]
    if how == "interpolated":
        places = np.linspace(0, 63, 190)
        expected = np.stack([np.interp(places, np.arange(64), each) for each in before.T], axis=1)
    np.testing.assert_allclose(table, expected, rtol=0, atol=1e-6)
    start = jax.device_get(stack(base.params, base.config))
    del start["wpe"]["embedding"]
    assert_identical(params, start)


def test_when_the_default_is_a_request_for_a_longer_context(tuning):
    config = dataclasses.replace(tuning, lora=LoraConfig())
    assert find_pretrained(config)[0].model.max_length == 64
    config = dataclasses.replace(config, length=2048)  # the default itself, of a GPT-2 maybe
    assert find_pretrained(config)[0].model.max_length == 2048


def test_the_length_is_the_context_of_the_checkpoint(tuning):
    assert find_pretrained(dataclasses.replace(tuning, length=0))[0].sequence_length == 64


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pretrained": ""}, "lora.rank needs a model to adapt; name one in pretrained"),
        ({"new_tokens": 2}, "adapters do not train embeddings, so those of new_tokens would never"),
        ({"new_tokens": 2, "lora": LoraConfig(), "pretrained": ""}, "new_tokens are for a model"),
        ({"length": 65}, "length 65 exceeds the model's context of 64"),
        ({"model": ModelConfig(num_layers=2)}, "model is another than that of the checkpoint"),
        ({"model": ModelConfig(max_length=65)}, "the positions that model.max_length adds"),
        (
            {"model": ModelConfig(max_length=32)},
            "model.max_length 32 is below the 64 positions of",
        ),
        ({"pretrained": "nowhere"}, "there is no folder and no published model 'nowhere'"),
    ],
)
def test_runs_that_cannot_be(tuning, fields, message):
    with pytest.raises(NeoError) as error:
        train(dataclasses.replace(tuning, **fields))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not Path(tuning.output).exists()
