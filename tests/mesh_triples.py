"""Triples of a mesh, rules and a model, drawn at random, each put to the test of one device."""

import dataclasses
import itertools
import math
import random

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict

from neo_jax.config import ModelConfig
from neo_jax.decode import engine
from neo_jax.decode.options import SamplingOptions, make_settings
from neo_jax.model.declared import logical_axes, param_shapes
from neo_jax.model.scan import stack
from neo_jax.model.transformer import Neo
from neo_jax.sharding.rules import make_sharding, tree_shardings
from neo_jax.text.score import score_ids
from neo_jax.training.config import OptimizerConfig, TrainConfig
from neo_jax.training.objectives.next_token import Batch
from neo_jax.training.optimizer import make_optimizer
from neo_jax.training.preflight import check_run
from neo_jax.training.step import (
    abstract_inputs,
    abstract_state,
    make_step,
    state_of,
    state_shardings,
)

STEPS, ROWS, LENGTH = 3, 48, 24
# With the usual epsilon Adam would make whole steps of gradients that are nothing but rounding.
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, warmup_steps=0, weight_decay=0.1, epsilon=1e-4)
PROMPTS = [[1, 2, 3], list(range(20, 40)), [7] * 9]
SHAPES = [(2, 4), (2, 2, 2), (2, 2, 2), (2, 2), (2, 3), (5,), (8,)]
AXES = "batch length kv_length embed heads head_dim mlp vocab positions".split()
# Those that some array has together: a mesh axis splits one of each at most.
TOGETHER = [
    names.split()
    for names in (
        "batch length",
        "batch heads head_dim kv_length",
        "batch mlp",
        "batch vocab",
        "embed heads head_dim",
        "embed mlp",
        "embed vocab",
        "embed positions",
    )
]


@dataclasses.dataclass(frozen=True)
class Triple:
    """A mesh, rules and a model, and the seed of what it is trained on."""

    mesh: str
    rules: str
    model: ModelConfig
    accumulation: int = 1
    has_segment_starts: bool = False
    seed: int = 0
    length: int = LENGTH

    def __str__(self):
        differing = [
            f"{field.name}={getattr(self.model, field.name)}"
            for field in dataclasses.fields(self.model)
            if getattr(self.model, field.name) != field.default
        ]
        return (
            f"--mesh {self.mesh} --rules {self.rules} accumulation={self.accumulation} "
            f"has_segment_starts={self.has_segment_starts} length={self.length} "
            f"{' '.join(differing)}"
        )


def draw(seed):
    """Returns a triple; it may be one that is refused."""
    rng = random.Random(seed)
    shape = rng.choice(SHAPES)
    shape = rng.sample(shape, len(shape))
    names = rng.sample(["data", "fsdp", "model", "context"], len(shape))
    rules = {}
    for axis in rng.sample(AXES, len(AXES)):
        others = {name for group in TOGETHER if axis in group for name in group}
        taken = {name for other in others for name in rules.get(other, "").split("+")}
        free = [name for name in names if name not in taken]
        if free and rng.random() < 0.7:
            count = 2 if len(free) > 1 and rng.random() < 0.2 else 1
            rules[axis] = "+".join(rng.sample(free, count))
    if "batch" not in rules:
        rules["batch"] = ""
    is_gpt2 = rng.random() < 0.4
    num_heads = 25 if 5 in shape else rng.choice([8, 8, 24, 25])
    kinds = rng.choice(["global", "global local", "local", "global global local"]).split()
    model = ModelConfig(
        num_layers=1 if is_gpt2 else len(kinds),
        num_heads=num_heads,
        embed_dim=num_heads * (8 if num_heads == 8 else 4),
        mlp_dim=rng.choice([120, 240]),
        vocab_size=rng.choice([200, 640]),
        max_length=240,
        window_size=rng.choice([1, 3, 8]),
        attention_types=("global",) if is_gpt2 else tuple(kinds),
        eos_token_id=-1,
        qkv_bias=is_gpt2,
        scale_attention=is_gpt2,
        tied_head=rng.random() < 0.7,
    )
    mesh = ",".join(f"{name}={size}" for name, size in zip(names, shape, strict=True))
    text = ",".join(f"{axis}:{target}" for axis, target in rules.items())
    return Triple(mesh, text, model, rng.choice([1, 1, 2]), rng.random() < 0.3, seed)


def draw_split(seed):
    """Returns a triple as `draw` does, the first of some whose rules split sequences."""
    drawn = (draw(1000 * seed + number) for number in itertools.count())
    return next(triple for triple in drawn if "length:context" in triple.rules.split(","))


_SPLIT = {"length": "context", "embed": "fsdp", "heads": "model", "mlp": "model", "vocab": "model"}


def split_sequences():
    """Returns triples of every mesh of eight devices that splits sequences, by each of some rules.

    All meshes come first by one of the rules, then by another. Windows are as long as a shard,
    shorter or longer; lengths, documents and prompts are ragged.
    """
    plain, both = {}, {"length": "context+model"}
    variants = [plain, {"embed": "fsdp+context"}, {"kv_length": "context"}, both]
    pairs = []
    for sizes in itertools.product((1, 2, 4, 8), repeat=4):
        mesh = dict(zip(("data", "fsdp", "model", "context"), sizes, strict=True))
        if math.prod(sizes) != 8:
            continue
        mine = variants if mesh["context"] > 1 else [both]
        mine = mine if mesh["model"] > 1 else mine[: len(mine) - 1]
        start = len(pairs)
        pairs.append([(mesh, mine[(start + i) % len(mine)]) for i in range(len(mine))])
    rounds = itertools.zip_longest(*pairs)
    listed = [pair for each in rounds for pair in each if pair]
    return [_split(seed, *pair) for seed, pair in enumerate(listed)]


def _split(seed, mesh, variant):
    names = [name for name, size in mesh.items() if size > 1]
    rules = {
        axis: "+".join(name for name in target.split("+") if name in names)
        for axis, target in {**_SPLIT, **variant}.items()
    }
    model = ModelConfig(
        num_layers=2,
        num_heads=8,
        embed_dim=64,
        mlp_dim=120,
        vocab_size=200,
        max_length=240,
        # The slots of a cache that is split, 16 more, have to divide.
        window_size=((8, 24) * 2 if "kv_length" in rules else (1, 3, 8, 20))[seed % 4],
        eos_token_id=-1,
    )
    return Triple(
        ",".join(f"{name}={mesh[name]}" for name in names),
        ",".join(f"{axis}:{target}" for axis, target in rules.items() if target),
        model,
        accumulation=1 + (seed % 5 == 0),
        has_segment_starts=seed % 2 == 0,
        seed=seed,
        length=(16, 24, 40, 56)[seed // 2 % 4],
    )


class Run:
    """What is done with a triple: on its mesh, or on one device."""

    def __init__(self, triple, sharding):
        """Draws the parameters and the batches, the same wherever they are to lie."""
        self.model = Neo(triple.model, sharding=sharding)
        self.config = TrainConfig(
            "",
            "",
            STEPS,
            batch_size=ROWS,
            length=triple.length,
            model=triple.model,
            optimizer=OPTIMIZER,
            dtype="float32",
            accumulation=triple.accumulation,
        )
        self.optimizer = recording(make_optimizer(OPTIMIZER, STEPS))
        self.step = make_step(self.model, self.optimizer, self.config)
        self.has_segment_starts = triple.has_segment_starts
        self.seed = triple.seed

    def check(self):
        """Raises a NeoError where the triple is refused."""
        abstract = abstract_state(self.model, self.optimizer)
        batch, frozen = abstract_inputs(self.config, self.model, self.has_segment_starts)
        check_run(self.config, self.model, self.step, abstract, batch, frozen)
        jax.eval_shape(self._decode, self.params())

    def params(self, width=0.02):
        """Draws parameters; with a large width every token matters to what follows."""
        config, rng = self.model.config, np.random.default_rng(self.seed)
        shapes = param_shapes(Neo(config))

        def drawn(path, leaf):
            values = rng.normal(path[-1].key == "scale", width, leaf.shape).astype(np.float32)
            if path[0].key in ("wte", "lm_head"):
                values[config.vocab_size :] = 0
            return values

        return jax.tree.map_with_path(drawn, shapes)

    def batches(self):
        """Yields a batch for each step, predictions of unequal weights."""
        rng = np.random.default_rng(self.seed)
        length = self.config.length
        segment_starts = np.tile(np.where(np.arange(length) < 9, 0, 9).astype(np.int32), (ROWS, 1))
        for _ in range(STEPS):
            tokens = rng.integers(0, self.model.config.vocab_size, (ROWS, length + 1), np.int32)
            weights = rng.choice(np.float32([0, 0.5, 1, 2]), (ROWS, length))
            batch = Batch(tokens, weights, segment_starts if self.has_segment_starts else None)
            if self.model.sharding:
                rows = self.model.sharding.named(("batch", None), tokens.shape, "batch")
                batch = jax.device_put(batch, rows)
            yield batch

    def train(self, steps=STEPS):
        """Returns the losses, the first gradients, and the parameters after the last step."""
        state = state_of(stack(self.params(), self.model.config), self.optimizer)
        if self.model.sharding:
            state = jax.device_put(state, state_shardings(self.model, self.optimizer, state))
        losses, grads = [], None
        for _, batch in zip(range(steps), self.batches(), strict=False):
            state, metrics = self.step(state, batch)
            losses.append(float(metrics["loss"]))
            grads = grads or flatten_dict(jax.device_get(state.opt_state[1]))
        return losses, grads, flatten_dict(jax.device_get(state.params))

    def greedy(self, new_tokens=24):
        """Returns what three prompts go on with."""
        params = self._placed()
        return [
            text.ids for text in engine.generate(self.model, params, PROMPTS, new_tokens, SETTINGS)
        ]

    def scores(self):
        """Returns the log-probabilities of the longer prompts."""
        params = self._placed()
        return np.concatenate(list(score_ids(self.model, params, PROMPTS[1:])))

    def _placed(self):
        params = self.params(width=0.1)
        if self.model.sharding:
            axes = logical_axes(self.model)
            params = jax.device_put(params, tree_shardings(self.model.sharding, axes, params))
        return params

    def _decode(self, params):
        state = engine.start(self.model, params, PROMPTS, 24, SETTINGS)
        return engine.run(self.model, params, state, 1)


SETTINGS = make_settings(SamplingOptions(temperature=0), [0, 0, 0])


def recording(optimizer):
    """Returns an optimizer whose state also holds the last gradients."""

    def init(params):
        return optimizer.init(params), jax.tree.map(jnp.zeros_like, params)

    def update(grads, state, params):
        updates, inner = optimizer.update(grads, state[0], params)
        return updates, (inner, grads)

    return optax.GradientTransformation(init, update)


def compare(triple):
    """Checks that a triple computes what one device does; returns the largest distances.

    Raises:
      NeoError: the triple is refused.
      AssertionError: a number differs; the message names it.
    """
    ours, theirs = Run(triple, make_sharding(triple.mesh, triple.rules)), Run(triple, None)
    ours.check()
    our_losses, our_grads, our_params = ours.train()
    losses, grads, params = theirs.train()
    np.testing.assert_allclose(our_losses, losses, rtol=1e-5)
    whole = np.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in grads.values()))
    largest = {"gradient": 0.0, "parameter": 0.0}
    for path, grad in grads.items():
        where = "/".join(path)
        if is_zero(triple.model, path):
            for noise in (grad, our_grads[path]):
                assert np.linalg.norm(noise) <= 1e-6 * whole, where
            assert np.abs(our_params[path] - params[path]).max() <= 1e-6, where
            continue
        for name, found, expected in (
            ("gradient", our_grads[path], grad),
            ("parameter", our_params[path], params[path]),
        ):
            far = distance(found, expected)
            assert far <= 1e-4, f"{name} of {where}: {far}"
            largest[name] = max(largest[name], far)
    assert ours.greedy() == theirs.greedy()
    np.testing.assert_allclose(ours.scores(), theirs.scores(), rtol=1e-4, atol=1e-4)
    return largest


def is_zero(config, path):
    """Tells whether a parameter's gradient is zero by mathematics, so that what is left is noise.

    The bias of k adds one number to all logits of a query; and what sees only itself weighs nothing
    up: k and q of a window of 1.
    """
    *_, name, leaf = path
    if name == "k_proj" and leaf == "bias":
        return True
    unit = path[0].removeprefix("unit_")
    sees_itself = unit.isdecimal() and config.window(int(unit)) == 1
    return sees_itself and name in ("q_proj", "k_proj")


def distance(ours, theirs):
    """Returns the norm of the difference over the norm."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
