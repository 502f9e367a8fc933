"""Tiny local tasks of lm-evaluation-harness, one for each kind of request."""

import numpy as np
import pytest

from benchmarks.harness_tasks import TASKS, write_task

WORDS = "the dog the fox a café call me Ishmael naïve never mind how long it sells cups".split()


def sentence(rng, words):
    return " ".join(rng.choice(WORDS, words))


KINDS = {
    "last_word": TASKS["lambada"],
    "choices": {
        **TASKS["hellaswag"],
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "fewshot_split": "test",
    },
    "whole": TASKS["wikitext"],
    "completion": {
        **TASKS["completion"],
        "doc_to_text": "{{text}}",
        "doc_to_target": "dog",
        "generation_kwargs": {"until": ["e", " f"], "max_gen_toks": 12},
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
        write_task(folder, name, kind, questions if name == "choices" else texts)
    return folder


@pytest.fixture(scope="session", autouse=True)
def _no_shared_data(tmp_path_factory):
    """Keeps what Hugging Face's data sets write out of the user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        patch.setattr("datasets.config.HF_HUB_OFFLINE", True)
        yield
