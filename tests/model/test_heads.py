"""Heads next to transformers': logits of both families and paddings, files both ways, adapters."""

import copy
import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers

import neo_jax
from neo_jax.checkpoints.load import load_params
from neo_jax.checkpoints.open_model import read_config
from neo_jax.checkpoints.peft import save_adapter
from neo_jax.checkpoints.peft_config import TASKS
from neo_jax.checkpoints.save import save_pretrained
from neo_jax.cli import main
from neo_jax.config import ModelConfig
from neo_jax.errors import NeoError
from neo_jax.labels import HeadConfig
from neo_jax.model import heads
from neo_jax.model.scan import stack, unstack
from neo_jax.model.transformer import Neo, init_params
from neo_jax.transforms.lora import LoraConfig, add_adapters, init_adapters

pytestmark = pytest.mark.optimized

PAD = 95
CONFIGS = {
    "gpt_neo": transformers.GPTNeoConfig(
        vocab_size=96, hidden_size=32, num_layers=2, num_heads=2, window_size=8,
        attention_types=[[["global", "local"], 1]], max_position_embeddings=64, eos_token_id=PAD,
        pad_token_id=PAD, classifier_dropout=0.2,
    ),
    "gpt2": transformers.GPT2Config(
        vocab_size=96, n_embd=32, n_layer=2, n_head=2, n_positions=64, eos_token_id=PAD,
        pad_token_id=PAD,
    ),
}  # fmt: skip
CLASSES = {
    "score": "AutoModelForSequenceClassification",
    "classifier": "AutoModelForTokenClassification",
    "qa_outputs": "AutoModelForQuestionAnswering",
}
LENGTHS = (20, 3, 11, 1)


def auto(kind):
    return getattr(transformers, CLASSES[kind])


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """Models of transformers that are wide enough for every token to matter, and their folders."""

    @functools.cache
    def make(family, kind):
        config = copy.deepcopy(CONFIGS[family])
        if kind != "qa_outputs":
            config.id2label = {0: "bad", 1: "so so", 2: "good"}
            config.label2id = {label: i for i, label in config.id2label.items()}
        torch.manual_seed(0)
        model = auto(kind).from_config(config, attn_implementation="eager").eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, 0.2)
        folder = tmp_path_factory.mktemp(f"{family}-{kind}")
        model.save_pretrained(folder)
        return model, folder

    return make


@functools.cache
def batch(side):
    """Texts padded on a side: ids, their mask, and positions, -1 for padding."""
    rng = np.random.default_rng(1)
    tokens = np.full((len(LENGTHS), max(LENGTHS)), PAD)
    positions = np.full_like(tokens, -1)
    for row, length in enumerate(LENGTHS):
        here = slice(0, length) if side == "right" else slice(tokens.shape[1] - length, None)
        tokens[row, here] = rng.integers(0, PAD, length)
        positions[row, here] = range(length)
    return tokens, positions >= 0, positions


def of_transformers(model, side):
    tokens, mask, positions = map(torch.tensor, batch(side))
    with torch.no_grad():
        out = model(tokens, attention_mask=mask.long(), position_ids=positions.clamp(min=0))
    if hasattr(out, "start_logits"):
        return torch.stack([out.start_logits, out.end_logits], -1).numpy()
    return out.logits.numpy()


@functools.partial(jax.jit, static_argnums=0)
def ours(model, params, tokens, positions):
    of_texts = model.config.head.kind == "score"
    classify = heads.classify_sequences if of_texts else heads.classify_tokens
    return classify(model, params, tokens, positions)


def noise(model, side):
    """How far float32 is from float64 in transformers."""
    single = of_transformers(model, side)
    double = of_transformers(model.double(), side)
    model.float()
    return np.abs(single - double)[valid(model, side)].max(), double


def valid(model, side):
    """Which logits are of tokens, not of padding."""
    return slice(None) if hasattr(model, "score") else batch(side)[1]


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("family", CONFIGS)
def test_logits_equal_those_of_transformers(theirs, family, kind):
    model, folder = theirs(family, kind)
    config = read_config(folder)
    assert config.head.kind == kind
    if kind != "qa_outputs":
        assert config.head.labels == ("bad", "so so", "good")
    params = load_params(folder, config)
    assert config.num_params == sum(p.numel() for p in model.parameters())
    for side in ("right", "left"):
        tokens, _, positions = batch(side)
        found = np.asarray(ours(Neo(config), params, tokens, positions))
        error, exact = noise(model, side)
        here = valid(model, side)
        np.testing.assert_allclose(found[here], exact[here], rtol=0, atol=2 * error)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("family", CONFIGS)
def test_a_saved_head_is_one_of_transformers(theirs, family, kind, tmp_path):
    """No key is missing or too many, the labels have their names, the logits are the same."""
    model, folder = theirs(family, kind)
    config = read_config(folder)
    save_pretrained(tmp_path / "copy", config, load_params(folder, config))
    assert read_config(tmp_path / "copy") == config
    back, report = auto(kind).from_pretrained(
        tmp_path / "copy", attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    assert type(back) is type(model)
    assert back.config.id2label == model.config.id2label
    assert back.config.pad_token_id == PAD
    assert (of_transformers(back.eval(), "left") == of_transformers(model, "left")).all()


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("family", CONFIGS)
def test_an_adapter_with_a_head_goes_to_peft_and_back(theirs, family, kind, tmp_path):
    _, folder = theirs(family, kind)
    config = read_config(folder)
    params = stack(load_params(folder, config), config)
    lora = LoraConfig(rank=2, targets=("q_proj", "c_fc"))
    drawn = jax.tree.map(lambda x: x + 0.1, init_adapters(config, lora, jax.random.key(0)))
    with_adapters = unstack(add_adapters(params, drawn, lora.scale), config)
    save_adapter(tmp_path / "adapter", config, lora, with_adapters, base=str(folder))
    tokens, _, positions = batch("right")
    expected = np.asarray(ours(Neo(config), with_adapters, tokens, positions))

    said = peft.PeftConfig.from_pretrained(tmp_path / "adapter")
    assert (said.task_type, said.modules_to_save) == (TASKS[kind], [kind])
    below = auto(kind).from_pretrained(folder)
    wrapped = peft.PeftModel.from_pretrained(below, tmp_path / "adapter").eval()
    here = valid(below, "right")
    np.testing.assert_allclose(
        of_transformers(wrapped, "right")[here], expected[here], rtol=0, atol=1e-5
    )
    wrapped.save_pretrained(tmp_path / "theirs")  # who keep no labels
    for name in ("adapter", "theirs"):
        lm = neo_jax.load(tmp_path / name)
        assert lm.config == config
        found = np.asarray(ours(Neo(config), lm.params, tokens, positions))
        np.testing.assert_allclose(found[here], expected[here], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", CLASSES)
def test_an_adapter_brings_a_head_to_a_language_model(theirs, kind, tmp_path):
    """One that PEFT trained, whose names for what it saves in whole are its own."""
    _, folder = theirs("gpt_neo", "score")
    below = transformers.AutoModelForCausalLM.from_pretrained(folder)
    below.save_pretrained(tmp_path / "below")
    count = 2 if kind == "qa_outputs" else 5
    model = auto(kind).from_pretrained(tmp_path / "below", num_labels=count)
    settings = peft.LoraConfig(task_type=TASKS[kind], r=2, target_modules=["q_proj"])
    wrapped = peft.get_peft_model(model, settings).eval()
    with torch.no_grad():
        for parameter in filter(lambda each: each.requires_grad, wrapped.parameters()):
            parameter.normal_(0, 0.2)
    wrapped.save_pretrained(tmp_path / "adapter")
    lm = neo_jax.load(tmp_path / "adapter")
    assert lm.config.head.labels == tuple(f"LABEL_{i}" for i in range(count))
    tokens, _, positions = batch("right")
    found = np.asarray(ours(lm.model, lm.params, tokens, positions))
    expected, here = of_transformers(wrapped, "right"), valid(model, "right")
    np.testing.assert_allclose(found[here], expected[here], rtol=0, atol=1e-5)


def test_int8_leaves_the_head_alone(theirs, tmp_path):
    model, folder = theirs("gpt_neo", "score")
    lm = neo_jax.load(folder, quantize="int8")
    lm.save_pretrained(tmp_path / "small")
    again = neo_jax.load(tmp_path / "small")
    assert again.config == lm.config
    for each in (lm, again):
        kernel = np.asarray(each.params["score"]["kernel"])
        np.testing.assert_array_equal(kernel, model.score.weight.detach().numpy())


def test_verbs_know_a_head(theirs, tmp_path, capsys):
    _, folder = theirs("gpt2", "classifier")
    assert main(["convert", str(folder), str(tmp_path / "copy")]) == 0
    assert read_config(tmp_path / "copy") == read_config(folder)
    capsys.readouterr()
    assert main(["info", str(tmp_path / "copy"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["head"], said["labels"]) == ("classifier", ["bad", "so so", "good"])


def test_a_drawn_head_stands_next_to_the_model():
    head = HeadConfig("classifier", tuple("abcde"))
    model = Neo(ModelConfig(num_layers=2, embed_dim=32, num_heads=2, vocab_size=96, head=head))
    draw = jax.jit(lambda key: init_params(model, key) | heads.init_head(model, key))
    params = draw(jax.random.key(0))
    assert jax.tree.map(jnp.shape, params["classifier"]) == {"kernel": (5, 32), "bias": (5,)}
    assert 0.01 < params["classifier"]["kernel"].std() < 0.03


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, HeadConfig("score", ("LABEL_0", "LABEL_1"))),
        ({"num_labels": 1}, HeadConfig("score", ("LABEL_0",), "regression")),
        ({"id2label": {"1": "b", "0": "a"}}, HeadConfig("score", ("a", "b"))),
        (
            {"num_labels": 3, "problem_type": "multi_label_classification"},
            HeadConfig("score", ("LABEL_0", "LABEL_1", "LABEL_2"), "multi_label_classification"),
        ),
    ],
)
def test_labels_that_config_json_leaves_open(fields, expected):
    """As transformers' defaults have them."""
    assert (
        HeadConfig.from_hf({"architectures": ["GPT2ForSequenceClassification"], **fields})
        == expected
    )
    theirs = transformers.GPT2Config(**fields)
    assert [theirs.id2label[i] for i in range(len(expected.labels))] == [*expected.labels]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"id2label": ["a", "b"]}, "id2label is ['a', 'b'], not names by numbers from 0"),
        ({"id2label": {"0": "a", "2": "b"}}, "not names by numbers from 0"),
        ({"id2label": {"0": "a", "1": "a"}}, "id2label has 'a' twice"),
        ({"num_labels": 0}, "num_labels 0 is no number of labels"),
        ({"problem_type": "other"}, "head.problem_type must be 'regression', "),
        ({"num_labels": 1, "problem_type": "single_label_classification"}, "one label tells"),
    ],
)
def test_labels_that_cannot_be(fields, message):
    with pytest.raises(NeoError) as error:
        HeadConfig.from_hf({"architectures": ["GPT2ForSequenceClassification"], **fields})
    assert message in str(error.value)


def test_a_config_with_a_head_is_a_static_argument():
    config = ModelConfig(head=HeadConfig("score", ("a", "b")))
    assert hash(config) != hash(ModelConfig())
    fields = dataclasses.asdict(config)
    assert ModelConfig(**fields) == config
