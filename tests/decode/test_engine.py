"""decode/engine.py: whole continuations, by transformers and by plain forward passes."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from decode_model import draw_params
from transformers import GPTNeoForCausalLM

from neo_jax.checkpoints.save import save_pretrained
from neo_jax.config import ModelConfig
from neo_jax.decode import engine
from neo_jax.decode.options import ROOM, SamplingOptions, make_settings, stack_settings
from neo_jax.decode.state import empty_state
from neo_jax.errors import NeoError
from neo_jax.model.tensor_table import tensors
from neo_jax.model.transformer import Neo
from neo_jax.sharding.rules import make_sharding

pytestmark = [pytest.mark.core, pytest.mark.optimized]

WINDOW = 16
NEW = 2 * WINDOW + 40  # every local layer's cache wraps around more than twice
CONFIG = ModelConfig(
    num_layers=4,
    embed_dim=64,
    num_heads=4,
    vocab_size=512,
    max_length=160,
    window_size=WINDOW,
    eos_token_id=-1,
)
MODEL = Neo(CONFIG)
PROMPTS = [
    np.random.default_rng(length).integers(0, CONFIG.vocab_size, length).tolist()
    for length in (1, 5, 16, 23)
]
GREEDY = SamplingOptions(temperature=0.0)


def settings_of(options, rows):
    return make_settings(options, [options.seed] * rows)


def mixed_settings():
    """A row each for greedy, plain, top-k and top-p."""
    return stack_settings(
        [
            GREEDY,
            SamplingOptions(1.0, top_p=1.0, seed=1),
            SamplingOptions(0.7, top_k=20, top_p=1.0, seed=2),
            SamplingOptions(1.5, top_p=0.8, seed=3),
        ]
    )


def generate(params, prompts, settings, model=MODEL, max_new_tokens=NEW):
    return engine.generate(model, params, prompts, max_new_tokens, settings)


@pytest.fixture(scope="module")
def params():
    return draw_params(MODEL, 1)


@pytest.fixture(scope="module")
def greedy(params):
    return generate(params, PROMPTS, settings_of(GREEDY, len(PROMPTS)))


@pytest.fixture(scope="module")
def sampled(params):
    return generate(params, PROMPTS, mixed_settings())


@pytest.fixture(scope="module")
def reference(params, tmp_path_factory):
    """transformers' model of the same weights."""
    torch.set_num_threads(1)  # its products are too small to share
    folder = tmp_path_factory.mktemp("engine")
    save_pretrained(folder, CONFIG, params)
    return GPTNeoForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


# Against transformers.


def assert_same_or_tied(reference, theirs, ours):
    """Equal ids; they may part where the reference cannot tell its two best tokens apart."""
    if ours == theirs:
        return
    first = next(i for i, pair in enumerate(zip(theirs, ours, strict=True)) if len({*pair}) > 1)
    ids = torch.tensor([theirs[:first]])
    with torch.no_grad():
        single = reference(ids).logits[0, -1].double()
        double = copy.deepcopy(reference).double()(ids).logits[0, -1]
    noise = (single - double).abs().max().item()
    best, second = single.topk(2).values.tolist()
    assert best - second <= 10 * noise, f"token {first}: {theirs[first]}, not {ours[first]}"
    assert ours[first] in single.topk(2).indices.tolist()


def test_greedy_text_is_that_of_transformers(reference, greedy):
    assert len({token for completion in greedy for token in completion.ids}) >= 50
    for prompt, completion in zip(PROMPTS, greedy, strict=True):
        assert len(set(completion.ids)) >= 50
        ids = torch.tensor([prompt])
        theirs = reference.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW
        )
        assert_same_or_tied(reference, theirs[0].tolist(), prompt + completion.ids)
        assert completion.finish_reason == "length"


def test_penalized_greedy_text_is_that_of_transformers(reference, params, greedy):
    asked = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}
    settings = settings_of(dataclasses.replace(GREEDY, **asked), len(PROMPTS))
    found = generate(params, PROMPTS, settings)
    for prompt, completion, plain in zip(PROMPTS, found, greedy, strict=True):
        ids = torch.tensor([prompt])
        theirs = reference.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW, **asked
        )
        assert theirs[0].tolist() == prompt + completion.ids
        assert completion.ids != plain.ids


# Against plain forward passes of the same model.


@jax.jit
def forward_logprobs(params, tokens):
    return jax.nn.log_softmax(MODEL.apply({"params": params}, tokens).logits)


@pytest.mark.parametrize("fixture", ["greedy", "sampled"])
def test_logprobs_are_those_of_a_full_forward_pass(params, fixture, request):
    padded = np.zeros((len(PROMPTS), CONFIG.max_length), np.int32)
    completions = request.getfixturevalue(fixture)
    for row, prompt, completion in zip(padded, PROMPTS, completions, strict=True):
        row[: len(prompt) + NEW] = prompt + completion.ids
    full = np.asarray(forward_logprobs(params, padded))
    for row, prompt, completion in zip(full, PROMPTS, completions, strict=True):
        before = np.arange(len(prompt), len(prompt) + NEW) - 1
        expected = row[before, completion.ids]
        np.testing.assert_allclose(completion.logprobs, expected, rtol=0, atol=1e-5)
        assert expected.min() < -0.5  # there is something to compare


def test_greedy_tokens_are_the_likeliest_of_a_full_forward_pass(params, greedy):
    for prompt, completion in zip(PROMPTS, greedy, strict=True):
        padded = np.zeros((len(PROMPTS), CONFIG.max_length), np.int32)
        padded[0, : len(prompt) + NEW] = prompt + completion.ids
        rows = np.asarray(forward_logprobs(params, padded))[0, len(prompt) - 1 :]
        chosen = rows[np.arange(NEW), completion.ids]
        np.testing.assert_allclose(chosen, rows[:NEW].max(axis=-1), rtol=0, atol=1e-5)


# Rows.


def assert_equal(ours, theirs):
    assert ours.ids == theirs.ids
    assert ours.finish_reason == theirs.finish_reason
    np.testing.assert_allclose(ours.logprobs, theirs.logprobs, rtol=0, atol=1e-5)


def test_a_row_is_the_same_alone_and_in_any_order(params, greedy, sampled):
    order = [2, 0, 3, 1]
    for settings, together in ((settings_of(GREEDY, 4), greedy), (mixed_settings(), sampled)):
        shuffled = jax.tree.map(lambda leaf: leaf[np.array(order)], settings)
        again = generate(params, [PROMPTS[i] for i in order], shuffled)
        for i, completion in zip(order, again, strict=True):
            assert_equal(completion, together[i])
        for i, prompt in enumerate(PROMPTS):
            one = jax.tree.map(lambda leaf: leaf[i : i + 1], settings)  # noqa: B023  (called here)
            assert_equal(generate(params, [prompt], one)[0], together[i])


def test_sampled_texts_differ_from_greedy_ones_and_follow_the_seed(params, greedy, sampled):
    assert sampled[0].ids == greedy[0].ids
    assert all(a.ids != b.ids for a, b in zip(sampled[1:], greedy[1:], strict=True))
    plain = SamplingOptions(temperature=1.0, top_p=1.0)
    same_prompt = [PROMPTS[1]] * 4
    texts = generate(params, same_prompt, make_settings(plain, [0, 1, 2, 0]))
    assert texts[0].ids == texts[3].ids
    assert len({tuple(text.ids) for text in texts}) == 3


@pytest.mark.parametrize("row", [0, 3])
def test_a_stream_is_what_generate_gives(params, greedy, sampled, row):
    for settings, whole in ((settings_of(GREEDY, 4), greedy), (mixed_settings(), sampled)):
        one = jax.tree.map(lambda leaf: leaf[row : row + 1], settings)
        tokens = list(engine.stream(MODEL, params, PROMPTS[row], NEW, one))
        assert tokens == whole[row].ids


# Stopping.


@pytest.fixture
def steps(monkeypatch):
    """Counts decoding steps on the device, of programs compiled from here on."""
    counted = []
    step = engine._step

    def counting_step(model, params, state):
        jax.debug.callback(lambda: counted.append(1))
        return step(model, params, state)

    monkeypatch.setattr(engine, "_step", counting_step)
    return counted


def test_the_end_of_text_stops_a_row_and_the_loop(params, greedy, steps):
    """Any of several ends, also as the first new token."""
    eos = (greedy[1].ids[20], greedy[0].ids[0])
    cuts = [next((i for i, token in enumerate(c.ids) if token in eos), None) for c in greedy]
    assert cuts[0] == 0
    assert cuts[1] > 3
    model = Neo(dataclasses.replace(CONFIG, eos_token_id=eos))
    settings = settings_of(GREEDY, len(PROMPTS))
    for cut, whole, ours in zip(
        cuts, greedy, generate(params, PROMPTS, settings, model), strict=True
    ):
        assert ours.ids == whole.ids[:cut]
        assert len(ours.logprobs) == len(ours.ids)
        assert ours.finish_reason == ("length" if cut is None else "eos")

    jax.effects_barrier()
    steps.clear()
    one = settings_of(GREEDY, 1)
    alone = generate(params, PROMPTS[1:2], one, model)[0]
    jax.effects_barrier()
    assert alone.ids == greedy[1].ids[: cuts[1]]
    assert len(steps) == cuts[1] + 1  # the end of text takes a step too
    for row in (0, 1):
        new = list(engine.stream(model, params, PROMPTS[row], NEW, one))
        assert new == greedy[row].ids[: cuts[row]]


def test_the_loop_runs_until_the_last_row_is_done(params, greedy, steps):
    # To JAX this is another model, whose program, compiled now, counts its steps.
    model = Neo(dataclasses.replace(CONFIG, norm_epsilon=1.0000001e-5))
    generate(params, PROMPTS, settings_of(GREEDY, 4), model, max_new_tokens=9)
    jax.effects_barrier()
    assert len(steps) == 9


def test_state_counts_tokens_and_keeps_the_prompts(params, greedy):
    model = Neo(dataclasses.replace(CONFIG, eos_token_id=greedy[0].ids[2]))
    state = engine.start(model, params, PROMPTS, NEW, settings_of(GREEDY, 4))
    assert state.lengths.tolist() == [1, 5, 16, 23]
    assert state.limits.tolist() == [length + NEW for length in (1, 5, 16, 23)]
    state = engine.run(model, params, state, 2)
    assert state.lengths.tolist() == [3, 7, 18, 25]
    assert not state.done.any()
    state = engine.run(model, params, state, 2)
    assert state.lengths.tolist() == [4, 9, 20, 27]
    assert state.done.tolist() == [True, False, False, False]
    empty = empty_state(model, 2, 64, ROOM).settings  # nothing for a step to do
    jax.tree.map(np.testing.assert_array_equal, empty, settings_of(GREEDY, 2))
    for row, prompt, completion in zip(state.tokens, PROMPTS, greedy, strict=True):
        length = 3 if prompt is PROMPTS[0] else 4
        expected = prompt + completion.ids[:length]
        assert row[: len(expected)].tolist() == expected
        assert not row[len(expected) :].any()


def test_a_single_new_token_and_the_last_place_of_the_context(params, greedy):
    one = settings_of(GREEDY, 1)
    assert generate(params, PROMPTS[:1], one, max_new_tokens=1)[0].ids == greedy[0].ids[:1]
    full = PROMPTS[3] + greedy[3].ids
    prompt = (full * 2)[: CONFIG.max_length - 1]
    completion = generate(params, [prompt], one, max_new_tokens=1)[0]
    last = np.asarray(forward_logprobs(params, np.array([[*prompt, 0]] * 4)))[0, -2]
    assert completion.ids == [int(last.argmax())]
    assert completion.finish_reason == "length"


def test_no_prompts_give_no_texts(params):
    assert generate(params, [], settings_of(GREEDY, 0)) == []


def test_settings_may_be_used_again(params, greedy):
    settings = settings_of(GREEDY, 1)
    for _ in range(2):
        assert generate(params, PROMPTS[:1], settings, max_new_tokens=2)[0].ids == greedy[0].ids[:2]
        stream = engine.stream(MODEL, params, PROMPTS[0], 2, settings)
        assert list(stream) == greedy[0].ids[:2]


# Compilation.


def test_prompts_of_one_bucket_share_their_programs(params, compilations):
    with compilations() as counted:
        jax.jit(lambda x: x + 1)(jnp.ones(3)).block_until_ready()
    assert counted  # the count counts

    options = SamplingOptions(temperature=0.9, seed=4)
    generate(params, [[1, 2, 3]], settings_of(options, 1), max_new_tokens=20)
    programs = engine.prefill._cache_size(), engine.run.on(MODEL)._cache_size()
    with compilations() as counted:
        for length, new in ((1, 1), (9, 30), (16, 48)):
            settings = settings_of(dataclasses.replace(options, top_k=length), 1)
            prompt = list(range(length))
            assert len(generate(params, [prompt], settings, max_new_tokens=new)[0].ids) == new
    assert counted == []
    assert (engine.prefill._cache_size(), engine.run.on(MODEL)._cache_size()) == programs


# Meshes.


@pytest.mark.parametrize("mesh", ["fsdp=4,model=2", "data=2,fsdp=2,model=2"])
def test_a_mesh_changes_no_token(params, greedy, sampled, mesh):
    sharding = make_sharding(mesh)
    placed = {
        row.path: sharding.named(row.axes, row.shape, "/".join(row.path)) for row in tensors(CONFIG)
    }
    split = jax.tree.map_with_path(
        lambda path, leaf: jax.device_put(leaf, placed[tuple(entry.key for entry in path)]), params
    )
    model = Neo(CONFIG, sharding=sharding)
    for settings, whole in ((settings_of(GREEDY, 4), greedy), (mixed_settings(), sampled)):
        for completion, expected in zip(
            generate(split, PROMPTS, settings, model), whole, strict=True
        ):
            assert_equal(completion, expected)
    # A batch that does not divide over the mesh.
    alone = generate(split, PROMPTS[2:3], settings_of(GREEDY, 1), model)
    assert_equal(alone[0], greedy[2])


# What cannot be done.


@pytest.mark.parametrize(
    ("prompts", "new", "message"),
    [
        ([[]], 1, "the prompt is empty; give at least one token"),
        ([[1], []], 1, "the prompt is empty"),
        ([[512]], 1, "token id 512 is not in the vocabulary, 0 to 511"),
        ([[3, -1]], 1, "token id -1 is not in the vocabulary"),
        ([[1]], 0, "max_new_tokens must be at least 1, not 0"),
        ([[1]], -3, "max_new_tokens must be at least 1, not -3"),
        ([[1] * 161], 1, "161 tokens exceed the context of 160; shorten the text"),
        (
            [[1], [1] * 100],
            61,
            "a prompt of 100 tokens and 61 new ones exceed the context of 160; shorten the prompt "
            "or ask for at most 60 new tokens",
        ),
        ([[1] * 160], 1, "a prompt of 160 tokens and 1 new ones exceed the context of 160; "
         "shorten the prompt"),
    ],
)  # fmt: skip
def test_prompts_that_cannot_be_continued(prompts, new, message):
    settings = settings_of(GREEDY, len(prompts))
    for refuse in (
        lambda: engine.check_prompts(MODEL, prompts, new),
        lambda: engine.generate(MODEL, {}, prompts, new, settings),
        lambda: list(engine.stream(MODEL, {}, prompts[-1], new, settings)),
    ):
        with pytest.raises(NeoError, match=message) as error:
            refuse()
        assert "\n" not in str(error.value)


def test_prompts_that_just_fit_are_accepted():
    engine.check_prompts(MODEL, [[0] * 100, [511]], 60)
    engine.check_tokens(MODEL, [0] * 160)
