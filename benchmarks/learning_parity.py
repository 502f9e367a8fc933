"""Learning against PyTorch: the same model, batches and optimizer, and the loss of every step.

  python benchmarks/learning_parity.py IDS.npy... [--layers 2 12] [--steps 200]

Each IDS.npy holds token ids of GPT-Neo's vocabulary, an integer array [rows, ids of a row]; files
of as many rows are joined along the rows, each of which is a sequence: of at least three windows of
local attention, 64 keys. The model is 256 wide, global and local attention in turn; float32; AdamW
after a linear warm-up, then a cosine; weight decay on kernels and embeddings; clipping. The peer is
transformers (eager) with `torch.optim.AdamW` and `clip_grad_norm_`, from the same weights.

A model of 2 layers is to have the losses of PyTorch to 1e-4 at every step. Deeper ones let rounding
grow: there PyTorch runs in float64 (attention weights are float32 in transformers whatever the
dtype), and once more from weights multiplied by 1 + 1e-7 x noise. At every step our largest
difference from the first so far is to be within 20 times the largest of these two so far (at least
the spacing of float32). In float64, for in float32 PyTorch rounds to one side: two runs of it agree
to 2e-7 and are both some 1e-6 away from float64. How far it is stands beside ours. Fails unless all
depths pass.
"""

import argparse
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import GPTNeoConfig, GPTNeoForCausalLM

from neo_jax.config import ModelConfig
from neo_jax.model import tensor_table
from neo_jax.model.scan import stack
from neo_jax.model.transformer import Neo, init_params
from neo_jax.training.config import OptimizerConfig, TrainConfig
from neo_jax.training.objectives.next_token import Batch
from neo_jax.training.optimizer import make_optimizer
from neo_jax.training.step import make_step, state_of

WINDOW, BATCH_SIZE = 64, 4
TOLERANCE, FACTOR, NOISE = 1e-4, 20, 1e-7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", metavar="IDS.npy")
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 12])
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    batches = read(args.files, args.steps)
    passed = [compare(layers, batches) for layers in args.layers]
    if not all(passed):
        sys.exit("the losses are not those of PyTorch")


def read(files, steps):
    """Returns the batches of a run, drawn without replacement from the rows of the files."""
    ids = np.concatenate([np.load(file) for file in files], axis=1).astype(np.int32)
    assert ids.shape[1] > 3 * WINDOW, f"rows of {ids.shape[1]} ids; {3 * WINDOW + 1} are needed"
    order = np.random.default_rng(0).permutation(len(ids))[: steps * BATCH_SIZE]
    weights = np.ones((BATCH_SIZE, ids.shape[1] - 1), np.float32)
    return [Batch(ids[rows], weights) for rows in order.reshape(steps, BATCH_SIZE)]


def compare(layers, batches):
    """Trains on both sides, prints the losses, and returns whether they pass."""
    config = TrainConfig(
        data="",
        output="",
        steps=len(batches),
        batch_size=BATCH_SIZE,
        model=ModelConfig(
            num_layers=layers,
            embed_dim=256,
            num_heads=4,
            max_length=batches[0].weights.shape[1],
            window_size=WINDOW,
        ),
        # So small a batch at GPT-Neo's own rate is chaotic: PyTorch leaves itself by 2e-3.
        optimizer=OptimizerConfig(
            learning_rate=1e-4, warmup_steps=len(batches) // 4, weight_decay=0.1
        ),
        dtype="float32",
        z_loss=0.0,
    )
    params = draw_params(config)
    mine, norms = ours(config, params, batches)
    other = theirs(config, params, batches)
    difference = np.abs(mine - other) / other
    passed = bool((difference <= TOLERANCE).all())
    bar = f"to be within {TOLERANCE}"
    if layers > 2:
        exact = theirs(config, params, batches, torch.float64)
        twin = theirs(config, params, batches, torch.float64, NOISE)
        difference, rounding, grown = (
            np.maximum.accumulate(np.abs(losses - exact) / exact) for losses in (mine, other, twin)
        )
        ratio = difference / np.maximum(grown, np.finfo(np.float32).eps)
        passed = bool((ratio <= FACTOR).all())
        bar = f"at most {ratio.max():.3g} times what noise makes of PyTorch in float64 "
        bar += f"({grown[-1]:.1e} at the end), from which its float32 is away by {rounding[-1]:.1e}"
        other = exact
    print(f"{layers} layers\n step     ours  PyTorch  relative difference")
    for step in range(0, len(batches), max(len(batches) // 20, 1)):
        print(f"{step + 1:5} {mine[step]:8.5f} {other[step]:8.5f}  {difference[step]:.1e}")
    print(
        f"largest difference of {len(batches)} steps {difference.max():.2e}, {bar}; last loss "
        f"{mine[-1]:.5f}; {np.mean(norms > config.optimizer.clip_norm):.0%} of the steps clipped: "
        f"{'passed' if passed else 'FAILED'}",
        flush=True,
    )
    return passed


def draw_params(config):
    """Returns canonical parameters, on the host."""
    model = Neo(config.model)
    return jax.device_get(jax.jit(lambda key: init_params(model, key))(jax.random.key(0)))


def ours(config, params, batches):
    """Trains in neo_jax; returns the loss of every step, and the norms of the gradients."""
    model = Neo(config.model, jnp.dtype(config.dtype), config.kernel)
    optimizer = make_optimizer(config.optimizer, config.steps)
    train_step = make_step(model, optimizer, config)
    state = state_of(stack(params, config.model), optimizer)
    losses, norms = [], []
    for batch in batches:
        state, metrics = train_step(state, Batch(*map(jnp.asarray, batch[:2])))
        losses.append(float(metrics["loss"]))
        norms.append(float(metrics["gradient_norm"]))
    return np.array(losses), np.array(norms)


def theirs(config, params, batches, dtype=torch.float32, noise=0.0):
    """Trains in PyTorch; returns the loss of every step."""
    model = peer(config.model, params).to(dtype)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight *= 1 + noise * torch.randn(weight.shape, generator=draw, dtype=dtype)
    wanted = config.optimizer
    decay, rest = (
        [weight for weight in model.parameters() if (weight.ndim > 1) == decays]
        for decays in (True, False)
    )
    optimizer = torch.optim.AdamW(
        [
            {"params": decay, "weight_decay": wanted.weight_decay},
            {"params": rest, "weight_decay": 0.0},
        ],
        lr=wanted.learning_rate,
        betas=(wanted.beta1, wanted.beta2),
        eps=wanted.epsilon,
    )

    def rate(step):
        if step < wanted.warmup_steps:
            return step / wanted.warmup_steps
        done = (step - wanted.warmup_steps) / (config.steps - wanted.warmup_steps)
        cosine = (1 + math.cos(math.pi * done)) / 2
        return wanted.final_fraction + (1 - wanted.final_fraction) * cosine

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    losses = []
    for batch in batches:
        tokens = torch.from_numpy(np.array(batch.tokens, np.int64))
        weights = torch.from_numpy(np.array(batch.weights))
        logits = model(tokens[:, :-1], use_cache=False).logits
        each = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
        )
        loss = (each * weights.flatten()).sum() / weights.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), wanted.clip_norm)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return np.array(losses)


def peer(config, params):
    """Returns transformers' model of canonical parameters."""
    fields = {k: v for k, v in config.to_hf().items() if k != "attention_layers"}
    model = GPTNeoForCausalLM(GPTNeoConfig(**fields, attn_implementation="eager")).train()
    weights = {}
    for tensor in tensor_table.tensors(config):
        leaf = params
        for key in tensor.path:
            leaf = leaf[key]
        weights[tensor.hf_name] = torch.from_numpy(np.array(tensor.to("hf", leaf)))
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert missing == ["lm_head.weight"], missing
    assert not unexpected, unexpected
    model.tie_weights()
    return model


if __name__ == "__main__":
    main()
