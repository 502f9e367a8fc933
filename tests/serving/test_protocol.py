"""serving/bodies.py, protocol.py, requests.py: what requests may say, and what becomes of it."""

import dataclasses
import json

import pytest

from neo_jax.decode.options import SamplingOptions
from neo_jax.serving.bodies import parse_body, read
from neo_jax.serving.errors import ApiError
from neo_jax.serving.protocol import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
)
from neo_jax.serving.reading_bodies import EmbeddingBody
from neo_jax.serving.requests import chat_jobs, completion_jobs, embedding_jobs
from neo_jax.text.defaults import Defaults

USER = [{"role": "user", "content": "Hi"}]


def refused(kind, body):
    with pytest.raises(ApiError) as caught:
        read(kind, body)
    assert caught.value.status == 400
    return caught.value


def job_of(service, **body):
    (job,) = completion_jobs(service, read(CompletionBody, body)).jobs
    return job


def chat_job_of(service, **body):
    body = {"messages": USER, **body}
    (job,) = chat_jobs(service, read(ChatBody, body)).jobs
    return job


def refusal_of(call, *args, **body):
    with pytest.raises(ApiError) as caught:
        call(*args, **body)
    assert caught.value.status == 400
    return caught.value


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b'{"a": 1} x', "Extra data"),
        (b'"\xff"', "can't decode byte"),
        (b'{"temperature": NaN}', "NaN is no number"),
        (b'{"temperature": -Infinity}', "-Infinity is no number"),
        (b'{"n": 1, "n": 2}', "'n' is named twice"),
        (b'{"logit_bias": {"1": 1, "1": 2}}', "'1' is named twice"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"a":' * 100_000, "nested too deep"),
        (b"1" * 5000, "4300 digits"),
    ],
)
def test_what_is_no_json(text, why):
    with pytest.raises(ApiError, match="not valid JSON") as caught:
        parse_body(text)
    assert why in caught.value.message
    assert caught.value.code == "invalid_json"


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ([], None, "the body must be a JSON object, not []"),
        ("x", None, "must be a JSON object"),
        ({"max_token": 5}, "max_token", "unknown field 'max_token'. Did you mean 'max_tokens'?"),
        ({"max_token": None}, "max_token", "unknown field"),
        ({"max_tokens": "5"}, "max_tokens", "must be a whole number, not '5'"),
        ({"max_tokens": 5.5}, "max_tokens", "must be a whole number"),
        ({"max_tokens": True}, "max_tokens", "must be a whole number"),
        ({"max_tokens": -1}, "max_tokens", "must lie between 0 and"),
        ({"max_tokens": 10**400}, "max_tokens", "must lie between 0 and"),
        ({"max_tokens": 0}, "max_tokens", "0 is for echo and prompt_logprobs"),
        ({"n": 0}, "n", "must lie between 1 and 128"),
        ({"n": 129}, "n", "must lie between 1 and 128"),
        ({"n": 128, "prompt": ["a"] * 17}, "n", "more than 2048 in one request"),
        ({"best_of": 2, "n": 3}, "best_of", "must be at least n, 3"),
        ({"best_of": 2, "stream": True}, "best_of", "cannot be streamed"),
        ({"temperature": -0.1}, "temperature", "temperature must lie between 0 and"),
        ({"temperature": 1e999}, "temperature", "must be a finite number"),
        ({"temperature": [1]}, "temperature", "must be a number"),
        ({"temperature": 10**400}, "temperature", "must be a number"),
        ({"top_p": 0}, "top_p", "top_p must lie in (0, 1]"),
        ({"top_p": 1.1}, "top_p", "top_p must lie in (0, 1]"),
        ({"top_k": -2}, "top_k", "must lie between -1 and"),
        ({"min_p": 2}, "min_p", "must lie in [0, 1]"),
        ({"repetition_penalty": 0}, "repetition_penalty", "must be above 0"),
        ({"presence_penalty": 1e9}, "presence_penalty", "must lie between"),
        ({"stream": 1}, "stream", "must be true or false, not 1"),
        ({"stream": "yes"}, "stream", "must be true or false"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "need stream: true"),
        (
            {"stream": True, "stream_options": {"usage": True}},
            "stream_options.usage",
            "unknown field 'stream_options.usage'",
        ),
        ({"stream": True, "stream_options": 1}, "stream_options", "must be a JSON object"),
        (
            {"stream": True, "stream_options": {"include_usage": 1}},
            "stream_options.include_usage",
            "must be true or false",
        ),
        (
            {"stream": True, "stream_options": {"include_obfuscation": True}},
            "stream_options.include_obfuscation",
            "chunks are not padded",
        ),
        ({"stop": ""}, "stop", "would stop every text at once"),
        ({"stop": ["a", ""]}, "stop", "would stop every text at once"),
        ({"stop": 1}, "stop", "must be a list"),
        ({"stop": [1]}, "stop", "stop[0] must be a text"),
        ({"stop": ["x"] * 17}, "stop", "at most 16"),
        ({"stop_token_ids": [-1]}, "stop_token_ids", "stop_token_ids[0] must be a token id"),
        ({"stop_token_ids": [1.0]}, "stop_token_ids", "must be a token id"),
        ({"seed": 2**63}, "seed", "must lie between"),
        ({"seed": "a"}, "seed", "must be a whole number"),
        ({"logit_bias": []}, "logit_bias", "must map token ids to numbers"),
        ({"logit_bias": {"the": 1}}, "logit_bias", "'the' is not a token id"),
        ({"logit_bias": {"-1": 1}}, "logit_bias", "is not a token id"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "must lie between -100 and 100"),
        ({"logit_bias": {"5": "1"}}, "logit_bias", "must be a number"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias", "at most 1024"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens", "exceed max_tokens 4"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "at least 1, or -1"),
        ({"prompt": []}, "prompt", "is an empty list"),
        ({"prompt": 5}, "prompt", "must be a list"),
        ({"prompt": ["a", 5]}, "prompt", "a list of texts, a list of token ids"),
        ({"prompt": [[1], "a"]}, "prompt", "a list of texts"),
        ({"prompt": [[1], [True]]}, "prompt", "prompt[1][0] must be a token id, not True"),
        ({"prompt": [1, -5]}, "prompt", "prompt[1] must be a token id, not -5"),
        ({"prompt": {"a": 1}}, "prompt", "must be a list"),
        ({"prompt": ["a"] * 2049}, "prompt", "at most 2048"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "cannot be streamed"),
        ({"logprobs": True}, "logprobs", "must be a whole number"),
        ({"suffix": "end"}, "suffix", "suffix 'end' is not supported: the model writes from left"),
        ({"response_format": {"type": "json_object"}}, "response_format", "is not supported"),
        ({"use_beam_search": True}, "use_beam_search", "is not supported"),
        ({"priority": 1}, "priority", "is not supported"),
        ({"skip_special_tokens": False}, "skip_special_tokens", "is not supported"),
        ({"model": 5}, "model", "must be a text"),
        ({"a" * 5000: 1}, "a" * 100, "unknown field"),
        ({"\n\ud800": 1}, "\\n\\ud800", "unknown field"),
    ],
)
def test_what_a_completion_cannot_have(body, param, words):
    error = refused(CompletionBody, body)
    assert words in error.message
    assert error.param == param
    assert len(error.message) < 2100


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "messages", "messages is missing"),
        ({"messages": None}, "messages", "messages is missing"),
        ({"messages": []}, "messages", "is empty"),
        ({"messages": "Hi"}, "messages", "must be a list"),
        ({"messages": ["Hi"]}, "messages[0]", "messages[0] must be a JSON object"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "is missing"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "not 'tool'"),
        (
            {"messages": [{"role": "user", "content": 5}]},
            "messages[0].content",
            "must be a text, or a list of parts",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            "messages[0].content",
            "messages[0].content[0] must be",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
            "messages[0].content",
            "messages[0].content[0].text must be a text",
        ),
        (
            {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]},
            "messages[0].tool_calls",
            "the model calls no functions",
        ),
        (
            {"messages": [{"role": "user", "content": "x", "contents": "y"}]},
            "messages[0].contents",
            "Did you mean 'content'",
        ),
        ({"messages": USER, "tools": [{}]}, "tools", "the model calls no functions"),
        ({"messages": USER, "tool_choice": "required"}, "tool_choice", "is not supported"),
        ({"messages": USER, "modalities": ["audio"]}, "modalities", "a model of text"),
        ({"messages": USER, "top_logprobs": 2}, "top_logprobs", "need logprobs: true"),
        ({"messages": USER, "logprobs": 1}, "logprobs", "must be true or false"),
        ({"messages": USER, "max_tokens": 0}, "max_tokens", "must lie between 1"),
        ({"messages": USER, "max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "differ"),
        ({"messages": USER, "prompt": "x"}, "prompt", "unknown field 'prompt'"),
        ({"messages": USER, "chat_template": "x"}, "chat_template", "the server's own is taken"),
        (
            {"messages": USER, "add_generation_prompt": True, "continue_final_message": True},
            "continue_final_message",
            "exclude each other",
        ),
    ],
)
def test_what_a_conversation_cannot_have(body, param, words):
    error = refused(ChatBody, body)
    assert words in error.message
    assert error.param == param


def test_what_other_requests_cannot_have():
    assert refused(EmbeddingBody, {}).code == "missing_required_parameter"
    assert "the model's width" in refused(EmbeddingBody, {"input": "a", "dimensions": 5}).message
    assert refused(EmbeddingBody, {"input": "a", "encoding_format": "x"}).param == "encoding_format"
    assert "either prompt or messages" in refused(TokenizeBody, {}).message
    assert "either" in refused(TokenizeBody, {"prompt": "a", "messages": USER}).message
    assert refused(DetokenizeBody, {"tokens": "a"}).param == "tokens"
    assert refused(DetokenizeBody, {"tokens": [[1]]}).param == "tokens"


def test_null_is_no_field_and_what_asks_for_nothing_is_accepted():
    fields = {field.name: None for field in dataclasses.fields(CompletionBody)}
    assert read(CompletionBody, fields) == read(CompletionBody, {})
    nothing = {
        "user": "me", "metadata": {"a": "b"}, "suffix": "", "response_format": {"type": "text"},
        "tools": None, "tool_choice": "none", "parallel_tool_calls": True, "store": False,
        "service_tier": "auto", "modalities": ["text"], "prompt_cache_key": "x",
    }  # fmt: skip
    for kind, body in ((CompletionBody, {}), (ChatBody, {"messages": USER})):
        known = {n: value for n, value in nothing.items() if n in {*kind.lacking, *kind.ignored}}
        assert len(known) > 5
        assert read(kind, body | known) == read(kind, body)


def test_what_openai_says_of_an_answer_can_be_sent_back():
    message = {
        "role": "assistant", "content": "Hi", "refusal": None, "annotations": [], "audio": None,
        "function_call": None, "tool_calls": None,
    }  # fmt: skip
    (found,) = read(ChatBody, {"messages": [message]}).messages
    assert (found.role, found.content) == ("assistant", "Hi")


def test_parts_of_a_message_are_lines():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert (
        read(ChatBody, {"messages": [{"role": "user", "content": parts}]}).messages[0]
        == (read(ChatBody, {"messages": [{"role": "user", "content": "a\nb"}]}).messages[0])
    )


def test_prompts_of_all_forms():
    for prompt, found in (
        ("a", ("a",)),
        (["a", ""], ("a", "")),
        ([1, 2], ([1, 2],)),
        ([[1], [2, 3]], ([1], [2, 3])),
    ):
        assert read(CompletionBody, {"prompt": prompt}).prompt == found
    assert read(CompletionBody, {}).prompt == ("",)


def test_options_of_a_request(service):
    job = job_of(
        service,
        prompt="The",
        temperature=0.5,
        top_p=0.5,
        top_k=5,
        min_p=0.1,
        presence_penalty=1,
        frequency_penalty=-1,
        repetition_penalty=1.5,
        logit_bias={"5": -100, "7": 2},
        min_tokens=3,
        ignore_eos=True,
        seed=7,
        max_tokens=9,
        stop=["x", "y"],
        stop_token_ids=[11],
        logprobs=3,
    )
    assert job.options == [
        SamplingOptions(
            temperature=0.5,
            top_p=0.5,
            top_k=5,
            min_p=0.1,
            presence_penalty=1.0,
            frequency_penalty=-1.0,
            repetition_penalty=1.5,
            logit_bias=((5, -100.0), (7, 2.0)),
            min_new_tokens=3,
            ignore_eos=True,
            seed=7,
        )
    ]
    assert job.ids == service.lm.encode("The")
    assert (job.max_new_tokens, job.stop, job.stop_token_ids) == (9, ("x", "y"), (11,))
    assert (job.num_alternatives, job.prompt_alternatives, job.pool) == (3, None, "")


def test_the_request_comes_before_the_checkpoint_and_that_before_openai(make_service, lm):
    class Other:
        tokenizer, config, model, folder = lm.tokenizer, lm.config, lm.model, lm.folder
        encode, prompt_ids = lm.encode, lm.prompt_ids
        defaults = Defaults({"temperature": 0.3, "max_new_tokens": 40, "stop": ("END",)})

    service = make_service()
    plain = job_of(service)
    assert (plain.options[0].temperature, plain.options[0].top_p) == (1.0, 1.0)
    assert (plain.max_new_tokens, plain.stop) == (16, ())
    object.__setattr__(service, "lm", Other())
    theirs = job_of(service)
    assert (theirs.options[0].temperature, theirs.options[0].top_p) == (0.3, 1.0)
    assert (theirs.max_new_tokens, theirs.stop) == (40, ("END",))
    own = job_of(service, temperature=0, max_tokens=5, stop="x")
    assert (own.options[0].temperature, own.max_new_tokens, own.stop) == (0, 5, ("x",))
    assert job_of(service, stop=[]).stop == ()
    # What the request does not say never makes it one that cannot be done.
    context = service.context
    assert job_of(service, prompt=[5] * (context - 3)).max_new_tokens == 3
    assert chat_job_of(service).max_new_tokens == 40
    searching = Defaults({"num_beams": 4, "length_penalty": 2.0, "temperature": 0.0})
    Other.defaults = searching
    assert job_of(service).options[0].temperature == 0  # no beams: greedy


def test_seeds(service):
    assert [each.seed for each in job_of(service, seed=2**32 - 1, n=3).options] == [2**32 - 1, 0, 1]
    assert job_of(service, seed=-1).options[0].seed == 2**32 - 1
    assert job_of(service, seed=2**40 + 5).options[0].seed == 5
    assert len({job_of(service).options[0].seed for _ in range(5)}) > 1
    assert len(job_of(service, n=2, best_of=5).options) == 5


def test_top_k_off(service):
    assert job_of(service, top_k=-1).options[0].top_k == job_of(service, top_k=0).options[0].top_k
    assert job_of(service).options[0].top_k == 0


def test_what_is_wanted_of_a_prompt(service):
    wanted = {
        None: {"logprobs": 2},
        2: {"logprobs": 2, "echo": True},
        0: {"logprobs": 0, "echo": True},
        5: {"prompt_logprobs": 5, "logprobs": 2, "echo": True},
        4: {"prompt_logprobs": 4, "logprobs": 7},
    }
    for num, body in wanted.items():
        assert job_of(service, **body).prompt_alternatives == num
    nothing = job_of(service, max_tokens=0, echo=True, logprobs=1)
    assert (nothing.max_new_tokens, nothing.options) == (0, ())


def test_the_context(service):
    size = service.context
    assert job_of(service, prompt=[5] * (size - 5), max_tokens=5).max_new_tokens == 5
    error = refusal_of(job_of, service, prompt=[5] * (size - 5), max_tokens=6)
    assert error.code == "context_length_exceeded"
    assert error.param == "prompt"
    assert error.message == (
        f"prompt has {size - 5} tokens, and at least 6 must follow: the context is {size}; shorten "
        "the text, or ask for at most 5 new tokens."
    )
    assert job_of(service, prompt=[5] * size, max_tokens=0, echo=True).max_new_tokens == 0
    for body in ({}, {"max_tokens": 1}, {"max_tokens": 2**31 - 1}):
        error = refusal_of(job_of, service, prompt=[5] * size, **body)
        assert error.code == "context_length_exceeded"
    with pytest.raises(ApiError) as caught:
        completion_jobs(service, read(CompletionBody, {"prompt": ["a", "b " * size]}))
    assert caught.value.param == "prompt[1]"
    assert chat_job_of(service).max_new_tokens == size - len(chat_job_of(service).ids)
    error = refusal_of(chat_job_of, service, messages=[{"role": "user", "content": "a " * size}])
    assert (error.param, error.code) == ("messages", "context_length_exceeded")


def test_truncation_keeps_the_newest_tokens(service):
    size = service.context
    ids = [*range(10, 10 + size)]
    assert job_of(service, prompt=ids, truncate_prompt_tokens=3).ids == ids[-3:]
    assert job_of(service, prompt=[5, 6], truncate_prompt_tokens=9).ids == [5, 6]
    assert job_of(service, prompt=ids, truncate_prompt_tokens=-1, max_tokens=4).ids == ids[4:]
    assert job_of(service, prompt=ids, truncate_prompt_tokens=-1).ids == ids[1:]
    body = read(EmbeddingBody, {"input": ids + ids, "truncate_prompt_tokens": -1})
    assert embedding_jobs(service, body).jobs[0].ids == ids


def test_what_this_model_cannot_do(service):
    size = service.lm.config.vocab_size
    for body, param in (
        ({"prompt": [5, size]}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"logit_bias": {str(size): 1}}, "logit_bias"),
        ({"stop_token_ids": [size]}, "stop_token_ids"),
        ({"logprobs": 21}, "logprobs"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
    ):
        assert refusal_of(job_of, service, **body).param == param
    error = refusal_of(chat_job_of, service, logprobs=True, top_logprobs=21)
    assert error.param == "top_logprobs"
    for given in ("", [], [[]], ["a", ""], [[1], []]):
        with pytest.raises(ApiError):
            embedding_jobs(service, read(EmbeddingBody, {"input": given}))


def test_more_prompts_than_may_wait(make_service):
    service = make_service(max_prompts=2)
    error = refusal_of(job_of, service, prompt=["a", "b", "c"])
    assert "more than the 2 that may wait" in error.message


def test_a_text_begins_behind_an_end_of_text(service):
    assert job_of(service).ids == job_of(service, prompt="").ids == [service.tokenizer.eos_id]


def test_a_conversation_becomes_a_prompt(service):
    prompt = "User: Hi\nAssistant:"
    job = chat_job_of(service)
    assert job.ids == service.tokenizer.encode(prompt)
    assert job.stop == ("\nUser:",)
    assert chat_job_of(service, stop=["x"]).stop == ("x", "\nUser:")
    assert chat_job_of(service, stop=["\nUser:"]).stop == ("\nUser:",)
    assert chat_job_of(service, max_completion_tokens=7).max_new_tokens == 7
    open_end = chat_job_of(
        service,
        messages=[*USER, {"role": "assistant", "content": "Hel"}],
        continue_final_message=True,
    )
    assert open_end.ids == service.tokenizer.encode("User: Hi\nAssistant: Hel")


def test_errors_are_short_and_are_json(service):
    error = refused(CompletionBody, {"\ud800" * 9999: 1})
    assert json.dumps(error.body).encode()
    assert len(error.message) < 2100
