"""decode/speculative.py: the texts of plain decoding, and its distribution."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from neo_jax.config import ModelConfig
from neo_jax.decode import engine, speculative
from neo_jax.decode.options import SamplingOptions, make_settings, stack_settings
from neo_jax.decode.processors import History
from neo_jax.decode.sampling import processed
from neo_jax.decode.speculative import Acceptance, Draft
from neo_jax.errors import NeoError
from neo_jax.model.cache import SLACK
from neo_jax.model.tensor_table import tensors
from neo_jax.model.transformer import Neo, init_params
from neo_jax.sharding.rules import make_sharding

WINDOW = 8
NEW = 100  # local layers have 24 slots: they wrap around four times
CONFIG = ModelConfig(
    num_layers=2,
    embed_dim=32,
    num_heads=2,
    vocab_size=96,
    max_length=128,
    window_size=WINDOW,
    eos_token_id=37,
)
MODEL = Neo(CONFIG)
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(1, CONFIG.vocab_size, length).tolist() for length in (1, 5, 11, 23)]
GREEDY = SamplingOptions(temperature=0.0, min_new_tokens=NEW)  # no text ends before


@functools.partial(jax.jit, static_argnums=0)
def draw_params(model, seed):
    """Wider weights than at the start of training, so that texts do not repeat themselves."""
    scales = {"kernel": 2, "wpe": 8, "wte": 1 if model is MODEL else 6}
    return jax.tree.map_with_path(
        lambda path, leaf: scales.get(path[0].key, scales.get(path[-1].key, 1)) * leaf,
        init_params(model, jax.random.key(seed)),
    )


@pytest.fixture(scope="module")
def params():
    return draw_params(MODEL, 7)


@pytest.fixture(scope="module")
def greedy(params):
    return engine.generate(MODEL, params, PROMPTS, NEW, settings_of(GREEDY))


def settings_of(options, rows=4):
    return make_settings(options, [options.seed + i for i in range(rows)])


def noisy(params, scale):
    """A draft made from the model: its weights with some of another model's added."""
    noise = draw_params(MODEL, 3)
    return Draft(MODEL, jax.tree.map(lambda a, b: a + scale * b, params, noise))


def generate(params, draft, settings, num_drafted=4, prompts=PROMPTS, new=NEW, model=MODEL):
    texts, fared = speculative.generate(model, params, draft, prompts, new, settings, num_drafted)
    return texts, Acceptance(*np.sum(fared, axis=0))


def rate(fared):
    return fared.accepted / fared.judged


def assert_equal(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        assert one.ids == other.ids
        assert one.finish_reason == other.finish_reason
        np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=0, atol=1e-5)


# Greedy.


@pytest.mark.parametrize(
    ("noise", "expected"), [(0.0, 1.0), (0.006, 0.95), (0.023, 0.8), (0.055, 0.6)]
)
@pytest.mark.parametrize("num_drafted", [4, SLACK])
def test_greedy_text_is_that_without_a_draft(params, greedy, noise, expected, num_drafted):
    assert len({token for completion in greedy for token in completion.ids}) >= 40
    texts, fared = generate(params, noisy(params, noise), settings_of(GREEDY), num_drafted)
    assert_equal(texts, greedy)
    assert rate(fared) == pytest.approx(expected, abs=0.03)
    tokens = NEW * len(PROMPTS)
    if noise:  # what is cut at the end was accepted
        assert tokens - len(PROMPTS) <= fared.accepted + fared.passes <= tokens + len(PROMPTS)
    else:
        assert fared.passes == len(PROMPTS) * -(-NEW // (num_drafted + 1))


def test_a_random_draft_changes_no_token(params, greedy):
    texts, fared = generate(params, Draft(MODEL, draw_params(MODEL, 4)), settings_of(GREEDY))
    assert_equal(texts, greedy)
    assert rate(fared) < 0.2


def test_looking_up_finds_what_repeats(params, greedy):
    texts, fared = generate(params, None, settings_of(GREEDY))
    assert_equal(texts, greedy)
    assert 0 < fared.accepted < fared.judged


@pytest.mark.parametrize(
    ("tokens", "proposed"),
    [
        ([5, 6, 7, 8, 5, 6], [7, 8, 5, 6]),
        ([5, 6, 1, 9, 6, 2, 5, 6], [1, 9, 6, 2]),  # two tokens match further back than one
        ([4, 6, 1, 4, 6, 2, 4, 6], [2, 4, 6, 2]),  # the latest; and what it lacks repeats
        ([3, 3], [3, 3, 3, 3]),
        ([1, 2, 3], None),
        ([1], None),
    ],
)
def test_what_is_looked_up(tokens, proposed):
    state = engine.start(MODEL, draw_params(MODEL, 2), [tokens], 9, settings_of(GREEDY, 1))
    found = speculative._look_up(state, 4, 128)
    assert found.there.tolist() == [[proposed is not None] * 4]
    if proposed:
        assert found.tokens.tolist() == [proposed]
        np.testing.assert_array_equal(found.weights.argmax(-1), [proposed])


def test_ends_of_text_penalties_and_limits(params, greedy):
    """Rows that stop at different places, in the middle of what was accepted."""
    plain = SamplingOptions(temperature=0.0)
    new = greedy[1].ids
    model = Neo(dataclasses.replace(CONFIG, eos_token_id=(new[0], new[40])))
    options = [
        plain,  # ends with the first new token
        dataclasses.replace(plain, min_new_tokens=50),
        dataclasses.replace(plain, repetition_penalty=1.2, begin_suppress_tokens=[new[0]]),
        dataclasses.replace(
            plain,
            no_repeat_ngram_size=2,
            suppress_tokens=[new[0], new[40]],
            bad_words_ids=[new[1:4], new[4:6]],
            forced_eos_token_id=3,
        ),
    ]
    prompts, settings = [PROMPTS[1]] * 4, stack_settings(options)
    expected = engine.generate(model, params, prompts, NEW, settings)
    assert len({tuple(completion.ids) for completion in expected}) == 4
    assert expected[0].ids == []
    assert "eos" in {completion.finish_reason for completion in expected}
    for draft in (noisy(params, 0.006), None):
        texts, fared = generate(params, draft, settings, prompts=prompts, model=model)
        assert_equal(texts, expected)
        assert fared.accepted <= fared.judged <= 4 * NEW
    assert speculative.generate(MODEL, params, None, [], 9, settings_of(GREEDY, 0), 4) == ([], [])


@pytest.mark.parametrize("new", [1, 2, 3, 7])
def test_the_last_places_of_the_context(params, greedy, new):
    full = [
        (prompt + completion.ids * 2)[: CONFIG.max_length - new]
        for prompt, completion in zip(PROMPTS, greedy, strict=True)
    ]
    plain = engine.generate(MODEL, params, full, new, settings_of(GREEDY))
    texts, fared = generate(
        params, noisy(params, 0.006), settings_of(GREEDY), prompts=full, new=new
    )
    assert_equal(texts, plain)
    assert [len(text.ids) for text in texts] == [new] * 4
    assert fared.accepted <= fared.judged <= 4 * new


# Sampling.


def test_a_row_does_not_depend_on_the_others(params, greedy):
    options = [
        GREEDY,
        dataclasses.replace(GREEDY, temperature=0.7, seed=3),
        dataclasses.replace(GREEDY, temperature=1.0, top_k=20, seed=4),
        GREEDY,
    ]
    settings = stack_settings(options)
    draft = noisy(params, 0.02)
    texts, _ = generate(params, draft, settings)
    assert_equal([texts[0], texts[3]], [greedy[0], greedy[3]])
    assert texts[1].ids != greedy[1].ids
    order = np.array([2, 0, 3, 1])
    shuffled = jax.tree.map(lambda leaf: leaf[order], settings)
    again, _ = generate(params, draft, shuffled, prompts=[PROMPTS[i] for i in order])
    assert_equal(again, [texts[i] for i in order])


SMALL = Neo(
    ModelConfig(
        num_layers=2, embed_dim=16, num_heads=2, vocab_size=8, max_length=16, window_size=3,
        eos_token_id=-1,
    )
)  # fmt: skip
SMALLER = Neo(
    ModelConfig(
        num_layers=1, attention_types=("local",), embed_dim=8, num_heads=1, vocab_size=8,
        max_length=9, window_size=2, eos_token_id=-1,
    )
)  # fmt: skip
SAMPLES = 8192
DRAWN = SamplingOptions(temperature=0.8, top_p=0.95)


def exact(model, params, prompt):
    """The probability of each text of three new tokens, by full forward passes."""
    texts = np.array(list(itertools.product(range(8), repeat=3)))
    tokens = np.concatenate([np.tile(prompt, (len(texts), 1)), texts], axis=1).astype(np.int32)
    settings = settings_of(DRAWN, len(texts))
    logits = jax.jit(lambda tokens: model.apply({"params": params}, tokens).logits)(tokens)
    total = np.ones(len(texts))
    for i in range(3):
        length = np.full(len(texts), len(prompt) + i)
        tokens, length = jnp.asarray(tokens), jnp.asarray(length)
        history = History(tokens, length, length - i, length + 3)
        kept = processed(logits[:, len(prompt) + i - 1], settings, history, ())
        total *= np.asarray(jax.nn.softmax(kept))[np.arange(len(texts)), texts[:, i]]
    return total


def p_value(counts, probabilities):
    """Of Pearson's chi-square test; what is expected less than five times counts as one."""
    expected = SAMPLES * probabilities
    rare = expected < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    observed, expected = observed[expected > 0], expected[expected > 0]
    expected *= observed.sum() / expected.sum()  # but for rounding they are equal
    return scipy.stats.chisquare(observed, expected).pvalue


def firsts(values, tokens):
    """Of values of each text of three tokens, the sums over texts that begin alike."""
    return values.reshape(8**tokens, -1).sum(1)


def judged_by(scale, p, q):
    """The distribution of a token that is accepted with probability min(1, scale p / q)."""
    accepted, left = np.minimum(scale * p, q), np.maximum(p - q, 0)
    return accepted + (1 - accepted.sum()) * left / left.sum()


@pytest.mark.parametrize("drafted_by", ["model", "look-up"])
def test_sampled_texts_have_the_distribution_of_the_model(drafted_by):
    """8192 texts of three tokens, seeds 0 to 8191, two drafted tokens a pass; p above 0.01.

    Of whole texts, and of their first tokens: few cells, in which small shifts show.
    """
    params, other = draw_params(SMALL, 0), draw_params(SMALLER, 2)
    prompt = [7, 1, 5, 1]  # of which looking up proposes 5, the likeliest token
    draft = Draft(SMALLER, other) if drafted_by == "model" else None
    settings = make_settings(DRAWN, range(SAMPLES))
    texts, fared = generate(params, draft, settings, 2, [prompt] * SAMPLES, new=3, model=SMALL)
    assert 0.1 < rate(fared) < 0.9
    counts = np.bincount([np.ravel_multi_index(text.ids, (8, 8, 8)) for text in texts], None, 512)
    probabilities = exact(SMALL, params, prompt)
    assert not counts[probabilities == 0].any()
    for tokens in (1, 2, 3):
        assert p_value(firsts(counts, tokens), firsts(probabilities, tokens)) > 0.01
    # The test can tell: were one text in twenty the draft's own, it would fail; and were drafts
    # accepted a tenth too often or too seldom.
    rng = np.random.default_rng(0)
    first, first_drafted = firsts(probabilities, 1), np.eye(8)[5]
    if draft:
        drafted = exact(SMALLER, other, prompt)
        mixed = 0.95 * probabilities + 0.05 * drafted
        assert p_value(rng.multinomial(SAMPLES, mixed / mixed.sum()), probabilities) < 0.01
        first_drafted = firsts(drafted, 1)
    np.testing.assert_allclose(judged_by(1, first, first_drafted), first, rtol=0, atol=1e-6)
    for scale in (0.9, 1.1):
        biased = judged_by(scale, first, first_drafted)
        assert p_value(rng.multinomial(SAMPLES, biased / biased.sum()), first) < 0.001


def test_a_mesh_changes_no_token(params, greedy):
    sharding = make_sharding("data=2,fsdp=2,model=2")
    placed = {row.path: sharding.named(row.axes, row.shape) for row in tensors(CONFIG)}
    model = Neo(CONFIG, sharding=sharding)

    def split(params):
        return jax.tree.map_with_path(
            lambda path, leaf: jax.device_put(leaf, placed[tuple(key.key for key in path)]), params
        )

    draft = Draft(model, split(noisy(params, 0.02).params))
    texts, _ = generate(
        split(params), draft, settings_of(GREEDY, 3), prompts=PROMPTS[:3], model=model
    )
    assert_equal(texts, greedy[:3])


@pytest.mark.parametrize(
    ("draft", "num_drafted", "message"),
    [
        (None, 0, "a draft has 1 to 16 tokens, not 0"),
        (None, 17, "a draft has 1 to 16 tokens, not 17"),
        (Draft(SMALL, {}), 4, "the draft model has 8 tokens and the model 96; take a draft with"),
    ],
)
def test_drafts_that_cannot_be(draft, num_drafted, message):
    with pytest.raises(NeoError, match=message):
        generate({}, draft, settings_of(GREEDY), num_drafted)
