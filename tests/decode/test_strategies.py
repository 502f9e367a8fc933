"""decode/strategies.py, by `LanguageModel` and `neo-jax generate`."""

import json
from pathlib import Path

import pytest

import neo_jax
from neo_jax.cli import main
from neo_jax.decode import beam
from neo_jax.decode.options import BeamOptions, SamplingOptions, make_settings
from neo_jax.errors import NeoError

PROMPTS = ["The fox", "Call me", "never mind how long"]
NEW = 12
GREEDY = SamplingOptions(temperature=0.0)


@pytest.fixture(scope="module")
def lm(checkpoints):
    return neo_jax.load(checkpoints["bytes"])


@pytest.fixture(scope="module")
def found(lm):
    return lm.sample(PROMPTS, NEW, 2, beams=BeamOptions(4), batch_size=12)


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs `neo-jax generate`; returns its status, stdout and stderr."""
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "1")  # alone: see tests/cli/conftest.py

    def call(*args):
        status = main(["generate", *map(str, args)])
        return (status, *capsys.readouterr())

    return call


def test_samples_of_a_search_are_its_best_beams(lm, found):
    ids = [lm.encode(prompt) for prompt in PROMPTS]
    settings = make_settings(GREEDY, [0] * 3)
    beams = beam.search(lm.model, lm.params, ids, NEW, BeamOptions(4), settings, 2)
    flat = [one for several in beams for one in several]
    assert [sample.prompt for sample in found] == [prompt for prompt in PROMPTS for _ in "ab"]
    assert [(s.ids, s.logprobs, s.finish_reason, s.score) for s in found] == flat
    assert found[0].score > found[1].score
    assert found[0].drafted is None
    best = lm.generate(PROMPTS, NEW, num_beams=4, batch_size=12, temperature=0)
    assert best == [sample.text for sample in found[::2]]


def test_a_stop_string_cuts_a_beam(lm, found):
    stop = found[0].text[2:5]
    cut = lm.sample(PROMPTS, NEW, 2, beams=BeamOptions(4), batch_size=12, stop=stop)[0]
    assert (cut.text, cut.finish_reason) == (found[0].text[: found[0].text.index(stop)], "stop")
    assert cut.ids == found[0].ids[: len(cut.ids)]
    assert len(cut.ids) == len(cut.logprobs) < NEW


def test_drafts_change_no_greedy_text(lm):
    texts = lm.generate(PROMPTS, NEW, temperature=0)
    assert lm.generate(PROMPTS, NEW, temperature=0, draft=lm, num_drafted=4) == texts
    assert lm.generate(PROMPTS, NEW, temperature=0, draft="prompt", num_drafted=4) == texts


def test_samples_with_a_draft_keep_their_order_and_tell_how_it_fared(lm):
    samples = lm.sample(PROMPTS, NEW, 2, draft=lm, num_drafted=4, batch_size=3)
    assert [sample.prompt for sample in samples] == [prompt for prompt in PROMPTS for _ in "ab"]
    for sample in samples:
        assert NEW / 2 < sample.accepted == sample.drafted <= NEW  # the draft is the model
    assert len({sample.text for sample in samples[:2]}) == 2
    stop = samples[0].text[3:5]
    cut = lm.sample(PROMPTS, NEW, 2, draft=lm, num_drafted=4, batch_size=3, stop=stop)[0]
    assert cut.text == samples[0].text[: samples[0].text.index(stop)]


def test_the_command_line(run, lm, found, checkpoints, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    args = ["--prompts-file", path, "--model", checkpoints["bytes"], "--max-new-tokens", NEW]
    status, out, _ = run(*args, "--num-beams", 4, "--num-samples", 2, "--batch-size", 12, "--json")
    fields = [json.loads(line) for line in out.splitlines()]
    assert status == 0
    assert [line["ids"] for line in fields] == [sample.ids for sample in found]
    assert list(fields[0]) == ["prompt", "text", "ids", "logprobs", "finish_reason", "score"]
    assert fields[0]["score"] == pytest.approx(found[0].score)

    args += ["--draft-model", checkpoints["bytes"], "--num-drafted", 4, "--temperature", 0]
    status, out, err = run(*args)
    texts = lm.generate(PROMPTS, NEW, temperature=0)
    assert (status, out.splitlines()) == (
        0,
        "".join(f"{p}{t}\n" for p, t in zip(PROMPTS, texts, strict=True)).splitlines(),
    )
    assert "drafted tokens taken, 100%" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2, "draft": "prompt"}, "a draft does not help beam search; leave out one"),
        ({"draft": "promt"}, "draft 'promt' is neither a loaded model nor 'prompt'"),
        ({"draft": "prompt", "num_drafted": 17}, "a draft has 1 to 16 tokens, not 17"),
        ({"num_beans": 4}, "unknown option 'num_beans'. Did you mean 'num_beams'"),
        ({"num_beams": 2, "temperature": 2.0}, "temperature has no effect on beam search, which"),
        ({"num_beams": 2, "seed": 3}, "seed has no effect on beam search"),
        ({"num_beams": 2, "top_k": 3}, "top_k has no effect on beam search"),
        ({"length_penalty": 0.5}, "length_penalty has no effect without beams; raise num_beams"),
        ({"early_stopping": True}, "early_stopping has no effect without beams"),
        ({"num_drafted": 3}, "num_drafted has no effect without a draft"),
        ({"draft": 3}, "draft 3 is neither a loaded model nor 'prompt'"),
    ],
)
def test_what_cannot_be_asked(lm, options, message):
    with pytest.raises(NeoError, match=message):
        lm.generate("The fox", NEW, **options)


def test_more_samples_than_beams_and_other_vocabularies(lm, run, checkpoints):
    bundled = Path(neo_jax.__file__).parent / "bundled"
    with pytest.raises(NeoError, match="3 texts of 2 beams cannot be returned; raise num_beams"):
        lm.sample(["The fox"], NEW, 3, beams=BeamOptions(2))
    with pytest.raises(NeoError, match="a stream has no option 'draft'"):
        list(lm.stream("The fox", draft="prompt"))
    args = ["--model", checkpoints["bytes"], "--draft-model", bundled, "--max-new-tokens", NEW]
    status, out, err = run("The", *args)
    assert (status, out) == (1, "")
    assert "tokens and the model 327; take a draft with the model's tokenizer" in err
