"""evaluation/texts.py and wikitext.py: documents, what they count as, how likely."""

import json
import math

import numpy as np
import pytest
import zstandard
from lm_eval.tasks.wikitext import preprocess_wikitext

import neo_jax
from neo_jax.errors import NeoError
from neo_jax.evaluation import texts, wikitext
from neo_jax.evaluation.texts import Document, measure, read_documents

RAW = """
 = First page = \n
 He said : " it 's 3 @.@ 5 ° ( not 1 @,@ 000 @-@ odd ) , [ sic ] ! " ; why ? The dogs ' N
 = = A section = = \n
 And ' so ' on .
 = Second page = \n
 { x } = = = = y
"""


@pytest.fixture(scope="module")
def lm(checkpoints):
    return neo_jax.load(checkpoints["bytes"])


def test_wikitext_is_detokenized_as_the_harness_does():
    pages = list(wikitext.pages(RAW))
    assert [page.split("\n")[0] for page in pages] == [" = First page = ", " = Second page = "]
    assert "\n".join(["", *pages]) == RAW
    for page in pages:
        found = wikitext.detokenize(page)
        assert found == preprocess_wikitext.wikitext_detokenizer({"page": page})
    assert 'said: "it\'s 3.5°(not 1,000-odd), [sic]!"; why?' in wikitext.detokenize(pages[0])


def test_documents_of_files_and_what_they_count_as(tmp_path):
    (tmp_path / "a.txt").write_text("Two words\n")
    lines = [
        {"text": "naïve", "meta": {"pile_set_name": "ArXiv"}},
        {"text": ""},
        {"text": "no meta"},
    ]
    packed = "".join(json.dumps(line) + "\n" for line in lines).encode()
    (tmp_path / "b.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(packed))
    assert list(read_documents([str(tmp_path)])) == [
        Document("Two words\n", str(tmp_path / "a.txt"), 3, 10),
        Document("naïve", "ArXiv", 1, 6),
        Document("no meta", str(tmp_path / "b.jsonl.zst"), 2, 7),
    ]
    raw = tmp_path / "wiki.raw"
    raw.write_text(RAW)
    pages = list(wikitext.pages(RAW))
    found = list(read_documents([str(raw)], is_wikitext=True))
    assert [document.text for document in found] == list(map(wikitext.detokenize, pages))
    assert [document.num_bytes for document in found] == [len(page.encode()) for page in pages]


@pytest.mark.parametrize("stride", [0, 64])
def test_all_of_a_document_is_predicted(lm, text, monkeypatch, stride):
    monkeypatch.setattr(texts, "_TOGETHER", 100)  # so that they come in several batches
    documents = [Document(t, t[:1], 2, len(t.encode())) for t in ("The fox", text, "日", "a b")]
    end = lm.tokenizer.eos_id
    for document, (subset, total) in zip(documents, measure(lm, documents, stride), strict=True):
        ids = lm.encode(document.text)
        (logprobs,) = lm.score([[end, *ids]], stride)[0:1]
        assert subset == document.subset
        assert (total.documents, total.tokens, total.words) == (1, len(ids), 2)
        assert total.nats == pytest.approx(-logprobs.logprobs.sum(dtype=np.float64), rel=1e-6)
        for first, last in ((0, 64), (64, 128), (128, 256), (256, 512)):
            some = logprobs.logprobs[first:last]
            assert total.tokens_after[last] == len(some)
            assert total.nats_after[last] == pytest.approx(-some.sum(dtype=np.float64), rel=1e-6)
        assert sum(total.tokens_after.values()) == len(ids)
        assert total.bits_per_byte == pytest.approx(total.nats / math.log(2) / document.num_bytes)
        assert total.token_perplexity == pytest.approx(math.exp(total.nats / len(ids)))
        assert total.word_perplexity == pytest.approx(math.exp(min(total.nats / 2, 700)), rel=1e-6)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", "no text to evaluate; every document is empty"),
        ("a.jsonl", '{"text": ""}\n', "no text to evaluate"),
        ("a.jsonl", '{"page": "x"}\n', 'a.jsonl:1: no "text"'),
        ("a.csv", "x", "a.csv: unknown ending"),
    ],
)
def test_texts_that_are_none(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(NeoError, match=message):
        list(read_documents([str(tmp_path / name)]))
