"""What an adapter_config.json of PEFT says of its tensors: ranks, and how often they are added."""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from neo_jax.errors import NeoError, brief, checked
from neo_jax.files.json_text import read_json
from neo_jax.files.paths import is_file
from neo_jax.labels import HeadConfig, unnamed

LABELS = "labels.json"
"""Of an adapter with a head of its own: the fields of config.json that say what its labels are."""

TASKS = {
    "lm_head": "CAUSAL_LM",
    "score": "SEQ_CLS",
    "classifier": "TOKEN_CLS",
    "qa_outputs": "QUESTION_ANS",
}
"""PEFT's task_type of each head."""

# Fields that do not change what an adapter computes, or that the tensors say again.
_NEUTRAL = frozenset(
    """
    peft_type peft_version task_type auto_mapping base_model_name_or_path revision inference_mode r
    lora_alpha lora_dropout target_modules exclude_modules layers_to_transform layers_pattern
    fan_in_fan_out megatron_core qalora_group_size runtime_config eva_config modules_to_save bias
    rank_pattern alpha_pattern use_rslora use_dora ensure_weight_tying
    """.split()
)
# What else a field may say: that it is off; and ways to draw a and b that leave the weight alone.
_OFF: tuple[Any, ...] = (None, False, "none", {}, [])
_DRAWS = (True, "gaussian", "orthogonal", "eva")

_MOST_RANK = 1 << 20
MERGE = "merge the adapter into its model with PEFT's merge_and_unload, if it can, and load that"
"""What to do with an adapter that is not supported."""

# A pattern is a regular expression of somebody else's: one that repeats what repeats takes forever.
_LONGEST_PATTERN = 200
_REPEATS = re.compile(r"\)[*+{]|(?:[^*+{]*[*+{]){4}")


@dataclasses.dataclass(frozen=True)
class PeftConfig:
    """An adapter of the kind LORA, with what PEFT can do to it that the tensors do not say."""

    path: Path
    base: Any  # the model that it is for, as the file has it
    rank: int
    alpha: float
    targets: list[str]
    ranks: dict[str, int]  # of modules whose names match
    alphas: dict[str, float]
    has_norms: bool  # DoRA
    is_rank_stabilized: bool  # Kalajdzievski, 2023: alpha / sqrt(rank)
    ties_head: bool  # a table of tokens that is trained is the output head too

    def rank_of(self, module: str) -> int:
        """Returns the rank of the adapter of a module, by its name in transformers."""
        return _matching(self.ranks, module, self.rank)

    def scale_of(self, module: str) -> float:
        """Returns how many times the adapter of a module is added."""
        rank = self.rank_of(module)
        alpha = _matching(self.alphas, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.is_rank_stabilized else rank)


def read_peft_config(path: Path) -> PeftConfig:
    """Reads an adapter_config.json.

    Raises:
      NeoError: it is of another kind than LORA, has a field whose effect is not known here, or
        values that are none.
    """
    fields = read_json(path)
    if fields.get("peft_type") != "LORA":
        kind = brief(fields.get("peft_type"))
        raise NeoError(
            f"{path}: peft_type is {kind}; this loads 'LORA', 'PROMPT_TUNING' and 'P_TUNING': "
            f"{MERGE}."
        )
    for name, value in fields.items():
        fine = _OFF + _DRAWS if name == "init_lora_weights" else _OFF
        if name not in _NEUTRAL and value not in fine:
            raise NeoError(f"{path}: {name} is {brief(value)}, which is not supported; {MERGE}.")
    try:
        return PeftConfig(
            path=path,
            base=fields.get("base_model_name_or_path"),
            rank=_rank("r", fields.get("r")),
            alpha=_alpha("lora_alpha", fields.get("lora_alpha")),
            targets=_targets(fields.get("target_modules") or ()),
            ranks=_pattern("rank_pattern", fields, _rank),
            alphas=_pattern("alpha_pattern", fields, _alpha),
            has_norms=bool(fields.get("use_dora")),
            is_rank_stabilized=bool(fields.get("use_rslora")),
            ties_head=bool(fields.get("ensure_weight_tying")),
        )
    except NeoError as error:
        raise NeoError(f"{path}: {error}") from error


def adapted_head(folder: Path, head: HeadConfig, sizes: Mapping[str, int]) -> HeadConfig:
    """Returns the head of a model with an adapter, which may have one that was trained with it.

    Args:
      folder: of the adapter; where it says no labels, they have transformers' names for unnamed
        ones, or those of the model.
      head: of the model below.
      sizes: the labels of each head that the adapter has, by its kind.

    Raises:
      NeoError: labels that cannot be.
    """
    for kind, count in sizes.items():
        if is_file(folder / LABELS):
            return HeadConfig.from_hf(read_json(folder / LABELS))
        if (head.kind, len(head.labels)) != (kind, count):
            problem = {"problem_type": "regression"} if kind == "score" and count == 1 else {}
            return HeadConfig(kind, unnamed(count), **problem)  # type: ignore[arg-type]
    return head


def _rank(name: str, value: Any) -> int:
    rank = checked(name, value, int)
    if not 1 <= rank <= _MOST_RANK:
        raise NeoError(f"{name} {brief(rank)} must lie between 1 and {_MOST_RANK:,}.")
    return rank


def _alpha(name: str, value: Any) -> float:
    alpha = checked(name, value, float)
    if not math.isfinite(alpha):
        raise NeoError(f"{name} {brief(alpha)} must be finite.")
    return alpha


def _targets(value: Any) -> list[str]:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise NeoError(f"target_modules are {brief(value)}, not names of kernels.")
    return sorted(names)


def _pattern(name: str, fields: Mapping[str, Any], check: Any) -> dict[str, Any]:
    found = fields.get(name) or {}
    if not isinstance(found, dict):
        raise NeoError(f"{name} is {brief(found)}, not numbers by names of modules.")
    for key in found:
        try:
            re.compile(key)
            is_fine = len(key) <= _LONGEST_PATTERN and not _REPEATS.search(key)
        except (re.error, OverflowError, RecursionError):
            is_fine = False
        if not is_fine:
            raise NeoError(
                f"{name} has {brief(key)}, no name or simple pattern of a module; {MERGE}."
            )
    return {key: check(f"{name} of {key}", value) for key, value in found.items()}


def _matching(values: Mapping[str, Any], module: str, default: Any) -> Any:
    """Returns the value of the first pattern that matches the end of a name, as PEFT finds it."""
    found = (value for key, value in values.items() if re.match(rf"(.*\.)?({key})$", module))
    return next(found, default)
