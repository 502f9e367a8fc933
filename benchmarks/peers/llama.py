"""llama.cpp as an engine: the weights written as GGUF, and greedy decoding of several sequences."""

from pathlib import Path

import gguf
import llama_cpp
import numpy as np

KINDS = {"float32": "F32", "bfloat16": "BF16", "int8": "Q8_0"}


def write(tensors: dict[str, np.ndarray], config, dtype: str, path: Path) -> None:
    """Writes GPT-2 under llama.cpp's names: products' weights in a dtype, all else in float32."""
    kind = gguf.GGMLQuantizationType[KINDS[dtype]]
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(4 * config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    for name, tensor in tensors.items():
        ours = _name(name)
        if ours is None:
            continue
        if any(part in name for part in ("c_attn.w", "c_proj.w", "c_fc.w")):
            tensor = np.ascontiguousarray(tensor.T)
        if tensor.ndim == 2 and "position" not in ours and dtype != "float32":
            writer.add_tensor(ours, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
        else:
            writer.add_tensor(ours, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _name(name: str) -> str | None:
    """Returns llama.cpp's name of a tensor of transformers'; None for a mask."""
    name = name.removeprefix("transformer.")
    whole = {
        "wte.weight": "token_embd.weight",
        "wpe.weight": "position_embd.weight",
        "ln_f.weight": "output_norm.weight",
        "ln_f.bias": "output_norm.bias",
    }
    parts = {
        "ln_1": "attn_norm",
        "attn.c_attn": "attn_qkv",
        "attn.c_proj": "attn_output",
        "ln_2": "ffn_norm",
        "mlp.c_fc": "ffn_up",
        "mlp.c_proj": "ffn_down",
    }
    if not name.startswith("h."):
        return whole.get(name)
    _, layer, rest = name.split(".", 2)
    part, _, leaf = rest.rpartition(".")
    return f"blk.{layer}.{parts[part]}.{leaf}" if part in parts else None


class Engine:
    """A model and, for each number of sequences, a context; its cache is float16, its default."""

    def __init__(self, path: Path, threads: int, vocab: int) -> None:
        llama_cpp.llama_log_set(_SILENT, None)
        llama_cpp.llama_backend_init()
        options = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
        self._threads, self._vocab, self._contexts = threads, vocab, {}

    def __call__(self, prompts: np.ndarray, new: int) -> np.ndarray:
        rows, length = prompts.shape
        context = self._context(rows)
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        logits, tokens = self._decode(context, prompts, 0), []
        for i in range(new):
            tokens.append(logits.argmax(-1))
            if i + 1 < new:
                logits = self._decode(context, tokens[-1][:, None], length + i)
        return np.stack(tokens, axis=1)

    def _context(self, rows: int):
        if rows not in self._contexts:
            options = llama_cpp.llama_context_default_params()
            options.n_ctx, options.n_batch, options.n_seq_max = rows * 1024, 2048, rows
            options.n_threads = options.n_threads_batch = self._threads
            options.kv_unified = False
            context = llama_cpp.llama_init_from_model(self._model, options)
            self._contexts[rows] = context, llama_cpp.llama_batch_init(2048, 0, 1)
        return self._contexts[rows][0]

    def _decode(self, context, ids: np.ndarray, first: int) -> np.ndarray:
        """Appends ids [B, T] from a position on; returns the logits [B, V] behind the last ones."""
        rows, length = ids.shape
        batch = self._contexts[rows][1]
        batch.n_tokens = rows * length
        for i, (row, place) in enumerate(np.ndindex(rows, length)):
            batch.token[i], batch.pos[i] = int(ids[row, place]), first + place
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
            batch.logits[i] = place == length - 1
        if status := llama_cpp.llama_decode(context, batch):
            raise RuntimeError(f"llama_decode returned {status}")
        last = [(row + 1) * length - 1 for row in range(rows)]
        found = [llama_cpp.llama_get_logits_ith(context, i) for i in last]
        return np.stack([np.ctypeslib.as_array(each, (self._vocab,)) for each in found])


@llama_cpp.llama_log_callback
def _SILENT(*_):  # noqa: N802 - kept alive for llama.cpp
    pass
