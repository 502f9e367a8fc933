"""What benchmarks of the harness's interface share: tasks of local files, and untrained models.

DATA_FOLDER of `write_tasks` holds lambada_test.jsonl (lines of "text"), piqa/valid.jsonl and
piqa/valid-labels.lst, hellaswag/*.jsonl (lines of "query", "choices" and "gold") and wiki.test.raw;
a task whose files are not asked for needs none of them.
"""

import json
import logging
import math

import jax
import transformers
import yaml

from neo_jax.checkpoints.save import save_pretrained
from neo_jax.evaluation import wikitext
from neo_jax.model.transformer import Neo, init_params
from neo_jax.text.tokenizer import load_tokenizer

MEAN = {"aggregation": "mean", "higher_is_better": True}
ACC = [{"metric": "acc", **MEAN}]
TASKS = {
    "lambada": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
        "doc_to_target": "{{' '+text.split(' ')[-1]}}",
        "metric_list": [*ACC, {"metric": "perplexity", "aggregation": "perplexity"}],
    },
    "piqa": {
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{goal}}\nAnswer:",
        "doc_to_target": "label",
        "doc_to_choice": "{{[sol1, sol2]}}",
        "metric_list": [*ACC, {"metric": "acc_norm", **MEAN}],
    },
    "hellaswag": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}",
        "doc_to_target": "gold",
        "doc_to_choice": "choices",
        "metric_list": [*ACC, {"metric": "acc_norm", **MEAN}],
    },
    "wikitext": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "completion": {
        "output_type": "generate_until",
        "doc_to_text": "{{text.split(' ')[:40]|join(' ')}}",
        "doc_to_target": "{{text.split(' ')[40]}}",
        "generation_kwargs": {"until": [".", "\n"], "max_gen_toks": 24},
        "metric_list": [{"metric": "exact_match", **MEAN}],
    },
}


def read_examples(data, name):
    """Returns the examples of a task."""
    if name == "piqa":
        labels = (data / "piqa" / "valid-labels.lst").read_text().split()
        docs = read_lines(data / "piqa" / "valid.jsonl")
        return [{**doc, "label": int(n)} for doc, n in zip(docs, labels, strict=True)]
    if name == "hellaswag":
        (file,) = (data / "hellaswag").glob("*.jsonl")
        return read_lines(file)
    if name == "wikitext":
        pages = wikitext.pages((data / "wiki.test.raw").read_text(encoding="utf-8"))
        return [{"text": wikitext.detokenize(page)} for page in pages]
    texts = read_lines(data / "lambada_test.jsonl")
    if name == "completion":  # a word is left to compare with
        return [doc for doc in texts if len(doc["text"].split(" ")) > 40]
    return texts


def read_lines(path):
    """Returns the objects of a .jsonl file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_tasks(data, folder, most, share=1.0):
    """Writes the examples and the files of tasks into a folder.

    Args:
      data: see above.
      folder: to write to.
      most: by the name of a task how many of its first examples to take.
      share: the part of these that is taken.
    """
    for name, number in most.items():
        docs = read_examples(data, name)[:number]
        write_task(folder, name, TASKS[name], docs[: math.ceil(share * len(docs))])


def write_task(folder, name, task, docs):
    """Writes a task's file, of these fields, and its examples into a folder."""
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    files = {"data_files": {"test": str(folder / f"{name}.jsonl")}}
    where = {"dataset_path": "json", "dataset_kwargs": files, "test_split": "test"}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **where, **task}))


def write_fresh(folder, config, tokenizer):
    """Writes a model of Mesh-TensorFlow's initialisation; returns its tokenizer of transformers."""
    params = jax.jit(lambda key: init_params(Neo(config), key))(jax.random.key(0))
    save_pretrained(folder, config, params, tokenizer=load_tokenizer(tokenizer))
    return transformers.AutoTokenizer.from_pretrained(folder)


def quiet():
    """Lets neither library comment on its work."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
