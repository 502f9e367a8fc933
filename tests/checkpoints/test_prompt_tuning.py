"""checkpoints/prompt_tuning.py: soft prompts that we and PEFT write, read by the other."""

import json
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file
from small_families import FAMILIES, TOKENS, read_base, write_bases

import neo_jax
from neo_jax.checkpoints.adapter_files import CONFIG, WEIGHTS
from neo_jax.checkpoints.prompt_tuning import describe_soft_prompt, save_soft_prompt
from neo_jax.decode.options import SamplingOptions
from neo_jax.errors import NeoError
from neo_jax.model.soft_prompt import PROMPT

COUNT = 6
GREEDY = SamplingOptions(temperature=0, ignore_eos=True)
KINDS = {
    "PROMPT_TUNING": peft.PromptTuningConfig,
    "P_TUNING": lambda **options: peft.PromptEncoderConfig(encoder_hidden_size=8, **options),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A folder of a model of each family, whose texts depend on all that they follow."""
    return write_bases(tmp_path_factory.mktemp("bases"), 0.2)


def base(bases, family):
    return read_base(bases, family).eval()


def told(model):
    """Logits, and the greedy continuation of each prompt, as PEFT has them."""
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):
        logits = model(torch.tensor(TOKENS)).logits.numpy()[:, -TOKENS.shape[1] :]
        texts = [
            model.generate(
                input_ids=torch.tensor([row]), attention_mask=torch.ones(1, len(row)).long(),
                max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None,
                use_cache=False,  # into which PEFT puts the prompt at every step
            )[0, len(row) :].tolist()
            for row in (TOKENS[0, :9].tolist(), TOKENS[1].tolist())
        ]  # fmt: skip
    return logits, texts


def logits_of(lm):
    ids = np.arange(96, 96 + lm.model.soft_prompt)
    tokens = np.concatenate([np.broadcast_to(ids, (2, len(ids))), TOKENS], 1)
    logits = jax.jit(lm.model.apply)({"params": lm.params}, jnp.asarray(tokens)).logits
    return np.asarray(logits)[:, len(ids) :]


def ours(lm):
    prompts = TOKENS[0, :9].tolist(), TOKENS[1].tolist()
    found = lm.samples(prompts, 12, sampling=GREEDY)
    return logits_of(lm), [sample.ids for sample in found]


@pytest.fixture(scope="module")
def theirs(bases, tmp_path_factory):
    """Folders that PEFT wrote, with its logits and texts, of each kind and family."""
    root, found = tmp_path_factory.mktemp("theirs"), {}
    for family in FAMILIES:
        for kind, make in KINDS.items():
            torch.manual_seed(1)
            config = make(task_type="CAUSAL_LM", num_virtual_tokens=COUNT)
            with warnings.catch_warnings(action="ignore"):
                model = peft.get_peft_model(base(bases, family), config).eval()
                model.save_pretrained(root / family / kind)
            found[family, kind] = root / family / kind, *told(model)
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_we_read_what_peft_wrote(bases, theirs, family, kind):
    folder, logits, texts = theirs[family, kind]
    lm = neo_jax.load(folder)
    found, written = ours(lm)
    np.testing.assert_allclose(found, logits, rtol=0, atol=1e-5 * np.abs(logits).max())
    assert written == texts
    plain = logits_of(neo_jax.load(bases / family))
    assert np.abs(plain - logits).max() > 0.1 * np.abs(logits).max()
    assert describe_soft_prompt(folder)["virtual_tokens"] == COUNT


def test_on_a_mesh(theirs):
    folder, logits, _ = theirs["gpt2", "PROMPT_TUNING"]
    found = logits_of(neo_jax.load(folder, mesh="fsdp=2,model=2,data=2"))
    np.testing.assert_allclose(found, logits, rtol=0, atol=1e-5 * np.abs(logits).max())


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_reads_ours(bases, tmp_path, family):
    lm = neo_jax.load(bases / family)
    table = jax.random.normal(jax.random.key(0), (COUNT, 32))
    save_soft_prompt(tmp_path, lm.config, table, base=str(bases / family))
    with warnings.catch_warnings(action="error", category=UserWarning):  # of missing keys
        model = peft.PeftModel.from_pretrained(base(bases, family), tmp_path)
    logits, texts = told(model)
    found, written = ours(neo_jax.load(tmp_path))
    np.testing.assert_allclose(found, logits, rtol=0, atol=1e-5 * np.abs(logits).max())
    assert written == texts


def test_int8_and_dtype(theirs):
    folder, logits, _ = theirs["neo", "PROMPT_TUNING"]
    lm = neo_jax.load(folder, quantize="int8")
    assert lm.params[PROMPT].dtype == jnp.float32
    found = logits_of(lm)
    assert np.corrcoef(found.ravel(), logits.ravel())[0, 1] > 0.995
    for each in (lm, neo_jax.load(folder)):
        with pytest.raises(NeoError, match="has prompt_embeddings, which no folder of a model can"):
            each.save_pretrained(folder / "copy")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "PREFIX_TUNING"}, "peft_type is 'PREFIX_TUNING'; this loads 'LORA', 'PROMP"),
        ({"task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS'; this loads soft prompts of language"),
        ({"num_transformer_submodules": 2}, "num_transformer_submodules is 2; this loads"),
        ({"modules_to_save": ["ln_f"]}, "modules_to_save is ['ln_f'], which is not supported"),
        ({"num_virtual_tokens": 5}, "prompt_embeddings is float32 [6, 32], not of floats [5, 32]"),
        ({"num_virtual_tokens": 64}, "num_virtual_tokens 64 must lie between 1 and 63"),
        ({"num_virtual_tokens": None}, "num_virtual_tokens must be a whole number, not None"),
    ],
)
def test_fields_that_cannot_be(theirs, tmp_path, fields, message):
    shutil.copytree(theirs["neo", "PROMPT_TUNING"][0], tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | fields))
    refused(tmp_path, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: {PROMPT: x[:, :16]}, "is float32 [6, 16], not of floats [6, 32]; is the adapt"),
        (lambda x: {PROMPT: x * np.nan}, "prompt_embeddings holds NaN or infinite numbers"),
        (lambda x: {"other": x}, "lacks prompt_embeddings"),
        (lambda x: {PROMPT: x, "score.weight": x}, "holds the tensor score.weight next to a soft"),
    ],
)
def test_tensors_that_cannot_be(theirs, tmp_path, change, message):
    shutil.copytree(theirs["neo", "PROMPT_TUNING"][0], tmp_path, dirs_exist_ok=True)
    table = load_file(tmp_path / WEIGHTS)[PROMPT]
    changed = {name: np.ascontiguousarray(array) for name, array in change(table).items()}
    save_file(changed, tmp_path / WEIGHTS)
    refused(tmp_path, message)


def refused(folder, message):
    with pytest.raises(NeoError) as error:
        neo_jax.load(folder)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
