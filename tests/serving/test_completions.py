"""serving/completions.py, chat.py, replies.py, token_text.py: answers as clients read them."""

import json
import math

import pytest
import tokenizers
from lm_eval.models.openai_completions import LocalCompletionsAPI
from tokenizers import decoders, models, pre_tokenizers

from neo_jax.serving.jobs import Token
from neo_jax.serving.replies import Written, to_json
from neo_jax.serving.token_text import Offsets, Shown, TokenTexts, leading
from neo_jax.text.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    """A tokenizer whose tokens are single bytes, and those of " the"."""
    folder = tmp_path_factory.mktemp("bytes")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: i for i, char in enumerate([*alphabet, "th", "the", "Ġthe"])}
    made = tokenizers.Tokenizer(models.BPE(vocab, [("t", "h"), ("th", "e"), ("Ġ", "the")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|endoftext|>"])
    made.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


def test_how_tokens_are_shown(byte_level, lm):
    texts = TokenTexts(byte_level)
    shown = [texts[token].text for token in byte_level.encode("é the<|endoftext|>")]
    assert shown == ["bytes:\\xc3", "bytes:\\xa9", " the", "<|endoftext|>"]
    assert texts[byte_level.eos_id].bytes == b""
    assert texts[9999] == Shown("token_id:9999", b"")
    pieces = TokenTexts(lm.tokenizer)
    assert [pieces[i].text for i in lm.encode("The café\n")][-3:] == [
        "bytes:\\xc3",
        "bytes:\\xa9",
        "\n",
    ]
    assert pieces[lm.tokenizer.eos_id].text == "<|endoftext|>"
    assert pieces[258].text == "bytes:\\xff"


def test_two_tokens_with_one_text(lm):
    texts = TokenTexts(lm.tokenizer)
    (letter,) = lm.tokenizer.encode("q")[-1:]
    byte = 3 + ord("q")  # <0x71>
    assert texts[byte].text == texts[letter].text == "q"
    assert texts.named([(letter, -5.0), (byte, -1.0)]) == {"q": -5.0, f"token_id:{byte}": -1.0}


def test_where_tokens_begin(byte_level):
    text = "é🚀 the"
    texts = TokenTexts(byte_level)
    offsets = Offsets(10)
    found = [offsets.push(texts[token]) for token in byte_level.encode(text)]
    assert found == [10, 10, 11, 11, 11, 11, 12]
    shown = [Shown(" The", b" The"), Shown(" dog", b" dog")]
    assert leading(shown, "The dog") == 1
    offsets = Offsets(-1)
    assert [offsets.push(token) for token in [*shown, shown[0]]] == [0, 3, 7]


def test_numbers_that_json_has_not():
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_json(math.nan)
    assert json.loads(to_json({"a": "\ud800é"})) == {"a": "\ud800é"}
    assert Written("", [Token(1, -math.inf, []), Token(1, -1.0, [])]).mean_logprob == -5000
    assert Written().mean_logprob == -math.inf


def test_an_answer(complete, lm):
    found = complete(prompt="The", max_tokens=3).json()
    assert found.pop("id").startswith("cmpl-")
    assert isinstance(found.pop("created"), int)
    assert found == {
        "object": "text_completion",
        "model": "neo",
        "choices": [
            {"index": 0, "text": " the world.", "logprobs": None, "finish_reason": "length"}
        ],
        "usage": {"prompt_tokens": 1, "completion_tokens": 3, "total_tokens": 4},
    }
    assert complete(model="gpt-neo").json()["model"] == "gpt-neo"


def test_many_prompts_and_texts(complete):
    found = complete(prompt=[[5], [6], [7, 8]], n=2, max_tokens=1).json()
    texts = [choice["text"] for choice in found["choices"]]
    assert [choice["index"] for choice in found["choices"]] == [*range(6)]
    assert texts == [" the", " world"] * 3
    assert found["usage"]["completion_tokens"] == 6
    (choice,) = complete(prompt="The", max_tokens=30, stop="\nUser:").json()["choices"]
    assert choice["text"] == " the world."
    assert choice["finish_reason"] == "stop"


def test_the_best_of_several(complete, engine):
    found = complete(prompt="The", n=2, best_of=4, max_tokens=1).json()
    assert len(engine.jobs[0].options) == 4
    # The fake engine finds each sample less likely than the one before.
    assert [choice["text"] for choice in found["choices"]] == [" the", " world"]
    assert [choice["index"] for choice in found["choices"]] == [0, 1]
    assert found["usage"]["completion_tokens"] == 4


def test_logprobs_of_new_tokens(complete, lm):
    (choice,) = complete(prompt="The", max_tokens=4, logprobs=2).json()["choices"]
    found = choice["logprobs"]
    assert found["tokens"] == [" the", " world", ".", "\n"]
    assert "".join(found["tokens"]) == choice["text"]
    assert found["token_logprobs"] == [-1.0] * 4
    assert found["text_offset"] == [0, 4, 10, 11]
    for token, top in zip(found["tokens"], found["top_logprobs"], strict=True):
        assert list(top) == [token, lm.tokenizer.token_bytes(300).decode()]
        assert list(top.values()) == [-1.0, -2.0]
    (choice,) = complete(prompt="The", max_tokens=1, logprobs=0).json()["choices"]
    assert choice["logprobs"]["top_logprobs"] == [{" the": -1.0}]


def test_a_token_that_is_not_among_the_likeliest_is_shown_too(complete, engine):
    token = engine.token
    engine.token = lambda id, num, sample=0: Token(id, -9.0, token(5, num + 1).alternatives[1:])
    (choice,) = complete(max_tokens=1, logprobs=1).json()["choices"]
    assert list(choice["logprobs"]["top_logprobs"][0].values()) == [-9.0, -2.0]


def test_echo(complete, lm):
    prompt = "The people"
    (choice,) = complete(prompt=prompt, max_tokens=1, echo=True).json()["choices"]
    assert choice["text"] == "The people the"
    assert choice["logprobs"] is None
    (choice,) = complete(prompt=prompt, max_tokens=1, echo=True, logprobs=1).json()["choices"]
    found = choice["logprobs"]
    assert found["tokens"] == [" The", " people", " the"]
    assert found["token_logprobs"] == [None, -1.0, -1.0]
    assert found["top_logprobs"][0] is None
    assert found["text_offset"] == [0, 3, 10]
    ids = lm.encode(prompt)
    assert complete(prompt=ids, max_tokens=1, echo=True).json()["choices"][0]["text"] == (
        "The people the"
    )
    cut = complete(prompt="a b The people", truncate_prompt_tokens=2, max_tokens=1, echo=True)
    assert cut.json()["choices"][0]["text"] == "The people the"


def test_echo_alone(complete, engine):
    found = complete(prompt=["The people", "x"], max_tokens=0, echo=True, n=2).json()
    assert [choice["text"] for choice in found["choices"]] == ["The people", "The people", "x", "x"]
    assert {choice["finish_reason"] for choice in found["choices"]} == {"length"}
    assert found["usage"]["completion_tokens"] == 0
    assert not engine.jobs  # nothing was computed
    (choice,) = complete(prompt="The people", max_tokens=0, echo=True, logprobs=0).json()["choices"]
    assert choice["logprobs"]["token_logprobs"] == [None, -1.0]


def test_logprobs_of_a_prompt(complete, lm):
    ids = lm.encode("The people of")
    body = {"prompt": ids, "max_tokens": 1, "prompt_logprobs": 2, "logprobs": 1, "echo": True}
    (choice,) = complete(**body).json()["choices"]
    first, second, third = choice["prompt_logprobs"]
    assert first is None
    assert second == {
        str(ids[1]): {"logprob": -1.0, "rank": 1, "decoded_token": " people"},
        "300": {"logprob": -2.0, "rank": 2, "decoded_token": " from"},
    }
    assert str(ids[2]) in third
    assert [top and len(top) for top in choice["logprobs"]["top_logprobs"]] == [None, 1, 1, 1]
    (choice,) = complete(prompt=ids, max_tokens=0, prompt_logprobs=0).json()["choices"]
    assert choice["text"] == ""
    assert [each and len(each) for each in choice["prompt_logprobs"]] == [None, 1, 1]


def test_the_harness_reads_scores(complete, lm):
    """lm_eval's own function takes the log p of continuations out of an answer."""
    texts = [("The people", " of the world"), ("a", " b")]
    ids = [[*lm.encode(context), *lm.encode("x" + rest)[1:]] for context, rest in texts]
    lengths = [len(lm.encode(context)) for context, _ in texts]
    answer = complete(
        prompt=ids, max_tokens=1, logprobs=1, echo=True, temperature=0, seed=1234
    ).json()
    found = LocalCompletionsAPI.parse_logprobs(answer, ids, lengths)
    assert found == [
        (-float(len(each) - length), True) for each, length in zip(ids, lengths, strict=True)
    ]


def test_a_stream(complete):
    events = complete(prompt="The", max_tokens=12, stream=True).events()
    assert len({event["id"] for event in events}) == 1
    assert {event["object"] for event in events} == {"text_completion"}
    (choices,) = zip(*(event["choices"] for event in events), strict=True)
    whole = complete(prompt="The", max_tokens=12).json()["choices"][0]
    assert "".join(choice["text"] for choice in choices) == whole["text"]
    assert [choice["finish_reason"] for choice in choices] == [None] * 11 + ["length"]
    assert "usage" not in events[0]


def test_a_stream_of_many_texts(complete):
    body = {"prompt": ["The", "dog"], "n": 2, "max_tokens": 5, "logprobs": 1, "echo": True}
    texts, tokens, offsets = {}, {}, {}
    for event in complete(**body, stream=True).events():
        (choice,) = event["choices"]
        index, logprobs = choice["index"], choice["logprobs"]
        texts[index] = texts.get(index, "") + choice["text"]
        tokens.setdefault(index, []).extend(logprobs["tokens"])
        offsets.setdefault(index, []).extend(logprobs["text_offset"])
    for choice in complete(**body).json()["choices"]:
        assert texts[choice["index"]] == choice["text"]
        assert tokens[choice["index"]] == choice["logprobs"]["tokens"]
        assert offsets[choice["index"]] == choice["logprobs"]["text_offset"]


def test_numbers_of_a_stream(complete):
    options = {"include_usage": True}
    events = complete(prompt="The", max_tokens=3, stream=True, stream_options=options).events()
    assert [event["usage"] for event in events[:-1]] == [None] * 3
    assert events[-1]["choices"] == []
    assert events[-1]["usage"] == {
        "prompt_tokens": 1, "completion_tokens": 3, "total_tokens": 4,
    }  # fmt: skip
    options["continuous_usage_stats"] = True
    events = complete(prompt="The", max_tokens=3, stream=True, stream_options=options).events()
    assert [event["usage"]["completion_tokens"] for event in events] == [1, 2, 3, 3]


def test_a_stream_of_an_echo(complete):
    for more in ({}, {"logprobs": 1}):
        body = {"prompt": "The dog", "max_tokens": 0, "echo": True, "stream": True, "n": 2}
        events = complete(**body, **more).events()
        choices = [event["choices"][0] for event in events]
        assert [choice["index"] for choice in choices] == [0, 1]
        assert {choice["text"] for choice in choices} == {"The dog"}
        assert {choice["finish_reason"] for choice in choices} == {"length"}
        assert all(bool(choice["logprobs"]) == bool(more) for choice in choices)


def test_a_conversation(chat):
    found = chat("Hi", max_tokens=30, n=2, logprobs=True, top_logprobs=1).json()
    assert found["id"].startswith("chatcmpl-")
    assert found["object"] == "chat.completion"
    first, second = found["choices"]
    assert first["message"] == {"role": "assistant", "content": " the world.", "refusal": None}
    assert first["finish_reason"] == "stop"
    assert second["index"] == 1
    content = first["logprobs"]["content"]
    assert content[0] == {
        "token": " the",
        "logprob": -1.0,
        "bytes": [*b" the"],
        "top_logprobs": [{"token": " the", "logprob": -1.0, "bytes": [*b" the"]}],
    }
    assert chat("Hi", max_tokens=1).json()["choices"][0]["logprobs"] is None


def test_a_stream_of_a_conversation(chat):
    options = {"include_usage": True}
    body = {"max_tokens": 4, "n": 2, "logprobs": True}
    events = chat("Hi", **body, stream=True, stream_options=options).events()
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    texts = ["", ""]
    roles = [[], []]
    for event in events[:-1]:
        (choice,) = event["choices"]
        roles[choice["index"]].append(choice["delta"].get("role"))
        texts[choice["index"]] += choice["delta"].get("content", "")
        assert len(choice["logprobs"]["content"]) == 1
    whole = chat("Hi", **body).json()
    assert texts == [choice["message"]["content"] for choice in whole["choices"]]
    assert roles == [["assistant", None, None, None]] * 2
    assert events[-1]["usage"] == whole["usage"]
    assert "length" in {event["choices"][0]["finish_reason"] for event in events[:-1]}


def test_special_tokens_have_no_bytes(chat, engine, lm):
    engine.words = [lm.tokenizer.eos_id]
    (choice,) = chat("Hi", max_tokens=1, logprobs=True).json()["choices"]
    assert choice["message"]["content"] == ""
    assert choice["logprobs"]["content"][0]["token"] == "<|endoftext|>"
    assert choice["logprobs"]["content"][0]["bytes"] is None
