"""A trained GPT-2 of another program, minGPT's in JSON, by the same machinery; prints differences.

    python benchmarks/sorting_gpt.py FOLDER

FOLDER holds gpt-nano-sort-model.json and gpt-nano-sort-t0-partials.json of bbycroft/llm-viz: three
layers that sort six digits of 0, 1, 2, and their activations, stage by stage, for three inputs. The
output head is not tied, and kernels lie as `torch.nn.Linear` has them. The name table says where
each goes; the result is saved, loaded and run as any model.
"""

import base64
import itertools
import json
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

import neo_jax
from neo_jax.axes import VOCAB
from neo_jax.checkpoints.save import save_pretrained
from neo_jax.config import ModelConfig
from neo_jax.model.tensor_table import tensors


def array(entry):
    """An array as that project writes it: float32 in base64."""
    data = np.frombuffer(base64.b64decode(entry["data"]), np.float32)
    return data.reshape(entry["shape"])


def main(folder):
    """Converts, then compares activations and sorts all inputs."""
    model = json.loads((folder / "gpt-nano-sort-model.json").read_text())
    stages = json.loads((folder / "gpt-nano-sort-t0-partials.json").read_text())
    shape = model.pop("config")
    config = ModelConfig(
        num_layers=shape["n_layer"], embed_dim=shape["n_embd"], num_heads=shape["n_head"],
        vocab_size=shape["vocab_size"], max_length=shape["block_size"], eos_token_id=-1,
        attention_types=("global",), qkv_bias=True, scale_attention=True, tied_head=False,
    )  # fmt: skip
    leaves = {}
    for row in tensors(config):
        stored = array(model[row.hf_name])
        # [outputs, inputs], as Flax's GPT-2 has it.
        leaf = row.of("flax" if row.num_inputs else "hf", stored)
        spare = row.shape[0] - leaf.shape[0] if row.axes[0] == VOCAB else 0
        leaves[row.path] = np.pad(leaf, [(0, spare)] + [(0, 0)] * (leaf.ndim - 1))
    buffers = [name for name in model if name.endswith(".attn.bias")]
    used = {row.hf_name for row in tensors(config)}
    assert sorted((*used, *buffers)) == sorted(model), "a tensor has no place, or two"

    with tempfile.TemporaryDirectory() as place:
        save_pretrained(place, config, unflatten_dict(leaves))
        lm = neo_jax.load(place, dtype="float32")

    tokens = jnp.asarray(array(stages["idx"]).astype(np.int32))
    output, caught = lm.model.apply(
        {"params": lm.params}, tokens, capture_intermediates=True, mutable=["intermediates"]
    )
    inner = caught["intermediates"]
    block = inner["h_0"]
    pairs = {
        "x": output.hidden_states[0],
        "ln1": block["ln_1"]["__call__"][0],
        "yProj": block["attn"]["out_proj"]["__call__"][0],
        "ln2": block["ln_2"]["__call__"][0],
        "fc": block["mlp"]["c_fc"]["__call__"][0],
        "mlp": block["mlp"]["__call__"][0],
        "k": block["attn"]["__call__"][0][1].k,
        "v": block["attn"]["__call__"][0][1].v,
        "block0": output.hidden_states[1],
        "block1": output.hidden_states[2],
        "block2": inner["h_2"]["__call__"][0][0],
        "ln_f": output.hidden_states[-1],
        "lm_head": output.logits,
        "probs": jax.nn.softmax(output.logits),
    }
    worst = 0.0
    for name, ours in pairs.items():
        difference = float(np.abs(np.asarray(ours) - array(stages[name])).max())
        worst = max(worst, difference)
        print(f"{name:<8} {difference:.2e}")

    inputs = [list(digits) for digits in itertools.product(range(3), repeat=6)]
    rows = jnp.asarray(inputs)
    forward = jax.jit(lambda params, tokens: lm.model.apply({"params": params}, tokens).logits)
    for _ in range(6):
        rows = jnp.concatenate([rows, forward(lm.params, rows)[:, -1:].argmax(-1)], axis=1)
    right = sum(sorted(row[:6]) == row[6:] for row in rows.tolist())
    print(f"worst    {worst:.2e}")
    print(f"sorted   {right} of {len(inputs)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
