"""The bundled model: what its card says, a golden continuation, transformers' opinion of it."""

import json
import lzma
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import GPTNeoForCausalLM

import neo_jax
from neo_jax import cli
from neo_jax.data.prepare import is_held_out

pytestmark = pytest.mark.optimized

TEXT = Path(__file__).parent / "corpora"
EVALUATE = Path(__file__).parents[1] / "docs" / "evaluate.md"
BUNDLED = Path(neo_jax.__file__).parent / "bundled"
GOLDEN = (
    ", and the other day, and the very much of the same time, and the same time, and "
    "the same time, and the same time, and the same time, and the same time,"
)


@pytest.fixture(scope="module")
def lm():
    return neo_jax.load()


def read(name):
    with lzma.open(TEXT / name, "rt", encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def test_it_is_a_gpt_neo_of_the_stated_size(lm):
    config = lm.config
    assert 4e6 <= config.num_params <= 8e6
    assert (config.attention_types, config.window_size) == (("global", "local"), 256)
    assert config.vocab_size == lm.tokenizer.vocab_size == 4096
    assert sum(file.stat().st_size for file in BUNDLED.iterdir()) <= 16e6


def test_the_held_out_documents_are_those_that_training_never_saw():
    corpus = read("corpus.jsonl.xz")
    assert read("held_out.jsonl.xz") == [text for text in corpus if is_held_out(text, 0.03)]
    assert len(set(corpus)) == len(corpus)


def test_the_command_prints_the_bits_a_byte_of_the_card(capsys):
    held_out = str(TEXT / "held_out.jsonl.xz")
    assert cli.main(["eval", "--text", held_out, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)["subsets"]["all"]["bits_per_byte"]
    card = (BUNDLED / "README.md").read_text()
    stated = re.search(r"\*\*([\d.]+) bits a byte\*\*", card)[1]
    # The fourth digit may turn with the order of a device's sums.
    assert printed == pytest.approx(float(stated), abs=2e-4)
    assert printed <= 1.9
    assert f"held out | {stated} |" in card
    assert f"held-out text, bits per byte | {stated} |" in EVALUATE.read_text()


def test_a_golden_continuation(lm):
    new = lm.generate("It was a cold morning", max_new_tokens=40, temperature=0.0)
    assert new == GOLDEN, "if the bundled model was trained anew, take its text over"


def test_transformers_says_the_same(lm):
    ids = np.array([lm.tokenizer.encode(read("held_out.jsonl.xz")[0])[: 3 * 256 + 7]])
    reference = GPTNeoForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32).eval()
    with torch.no_grad():
        single = reference(torch.from_numpy(ids)).logits.numpy()
        double = reference.double()(torch.from_numpy(ids)).logits.numpy()
    ours = np.asarray(lm.model.apply({"params": lm.params}, jnp.asarray(ids)).logits)
    noise = np.abs(single - double).max()
    assert np.abs(ours - double).max() <= 2 * noise + 2e-6 * double.std()
