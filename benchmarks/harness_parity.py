"""lm-evaluation-harness on real data: its own PyTorch model, in float32, and ours agree.

    python benchmarks/harness_parity.py DATA_FOLDER [--share 0.1] [--tokenizer FOLDER]

DATA_FOLDER is that of harness_tasks.py. Two models: the bundled one, and with --tokenizer a GPT-Neo
of Mesh-TensorFlow's initialisation with that vocabulary. 500 examples of LAMBADA, all of PIQA, 300
of HellaSwag, all of WikiText's test split, and 50 texts generated up to a stop string; --share
takes that part of each.

Prints for each model and task the largest difference of an example's log-likelihood, and both
results; exits with 1 where one differs by more than 1e-3, an accuracy at all, or a perplexity in
its first four digits. WikiText's documents are sums of up to ten thousands of tokens, which the
harness adds up in float32: there ours are compared with its model's float32 logits, normalised and
added up in float64 (to 1e-3 again), and so are its own, to the float32 rounding of such sums.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import transformers
from harness_tasks import quiet, write_fresh, write_tasks
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import neo_jax
from neo_jax.checkpoints.save import save_pretrained
from neo_jax.evaluation import tasks
from neo_jax.evaluation.harness import NeoLM

TOLERANCE = 1e-3
# Of a sum of float32: a window's 1024 terms added in pairs round ten times, log-softmax the rest.
ROUNDING = 16 * 2.0**-24
MOST = {"lambada": 500, "piqa": None, "hellaswag": 300, "wikitext": None, "completion": 50}


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


def answers(results, name):
    """Returns what the model answered, example by example."""
    samples = sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
    return [answer for sample in samples for request in sample["resps"] for answer in request]


def compare(name, ours, theirs, exact):
    """Prints how two results of a task differ; returns whether they agree.

    Args:
      name: of the task.
      ours: our results.
      theirs: the harness's.
      exact: what ours are to be near: the harness's, of sums in float64 where sums are long.
    """
    mine, other, reference = (answers(results, name) for results in (ours, theirs, exact))
    if name == "completion":
        different = [pair for pair in zip(mine, other, strict=True) if pair[0] != pair[1]]
        good, told = not different, f"{len(different)} different {different[:1]}"
    else:
        if name != "wikitext":
            mine, other, reference = ([p for p, _ in pairs] for pairs in (mine, other, reference))
        gap = np.abs(np.subtract(mine, reference)).max()
        good, told = bool(gap <= TOLERANCE), f"largest difference {gap:.1e}"
        if exact is not theirs:
            noise = np.abs(np.subtract(other, reference))
            good = good and bool(np.all(noise <= ROUNDING * np.abs(reference)))
            told += f", its own {noise.max():.1e}"
    figures = []
    for metric, value in theirs["results"][name].items():
        if isinstance(value, float) and "stderr" not in metric:
            found = ours["results"][name][metric]
            same = found == value if metric.startswith(("acc", "exact")) else None
            same = f"{found:.4g}" == f"{value:.4g}" if same is None else same
            good = good and same
            figures.append(f"{metric.split(',')[0]} {found:.6g} / {value:.6g}")
    print(f"  {name:<11} {len(mine):>5} {told:<46} {', '.join(figures)}", flush=True)
    if not good:
        print(f"  {name} DIFFERS", flush=True)
    return good


def in_float64(hf, one):
    """Returns the harness's results with float32 logits, normalised and added up in float64."""
    size, hf.batch_size_per_gpu, hf.softmax_dtype = hf.batch_size_per_gpu, 2, torch.float64
    try:
        return simple_evaluate(hf, **one)
    finally:
        hf.batch_size_per_gpu, hf.softmax_dtype = size, None


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("--tokenizer", type=Path, help="a folder of byte-level BPE, as GPT-2's")
    parser.add_argument("--tasks", default=",".join(MOST))
    options = parser.parse_args()
    quiet()
    names = options.tasks.split(",")
    good = True
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_tasks(options.data, folder, {name: MOST[name] for name in names}, options.share)
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        bundled = neo_jax.load()
        save_pretrained(folder / "bundled", bundled.config, bundled.params)
        models = {"bundled": Pieces(bundled.folder / "tokenizer.model")}
        bundled.tokenizer.save(folder / "bundled")
        if options.tokenizer:
            config = neo_jax.ModelConfig(num_layers=4, embed_dim=128, num_heads=4, max_length=1024)
            models["fresh"] = write_fresh(folder / "fresh", config, options.tokenizer)
        for name, tokenizer in models.items():
            print(f"{name}: ours / the harness's own model", flush=True)
            hf = HFLM(
                str(folder / name), tokenizer=tokenizer, dtype="float32", device="cpu", batch_size=8
            )
            ours = NeoLM(str(folder / name), cache="none")
            for task in names:
                one = {"tasks": [task], "task_manager": manager, "bootstrap_iters": 0}
                theirs = simple_evaluate(hf, **one)
                exact = in_float64(hf, one) if task == "wikitext" else theirs
                good = compare(task, tasks.run(ours, [task], manager), theirs, exact) and good
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
