"""training/loop.py: whole runs of a tiny model."""

import dataclasses
import json
import math
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from transformers import GPTNeoForCausalLM

import neo_jax
from neo_jax.data.feed import batches, evaluation_batches
from neo_jax.data.packing import TokenDataset
from neo_jax.data.prepare import prepare
from neo_jax.errors import NeoError
from neo_jax.model.scan import unstack
from neo_jax.model.transformer import Neo
from neo_jax.sharding.rules import make_sharding
from neo_jax.training import loop, preflight
from neo_jax.training.loop import train
from neo_jax.training.objectives.next_token import Batch, NextToken
from neo_jax.training.optimizer import make_optimizer
from neo_jax.training.step import abstract_inputs, init_state, make_step


def metrics(config, name="loss"):
    """What metrics.jsonl says of each step."""
    lines = map(json.loads, (Path(config.output) / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line[name] for line in lines if name in line}


def assert_identical(ours, theirs):
    ours, theirs = map(jax.tree.leaves_with_path, (ours, theirs))
    assert len(ours) == len(theirs)
    for (path, a), (_, b) in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), jax.tree_util.keystr(path))


@pytest.fixture(scope="module")
def finished(six_steps, tmp_path_factory):
    """An uninterrupted run of six steps: its config and its final state."""
    output = tmp_path_factory.mktemp("finished") / "run"
    config = dataclasses.replace(six_steps, output=str(output))
    return config, train(config)


def test_a_run_learns_and_leaves_a_model(config, text):
    optimizer = dataclasses.replace(config.optimizer, learning_rate=1e-2)
    every = {"log_every": 30, "eval_every": 60, "save_every": 60}
    config = dataclasses.replace(config, steps=90, optimizer=optimizer, **every)
    state = train(config)
    assert int(state.step) == 90
    losses = metrics(config)
    assert list(losses) == [30, 60, 90]
    assert losses[90] < losses[60] < losses[30] < math.log(320)
    assert losses[90] < 3
    # The held-out lines are of the same text.
    held_out, bits = metrics(config, "eval_loss"), metrics(config, "eval_bits_per_byte")
    assert list(held_out) == [60, 90]
    assert held_out[90] == pytest.approx(losses[90], abs=0.5)
    dataset = TokenDataset.open(config.data, "held_out", 32)
    nats = held_out[90] * (dataset.num_tokens - 1)
    assert bits[90] == pytest.approx(nats / math.log(2) / dataset.num_bytes, rel=1e-4)

    folder = Path(config.output) / "model"
    lm = neo_jax.load(folder)
    assert lm.config == config.model
    assert_identical(lm.params, unstack(state.params, config.model))
    assert lm.tokenizer.eos_id == config.model.eos_token_id
    reference = GPTNeoForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    ids = torch.tensor([lm.encode(text)[:32]])
    with torch.no_grad():
        theirs = reference(ids).logits.numpy()
    ours = lm.model.apply({"params": lm.params}, jnp.asarray(ids.numpy())).logits
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


class Killed(BaseException):
    """What a signal does to a run."""


@pytest.mark.core
def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(config, finished, monkeypatch):
    killed, (config, whole) = config, finished

    def dying(*args, **options):
        for i, batch in enumerate(batches(*args, **options)):
            if i == 5:  # two steps after the checkpoint of step 3
                raise Killed
            yield batch

    monkeypatch.setattr(loop, "batches", dying)
    with pytest.raises(Killed):
        train(killed)
    assert list(metrics(killed)) == [1, 2, 3, 4]
    assert not (Path(killed.output) / "model").exists()

    steps = []

    def watched(*args, **options):
        steps.append(options["start_step"])
        return batches(*args, **options)

    monkeypatch.setattr(loop, "batches", watched)
    resumed = train(killed)
    assert steps == [3]
    assert int(resumed.step) == 6
    assert_identical(resumed, whole)
    assert metrics(killed) == metrics(config)
    assert list(metrics(killed)) == [1, 2, 3, 4, 5, 6]
    models = [Path(c.output) / "model" / "model.safetensors" for c in (config, killed)]
    assert models[0].read_bytes() == models[1].read_bytes()

    # A finished run is left as it is.
    assert_identical(train(killed), whole)
    assert metrics(killed) == metrics(config)


def test_a_run_that_goes_on_draws_no_weights(config, monkeypatch):
    """They would lie beside those of the checkpoint."""
    train(dataclasses.replace(config, steps=3))
    monkeypatch.setattr(loop, "first_state", None)
    assert int(train(dataclasses.replace(config, mesh="fsdp=8")).step) == 6


def test_only_the_newest_checkpoints_are_kept(config):
    train(dataclasses.replace(config, save_every=2, keep=2))
    kept = {path.name for path in (Path(config.output) / "checkpoints").iterdir()}
    assert kept == {"4", "6"}


def test_seeds_choose_the_weights_and_the_order_of_the_data(config, finished):
    other = dataclasses.replace(config, seed=1)
    states = train(other), finished[1]
    kernels = [state.params["unit_0"]["mlp"]["c_fc"]["kernel"] for state in states]
    assert np.abs(kernels[0] - kernels[1]).max() > 0.01
    dataset = TokenDataset.open(config.data, length=32)
    first, again, second = (
        next(batches(dataset, batch_size=8, seed=seed))["tokens"] for seed in (0, 0, 1)
    )
    assert (first == again).all()
    assert (first != second).any()


def test_what_a_run_tells_changes_nothing_of_it(config, finished):
    """Evaluations, sample texts, a picture, a trace, TensorBoard."""
    prompts = ("The quick", "Call")
    told = dataclasses.replace(  # what is compiled is not traced: that would take long
        config, eval_every=1, prompts=prompts, sample_tokens=5, profile=2, tensorboard=True
    )
    assert_identical(train(told), finished[1])
    output = Path(config.output)
    samples = list(map(json.loads, (output / "samples.jsonl").read_text().splitlines()))
    assert [(line["step"], line["prompt"]) for line in samples] == [
        (step, prompt) for step in range(1, 7) for prompt in prompts
    ]
    # They are what the model writes that is left at the end.
    last = neo_jax.load(output / "model", dtype="float32").sample(prompts, 5)
    assert samples[-2]["text"] == last[0].text
    assert list((output / "profile").rglob("*.xplane.pb"))
    for name in ("loss.png", "best.json", "tensorboard"):
        assert (output / name).exists()


def test_what_a_run_goes_on_with_is_said(config, capsys):
    three = dataclasses.replace(config, steps=3)
    train(three)
    assert "resuming" not in capsys.readouterr().err
    optimizer = dataclasses.replace(config.optimizer, learning_rate=1e-3)
    train(dataclasses.replace(config, batch_size=4, optimizer=optimizer))
    err = capsys.readouterr().err.splitlines()
    assert err[0] == (
        "resuming at step 3 of 6; steps 3 -> 6; batch_size 8 -> 4; optimizer.learning_rate "
        "0.003 -> 0.001"
    )
    shutil.rmtree(Path(config.output) / "model")
    assert int(train(three).step) == 6  # and what it has come to is there
    err = capsys.readouterr().err.splitlines()
    assert err[0].startswith("resuming at step 6 of 3: already finished; steps 6 -> 3; batch_size")
    assert neo_jax.load(Path(config.output) / "model").config == config.model


def test_a_second_run_into_the_same_folder(config, monkeypatch):
    """Neither loses anything; the first goes on."""
    errors = []

    def second(*args, **options):
        with pytest.raises(NeoError) as error:
            train(config)
        errors.append(str(error.value))
        return batches(*args, **options)

    monkeypatch.setattr(loop, "batches", second)
    assert int(train(config).step) == 6
    assert errors == [
        f"another process is writing {config.output}; wait for it, stop it, or choose another "
        "output."
    ]


# What it learns from.


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, tokenizer_folders):
    """A data set of pairs, a part of them held out."""
    root = tmp_path_factory.mktemp("pairs")
    lines = [{"prompt": f"What is {i}? ", "completion": f"the fox {i % 7}"} for i in range(80)]
    lines.append({"prompt": "the dog and " * 20, "completion": "so do I"})
    (root / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    prepare([root / "pairs.jsonl"], root / "data", tokenizer_folders["pieces"], held_out=0.2)
    return root / "data"


def evaluation_alone(config, state, data, **options):
    """The loss of a held-out split, document by document, each in a row of its own."""
    dataset = TokenDataset.open(data, "held_out", 32, **options)
    total = weight = 0.0
    model = Neo(config.model)
    losses = jax.jit(lambda batch: NextToken().loss(model, state.params, batch))
    for i in range(dataset.num_sequences):
        tokens, weights, segment_starts = (
            dataset.sequence(i)[n] for n in ("tokens", "weights", "segment_starts")
        )
        for start in np.unique(segment_starts[weights > 0]):
            mine = (segment_starts == start) & (weights > 0)
            stop = np.flatnonzero(mine)[-1] + 2
            row = np.zeros((1, 33), np.int32)
            row[0, : stop - start] = tokens[start:stop]
            counts = np.zeros((1, 32), np.float32)
            counts[0, : stop - start - 1] = mine[start : stop - 1]
            found = losses(Batch(jnp.asarray(row), jnp.asarray(counts)))
            total, weight = total + float(found.loss), weight + float(found.weight)
    return total, weight


def test_documents_that_see_only_themselves(config, finished):
    apart = dataclasses.replace(config, across_documents=False, eval_every=6)
    state = train(apart)
    total, weight = evaluation_alone(apart, state, config.data, across_documents=False)
    assert metrics(apart, "eval_loss")[6] == pytest.approx(total / weight, rel=1e-5)
    assert metrics(apart, "eval_bits_per_byte")
    assert metrics(apart)[1] != metrics(finished[0])[1]


def test_a_mixture_with_pairs_on_a_mesh(config, pairs):
    """Each held-out split counts by its targets; bits a byte are of text alone."""
    data = f"{config.data}=0.6,{pairs}=0.4"
    mixed = dataclasses.replace(config, data=data, eval_every=6, prompts=("the",), sample_tokens=4)
    one = train(mixed)
    parts = [evaluation_alone(mixed, one, pairs)]
    dataset = TokenDataset.open(config.data, "held_out", 32)
    losses = jax.jit(lambda batch: NextToken().loss(Neo(config.model), one.params, batch))
    for batch in evaluation_batches(dataset, 8):
        model = Neo(config.model)
        placed = loop.Placement(model, abstract_inputs(config, model)[0])(batch)
        assert placed.segment_starts is None  # nobody needs them: the step is compiled without
        found = losses(placed)
        parts.append((float(found.loss), float(found.weight)))
    totals, weights = zip(*parts, strict=True)
    expected = sum(totals) / sum(weights)
    assert metrics(mixed, "eval_loss")[6] == pytest.approx(expected, rel=1e-5)
    assert not metrics(mixed, "eval_bits_per_byte")
    assert not metrics(mixed, "bits_per_byte")
    assert neo_jax.load(Path(mixed.output) / "model").tokenizer.vocab_size == 320

    split = {"mesh": "data=2,fsdp=2,model=2", "accumulation": 2}
    split = dataclasses.replace(mixed, output=mixed.output + "-split", **split)
    train(split)
    for step, loss in metrics(split).items():
        assert loss == pytest.approx(metrics(mixed)[step], rel=1e-5)


def test_completions_alone_are_learned(config, pairs, capsys):
    """What prompts are followed by within themselves has no part in it."""
    optimizer = dataclasses.replace(config.optimizer, learning_rate=1e-2)
    config = dataclasses.replace(config, data=str(pairs), steps=40, optimizer=optimizer)
    state = train(dataclasses.replace(config, save_every=40, log_every=20))
    assert "pairs of split 'train'" in capsys.readouterr().err
    assert metrics(config)[40] < metrics(config)[20] < math.log(320)
    sequence = TokenDataset.open(pairs, length=32)[0]
    tokens = jnp.asarray(sequence["tokens"][None])
    segment_starts = jnp.asarray(sequence["segment_starts"][None])

    def loss(weights):
        batch = Batch(tokens, jnp.asarray(weights[None]), segment_starts)
        found = NextToken().loss(Neo(config.model), state.params, batch)
        return float(found.loss / found.weight)

    real = sequence["tokens"][1:] > 0
    prompts = ((sequence["weights"] == 0) & real).astype(np.float32)
    assert loss(sequence["weights"]) < 0.7 * loss(prompts)


# Meshes.


def test_a_mesh_changes_nothing(config, finished):
    split = dataclasses.replace(config, mesh="data=2,fsdp=4")
    config, whole = finished
    state = train(split)
    for name in ("loss", "gradient_norm"):
        ours, theirs = metrics(split, name), metrics(config, name)
        assert list(ours) == list(theirs) == [1, 2, 3, 4, 5, 6]
        for step, value in ours.items():
            assert value == pytest.approx(theirs[step], rel=1e-5)
    # Adam divides small gradients by themselves, so rounding moves a weight by part of a step.
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(whole.params), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=3e-4)


def test_a_run_goes_on_upon_another_mesh(config, finished, monkeypatch):
    moved = config

    def dying(*args, **options):
        yield from (batch for _, batch in zip(range(3), batches(*args, **options), strict=False))
        raise Killed

    monkeypatch.setattr(loop, "batches", dying)
    with pytest.raises(Killed):
        train(moved)
    monkeypatch.undo()
    train(dataclasses.replace(moved, mesh="fsdp=4,model=2"))
    ours, theirs = metrics(moved), metrics(finished[0])
    assert list(ours) == list(theirs)
    for step, loss in ours.items():
        assert loss == pytest.approx(theirs[step], rel=1e-5)


def test_a_step_leaves_every_array_where_it_was(config, compilations):
    """Else what is split would not stay split, and the next step would compile anew."""
    model = Neo(config.model, jnp.float32, sharding=make_sharding("data=2,fsdp=2,model=2"))
    optimizer = make_optimizer(config.optimizer, 10)
    step = make_step(model, optimizer, config)
    state = init_state(model, optimizer, 0)
    before = jax.tree.map(lambda leaf: leaf.sharding, state)
    kernel = state.opt_state[1][0].mu["unit_0"]["mlp"]["c_fc"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (1, 64, 16)
    batch = next(batches(TokenDataset.open(config.data, length=32), batch_size=8, seed=0))
    place = loop.Placement(model, abstract_inputs(config, model)[0])
    for compiles in (True, False, False):
        with compilations() as counted:
            state, _ = step(state, place(batch))
        assert bool(counted) == compiles
        same = jax.tree.map(
            lambda leaf, sharding: leaf.sharding.is_equivalent_to(sharding, leaf.ndim),
            state,
            before,
        )
        assert jax.tree.all(same)


# What cannot be done.


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data": "nowhere"}, "nowhere holds no data set; make one: neo-jax prepare FILE..."),
        (
            {"data": "a=1,b"},
            "data 'a=1,b': 'b' is not a folder and its share, a positive number; wr",
        ),
        ({"data": "a=1,b=2"}, "a holds no data set; make one"),
        ({"length": 33}, "length 33 exceeds the model's context of 32; shorten it, or raise"),
        ({"batch_size": 6, "mesh": "fsdp=4,data=2"}, "batch: axis 'batch' of size 6 does not"),
        (
            {"accumulation": 2, "mesh": "data=2,fsdp=4"},
            "a batch of 8 in accumulation 2 parts does not divide over 8 devices; make batch",
        ),
        (
            {"mesh": "fsdp=8", "rules": "batch:fsdp,length:fsdp"},
            "mesh axis 'fsdp' of 8 devices would split both 'batch' of size 8 and 'length' of size",
        ),
        ({"mesh": "fsdp=9"}, "mesh 'fsdp=9' asks for 9 devices, but 8 are here"),
        ({"mesh": "model=8"}, "axis 'heads' of size 2 does not divide over 8 devices of model"),
        ({"mesh": "fsdp=8", "rules": "embed:model"}, "names no axis of the mesh"),
        ({"steps": 0}, "steps must be at least 1, not 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"profile": -1}, "profile must be 0 or more, not -1"),
        ({"prompts": ("",)}, "the prompt is empty"),
        ({"prompts": ("a",), "sample_tokens": 40}, "exceed the context of 32; shorten the prompt"),
    ],
)
def test_runs_that_cannot_be(config, fields, message):
    with pytest.raises(NeoError) as error:
        train(dataclasses.replace(config, **fields))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not Path(config.output).exists()


def test_a_state_larger_than_its_device(config, monkeypatch):
    """Four arrays of 4 bytes a parameter: weights, gradients and AdamW's two."""
    params = jax.eval_shape(lambda: init_state(Neo(config.model), optax.identity(), 0)).params
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    monkeypatch.setattr(preflight, "device_memory", lambda: 16 * size)
    with pytest.raises(NeoError, match=r"GB of each device, which has .* GB; split them over more"):
        train(config)
    assert not Path(config.output).exists()
    monkeypatch.setattr(preflight, "device_memory", lambda: 16 * size + 64)  # and counters
    assert int(train(dataclasses.replace(config, steps=1)).step) == 1


def test_the_memory_of_a_device_is_its_share_of_the_machine():
    share = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 8
    assert preflight.device_memory() == share


def test_a_vocabulary_that_does_not_fit(config):
    small = dataclasses.replace(config.model, vocab_size=319)
    with pytest.raises(NeoError, match="has a vocabulary of 320, the model one of 319"):
        train(dataclasses.replace(config, model=small))


def test_tokens_that_cannot_be(config, tmp_path):
    """As a damaged file of the right size may hold."""
    data = tmp_path / "data"
    shutil.copytree(config.data, data)
    size = (data / "train" / "tokens.bin").stat().st_size
    (data / "train" / "tokens.bin").write_bytes(b"\xff" * size)
    with pytest.raises(
        NeoError, match="holds the token 65535, beyond the vocabulary of 320: its f"
    ):
        train(dataclasses.replace(config, data=str(data)))


def test_an_output_that_belongs_to_another_model(config):
    train(dataclasses.replace(config, steps=1))
    other = dataclasses.replace(config.model, window_size=9)
    lion = dataclasses.replace(config.optimizer, name="lion")
    for field, value, what in (
        ("model", other, "another model (model.window_size 8 -> 9)"),
        ("optimizer", lion, "another optimizer (optimizer.name adamw -> lion)"),
    ):
        with pytest.raises(NeoError) as error:
            train(dataclasses.replace(config, **{field: value}))
        assert str(error.value) == (
            f"the run in this output folder trains {what}; choose another output, or delete the "
            "folder."
        )
    assert os.listdir(Path(config.output) / "checkpoints") == ["1"]


@pytest.mark.parametrize("leads", [True, False])
def test_the_process_that_writes_a_model_alone_clears_its_place(config, monkeypatch, leads):
    """Another one that comes later would remove what is being written."""
    left = Path(config.output) / "model" / ".saving-half"
    left.mkdir(parents=True)
    monkeypatch.setattr(loop, "is_leader", lambda: leads)
    monkeypatch.setattr(loop, "save_pretrained", lambda *_, **__: None)
    loop._export(config, {}, None)
    assert left.exists() != leads


def test_an_output_that_is_a_file(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NeoError, match=r"cannot write in .*file \(File exists\); choose another"):
        train(dataclasses.replace(config, output=str(tmp_path / "file")))


def test_a_held_out_split_too_short_to_evaluate_matters_only_where_it_is(config, tmp_path):
    data = tmp_path / "data"
    data.symlink_to(config.data)
    short = tmp_path / "short"
    short.mkdir()
    fields = json.loads((data / "dataset.json").read_text())
    fields["splits"]["held_out"]["tokens"] = 1
    (short / "dataset.json").write_text(json.dumps(fields))
    (short / "train").symlink_to(data / "train")
    (short / "tokenizer.model").symlink_to(data / "tokenizer.model")
    (short / "held_out").mkdir()
    (short / "held_out" / "tokens.bin").write_bytes(bytes(2))
    config = dataclasses.replace(config, data=str(short), steps=1)
    with pytest.raises(NeoError, match=r"split 'held_out' of .* has 1 tokens, too few"):
        train(dataclasses.replace(config, eval_every=1))
    assert int(train(config).step) == 1
