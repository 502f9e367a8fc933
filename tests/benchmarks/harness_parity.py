"""lm-evaluation-harness on real data: its own PyTorch model, in float32, and ours agree.

    python tests/benchmarks/harness_parity.py DATA_FOLDER [--share 0.1] [--tokenizer FOLDER]

DATA_FOLDER holds lambada_test.jsonl (lines of "text"), piqa/valid.jsonl and piqa/valid-labels.lst,
hellaswag/*.jsonl (lines of "query", "choices" and "gold") and wiki.test.raw. Two models: the
bundled one, and with --tokenizer a GPT-Neo of Mesh-TensorFlow's initialisation with that
vocabulary. 500 examples of LAMBADA, all of PIQA, 300 of HellaSwag, all of WikiText's test split,
and 50 texts generated up to a stop string; --share takes that part of each.

Prints for each model and task the largest difference of an example's log-likelihood, and both
results; exits with 1 where one differs by more than 1e-3, an accuracy at all, or a perplexity in
its first four digits. Of WikiText's documents the harness adds up the tokens in float32, whose
numbers are 1e-3 and more apart there: four of these steps are allowed.
"""

import argparse
import json
import logging
import math
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
import sentencepiece
import transformers
import yaml
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import neo_jax
from neo_jax.data.tokenizer import load_tokenizer
from neo_jax.evaluation import tasks, wikitext
from neo_jax.evaluation.harness import NeoLM
from neo_jax.model import init_params
from neo_jax.pretrained import save_pretrained

TOLERANCE = 1e-3
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


class Pieces(transformers.PreTrainedTokenizer):
    """The bundled model's SentencePiece vocabulary, as the harness's model wants a tokenizer."""

    def __init__(self, file):
        self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(file))
        end = self.pieces.IdToPiece(self.pieces.eos_id())
        super().__init__(bos_token=end, eos_token=end, pad_token=end)

    @property
    def vocab_size(self):
        return self.pieces.GetPieceSize()

    def get_vocab(self):
        return {self.pieces.IdToPiece(i): i for i in range(self.vocab_size)}

    def _tokenize(self, text):
        return self.pieces.EncodeAsPieces(text)

    def _convert_token_to_id(self, token):
        return self.pieces.PieceToId(token)

    def _convert_id_to_token(self, index):
        return self.pieces.IdToPiece(index)

    def convert_tokens_to_string(self, tokens):
        if tokens == [self.eos_token]:
            return self.eos_token
        # Behind a full stop: a text that goes on keeps the space before its first word.
        return self.pieces.DecodePieces([".", *tokens])[1:]

    def prepare_for_tokenization(self, text, **options):
        return text, options


def read_lines(path):
    """Returns the objects of a .jsonl file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_tasks(data, folder, share):
    """Writes the tasks' examples and their files into a folder."""
    lambada = read_lines(data / "lambada_test.jsonl")
    labels = (data / "piqa" / "valid-labels.lst").read_text().split()
    piqa = [
        {**doc, "label": int(label)}
        for doc, label in zip(read_lines(data / "piqa" / "valid.jsonl"), labels, strict=True)
    ]
    (file,) = (data / "hellaswag").glob("*.jsonl")
    pages = wikitext.pages((data / "wiki.test.raw").read_text(encoding="utf-8"))
    examples = {
        "lambada": lambada[:500],
        "piqa": piqa,
        "hellaswag": read_lines(file)[:300],
        "wikitext": [{"text": wikitext.detokenize(page)} for page in pages],
        "completion": lambada[:50],
    }
    for name, task in TASKS.items():
        docs = examples[name][: math.ceil(share * len(examples[name]))]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
        files = {"data_files": {"test": str(folder / f"{name}.jsonl")}}
        where = {"dataset_path": "json", "dataset_kwargs": files, "test_split": "test"}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **where, **task}))


def answers(results, name):
    """Returns what the model answered, example by example."""
    samples = sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
    return [answer for sample in samples for request in sample["resps"] for answer in request]


def compare(name, ours, theirs):
    """Prints how two results of a task differ; returns whether they agree."""
    mine, other = answers(ours, name), answers(theirs, name)
    if name == "completion":
        different = [pair for pair in zip(mine, other, strict=True) if pair[0] != pair[1]]
        good, told = not different, f"{len(different)} different {different[:1]}"
    else:
        if name != "wikitext":
            mine, other = [p for p, _ in mine], [p for p, _ in other]
        gaps = np.abs(np.subtract(mine, other))
        steps = 4 * np.spacing(np.abs(np.array(other, np.float32))) if name == "wikitext" else 0
        good = bool(np.all(gaps <= np.maximum(TOLERANCE, steps)))
        told = f"largest difference {gaps.max():.1e}"
    figures = []
    for metric, value in theirs["results"][name].items():
        if isinstance(value, float) and "stderr" not in metric:
            found = ours["results"][name][metric]
            same = found == value if metric.startswith(("acc", "exact")) else None
            same = f"{found:.4g}" == f"{value:.4g}" if same is None else same
            good = good and same
            figures.append(f"{metric.split(',')[0]} {found:.6g} / {value:.6g}")
    print(f"  {name:<11} {len(mine):>5} {told:<27} {', '.join(figures)}", flush=True)
    if not good:
        print(f"  {name} DIFFERS", flush=True)
    return good


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("--tokenizer", type=Path, help="a folder of byte-level BPE, as GPT-2's")
    parser.add_argument("--tasks", default=",".join(TASKS))
    options = parser.parse_args()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    names = options.tasks.split(",")
    good = True
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_tasks(options.data, folder, options.share)
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        bundled = neo_jax.load()
        save_pretrained(folder / "bundled", bundled.config, bundled.params)
        models = {"bundled": Pieces(bundled.folder / "tokenizer.model")}
        bundled.tokenizer.save(folder / "bundled")
        if options.tokenizer:
            config = neo_jax.ModelConfig(num_layers=4, embed_dim=128, num_heads=4, max_length=1024)
            params = jax.jit(lambda key: init_params(neo_jax.Neo(config), key))(jax.random.key(0))
            tokenizer = load_tokenizer(options.tokenizer)
            save_pretrained(folder / "fresh", config, params, tokenizer=tokenizer)
            models["fresh"] = transformers.AutoTokenizer.from_pretrained(folder / "fresh")
        for name, tokenizer in models.items():
            print(f"{name}: ours / the harness's own model", flush=True)
            hf = HFLM(
                str(folder / name), tokenizer=tokenizer, dtype="float32", device="cpu", batch_size=8
            )
            ours = NeoLM(str(folder / name), cache="none")
            for task in names:
                one = {"tasks": [task], "task_manager": manager, "bootstrap_iters": 0}
                theirs = simple_evaluate(hf, **one)
                good = compare(task, tasks.run(ours, [task], manager), theirs) and good
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
