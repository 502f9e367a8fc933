"""A soft prompt that is the embeddings of some tokens does what these tokens do, everywhere."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_model import CONFIG, MODEL

from neo_jax.decode import beam, engine, speculative
from neo_jax.decode.options import BeamOptions, SamplingOptions, stack_settings
from neo_jax.decode.requests import Event, PromptRead, Request
from neo_jax.decode.scheduler import Scheduler, complete, in_order
from neo_jax.decode.speculative import Draft
from neo_jax.errors import NeoError
from neo_jax.model.soft_prompt import PROMPT
from neo_jax.model.transformer import Neo
from neo_jax.sharding.rules import make_sharding

WORDS = [7, 3, 3, 90, 41]
SOFT = MODEL.clone(virtual_tokens=len(WORDS), soft_prompt=len(WORDS))
GREEDY = SamplingOptions(temperature=0.0)
DRAWN = SamplingOptions(temperature=1.0, top_p=0.9, seed=3)
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(1, CONFIG.vocab_size, n).tolist() for n in (3, 17, 1, 30)]
TOLD = [[*WORDS, *prompt] for prompt in PROMPTS]


@pytest.fixture(scope="module")
def soft(params):
    return params | {PROMPT: params["wte"]["embedding"][np.array(WORDS)]}


def assert_same(found, expected):
    assert [text.ids for text in found] == [text.ids for text in expected]
    for mine, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(mine.logprobs, other.logprobs)


def test_a_batch_of_prompts_of_all_lengths(params, soft):
    settings = stack_settings([GREEDY, DRAWN, GREEDY, DRAWN])
    expected = engine.generate(MODEL, params, TOLD, 20, settings)
    assert len({tuple(text.ids) for text in expected}) == 4
    assert_same(engine.generate(SOFT, soft, PROMPTS, 20, settings), expected)
    streamed = [*engine.stream(SOFT, soft, PROMPTS[1], 8, stack_settings([DRAWN]))]
    assert streamed == [*engine.stream(MODEL, params, TOLD[1], 8, stack_settings([DRAWN]))]


def requests(prompts, **fields):
    return [Request(prompt, 10, [GREEDY, DRAWN], **fields) for prompt in prompts]


def test_rows_that_are_refilled(params, soft):
    found, expected = (
        [text for texts in in_order(complete(model, tree, requests(prompts), 3)) for text in texts]
        for model, tree, prompts in ((SOFT, soft, PROMPTS), (MODEL, params, TOLD))
    )
    assert_same(found, expected)


def test_chunks_and_what_is_known_of_prompts(params, soft):
    long = RNG.integers(1, CONFIG.vocab_size, 40).tolist()
    several = [[*long, 5], [*long, 9, 9], PROMPTS[0]]

    def run(model, tree, prompts, **fields):
        scheduler = Scheduler(model, tree, 2, chunk=16, prefix_bytes=1 << 20)
        texts, read = {}, {}
        for request in requests(prompts, **fields):
            scheduler.submit(request)
            while scheduler.busy:
                for event in scheduler.step():
                    if isinstance(event, PromptRead):
                        read[event.request] = event
                    elif isinstance(event, Event) and event.completion:
                        texts[event.request, event.sample] = event.completion
        return [texts[key] for key in sorted(texts)], [read[key] for key in sorted(read)], scheduler

    found, _, scheduler = run(SOFT, soft, several)
    expected, _, other = run(MODEL, params, [[*WORDS, *prompt] for prompt in several])
    assert_same(found, expected)
    assert scheduler.prefixes.hit == other.prefixes.hit >= 32
    wanted = {"prompt_logprobs": True, "prompt_pool": "last"}
    found, read, _ = run(SOFT, soft, several, **wanted)
    expected, told, _ = run(MODEL, params, [[*WORDS, *prompt] for prompt in several], **wanted)
    assert_same(found, expected)
    for mine, theirs, prompt in zip(read, told, several, strict=True):
        assert len(mine.logprobs) == len(prompt) - 1
        np.testing.assert_array_equal(mine.logprobs, theirs.logprobs[len(WORDS) :])
        np.testing.assert_array_equal(mine.pooled, theirs.pooled)


def test_the_mean_of_a_prompt_is_of_its_own_tokens(soft):
    scheduler = Scheduler(SOFT, soft, 2, chunk=16)
    scheduler.submit(Request(PROMPTS[1], 0, [], prompt_pool="mean"))
    (read,) = (event for _ in range(9) for event in scheduler.step())
    ids = jnp.asarray([[*range(CONFIG.vocab_size, CONFIG.vocab_size + 5), *PROMPTS[1]]])
    states = SOFT.apply({"params": soft}, ids, method=Neo.hidden)[0][0, 5:]
    np.testing.assert_allclose(read.pooled, states.mean(0), rtol=1e-5, atol=1e-5)


def test_beams(params, soft):
    settings = stack_settings([GREEDY] * 4)
    searches = [
        beam.search(model, tree, prompts, 10, BeamOptions(num_beams=3), settings, 2)
        for model, tree, prompts in ((SOFT, soft, PROMPTS), (MODEL, params, TOLD))
    ]
    for found, expected in zip(*searches, strict=True):
        assert_same(found, expected)


@pytest.mark.parametrize("drafts", ["prompt", "model"])
def test_drafts(params, soft, drafts):
    draft = Draft(MODEL, params) if drafts == "model" else None
    settings = stack_settings([GREEDY] * 4)
    found, fared = speculative.generate(SOFT, soft, draft, PROMPTS, 16, settings, 3)
    expected = engine.generate(MODEL, params, TOLD, 16, settings)
    assert [text.ids for text in found] == [text.ids for text in expected]
    assert sum(each.judged for each in fared) > 0
    with pytest.raises(NeoError, match="the draft model has a soft prompt"):
        speculative.generate(MODEL, params, Draft(SOFT, soft), PROMPTS, 16, settings, 3)


@pytest.mark.parametrize("mesh", ["data=2,fsdp=2,model=2"])
def test_on_a_mesh(params, soft, mesh):
    sharding = make_sharding(mesh, "")
    model = dataclasses.replace(SOFT, sharding=sharding)
    settings = stack_settings([GREEDY] * 4)
    found = engine.generate(model, soft, PROMPTS, 12, settings)
    expected = engine.generate(MODEL, params, TOLD, 12, settings)
    assert [text.ids for text in found] == [text.ids for text in expected]


def test_virtual_tokens_within_a_prompt(params, soft):
    """Each request may have embeddings of its own: they are ids as others are."""
    model = SOFT.clone(soft_prompt=0)
    virtual = {word: CONFIG.vocab_size + i for i, word in enumerate(WORDS)}
    prompts = [
        [*range(CONFIG.vocab_size, CONFIG.vocab_size + 5), *PROMPTS[0]],
        [virtual[90], virtual[7]],
        [5, virtual[3], 6],
    ]
    plain = [TOLD[0], [90, 7], [5, 3, 6]]
    settings = stack_settings([GREEDY, DRAWN, GREEDY])
    found = engine.generate(model, soft, prompts, 10, settings)
    assert_same(found, engine.generate(MODEL, params, plain, 10, settings))
    with pytest.raises(NeoError, match="token id 133 is not in the vocabulary"):
        engine.check_tokens(model, [CONFIG.vocab_size + 5])
    found, _ = speculative.generate(model, soft, None, prompts, 10, stack_settings([GREEDY] * 3), 3)
    assert all(max(text.ids) < CONFIG.vocab_size for text in found)


def test_there_is_less_room_for_a_text(soft):
    room = CONFIG.max_length - len(WORDS)
    engine.check_prompts(SOFT, [[1] * (room - 3)], 3)
    with pytest.raises(NeoError, match=f"exceed the context of {room}"):
        engine.check_prompts(SOFT, [[1] * (room - 3)], 4)


def test_no_text_holds_a_virtual_token(soft):
    """Even where its row is the likeliest of all: the head ends at the vocabulary."""
    loud = soft | {PROMPT: 100 * soft[PROMPT]}
    logits = SOFT.apply({"params": loud}, jnp.asarray([PROMPTS[1]])).logits
    assert logits.shape[-1] == CONFIG.vocab_size
    penalized = dataclasses.replace(DRAWN, repetition_penalty=1.3, no_repeat_ngram_size=2)
    (text,) = engine.generate(SOFT, loud, [PROMPTS[0]], 20, stack_settings([penalized]))
    assert max(text.ids) < CONFIG.vocab_size


def test_gradients_reach_the_table_and_no_other(soft):
    tokens = jnp.asarray([[CONFIG.vocab_size + 1, 4, CONFIG.vocab_size + 3]])

    def loss(tree):
        return SOFT.apply({"params": tree}, tokens, method=Neo.embed)[0].sum()

    grads = jax.jit(jax.grad(loss))(soft)
    np.testing.assert_array_equal(
        grads[PROMPT].sum(1), CONFIG.embed_dim * np.array([0, 1, 0, 1, 0])
    )
    rows = np.flatnonzero(np.asarray(grads["wte"]["embedding"]).any(1))
    assert rows.tolist() == [4]
