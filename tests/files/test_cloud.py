"""From text to a model in the cloud: every verb, checkpoints and all, on a stand-in for it."""

import dataclasses
import gzip
import json

import jax
import numpy as np
import pytest
import tokenizers

import neo_jax
from neo_jax.checkpoints.load import load_params
from neo_jax.checkpoints.open_model import read_config, stored_dtypes
from neo_jax.checkpoints.save import save_pretrained
from neo_jax.cli import main
from neo_jax.config import ModelConfig
from neo_jax.data.feed import batches, evaluation_batches
from neo_jax.data.packing import TokenDataset
from neo_jax.data.prepare import prepare
from neo_jax.data.tokenizer_training import train_sentencepiece
from neo_jax.devices.compilation_cache import enable_compilation_cache
from neo_jax.errors import NeoError
from neo_jax.files import paths
from neo_jax.model.scan import unstack
from neo_jax.text.tokenizer import has_tokenizer, load_tokenizer
from neo_jax.training import snapshot
from neo_jax.training.config import OptimizerConfig, TrainConfig
from neo_jax.training.loop import train


def upload(cloud, folder, place):
    """Puts the files of a local folder into the cloud; returns its address there."""
    for path in paths.find_files(folder):
        cloud[f"{place}/{path.relative_to(folder).as_posix()}"] = path.read_bytes()
    return f"gs://{place}"


def assert_identical(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def run(*args):
    assert main([str(arg) for arg in args]) == 0


# Data sets.


@pytest.fixture
def documents(cloud, bucket, text, tmp_path):
    """A folder of documents, here and in the cloud."""
    folder = tmp_path / "text"
    (folder / "more").mkdir(parents=True)
    lines = [{"text": f"{i}. {line}"} for i in range(40) for line in text.splitlines()]
    (folder / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "more" / "b.txt.gz").write_bytes(gzip.compress(text.encode()))
    return folder, upload(cloud, folder, f"{bucket}/text")


@pytest.fixture
def datasets(documents, bucket, tokenizer_folders, tmp_path):
    """The same data set, here and in the cloud."""
    for source, output in zip(documents, (tmp_path / "data", f"gs://{bucket}/data"), strict=True):
        prepare([source], output, tokenizer_folders["pieces"], held_out=0.1)
    return tmp_path / "data", f"gs://{bucket}/data"


def test_a_data_set_is_the_same_as_here(cloud, bucket, datasets):
    here = {path.relative_to(datasets[0]).as_posix() for path in paths.find_files(datasets[0])}
    assert set(cloud.names(f"{bucket}/data")) == here
    for name in here:
        assert cloud[f"{bucket}/data/{name}"] == (datasets[0] / name).read_bytes(), name


def test_batches_are_the_same_as_here_and_read_what_they_need(cloud, bucket, datasets):
    ours, theirs = (TokenDataset.open(folder, "train", 16) for folder in datasets)
    assert len(ours) == len(theirs)
    cloud.requests.clear()
    np.testing.assert_array_equal(ours[3]["tokens"], theirs[3]["tokens"])
    assert cloud.requests == [("GET", f"{bucket}/data/train/tokens.bin", "bytes=96-129")]
    pair = [batches(dataset, batch_size=4, seed=1) for dataset in (ours, theirs)]
    for _, a, b in zip(range(5), *pair, strict=False):
        assert_identical(a, b)
    pair = [evaluation_batches(dataset, 4) for dataset in (ours, theirs)]
    assert_identical(*map(list, pair))


def test_a_data_set_is_there_when_all_of_it_is(cloud, bucket, documents, tmp_path):
    output = f"gs://{bucket}/data"
    tokenizer = train_sentencepiece([documents[0].joinpath("a.jsonl").read_text()], 320, tmp_path)
    prepare([f"{documents[1]}/**/*.gz"], output, tokenizer)
    assert cloud.names(f"{bucket}/data") == [
        "dataset.json",
        "tokenizer.model",
        "train/offsets.npy",
        "train/tokens.bin",
    ]
    order = [name for method, name, _ in cloud.requests if method == "PUT" and bucket in name]
    assert order[-1] == f"{bucket}/data/dataset.json"

    del cloud[f"{bucket}/data/dataset.json"]
    cloud[f"{bucket}/data/other"] = b""
    with pytest.raises(NeoError, match="holds 'other' already; choose another output"):
        prepare([documents[1]], output, tokenizer)


def test_inputs_that_are_not_there(bucket, documents, tmp_path):
    for name, message in (("no*", "nothing matches"), ("no", "does not exist")):
        with pytest.raises(NeoError, match=message):
            prepare([f"gs://{bucket}/{name}"], tmp_path / "out", train_tokenizer=320)
    with pytest.raises(NeoError, match=f"gs://{bucket}/text holds no data set; make one"):
        TokenDataset.open(documents[1])


# Models.


@pytest.fixture
def byte_pairs(tokenizer_folders, tmp_path):
    """The tokenizer of `tokenizer_folders["bytes"]` as vocab.json and merges.txt."""
    tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_folders["bytes"] / "tokenizer.json"))
    (tmp_path / "pairs").mkdir()
    tokenizer.model.save(str(tmp_path / "pairs"))
    return tmp_path / "pairs"


@pytest.mark.parametrize("kind", ["pieces", "bytes", "pairs"])
def test_tokenizers(cloud, bucket, tokenizer_folders, byte_pairs, text, kind):
    folder = byte_pairs if kind == "pairs" else tokenizer_folders[kind]
    place = upload(cloud, folder, f"{bucket}/tokenizer")
    tokenizer = load_tokenizer(place)
    ids = load_tokenizer(folder).encode(text)
    assert tokenizer.encode(text) == ids
    tokenizer.save(paths.make_path(f"gs://{bucket}/copy"))
    assert load_tokenizer(f"gs://{bucket}/copy").encode(text) == ids


@pytest.mark.parametrize("max_shard_bytes", [1 << 40, 20_000], ids=["one file", "shards"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_models_are_saved_and_loaded_as_here(
    cloud, bucket, checkpoints, tmp_path, max_shard_bytes, dtype
):
    config, tokenizer = read_config(checkpoints["bytes"]), load_tokenizer(checkpoints["bytes"])
    params = load_params(checkpoints["bytes"], config)
    place = f"gs://{bucket}/model"
    for folder in (tmp_path, place):
        save_pretrained(
            folder, config, params, tokenizer=tokenizer, dtype=dtype,
            max_shard_bytes=max_shard_bytes,
        )  # fmt: skip
    assert cloud.bucket(bucket) == {
        f"{bucket}/model/{path.name}": path.read_bytes() for path in tmp_path.iterdir()
    }
    assert read_config(place) == config
    assert stored_dtypes(place, config) == [dtype]
    assert has_tokenizer(place)
    assert_identical(load_params(place, config), load_params(tmp_path, config))


def test_a_new_model_replaces_the_old(cloud, bucket, checkpoints):
    config = read_config(checkpoints["bare"])
    params = load_params(checkpoints["bare"], config)
    for size, names in ((20_000, "model-00001-of-"), (1 << 40, "model.safetensors")):
        save_pretrained(f"gs://{bucket}/model", config, params, max_shard_bytes=size)
        entry = "model.safetensors" if size > 20_000 else "model.safetensors.index.json"
        assert any(names in name for name in cloud.names(bucket))
        assert max(cloud.bucket(bucket), key=cloud.generations.get) == f"{bucket}/model/{entry}"
    assert cloud.names(f"{bucket}/model") == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]


def test_weights_are_read_in_ranges(cloud, bucket, checkpoints):
    place = upload(cloud, checkpoints["bytes"], bucket)
    cloud.requests.clear()
    load_params(place, read_config(place))
    ranges = [asked for _, name, asked in cloud.requests if name.endswith(".safetensors")]
    assert len(ranges) > 20
    assert all(ranges)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-1], "bytes where the header speaks of"),
        (lambda content: content + b"\0", "bytes where the header speaks of"),
        (lambda content: content[:5], "no whole header"),
        (lambda content: content[:100], "no whole header"),
        (
            lambda content: content[:8] + b"#" + content[9:],
            "the header is not valid JSON (Expecting",
        ),
        (lambda content: content.replace(b'"F32"', b'"F16"'), "do not follow each other"),
        (lambda content: content.replace(b'"dtype"', b'"dtipe"', 1), "not a header: 'dtype'"),
        (lambda _: b"version https://git-lfs.github.com/spec/v1\n", "no whole header"),
        (lambda _: b"", "no whole header"),
    ],
)
def test_damaged_weights(cloud, bucket, checkpoints, damage, message):
    place = upload(cloud, checkpoints["bare"], bucket)
    name = f"{bucket}/model.safetensors"
    cloud[name] = damage(cloud[name])
    with pytest.raises(NeoError, match="damaged or cut short") as error:
        load_params(place, read_config(place))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_folders_without_a_model(cloud, bucket, capsys):
    cloud[f"{bucket}/text/a.txt"] = b""
    assert main(["info", f"gs://{bucket}/nothing"]) == 1
    assert f"there is no folder gs://{bucket}/nothing; check" in capsys.readouterr().err
    assert main(["generate", "hi", "--model", f"gs://{bucket}/text"]) == 1
    assert f"gs://{bucket}/text holds no config.json" in capsys.readouterr().err


def test_reading_a_model_writes_nothing(cloud, bucket, checkpoints, capsys):
    place = upload(cloud, checkpoints["pieces"], bucket)
    cloud[f"{bucket}/prompts.jsonl"] = b'{"prompt": "the fox", "text": "the dog"}\n'
    cloud.read_only.add(bucket)
    before = cloud.bucket(bucket)
    run("info", place)
    run("score", "--model", place, "--input", f"gs://{bucket}/prompts.jsonl")
    prompts = f"gs://{bucket}/prompts.jsonl"
    run("generate", "--model", place, "--prompts-file", prompts, "--max-new-tokens", 4)
    assert cloud.bucket(bucket) == before
    assert "the fox" in capsys.readouterr().out
    assert neo_jax.load(place).generate("Call me", 4, temperature=0) == neo_jax.load(
        checkpoints["pieces"]
    ).generate("Call me", 4, temperature=0)


def test_samples_and_scores_go_to_the_cloud(cloud, bucket, checkpoints, capsys):
    place = upload(cloud, checkpoints["pieces"], bucket)
    samples, scores = (f"gs://{bucket}/out/{name}.jsonl" for name in ("samples", "scores"))
    run("generate", "the fox", "--model", place, "--max-new-tokens", 3, "--output", samples)
    run("score", "--model", place, "--input", samples, "--output", scores)
    assert len(json.loads(cloud[f"{bucket}/out/samples.jsonl"])["ids"]) == 3
    assert json.loads(cloud[f"{bucket}/out/scores.jsonl"])["loss"] > 0
    cloud.read_only.add(bucket)
    capsys.readouterr()
    assert main(["generate", "hi", "--model", place, "--output", samples]) == 1
    assert f"cannot write in gs://{bucket}/out (Forbidden" in capsys.readouterr().err


# Training.


@pytest.fixture
def config(datasets, bucket):
    """A run of two steps, all of it in the cloud."""
    enable_compilation_cache()
    return TrainConfig(
        data=datasets[1],
        output=f"gs://{bucket}/run",
        steps=2,
        batch_size=4,
        model=ModelConfig(
            num_layers=1,
            embed_dim=32,
            num_heads=2,
            vocab_size=320,
            attention_types=("local",),
            max_length=32,
            window_size=8,
            eos_token_id=1,
        ),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=2, weight_decay=0.1),
        dtype="float32",
        log_every=1,
        eval_every=2,
        save_every=1,
    )


def test_a_run_and_its_continuation(cloud, bucket, config):
    whole = train(config)
    for name in cloud.names(bucket):  # as if it had been stopped at the second step
        if name.startswith(("run/model/", "run/checkpoints/2/")):
            del cloud[f"{bucket}/{name}"]
    state = train(config)
    assert_identical(state, whole)
    lines = [json.loads(line) for line in cloud[f"{bucket}/run/metrics.jsonl"].splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    assert [line["step"] for line in lines if "eval_loss" in line] == [2]
    folders = {name.split("/")[0] for name in cloud.names(f"{bucket}/run/checkpoints")}
    assert folders == {"1", "2"}
    lm = neo_jax.load(f"gs://{bucket}/run/model")
    assert_identical(lm.params, unstack(state.params, lm.config))
    assert lm.tokenizer is not None


def test_old_checkpoints_are_removed(cloud, bucket, config):
    train(dataclasses.replace(config, keep=1, eval_every=0))
    folders = {name.split("/")[0] for name in cloud.names(f"{bucket}/run/checkpoints")}
    assert folders == {"2"}


def test_what_cannot_be_read_is_set_aside(cloud, bucket, config, capsys, monkeypatch):
    """No object of it is lost, and no later run takes it for one that was cut off."""
    monkeypatch.setattr(snapshot, "_PAUSES", ())
    config = dataclasses.replace(config, eval_every=0)
    whole = train(config)
    place = f"{bucket}/run/checkpoints"
    cloud[f"{place}/2/state/_METADATA"] = b"damaged"
    left = {name: cloud[f"{place}/2/{name}"] for name in cloud.names(f"{place}/2")}
    for _ in range(2):
        assert_identical(train(config), whole)
        name = f"{place}/2.unreadable"
        assert {each: cloud[f"{name}/{each}"] for each in cloud.names(name)} == left
    err = capsys.readouterr().err
    assert err.count("it is now called 2.unreadable, going on from 1.\n") == 1
    assert {name.split("/")[0] for name in cloud.names(place)} == {"1", "2", "2.unreadable"}


def test_a_run_that_may_not_ask_about_its_bucket_says_so_first(cloud, bucket, config):
    cloud.discreet.add(bucket)
    with pytest.raises(NeoError, match=r"cannot keep checkpoints in .*; ask for storage\.buckets"):
        train(config)
    assert not cloud.names(f"{bucket}/run")


def test_a_run_that_may_not_write_says_so_first(cloud, bucket, config):
    cloud.read_only.add(bucket)
    with pytest.raises(NeoError, match=rf"cannot write in gs://{bucket}/run/checkpoints \(Forb"):
        train(config)
    with pytest.raises(NeoError, match=rf"cannot write in gs://{bucket}/more \(Forbidden"):
        prepare(["gs://nowhere"], f"gs://{bucket}/more", train_tokenizer=320)
