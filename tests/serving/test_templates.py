"""serving/templates.py: transformers' texts, within bounds."""

import json
import time
import types

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from neo_jax.errors import NeoError
from neo_jax.serving import templates
from neo_jax.serving.templates import PLAIN, Template, find_chat_template, find_template

TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": " Hi <b>\n"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
]
CHATML = """
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
OTHERS = [
    CHATML,
    PLAIN,
    "{{ bos_token }}{% for m in messages %}{% if loop.last %}{% break %}{% endif %}\n"
    "    {% if m.role == 'user' %}\n  {{ m | tojson }}\n  {% endif %}\n{% endfor %}\n",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ ns.n }}"
    "{% generation %}{{ m.content | trim }}{% endgeneration %}{% endfor %}{{ eos_token }}",
    "{{ strftime_now('%Y') }}{{ messages[0]['content'].upper()[:3] * 2 }}{{ 7 % 4 }}",
]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize("source", OTHERS)
@pytest.mark.parametrize("begins", [True, False])
def test_texts_are_those_of_transformers(source, begins):
    ours = Template(source, (), TOKENS).render(TALK, begins)
    ((theirs,), _) = render_jinja_template(
        [TALK], chat_template=source, add_generation_prompt=begins, **TOKENS
    )
    assert ours == theirs


def test_the_plain_one():
    template = Template(PLAIN)
    assert template.render(TALK) == (
        "Be kind.\n\nUser: Hi <b>\nAssistant: Hello\nUser: Bye\nAssistant:"
    )
    assert template.render(TALK[:3], False, True).endswith("\nAssistant: Hello")
    assert template.render(TALK[:3], False).endswith("\nAssistant: Hello\n")


def test_the_last_message_goes_on_as_with_transformers():
    talk = TALK[:3]
    ours = Template(CHATML).render(talk, False, True)
    ((theirs,), _) = render_jinja_template(
        [talk], chat_template=CHATML, continue_final_message=True
    )
    assert ours == theirs
    with pytest.raises(NeoError, match="does not show the last message"):
        Template("{{ messages[0].content }}").render(talk, False, True)


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{% import '/etc/passwd' as x %}", "no loader"),
        ("{{ open('/etc/passwd').read() }}", "undefined"),
        ("{% for a in range(10**6) %}{% endfor %}", "Range too big"),
        ("{{ 9**9**9 }}", "large power"),
        ("{{ 'a' * 10**9 }}", "something large"),
        ("{{ 10**9 * [messages] }}", "something large"),
        ("{{ '%999999999d' % 1 }}", "formats with %"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ raise_exception('roles must\nalternate') }}", "roles must alternate"),
        ("{{ nobody.name }}", "'nobody' is undefined"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% for a in range(99999) %}{{ messages[0].content * 99 }}{% endfor %}", "gives more"),
    ],
)
def test_what_a_template_cannot_do(source, why):
    with pytest.raises(NeoError, match="the chat template fails") as caught:
        Template(source).render(TALK)
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)


def test_texts_are_formatted_within_the_sandbox():
    assert Template("{{ '{0.__class__}{1}'.format(1, 2) }}").render(TALK) == "2"


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) ~ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
    ],
)
def test_a_template_does_not_take_for_ever(source, monkeypatch):
    monkeypatch.setattr(templates, "SECONDS", 0.1)
    begin = time.monotonic()
    with pytest.raises(NeoError, match=r"more than 0\.1 s"):
        Template(source).render(TALK)
    assert time.monotonic() - begin < 5
    assert Template("{{ messages | length }}").render(TALK) == "4"


def test_what_is_no_template():
    for source in ("{% for", "{{ x", "{% endif %}", "{% unknown %}"):
        with pytest.raises(NeoError, match="is no template"):
            Template(source)


def test_where_templates_come_from(tmp_path):
    assert find_template(tmp_path, "", {}) is None
    plain = find_template(tmp_path, "plain", {"eos_token": "E"})
    assert (plain.source, plain.stop, plain.tokens) == (PLAIN, ("\nUser:",), {"eos_token": "E"})
    config = tmp_path / "tokenizer_config.json"
    config.write_text(
        json.dumps({"chat_template": "one{{ eos_token }}", "eos_token": {"content": "</s>"}})
    )
    found = find_template(tmp_path, "", {"eos_token": "E"})
    assert found.render(TALK) == "one</s>"
    assert found.stop == ()
    many = [{"name": "default", "template": "two"}, {"name": "tools", "template": "three"}]
    config.write_text(json.dumps({"chat_template": many}))
    assert find_template(tmp_path, "", {}).source == "two"
    assert find_template(tmp_path, "tools", {}).source == "three"
    config.write_text(json.dumps({"chat_template": many[1:]}))
    with pytest.raises(NeoError, match="name one of them with --chat-template: tools"):
        find_template(tmp_path, "", {})
    (tmp_path / "chat_template.jinja").write_text("four")
    assert find_template(tmp_path, "", {}).source == "four"
    file = tmp_path / "own.txt"
    file.write_text("five é")
    assert find_template(tmp_path, str(file), {}).source == "five é"
    with pytest.raises(NeoError, match="Did you mean 'plain'"):
        find_template(tmp_path, "plane", {})
    file.write_bytes(b"\xff")
    with pytest.raises(NeoError, match="cannot read the chat template"):
        find_template(tmp_path, str(file), {})
    for wrong in (5, [5], [{"name": "x"}], [{"name": 1, "template": 2}], {"a": "b"}):
        config.write_text(json.dumps({"chat_template": wrong}))
        (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
        with pytest.raises(NeoError, match="must be a text, or a list"):
            find_template(tmp_path, "", {})


def test_the_template_of_a_model(lm, tmp_path):
    assert find_chat_template(lm, "") is None
    assert find_chat_template(lm, "plain").tokens == {"eos_token": "<|endoftext|>"}
    (tmp_path / "chat_template.jinja").write_text("x")
    tokenizer = types.SimpleNamespace(folder=tmp_path, eos_id=None)
    other = types.SimpleNamespace(tokenizer=tokenizer, folder=tmp_path / "model")
    assert find_chat_template(other, "").source == "x"
