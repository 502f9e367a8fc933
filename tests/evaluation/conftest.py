"""Tiny local tasks of lm-evaluation-harness, one for each kind of request."""

import json

import numpy as np
import pytest
import yaml

WORDS = "the dog the fox a café call me Ishmael naïve never mind how long it sells cups".split()


def sentence(rng, words):
    return " ".join(rng.choice(WORDS, words))


MEAN = {"aggregation": "mean", "higher_is_better": True}
KINDS = {
    "last_word": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
        "doc_to_target": "{{' ' + text.split(' ')[-1]}}",
        "metric_list": [
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            {"metric": "acc", **MEAN},
        ],
    },
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "fewshot_split": "test",
        "metric_list": [{"metric": "acc", **MEAN}, {"metric": "acc_norm", **MEAN}],
    },
    "whole": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "completion": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "dog",
        "generation_kwargs": {"until": ["e", " f"], "max_gen_toks": 12},
        "metric_list": [{"metric": "exact_match", **MEAN}],
    },
}


@pytest.fixture(scope="session")
def tasks(tmp_path_factory):
    """A folder of task files and their data: the names of `KINDS`."""
    folder = tmp_path_factory.mktemp("tasks")
    rng = np.random.default_rng(0)
    # Beyond the context of 64 tokens too, where the beginning is lost or windows follow.
    texts = [{"text": sentence(rng, n)} for n in (3, 9, 5, 12, 7, 60)]
    questions = [
        {
            "question": sentence(rng, 4),
            "choices": [sentence(rng, n) for n in (2, 4, 3, 1)] if i % 2 else ["a", "b", "it"],
            "gold": i % 3,
        }
        for i in range(5)
    ]
    for name, kind in KINDS.items():
        docs = questions if name == "choices" else texts
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
            **kind,
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
    return folder


@pytest.fixture(scope="session", autouse=True)
def _no_shared_data(tmp_path_factory):
    """Keeps what Hugging Face's data sets write out of the user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        patch.setattr("datasets.config.HF_HUB_OFFLINE", True)
        yield
