"""Published runs of training: what was run, how fast it was, and where that is said.

Each is a `Row`: the shape of its model, how the step was split, and the reported time. See
docs/validation.md for what is known and what had to be taken from the sources' history.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from neo_jax.devices.chips import CHIPS, Chip, Reached
from neo_jax.tools.plan.arithmetic import PARTS, Setup, Shape, again, phases
from neo_jax.tools.plan.predict import EXPOSED, Prediction, predict

_MAXTEXT = "https://github.com/AI-Hypercomputer/maxtext"
_OLD = (
    f"{_MAXTEXT}/tree/76bd53b0f/MaxText/configs"  # with the defaults that the tables were made by
)
_RECIPES = "https://github.com/AI-Hypercomputer/tpu-recipes/tree/main/training"
_LEVANTER = "https://github.com/stanford-crfm/levanter/blob/6ccab359/docs/Levanter-1.0-Release.md"


@dataclasses.dataclass(frozen=True)
class Row:
    """A published run."""

    model: str
    chip: str  # of CHIPS
    name: str  # of the slice, as published
    devices: int
    shape: Shape
    setup: Setup
    remat: str
    source: str
    seconds: float = 0.0  # of a step, as reported; or
    teraflops: float = 0.0  # a device and second
    seen: float = 0.5  # the share of pairs that the report counts for attention
    fits: str = ""  # what this row decided
    command: str = ""  # of neo-jax plan, where the block is ours

    @property
    def mesh(self) -> str:
        """As text."""
        sizes = {"data": self.setup.data, "fsdp": self.setup.fsdp, "model": self.setup.model}
        text = ",".join(f"{name}={size}" for name, size in sizes.items() if size > 1)
        return f"{self.setup.slices} slices of {text}" if self.setup.slices > 1 else text

    @property
    def rows(self) -> float:
        """Sequences of a device."""
        return self.setup.rows / self.setup.model

    @property
    def flops(self) -> float:
        """Of a device in a step, as the report counts."""
        tokens = self.rows * self.setup.length
        return self.shape.flops_per_token(self.setup.length, self.seen) * tokens

    @property
    def reported(self) -> float:
        """Seconds of a step."""
        return self.seconds or self.flops / (self.teraflops * 1e12)

    def predicted(self, chip: Chip | None = None, exposed: float = EXPOSED) -> Prediction:
        """By arithmetic."""
        return predict(chip or CHIPS[self.chip], phases(self.shape, self.setup), exposed)


def _maxtext_2023(scale: int) -> Shape:
    """Returns MaxText's model of so many billions, as its defaults of 2023 and a scale give it.

    Attention and an MLP of two weights read one norm; heads of 256; the scale doubles heads and
    MLP, then the width, then layers (`get_individual_scales`).
    """
    base, rest = divmod(scale.bit_length() - 1, 3)
    wide, deep = 2 ** (base + (rest > 0)), 2**base
    embed = 2560 * 2 ** (base + (rest > 1))
    return _old(embed, 8 * wide, 8192 * wide, 16 * deep)


def _old(embed: int, heads: int, mlp: int, layers: int) -> Shape:
    return Shape(layers, embed, heads, 256, mlp, 32768, parallel=True, rotary=True)


def _llama(layers: int, embed: int, heads: int, mlp: int, vocab: int = 128256) -> Shape:
    return Shape(
        layers, embed, heads, 128, mlp, vocab, kv_heads=8, gated=True, rotary=True, tied_head=False
    )


def _gpt2(layers: int, embed: int, heads: int) -> Shape:
    return Shape(layers, embed, heads, embed // heads, 4 * embed, 50304)


def _command(shape: Shape, length: int, rows: int, topology: str, layers: str = "") -> str:
    """Returns how `neo-jax plan` is given a run of GPT-2's block, on 256 devices."""
    return (
        f"gpt-neo-2.7b --model.num-layers {layers or shape.num_layers} "
        f"--model.embed-dim {shape.embed_dim} --model.mlp-dim {shape.mlp_dim} "
        f"--model.num-heads {shape.num_heads} --model.head-dim {shape.head_dim} "
        f"--model.vocab-size {shape.vocab_size} --model.max-length {length} "
        "--model.attention-types global --model.qkv-bias --model.scale-attention "
        f"--topology {topology} --mesh fsdp=256 --batch-size {256 * rows}"
    )


LLAMA_8B, LLAMA_70B = _llama(32, 4096, 32, 14336), _llama(80, 8192, 64, 28672)
LLAMA_405B, MISTRAL_7B = _llama(126, 16384, 128, 53248), _llama(32, 4096, 32, 14336, 32000)
LLAMA2_70B, GPT3 = _llama(80, 8192, 64, 28672, 32000), _gpt2(96, 12288, 96)

_ONE_RING = 2.0  # links by which a device sends
_TWO_RINGS = 2 * Reached.second_ring  # along two axes of a torus
_TWO_LINES = Reached.second_ring  # of a slice that does not close along an axis


def _v5e() -> Iterator[Row]:
    for scale, rows, tera, split, fits in (
        (16, 6, 120, 1, ""),
        (32, 4, 132, 1, "products of v5e"),
        (64, 2, 118, 1, "waiting"),
        (128, 1, 110, 16, ""),
    ):
        shape = _maxtext_2023(scale)
        links = _TWO_RINGS if split == 1 else _ONE_RING
        setup = Setup(
            rows * split, 2048, fsdp=256 // split, model=split, again=again("full", shape),
            side=1024, sum_bytes=2, links=links,
        )  # fmt: skip
        yield Row(
            f"MaxText {scale}B", "TPU v5e", "v5e-256", 256, shape, setup, "full",
            f"{_OLD}/v5e", teraflops=tera, seen=1.0, fits=fits,
        )  # fmt: skip


def _v5p() -> Iterator[Row]:
    for scale, chips, rows, tera, split, remat, links in (
        (32, 64, 8, 328, 4, "products", _ONE_RING),
        (64, 64, 4, 323, 4, "products", _ONE_RING),
        (128, 128, 2, 315, 8, "products", _ONE_RING),
        (256, 512, 2, 308, 8, "products", _ONE_RING),
        (512, 512, 2, 294, 16, "full", _TWO_RINGS),
        (1024, 2048, 2, 297, 16, "full", _ONE_RING),
    ):
        shape = _maxtext_2023(scale)
        setup = Setup(
            rows * split, 2048, fsdp=chips // split, model=split, again=again(remat, shape),
            side=1024, sum_bytes=2, links=_TWO_RINGS, model_links=links,
        )  # fmt: skip
        yield Row(
            f"MaxText {scale}B", "TPU v5p", f"v5p-{2 * chips}", chips, shape, setup,
            "minimal" if remat == "products" else remat, f"{_OLD}/v5p", teraflops=tera,
            fits="products of v3, v4 and v5p" if scale == 32 else "",
        )  # fmt: skip


def _v4() -> Iterator[Row]:
    for name, shape, chips, rows, tera in (
        ("MaxText 22B", _old(6144, 24, 24576, 48), 64, 16, 156),
        ("MaxText 52B", _old(12288, 32, 49152, 32), 192, 10, 154),
    ):
        setup = Setup(
            rows, 2048, fsdp=chips, again=again("full", shape), side=1024, sum_bytes=2,
            links=_TWO_RINGS,
        )  # fmt: skip
        yield Row(
            name, "TPU v4", f"v4-{2 * chips}", chips, shape, setup, "full", f"{_OLD}/v4",
            teraflops=tera, seen=1.0,
        )  # fmt: skip


_WITHOUT_DOWN = tuple(part for part in PARTS if part != "down")


def _v6e() -> Iterator[Row]:
    offloaded = ("attention", "up", "rest")  # qkv and out are kept, in the hosts' memory
    qkv = ("attention", "out", "up", "rest")
    for chips, rows, seconds in ((8, 3, 3.443), (16, 3, 3.393), (64, 5, 5.652), (256, 4, 4.546)):
        yield _v6e_row(
            "Llama 3.1 8B", LLAMA_8B, chips, rows, 8192, offloaded, seconds,
            f"Llama3.1-8B-MaxText/v6e-{chips}", fits="products of v6e" if chips == 8 else "",
        )  # fmt: skip
    yield _v6e_row("Mistral 7B", MISTRAL_7B, 8, 6, 8192, offloaded, 6.320, "Mistral-7B-MaxText")
    for chips, rows, seconds in ((32, 2, 17.790), (64, 2, 18.688), (256, 5, 42.656)):
        yield _v6e_row(
            "Llama 3.1 70B", LLAMA_70B, chips, rows, 8192, qkv, seconds,
            f"Llama3.1-70B-MaxText/v6e-{chips}",
        )  # fmt: skip
    yield _v6e_row(
        "Llama 2 70B", LLAMA2_70B, 256, 2, 4096, qkv, 9.052, "Llama2-70B-MaxText", side=1024,
        fused=False,
    )  # fmt: skip
    yield _v6e_row(
        "Llama 3.1 405B", LLAMA_405B, 512, 1, 8192, _WITHOUT_DOWN, 54.803,
        "Llama3.1-405B-MaxText", side=1024, fused=False, slices=2,
    )  # fmt: skip
    yield _v6e_row(
        "GPT-3 175B", GPT3, 256, 3, 2048, _WITHOUT_DOWN, 17.182, "GPT3-175B-MaxText/bf16",
        side=1024, fused=False, seen=1.0, command=_command(GPT3, 2048, 3, "v6e:16x16", "{layers}"),
    )  # fmt: skip


def _v6e_row(
    name: str, shape: Shape, chips: int, rows: int, length: int, repeated: tuple[str, ...],
    seconds: float, source: str, side: int = 2048, fused: bool = True, slices: int = 1, **rest: Any,
) -> Row:  # fmt: skip
    inside = chips // slices
    setup = Setup(
        rows, length, fsdp=inside, slices=slices, again=repeated, side=side, fused=fused,
        sum_bytes=2, links=_TWO_RINGS if inside == 256 else _TWO_LINES,
    )  # fmt: skip
    remat = "full" if repeated == _WITHOUT_DOWN else "custom"
    return Row(
        name, "TPU v6e", f"v6e-{inside}" if slices == 1 else f"{slices}x v6e-{inside}", chips,
        shape, setup, remat, f"{_RECIPES}/trillium/{source}", seconds, **rest,
    )  # fmt: skip


def _ironwood() -> Iterator[Row]:
    kept = ("out", "up", "rest")  # queries, keys, values and what attention gives are kept
    for name, shape, chips, rows, repeated, seconds, source in (
        ("Llama 3.1 70B", LLAMA_70B, 64, 2, kept, 12.20, "llama3.1-70b/8k-bf16-tpu7x-4x4x4"),
        ("Llama 3.1 70B", LLAMA_70B, 256, 2, kept, 12.27, "llama3.1-70b/8k-bf16-tpu7x-4x8x8"),
        (
            "Llama 3.1 405B", LLAMA_405B, 256, 3, ("qkv", "attention", "out", "up", "rest"),
            98.34, "llama3.1-405b/8k-bf16-tpu7x-4x8x8",
        ),
    ):  # fmt: skip
        setup = Setup(
            rows, 8192, fsdp=2 * chips, again=repeated, side=2048, fused=True, sum_bytes=2,
            links=_TWO_RINGS,
        )  # fmt: skip
        yield Row(
            name, "TPU7x", f"tpu7x-{chips}", 2 * chips, shape, setup, "custom",
            f"{_RECIPES}/ironwood/{source}", seconds,
        )  # fmt: skip


def _v3() -> Iterator[Row]:
    for name, shape, rows, length, mfu in (
        ("GPT-2 345M", _gpt2(24, 1024, 16), 2, 1024, 0.351),
        ("GPT-2 750M", _gpt2(36, 1280, 20), 2, 1024, 0.389),
        ("GPT-2 1.4B", _gpt2(48, 1536, 24), 2, 1024, 0.417),
        ("GPT-2 6.7B", _gpt2(32, 4096, 32), 4, 2048, 0.473),
    ):
        setup = Setup(rows, length, fsdp=256, again=PARTS, side=-1, sum_bytes=2, links=_TWO_RINGS)
        yield Row(
            name, "TPU v3", "v3-256", 256, shape, setup, "blocks of layers", _LEVANTER,
            teraflops=mfu * CHIPS["TPU v3"].peak_flops / 1e12, seen=1.0,
            command=_command(shape, length, rows, "v3:8x16"),
        )  # fmt: skip


def rows() -> list[Row]:
    """Returns every row."""
    return [*_v3(), *_v4(), *_v5e(), *_v5p(), *_v6e(), *_ironwood()]
