"""serving/web_page.py, serving/page: one file that loads nothing, and whose policy says so.

What it does in a browser is seen by benchmarks/serving/page.py.
"""

import base64
import hashlib
import re
from html.parser import HTMLParser

import pytest

from neo_jax.serving.web_page import FILE

PAGE = FILE.read_text(encoding="utf-8")


class Elements(HTMLParser):
    """All elements of a page, by their tags and attributes."""

    def __init__(self):
        super().__init__()
        self.found = []
        self.feed(PAGE)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


ELEMENTS = Elements().found


def test_the_page_is_served(client):
    found = client("GET", "/")
    assert found.status == 200
    assert found.headers["content-type"] == "text/html; charset=utf-8"
    assert found.body.decode() == PAGE
    assert client("HEAD", "/").status == 200
    client("POST", "/", {}).error(405)


def test_the_page_needs_no_key_and_what_it_asks_does(make_client):
    client = make_client(api_keys=("k",))
    assert client("GET", "/").status == 200
    for path in ("/v1/models", "/tokenizer_info"):
        client("GET", path).error(401)


def test_its_policy_allows_its_own_script_and_style_alone(client):
    found = client("GET", "/").headers
    policy = dict(part.split(" ", 1) for part in found["content-security-policy"].split("; "))
    assert policy.pop("connect-src") == "'self'"
    assert policy.pop("img-src") == "data:"
    for tag in ("script", "style"):
        (inner,) = re.findall(f"<{tag}>(.*?)</{tag}>", PAGE, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()
        assert policy.pop(f"{tag}-src") == f"'sha256-{digest}'"
    assert policy.keys() == {"default-src", "base-uri", "form-action", "frame-ancestors"}
    assert set(policy.values()) == {"'none'"}
    assert found["x-content-type-options"] == "nosniff"


def test_it_loads_nothing():
    assert not re.findall(r"https?://|url\(|@import|\bimport\b", PAGE)
    sources = [attrs.get(name) for _, attrs in ELEMENTS for name in ("src", "href")]
    assert [source for source in sources if source is not None] == ["data:,"]


def test_what_the_model_writes_is_never_read_as_html():
    assert not re.findall(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|createContextual|\beval\b|Function\(",
        PAGE,
    )
    # A policy with hashes leaves no attribute that runs or styles.
    assert not [name for _, attrs in ELEMENTS for name in attrs if name.startswith("on")]
    assert not [attrs for _, attrs in ELEMENTS if "style" in attrs]


def test_what_can_be_used_has_a_name():
    labelled = {attrs["for"] for tag, attrs in ELEMENTS if tag == "label" and "for" in attrs}
    fields = [attrs for tag, attrs in ELEMENTS if tag in ("input", "textarea")]
    assert len(fields) > 8
    for attrs in fields:
        inside = attrs.get("type") == "checkbox"  # its label is around it
        assert inside or attrs["id"] in labelled or attrs.get("aria-label"), attrs
    for tag, attrs in ELEMENTS:
        assert tag != "dialog" or attrs["aria-labelledby"]
    ids = [attrs["id"] for _, attrs in ELEMENTS if "id" in attrs]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("name", sorted(set(re.findall(r'\$\("([\w-]+)"\)', PAGE))))
def test_its_script_finds_what_it_looks_for(name):
    assert f'id="{name}"' in PAGE


def test_the_fields_that_it_sends_are_taken(post):
    settings = {"temperature": 0.7, "top_p": 0.9, "max_tokens": 3, "seed": 4294967295}
    body = {**settings, "model": "neo", "stream": True, "prompt": "", "logprobs": 5}
    events = post("/v1/completions", body).events()
    assert len(events[0]["choices"][0]["logprobs"]["top_logprobs"][0]) == 5
    talk = {"messages": [{"role": "user", "content": "Hi"}], "logprobs": True, "top_logprobs": 5}
    events = post("/v1/chat/completions", {**settings, "stream": True, **talk}).events()
    assert events[0]["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
