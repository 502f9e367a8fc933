"""neo-jax prepare and neo-jax train, one after the other."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import zstandard

import neo_jax
from neo_jax.cli.train import load_config
from neo_jax.data.packing import TokenDataset
from neo_jax.training.config import TrainConfig

CONFIG = """
from neo_jax.config import ModelConfig
from neo_jax.transforms.lora import LoraConfig
from neo_jax.training.config import OptimizerConfig, TrainConfig

config = TrainConfig(
    data={data!r},
    output={output!r},
    steps=2,
    batch_size=4,
    model=ModelConfig(
        num_layers=2, embed_dim=16, num_heads=2, vocab_size=320, max_length=16, window_size=4,
        eos_token_id=1,
    ),
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1),
    dtype="float32",
    log_every=1,
)
"""


@pytest.fixture
def source(tmp_path, text):
    path = tmp_path / "text.jsonl"
    lines = [{"text": f"{i} {line}"} for i in range(12) for line in text.splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "tiny.py"
    path.write_text(CONFIG.format(data=str(tmp_path / "data"), output=str(tmp_path / "run")))
    return path


def test_from_text_to_a_trained_model(
    run, succeed, fail, source, config_file, tokenizer_folders, tmp_path
):
    data, output = tmp_path / "data", tmp_path / "run"
    args = ["prepare", source, "--output", data, "--tokenizer", tokenizer_folders["pieces"]]
    statistics = json.loads(succeed(*args, "--held-out", 0.2, "--json"))
    assert statistics["vocab_size"] == 320
    assert set(statistics["splits"]) == {"train", "held_out"}
    assert TokenDataset.open(data, length=16).num_tokens == statistics["splits"]["train"]["tokens"]

    args = ["train", config_file, "--optimizer.learning-rate", "3e-4", "--steps", 4]
    status, out, err = run(*args, "--eval-every", 4)
    assert status == 0, err
    assert out == f"{output}/model\n"
    assert err.splitlines()[0].startswith("step 1/4: loss ")
    assert any(line.startswith("step 4: held-out loss ") for line in err.splitlines())
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 4]
    rates = [line["learning_rate"] for line in lines[:4]]
    assert rates[:2] == [0.0, pytest.approx(3e-4, rel=1e-5)]
    assert set(lines[0]) == {
        "step", "loss", "bits_per_byte", "gradient_norm", "learning_rate", "tokens_per_second",
        "mfu", "memory_bytes", "skipped", "skipped_in_a_row",
    }  # fmt: skip
    assert set(lines[4]) == {"step", "eval_loss", "eval_bits_per_byte"}
    # A held-out token costs about as much as a guess, and there are some three in ten bytes.
    assert lines[4]["eval_loss"] == pytest.approx(np.log(320), rel=0.1)

    lm = neo_jax.load(output / "model")
    assert lm.config == load_config(str(config_file)).model
    assert lm.generate("The fox", 4)
    assert succeed(*args) == out  # nothing is left to do
    message = fail(*args, "--model.window-size", 5)
    assert message.startswith(
        "the run in this output folder trains another model (--model.window-size 4 -> 5); choose "
    )


TUNING = """
from neo_jax.training.config import OptimizerConfig, TrainConfig

config = TrainConfig(
    data={data!r},
    output={output!r},
    steps=3,
    batch_size=4,
    length=16,
    optimizer=OptimizerConfig(learning_rate=0.1, schedule="constant", warmup_steps=0),
    dtype="float32",
)
"""


def test_from_text_to_adapters(succeed, fail, source, checkpoints, tmp_path):
    data, output, base = tmp_path / "data", tmp_path / "run", checkpoints["pieces"]
    file = tmp_path / "tuning.py"
    file.write_text(TUNING.format(data=str(data), output=str(output)))
    succeed("prepare", source, "--output", data, "--tokenizer", base)
    args = ["train", file, "--lora.rank", 2, "--lora.targets", "q_proj", "c_fc"]
    assert fail(*args).startswith("--lora.rank needs a model to adapt; name one in pretrained")
    assert succeed(*args, "--pretrained", base) == f"{output}/model\n"
    args = ["generate", "The fox", "--max-new-tokens", 8, "--temperature", 0, "--model"]
    merged, adapted, before = (
        succeed(*args, folder) for folder in (output / "model", output / "adapter", base)
    )
    assert merged == adapted != before


def test_statistics_for_people(succeed, source, tmp_path):
    args = ["prepare", source, "--output", tmp_path / "data", "--train-tokenizer", 320]
    out = succeed(*args)
    assert out.startswith("train\n  documents          36\n")
    assert " a byte\n  tokens a document  median " in out
    assert out.endswith(" ████████████████████████████████████████ 26\n")
    assert (tmp_path / "data" / "tokenizer.model").is_file()


def test_byte_pairs_from_fields_of_another_name(succeed, fail, text, tmp_path):
    lines = "".join(json.dumps({"body": f"{i} {text}"}) + "\n" for i in range(20))
    (tmp_path / "in.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    args = ["prepare", tmp_path, "--output", tmp_path / "data", "--train-tokenizer", 300]
    assert 'in.jsonl.zst:1: no "text"' in fail(*args)
    succeed(*args, "--text-field", "body", "--tokenizer-kind", "bpe")
    assert (tmp_path / "data" / "tokenizer.json").is_file()
    fields = json.loads((tmp_path / "data" / "dataset.json").read_text())
    assert (fields["vocab_size"], fields["splits"]["train"]["documents"]) == (300, 20)


def test_config_files_and_names(config_file):
    config = load_config(str(config_file))
    assert isinstance(config, TrainConfig)
    assert config.optimizer.learning_rate == 1e-2
    assert load_config("bundled").model.vocab_size == 4096


def test_every_field_of_a_config_has_an_option(run, config_file):
    status, out, err = run("train", config_file, "--help")
    assert (status, err) == (0, "")
    for field in dataclasses.fields(TrainConfig):
        prefix = f"--{field.name.replace('_', '-')}"
        if dataclasses.is_dataclass(field.type):
            for inner in dataclasses.fields(field.type):
                assert f"{prefix}.{inner.name.replace('_', '-')}" in out
        else:
            assert prefix in out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("batch_size=4", "batchsize=4"), "TrainConfig has no field 'batchsize'. Did you mean 'ba"),
        (("warmup_steps=1", "warmup=1"), "OptimizerConfig has no field 'warmup'. Did you mean 'wa"),
        (("steps=2", "steps=2, lora=LoraConfig(rnk=2)"), "LoraConfig has no field 'rnk'. Did "),
        (("embed_dim", "embd_dim"), "ModelConfig has no field 'embd_dim'. Did you mean 'embed_dim"),
        (("steps=2", "steps=0"), "tiny.py: steps must be at least 1, not 0"),
        (("steps=2,", ""), "tiny.py: TypeError: TrainConfig.__init__() missing 1 required"),
        (("steps=2", "steps=="), "tiny.py: SyntaxError: "),
        (("import ModelConfig", "import Model"), "tiny.py: ImportError: cannot import name 'Mod"),
        (("config =", "settings ="), "tiny.py does not define a TrainConfig called `config`"),
    ],
)
def test_configs_that_are_wrong(fail, config_file, change, message):
    old, new = change
    content = config_file.read_text()
    assert old in content
    config_file.write_text(content.replace(old, new))
    assert message in fail("train", config_file)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["train", "bundeld"], "no config is called 'bundeld'. Did you mean 'bundled'?"),
        (["train", "text.jsonl"], "text.jsonl is no config; name a .py file that defines `config`"),
        (["recipe", "bundled-2"], "no config is called 'bundled-2'. Known are: instructions,"),
        (["recipe", "questions", "--output", "tiny.py"], "cannot write in tiny.py (File exists); "),
        (["recipe", "questions", "--examples", "latin.txt", "--test-examples", "latin.txt",
          "--output", "asked"], "latin.txt holds no pairs; name .jsonl files."),
        (["train", "tiny.py", "--output="], "--output must name a folder, not be empty."),
        (["train", "tiny.py", "--data="], "--data must name a folder, not be empty."),
        (["train", "nowhere.py"], "nowhere.py does not exist; name a .py file"),
        (["train", "tiny.py"], "holds no data set; make one: neo-jax prepare FILE..."),
        (["prepare", "nowhere.txt", "--output", "out", "--train-tokenizer", "300"],
         "nowhere.txt does not exist"),
        (["prepare", "text.jsonl", "--output", "out", "--tokenizer", "nowhere"],
         "there is no folder and no published model 'nowhere'; give a folder"),
        (["prepare", "text.jsonl", "--output", "out", "--train-tokenizer", "99999"],
         "the text is too small for 99999 pieces; ask for at most"),
        (["prepare", "text.jsonl", "--output", "out", "--train-tokenizer", "300", "--held-out",
          "1"], "--held-out is a share of the documents from 0 to below 1, not 1.0"),
        (["prepare", "latin.txt", "--output", "out", "--train-tokenizer", "300"],
         "latin.txt is not UTF-8: byte 3 is 0xe9; convert it, for example with iconv"),
        (["prepare", "tiny.py", "--output", "out", "--train-tokenizer", "300"],
         "tiny.py: unknown ending; known are .txt"),
        (["prepare", "text.jsonl", "--output", "tiny.py", "--train-tokenizer", "300"],
         "tiny.py is a file; choose another output"),
        (["prepare", "text.jsonl", "--output", "/proc/data", "--train-tokenizer", "300"],
         "cannot write /proc/data: No such file or directory; choose another output"),
    ],
)  # fmt: skip
def test_requests_that_cannot_be_met(
    fail, source, config_file, tmp_path, monkeypatch, args, message
):
    monkeypatch.chdir(tmp_path)
    Path("latin.txt").write_bytes(b"caf\xe9")
    assert message in fail(*args)
    assert not Path("out").exists()


def test_a_data_set_that_does_not_fit(succeed, fail, source, config_file, tmp_path):
    succeed("prepare", source, "--output", tmp_path / "data", "--train-tokenizer", 320)
    assert (
        f"{tmp_path}/data has a vocabulary of 320, the model one of 300; set --model.vocab"
        in fail("train", config_file, "--model.vocab-size", 300)
    )
    assert "too few for a sequence of 4000; choose a length below" in fail(
        "train", config_file, "--model.max-length", 4000
    )
    assert "does not divide over 8 devices of data; choose a multiple of 8" in fail(
        "train", config_file, "--mesh", "data=8"
    )
    (tmp_path / "file").write_text("")
    assert "file (File exists); choose another output" in fail(
        "train", config_file, "--output", tmp_path / "file"
    )
