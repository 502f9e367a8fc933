"""Every engine as a function (weights, dtype) -> ((prompts [B, T], new tokens) -> ids [B, new])."""

import dataclasses
import functools
from pathlib import Path

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

VOCAB = 50257
THREADS = torch.get_num_threads()


class MissingError(Exception):
    """An engine does not have this dtype; says so."""


@dataclasses.dataclass(frozen=True)
class Weights:
    """One set of drawn weights, as a model of transformers and as a folder."""

    model: GPT2LMHeadModel
    folder: Path

    @classmethod
    def draw(cls, folder: Path) -> "Weights":
        torch.manual_seed(0)
        config = GPT2Config(attn_implementation="sdpa", eos_token_id=None, bos_token_id=0)
        model = GPT2LMHeadModel(config).eval()
        with torch.no_grad():  # logits that differ by more than what bfloat16 rounds
            model.transformer.wte.weight.mul_(4)
        model.generation_config.eos_token_id = None
        model.save_pretrained(folder / "hf")
        return cls(model, folder)

    def greedy(self, prompts: np.ndarray, new: int) -> np.ndarray:
        return _generate(self.model, prompts, new)

    def copy(self) -> GPT2LMHeadModel:
        return GPT2LMHeadModel.from_pretrained(self.folder / "hf", attn_implementation="sdpa")


def _generate(model, prompts, new, **options) -> np.ndarray:
    ids = torch.from_numpy(prompts)
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
            **options,
        )
    return out[:, prompts.shape[1] :].numpy()


def neo_jax(weights: Weights, dtype: str):
    import neo_jax as package
    from neo_jax.decode import engine
    from neo_jax.decode.options import SamplingOptions, make_settings

    options = {"quantize": "int8"} if dtype == "int8" else {"dtype": dtype}
    lm = package.load(str(weights.folder / "hf"), tokenizer=_tokenizer_folder(weights), **options)

    def generate(prompts, new):
        settings = make_settings(SamplingOptions(temperature=0.0), [0] * len(prompts))
        done = engine.generate(lm.model, lm.params, prompts.tolist(), new, settings)
        return [completion.ids for completion in done]

    return generate


def transformers(weights: Weights, dtype: str):
    if dtype == "int8":
        raise MissingError("transformers has no int8 for CPUs")
    model = weights.copy().to(getattr(torch, dtype)).eval()
    return lambda prompts, new: _generate(model, prompts, new)


def torch_compile(weights: Weights, dtype: str):
    """The same, its forward pass compiled, over a static cache."""
    if dtype == "int8":
        raise MissingError("transformers has no int8 for CPUs")
    model = weights.copy().to(getattr(torch, dtype)).eval()
    model.forward = torch.compile(model.forward, dynamic=False)
    return lambda prompts, new: _generate(model, prompts, new, cache_implementation="static")


def ctranslate2(weights: Weights, dtype: str):
    import ctranslate2
    from ctranslate2.converters import TransformersConverter

    if dtype not in ctranslate2.get_supported_compute_types("cpu"):
        raise MissingError(f"CTranslate2 has no {dtype} on this CPU")
    folder = weights.folder / "ctranslate2"
    if not folder.exists():
        _tokenizer_folder(weights)
        TransformersConverter(str(weights.folder / "hf")).convert(str(folder))
    model = ctranslate2.Generator(
        str(folder), compute_type=dtype, inter_threads=1, intra_threads=THREADS
    )

    def generate(prompts, new):
        done = model.generate_batch(
            [[str(token) for token in row] for row in prompts],
            max_length=new,
            min_length=new,
            sampling_topk=1,
            include_prompt_in_result=False,
        )
        return [each.sequences_ids[0] for each in done]

    return generate


def onnxruntime(weights: Weights, dtype: str):
    import onnxruntime
    from onnxruntime.quantization import quantize_dynamic

    if dtype == "bfloat16":
        raise MissingError("onnxruntime has no bfloat16 kernels for CPUs")
    path = _onnx(weights)
    if dtype == "int8":
        path = path.with_name("int8.onnx")
        quantize_dynamic(_onnx(weights), path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    outputs = [output.name for output in session.get_outputs()]

    def step(ids, positions, past):
        feed = {"ids": ids, "positions": positions, **dict(zip(_past_names(), past, strict=True))}
        logits, *past = session.run(outputs, feed)
        return logits, past

    return functools.partial(_loop, step)


def openvino(weights: Weights, dtype: str):
    import openvino

    if dtype == "int8":
        raise MissingError("its int8 needs weights that NNCF compressed")
    core = openvino.Core()
    config = {
        "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[dtype],
        "INFERENCE_NUM_THREADS": THREADS,
        "PERFORMANCE_HINT": "LATENCY",
    }
    model = core.compile_model(core.read_model(_onnx(weights)), "CPU", config)
    request = model.create_infer_request()

    def step(ids, positions, past):
        feed = {"ids": ids, "positions": positions, **dict(zip(_past_names(), past, strict=True))}
        results = list(request.infer(feed).values())
        return results[0], results[1:]

    return functools.partial(_loop, step)


def llama_cpp(weights: Weights, dtype: str):
    from peers import llama

    path = weights.folder / f"{dtype}.gguf"
    tensors = {name: each.numpy() for name, each in weights.model.state_dict().items()}
    llama.write(tensors, weights.model.config, dtype, path)
    return llama.Engine(path, THREADS, VOCAB)


ENGINES = {
    "neo_jax": neo_jax,
    "transformers": transformers,
    "torch.compile": torch_compile,
    "ctranslate2": ctranslate2,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
    "llama.cpp": llama_cpp,
}


def _tokenizer_folder(weights: Weights) -> str:
    """Writes a tokenizer whose tokens are the names of their ids."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    words = Tokenizer(WordLevel({str(i): i for i in range(VOCAB)}, unk_token="0"))
    words.pre_tokenizer = WhitespaceSplit()
    names = {"unk_token": "0", "bos_token": "0", "eos_token": "50256"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **names)
    tokenizer.save_pretrained(weights.folder / "hf")
    return str(weights.folder / "hf")


class _Steps(torch.nn.Module):
    """GPT-2's forward pass over past keys and values, as what exporters can read."""

    def __init__(self, model: GPT2LMHeadModel) -> None:
        super().__init__()
        self.model, self.heads = model, model.config.n_head

    def forward(self, ids, positions, *past):
        body = self.model.transformer
        x = body.wte(ids) + body.wpe(positions)
        kept = []
        for block, old_k, old_v in zip(body.h, past[::2], past[1::2], strict=True):
            q, k, v = block.attn.c_attn(block.ln_1(x)).split(x.shape[-1], dim=-1)
            q, k, v = (
                part.reshape(part.shape[0], part.shape[1], self.heads, -1).transpose(1, 2)
                for part in (q, k, v)
            )
            k, v = torch.cat([old_k, k], dim=2), torch.cat([old_v, v], dim=2)
            hidden = torch.arange(k.shape[2])[None, :] > positions[0][:, None]
            logits = (q @ k.transpose(2, 3)) / q.shape[-1] ** 0.5
            weights = logits.masked_fill(hidden, -1e9).softmax(-1)
            y = (weights @ v).transpose(1, 2).reshape(x.shape)
            x = x + block.attn.c_proj(y)
            x = x + block.mlp(block.ln_2(x))
            kept += [k, v]
        return self.model.lm_head(body.ln_f(x[:, -1:])), *kept


def _past_names() -> list[str]:
    return [f"{part}_{layer}" for layer in range(12) for part in "kv"]


def _onnx(weights: Weights) -> Path:
    """Exports the forward pass over a cache once."""
    path = weights.folder / "gpt2.onnx"
    if not path.exists():
        past = tuple(torch.zeros(2, 12, 3, 64) for _ in _past_names())
        names = _past_names()
        axes = {"ids": {0: "B", 1: "T"}, "positions": {0: "B", 1: "T"}, "logits": {0: "B"}}
        axes |= {name: {0: "B", 2: "S"} for name in names}
        axes |= {f"new_{name}": {0: "B", 2: "U"} for name in names}
        torch.onnx.export(
            _Steps(weights.copy().eval()),
            (torch.zeros(2, 4, dtype=torch.long), torch.arange(3, 7).repeat(2, 1), *past),
            str(path),
            input_names=["ids", "positions", *names],
            output_names=["logits", *(f"new_{name}" for name in names)],
            dynamic_axes=axes,
            dynamo=False,
        )
    return path


def _loop(step, prompts, new) -> np.ndarray:
    """Generates with a function of ids, positions and a past."""
    batch, length = prompts.shape
    past = [np.zeros((batch, 12, 0, 64), np.float32) for _ in _past_names()]
    ids, positions, tokens = prompts, np.arange(length)[None].repeat(batch, 0), []
    for i in range(new):
        logits, past = step(ids, positions, past)
        ids = np.asarray(logits)[:, -1].argmax(-1)[:, None]
        positions = np.full((batch, 1), length + i)
        tokens.append(ids)
    return np.concatenate(tokens, axis=1)
