"""decode/beam.py: the beams of transformers, their order and their scores."""

import dataclasses
import itertools
import math

import jax
import numpy as np
import pytest
import torch
from transformers import GPTNeoForCausalLM

from neo_jax.checkpoints.save import save_pretrained
from neo_jax.config import ModelConfig
from neo_jax.decode import beam, engine
from neo_jax.decode.options import BeamOptions, SamplingOptions, make_settings
from neo_jax.errors import NeoError
from neo_jax.model.tensor_table import tensors
from neo_jax.model.transformer import Neo, init_params
from neo_jax.sharding.rules import make_sharding

pytestmark = pytest.mark.optimized

CONFIG = ModelConfig(
    num_layers=2,
    embed_dim=32,
    num_heads=2,
    vocab_size=48,
    max_length=64,
    window_size=8,  # and 16 slots more: long texts wrap around
    eos_token_id=0,
)
MODEL = Neo(CONFIG)
NEW = 24
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(1, CONFIG.vocab_size, length).tolist() for length in (1, 5, 11, 17)]
GREEDY = SamplingOptions(temperature=0.0)
NUM_BEAMS, PENALTIES, STOPPING = (1, 4, 8), (0.5, 1.0, 2.0), (True, False, "never")
KEYS = list(itertools.product(NUM_BEAMS, PENALTIES, STOPPING))


def search(params, options, sampling=GREEDY, prompts=PROMPTS, num_return=None, model=MODEL):
    settings = make_settings(sampling, [0] * len(prompts))
    count = num_return or min(options.num_beams, 3)
    return beam.search(model, params, prompts, NEW, options, settings, count)


@pytest.fixture(scope="module")
def params():
    """Wider weights than at the start of training, and texts that end early and late."""
    drawn = jax.jit(lambda key: init_params(MODEL, key))(jax.random.key(0))
    scales = {"kernel": 2, "wpe": 8, "wte": 1.5}
    return jax.tree.map_with_path(
        lambda path, leaf: scales.get(path[0].key, scales.get(path[-1].key, 1)) * leaf, drawn
    )


@pytest.fixture(scope="module")
def found(params):
    """What we find, by number of beams, length penalty and early stopping."""
    return {key: search(params, BeamOptions(*key)) for key in KEYS}


@pytest.fixture(scope="module")
def reference(params, tmp_path_factory):
    """transformers' model of the same weights."""
    torch.set_num_threads(1)  # its products are too small to share
    folder = tmp_path_factory.mktemp("beam")
    save_pretrained(folder, CONFIG, params)
    return GPTNeoForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def theirs(reference, num_return, **options):
    """transformers' texts of all prompts, padded on the left; the sum or score of each."""
    width = max(map(len, PROMPTS))
    padded = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in PROMPTS])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    with torch.no_grad():
        out = reference.generate(
            padded,
            attention_mask=mask,
            max_new_tokens=NEW,
            do_sample=False,
            pad_token_id=0,
            num_return_sequences=num_return,
            return_dict_in_generate=True,
            output_scores=True,
            **options,
        )
    texts = [ids[width:].tolist() for ids in out.sequences]
    texts = [ids[: ids.index(0)] if 0 in ids else ids for ids in texts]
    return texts, out.get("sequences_scores")


def assert_same(beams, texts, scores):
    flat = [one for several in beams for one in several]
    assert [one.ids for one in flat] == texts
    np.testing.assert_allclose([one.score for one in flat], scores, rtol=0, atol=1e-4)


@pytest.mark.parametrize("key", [key for key in KEYS if key[0] > 1], ids=str)
def test_beams_are_those_of_transformers(reference, found, key):
    num_beams, length_penalty, early_stopping = key
    expected = theirs(
        reference,
        num_return=3,
        num_beams=num_beams,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
    )
    assert_same(found[key], *expected)


def test_every_option_matters_to_these_texts(found):
    def texts(*key):
        return [[one.ids for one in beams] for beams in found[key]]

    for stopping in STOPPING:
        assert texts(4, 0.5, stopping) != texts(4, 2.0, stopping)
        assert texts(4, 1.0, stopping) != texts(8, 1.0, stopping)
    pairs = dict.fromkeys(itertools.combinations(STOPPING, 2), 0)
    for num_beams, penalty in itertools.product(NUM_BEAMS, PENALTIES):
        for one, other in pairs:
            differ = texts(num_beams, penalty, one) != texts(num_beams, penalty, other)
            pairs[one, other] += differ
    assert min(pairs.values()) >= 1
    ends = {one.finish_reason for beams in found[4, 1.0, False] for one in beams}
    assert ends == {"eos", "length"}


def test_one_beam_is_greedy(params, reference, found):
    texts, _ = theirs(reference, num_return=1, num_beams=1)
    settings = make_settings(GREEDY, [0] * len(PROMPTS))
    plain = engine.generate(MODEL, params, PROMPTS, NEW, settings)
    for stopping in STOPPING:
        beams = [beams[0] for beams in found[1, 1.0, stopping]]
        assert [one.ids for one in beams] == texts
        assert [one.finish_reason for one in beams] == [one.finish_reason for one in plain]
    assert "eos" in {one.finish_reason for one in plain}


def test_scores_come_from_full_forward_passes(params, found):
    forward = jax.jit(
        lambda tokens: jax.nn.log_softmax(MODEL.apply({"params": params}, tokens).logits)
    )
    for penalty in (0.5, 2.0):
        for prompt, beams in zip(PROMPTS, found[4, penalty, False], strict=True):
            assert [one.score for one in beams] == sorted((b.score for b in beams), reverse=True)
            for one in beams:
                new = one.ids + [0] * (one.finish_reason == "eos")
                padded = np.zeros((1, CONFIG.max_length), np.int32)
                padded[0, : len(prompt) + len(new)] = prompt + new
                rows = np.asarray(forward(padded))[0, len(prompt) - 1 :]
                logprobs = rows[np.arange(len(new)), new]
                np.testing.assert_allclose(one.logprobs, logprobs[: len(one.ids)], atol=1e-5)
                assert math.isclose(one.score, logprobs.sum() / len(new) ** penalty, abs_tol=1e-5)


def test_penalties_act_on_beams_as_in_transformers(params, reference):
    sampling = SamplingOptions(
        temperature=0.0, repetition_penalty=1.3, no_repeat_ngram_size=2, min_new_tokens=5
    )
    beams = search(params, BeamOptions(4), sampling)
    expected = theirs(
        reference,
        num_return=3,
        num_beams=4,
        repetition_penalty=1.3,
        no_repeat_ngram_size=2,
        min_new_tokens=5,
    )
    assert_same(beams, *expected)
    assert beams != search(params, BeamOptions(4))


def test_several_tokens_that_end_a_text(params, reference, found):
    """More of the likeliest texts end than there are beams, and K others still go on."""
    first = [one.ids[0] for beams in found[4, 1.0, False] for one in beams if one.ids]
    ends = tuple(dict.fromkeys([0, *first]))[:5]  # of which 8 beams have enough candidates
    assert len(ends) > 3
    model = Neo(dataclasses.replace(CONFIG, eos_token_id=ends))
    for options in (BeamOptions(4), BeamOptions(8, 2.0, "never")):
        beams = search(params, options, model=model)
        texts, scores = theirs(
            reference,
            num_return=3,
            num_beams=options.num_beams,
            length_penalty=options.length_penalty,
            early_stopping=options.early_stopping,
            eos_token_id=list(ends),
        )
        texts = [list(itertools.takewhile(lambda token: token not in ends, ids)) for ids in texts]
        assert_same(beams, texts, scores)


def test_fewer_returned_are_the_first_and_lengths_share_a_program(params, found):
    programs = beam.run.on(MODEL)._cache_size()
    for count in (1, 2):
        beams = search(params, BeamOptions(4), num_return=count)
        assert beams == [several[:count] for several in found[4, 1.0, False]]
    settings = make_settings(GREEDY, [0] * len(PROMPTS))
    short = beam.search(MODEL, params, PROMPTS, 1, BeamOptions(4), settings, 4)
    best = engine.generate(MODEL, params, PROMPTS, 1, settings)
    for beams, one in zip(short, best, strict=True):
        assert len({tuple(text.ids) for text in beams}) == 4
        assert beams[0].ids == one.ids
    assert beam.run.on(MODEL)._cache_size() == programs
    assert beam.search(MODEL, params, [], 1, BeamOptions(4), make_settings(GREEDY, [])) == []


def test_a_mesh_changes_no_beam(params, found):
    sharding = make_sharding("data=2,fsdp=2,model=2")
    placed = {row.path: sharding.named(row.axes, row.shape) for row in tensors(CONFIG)}
    split = jax.tree.map_with_path(
        lambda path, leaf: jax.device_put(leaf, placed[tuple(entry.key for entry in path)]), params
    )
    beams = search(split, BeamOptions(4), prompts=PROMPTS[:3], model=Neo(CONFIG, sharding=sharding))
    for ours, expected in zip(beams, found[4, 1.0, False][:3], strict=True):
        assert [one.ids for one in ours] == [one.ids for one in expected]
        np.testing.assert_allclose(
            [one.score for one in ours], [one.score for one in expected], rtol=0, atol=1e-5
        )


@pytest.mark.parametrize(
    ("options", "num_return", "message"),
    [
        ({"num_beams": 4}, 5, "5 texts of 4 beams cannot be returned; raise num_beams"),
        ({"num_beams": 4}, 0, "0 texts of 4 beams"),
        ({"num_beams": 25}, 1, "25 beams are too many for 48 tokens"),
        ({"num_beams": 0}, 1, "num_beams must be at least 1, not 0"),
        (
            {"length_penalty": math.inf},
            1,
            "must lie between -100.0 and 100.0, not be inf",
        ),
    ],
)
def test_searches_that_cannot_be(options, num_return, message):
    settings = make_settings(GREEDY, [0])
    with pytest.raises(NeoError, match=message):
        beam.search(MODEL, {}, [[1]], 2, BeamOptions(**options), settings, num_return)
