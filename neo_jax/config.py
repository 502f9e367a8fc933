"""What a model is: `ModelConfig`, the presets, the way to and from Hugging Face's config.json."""

import dataclasses
import difflib
import json
from collections.abc import Sequence
from typing import Any, Literal, get_args

from neo_jax import fields as options
from neo_jax.errors import NeoError, brief, checked, suggest, warn
from neo_jax.families import FAMILIES, GPT2, GPT_NEO, HF_IGNORED, SAME_ACTIVATIONS, Family
from neo_jax.labels import HeadConfig, as_head

AttentionType = Literal["global", "local"]
Activation = Literal["gelu_new", "gelu", "relu", "silu"]
Kernel = Literal[  # see `ops.attention`
    "auto", "dense", "single", "blocked", "splash", "splash-256", "splash-1024", "cudnn"
]

VOCAB_MULTIPLE = 128

# What is larger is damage, or would fill the memory before anything could be refused. Names of the
# tensors of a layer are held for every layer; positions plus a window must fit 32 bits.
_MOST_LAYERS, _MOST, _MOST_PARAMS = 4096, 2**30, 10**14


def _size(default: int, least: int = 1, most: int = _MOST) -> Any:
    """Returns a field for a whole number."""
    words = f"be a whole number from {least} to {most:,}, not {{}}"
    return options.number(default, least=least, most=most, words=words)


QUANTIZED = (
    "the weights are quantized, which this cannot take; name the checkpoint of floats that they "
    "were made of."
)
"""What is said of other weights than floats."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape of a GPT-Neo, or of a GPT-2. Hashable: it may be a static argument of `jax.jit`.

    Raises:
      NeoError: the values contradict each other; the message carries them.
    """

    num_layers: int = _size(12, most=_MOST_LAYERS)
    embed_dim: int = _size(768)
    num_heads: int = _size(12)
    head_dim: int = _size(0, least=0)  # 0 stands for embed_dim // num_heads
    mlp_dim: int = _size(0, least=0)  # 0 stands for 4 * embed_dim
    vocab_size: int = _size(50257)
    max_length: int = _size(
        2048
    )  # the context: learned positions, and the most tokens of a sequence
    window_size: int = _size(256)  # keys that a query of a local layer sees, itself included
    attention_types: tuple[AttentionType, ...] = ("global", "local")  # a unit, repeated in depth
    activation: Activation = "gelu_new"  # gelu_new is the tanh approximation
    norm_epsilon: float = options.number(
        1e-5, above=0, below=1, words="lie between 0 and 1, not be {}"
    )
    eos_token_id: int | tuple[int, ...] = 50256  # each ends a text; -1: the vocabulary has none
    # What GPT-2 has: biases of queries, keys and values, and logits of attention that are
    # multiplied by head_dim ** -0.5.
    qkv_bias: bool = False
    scale_attention: bool = False
    tied_head: bool = True  # whether the output head is the table of token embeddings
    # a classifier's in the place of the output head, if it is one
    head: HeadConfig = options.converted(HeadConfig(), as_head)

    def __post_init__(self) -> None:
        options.check(self)
        _set(self, tied_head=self.tied_head or self.head.is_classifier)
        _set(self, eos_token_id=_ends(self.eos_token_id))
        _set(self, head_dim=self.head_dim or self.embed_dim // self.num_heads)
        _set(self, mlp_dim=self.mlp_dim or 4 * self.embed_dim)
        _set(self, attention_types=_repeating_unit(tuple(self.attention_types)))
        if self.num_heads * self.head_dim != self.embed_dim:
            raise NeoError(
                f"num_heads {self.num_heads} x head_dim {self.head_dim} is not embed_dim "
                f"{self.embed_dim}: choose a number of heads that divides the width."
            )
        for kind in self.attention_types:
            if kind not in ("global", "local"):
                known = ["global", "local"]
                raise NeoError(f"unknown attention type {brief(kind)}.{suggest(kind, known)}")
        if not self.attention_types or self.num_layers % len(self.attention_types):
            raise NeoError(
                f"num_layers {self.num_layers} is not a multiple of the "
                f"{len(self.attention_types)} attention_types {self.attention_types}: name one "
                "type for each layer, or a unit that repeats."
            )
        if self.activation not in (names := get_args(Activation)):
            raise NeoError(
                f"unknown activation {brief(self.activation)}.{suggest(self.activation, names)}"
            )
        if self.qkv_bias and self.attention_types != ("global",):
            raise NeoError(
                "qkv_bias is for GPT-2, whose layers are all global: set attention_types to "
                "('global',), or leave qkv_bias out."
            )
        if self.scale_attention and not self.qkv_bias:
            raise NeoError("scale_attention is for GPT-2: set qkv_bias too, or leave it out.")
        if self.num_params > _MOST_PARAMS:
            raise NeoError(
                f"a model of these sizes has {self.num_params:.3g} parameters, more than "
                f"{_MOST_PARAMS:.0e}: num_layers {self.num_layers}, embed_dim {self.embed_dim}, "
                f"mlp_dim {self.mlp_dim}, vocab_size {self.vocab_size}, max_length "
                f"{self.max_length}; correct them."
            )

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end a text, which may be none."""
        ids = self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)
        return tuple(i for i in ids if i >= 0)

    @property
    def family(self) -> Family:
        """The architecture."""
        return GPT2 if self.qkv_bias else GPT_NEO

    @property
    def unembedding(self) -> str:
        """The sub-tree of parameters that holds the table of the output head, [V, D]."""
        return "wte" if self.tied_head else "lm_head"

    @property
    def layer_types(self) -> tuple[AttentionType, ...]:
        """The attention type of every layer, `num_layers` of them."""
        return self.attention_types * (self.num_layers // len(self.attention_types))

    def window(self, layer: int) -> int | None:
        """Keys that a query of this layer sees; None where it sees all that came before."""
        return self.window_size if self.layer_types[layer] == "local" else None

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding table: the vocabulary, rounded up to a multiple of 128.

        So it divides over any usual mesh and fills a TPU's tiles. The rows beyond the vocabulary
        are zeros and never leave the package.
        """
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    def size(self, axis: str) -> int:
        """Returns how long a logical axis of parameters is, "embed" or another."""
        return len(self.head.labels) if axis == "labels" else getattr(self, _SIZES[axis])

    @property
    def num_params(self) -> int:
        """Parameters, the table of the output head counted once where it is that of tokens."""
        embed, mlp = self.embed_dim, self.mlp_dim
        attention = 4 * embed * embed + (4 if self.qkv_bias else 1) * embed
        layer = attention + 2 * embed * mlp + mlp + embed + 4 * embed
        rows = (1 if self.tied_head else 2) * self.vocab_size + self.max_length
        head = self.head.num_params(embed)
        return rows * embed + self.num_layers * layer + 2 * embed + head

    def to_hf(self) -> dict[str, Any]:
        """Returns the config.json that transformers' class of the family and the head reads."""
        family, first = self.family, self.eos_ids[0] if self.eos_ids else None
        fields = {
            "architectures": [family.architecture],
            **{theirs: getattr(self, ours) for theirs, ours in family.fields.items()},
            "model_type": family.name,
            "bos_token_id": first,
            "eos_token_id": [*self.eos_ids] if len(self.eos_ids) > 1 else first,
            "initializer_range": 0.02,
            "use_cache": True,
        }
        if family.layer_fields:
            units = self.num_layers // len(self.attention_types)
            layers = [[list(self.attention_types), units]], list(self.layer_types)
            fields |= dict(zip(family.layer_fields, layers, strict=True))
        return {**fields, **family.off, **self.head.to_hf(family.prefix, first)}

    @classmethod
    def from_hf(cls, fields: dict[str, Any], source: str = "config.json") -> "ModelConfig":
        """Reads the fields of a config.json of GPT-Neo or GPT-2; `source` names it in errors.

        A field that is null is not there, unless it says a size. Fields that transformers does not
        know either change nothing, and are named in a warning.

        Raises:
          NeoError: another architecture, a missing or mistyped field, or a bad value.
        """
        name = fields.get("model_type")
        family = FAMILIES.get(name) if isinstance(name, str) else None
        if family is None:
            raise NeoError(
                f"{source}: model_type is {brief(name)}; this loads "
                f"{' and '.join(map(repr, FAMILIES))} checkpoints."
            )
        if fields.get("quantization_config") is not None:
            raise NeoError(f"{source}: {QUANTIZED}")
        table, fields = family.fields, _without_aliases(fields, family, source)
        unknown = _unknown(fields, family, source)
        for name, ours in table.items():
            if ours in _NEEDED and name not in fields:
                raise NeoError(f"{source}: field '{name}' is missing; is the file whole?")
            if ours not in _NULLABLE and fields.get(name, ours) is None:
                raise NeoError(f"{source}: field '{name}' is null; give its value.")
        if fields.get("scale_attn_by_inverse_layer_idx"):
            raise NeoError(
                f"{source}: scale_attn_by_inverse_layer_idx is true, which is not supported; give "
                "a GPT-2 without it."
            )
        values: dict[str, Any] = {"eos_token_id": -1, **family.defaults}
        values |= {
            ours: fields[theirs] for theirs, ours in table.items() if fields.get(theirs) is not None
        }
        activation = values.get("activation")
        if isinstance(activation, str):
            values["activation"] = SAME_ACTIVATIONS.get(activation, activation)
        try:
            if family.layer_fields:
                values["attention_types"] = _hf_layer_types(fields)
            config = cls(**values, head=HeadConfig.from_hf(fields))
        except (TypeError, ValueError) as error:
            raise NeoError(f"{source}: {error}") from error
        if unknown:
            warn(
                f"{source}: not followed: {', '.join(unknown)}, no field of transformers' "
                f"{family.architecture}; a model that needs it is another one here and there."
            )
        return config


def _without_aliases(fields: dict[str, Any], family: Family, source: str) -> dict[str, Any]:
    """Returns fields by the names that the family's table has for them."""
    named = {name: value for name, value in fields.items() if name not in family.aliases}
    for name, full in family.aliases.items():
        value = fields.get(name)
        if value is not None and named.setdefault(full, value) != value:
            raise NeoError(
                f"{source}: '{full}' is {brief(named[full])} and '{name}', which is another name "
                f"of it, {brief(value)}; remove the wrong one."
            )
    return named


def _unknown(fields: dict[str, Any], family: Family, source: str) -> list[str]:
    """Returns the names of fields that are not followed; refuses those that look mistyped."""
    known = {*family.fields, *family.layer_fields}
    ignored = known | HF_IGNORED | family.ignored | family.off.keys()
    unknown = []
    for name, value in fields.items():
        if value is None or name in ignored or name.startswith("_"):
            continue
        close = difflib.get_close_matches(name[:100], known, n=1, cutoff=_MISTYPED)
        if not close:
            unknown.append(f"'{name}'")
        elif fields.get(close[0]) != value:
            raise NeoError(f"{source}: unknown field '{name}'. Did you mean '{close[0]}'?")
    return unknown


_MISTYPED = 0.85  # as difflib measures; "hiden_size" is 0.95 of "hidden_size"


def _set(config: ModelConfig, **values: Any) -> None:
    for name, value in values.items():
        object.__setattr__(config, name, value)


_SIZES = {
    "embed": "embed_dim",
    "features": "embed_dim",
    "heads": "num_heads",
    "head_dim": "head_dim",
    "mlp": "mlp_dim",
    "vocab": "vocab_size",
    "positions": "max_length",
}


def _ends(ids: Any) -> int | tuple[int, ...]:
    """Returns ids that end texts, each once; an id alone as it is."""
    listed = isinstance(ids, list | tuple)
    several = tuple(ids) if listed else (ids,)
    if not all(_is_whole(i, 0 if listed else -1) for i in several):
        raise NeoError(
            f"eos_token_id must be a whole number >= -1 or a list of ids, not {brief(ids)}."
        )
    several = tuple(dict.fromkeys(several))
    return several if len(several) > 1 else several[0] if several else -1


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _repeating_unit(types: tuple[Any, ...]) -> tuple[Any, ...]:
    """Returns the shortest unit whose repetition gives `types`."""
    for size in range(1, len(types)):
        if len(types) % size == 0 and types == types[:size] * (len(types) // size):
            return types[:size]
    return types


def expand_types(pairs: Any, num_layers: Any) -> tuple[Any, ...]:
    """Returns the type of every layer from [[unit, repeats], ...]; counts before it repeats.

    Raises:
      NeoError: they are written in another way, or for another number of layers.
    """
    if checked("num_layers", num_layers, int) > _MOST_LAYERS:
        raise NeoError(f"num_layers {num_layers} is more than {_MOST_LAYERS:,}; correct it.")
    if isinstance(pairs, list | tuple) and pairs and all(isinstance(x, str) for x in pairs):
        raise NeoError(
            f"attention_types are a flat list, {brief(pairs)}; write units and how often they "
            f"repeat, as in {_written(pairs, num_layers)}."
        )
    if not isinstance(pairs, list | tuple) or not all(map(_is_pair, pairs)):
        raise NeoError(
            f"attention_types are {brief(pairs)}, not units and how often they repeat, as in "
            '[[["global", "local"], 12]].'
        )
    count = sum(len(unit) * repeats for unit, repeats in pairs)
    if count != num_layers:
        raise NeoError(
            f"attention_types are for {brief(count)} layers, num_layers is {num_layers}; correct "
            "one of them."
        )
    return tuple(kind for unit, repeats in pairs if unit for kind in [*unit] * repeats)


def _written(types: Sequence[str], num_layers: int) -> str:
    """Returns how types, of some layers that repeat, are to be written."""
    unit = _repeating_unit(tuple(types))
    return json.dumps([[[*unit], num_layers // len(unit) or 1]])


def _is_pair(pair: Any) -> bool:
    return (
        isinstance(pair, list | tuple)
        and len(pair) == 2
        and isinstance(pair[0], list | tuple)
        and _is_whole(pair[1], 0)
    )


def _hf_layer_types(fields: dict[str, Any]) -> tuple[AttentionType, ...]:
    """Reads `attention_types` and `attention_layers`, which may be given in any combination."""
    pairs, layers = fields.get("attention_types"), fields.get("attention_layers")
    if layers is None:
        return ("global", "local") if pairs is None else expand_types(pairs, fields["num_layers"])
    if not isinstance(layers, list | tuple) or len(layers) != fields["num_layers"]:
        raise NeoError(
            f"attention_layers are {brief(layers)}, not a type for each of num_layers "
            f"{fields['num_layers']}; correct one of them."
        )
    types = tuple(layers)
    if pairs is not None and expand_types(pairs, fields["num_layers"]) != types:
        raise NeoError(
            "attention_types and attention_layers disagree; correct one of them, or leave "
            "attention_layers out."
        )
    return types


_NEEDED = ("num_layers", "embed_dim", "num_heads", "vocab_size")
_NULLABLE = ("mlp_dim", "eos_token_id")  # null says: as wide as usual; no such token


_PRESETS = {
    name: {**family.defaults, **sizes}
    for family in FAMILIES.values()
    for name, sizes in family.presets.items()
}
PRESETS = tuple(_PRESETS)
"""Names of the presets: the released sizes, and two larger ones that GPT-Neo's original has."""


def preset(name: str) -> ModelConfig:
    """Returns a published configuration by its name, such as "gpt-neo-1.3b".

    Raises:
      NeoError: no preset has this name; the message suggests the nearest.
    """
    if name not in _PRESETS:
        raise NeoError(f"no preset is called '{name}'.{suggest(name, _PRESETS)}")
    return ModelConfig(**_PRESETS[name])


def find_preset(config: ModelConfig) -> str:
    """Returns the name of the preset that has a model's shape, whatever its vocabulary, or ""."""
    return next((name for name in PRESETS if _shape(preset(name)) == _shape(config)), "")


def _shape(config: ModelConfig) -> tuple[object, ...]:
    return config.num_layers, config.embed_dim, config.num_heads, config.attention_types
