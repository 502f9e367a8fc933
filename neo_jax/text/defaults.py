"""What a checkpoint's generation_config.json says of texts where their user says nothing.

Names and meanings are those of transformers' GenerationConfig. With `do_sample: true` what the file
leaves out of temperature, top_k and top_p is transformers' too, with false texts are greedy; where
it does not say, what it names takes the place of our defaults, one by one.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from neo_jax.config import ModelConfig
from neo_jax.decode.options import BeamOptions, SamplingOptions
from neo_jax.errors import NeoError, brief
from neo_jax.files.json_text import read_json
from neo_jax.text.options import TextOptions, names, pick

FILE = "generation_config.json"

_DRAWS = ("temperature", "top_k", "top_p", "min_p")
_BEAMS = names(BeamOptions)
_KNOWN = {*names(SamplingOptions), *_BEAMS, "max_new_tokens", "stop"} - {"seed"}
_DRAWN = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}  # by transformers, by default
_NEUTRAL = {  # what these say is what happens anyway; elsewhere it is null, false or an empty list
    "guidance_scale": 1, "typical_p": 1, "epsilon_cutoff": 0, "eta_cutoff": 0,
    "diversity_penalty": 0, "num_beam_groups": 1, "encoder_repetition_penalty": 1,
    "encoder_no_repeat_ngram_size": 0, "num_return_sequences": 1, "min_length": 0,
    "max_length": 20, "penalty_alpha": 0,
}  # fmt: skip
_SILENT = frozenset(  # say nothing of which texts are written
    """do_sample eos_token_id bos_token_id pad_token_id decoder_start_token_id transformers_version
    use_cache cache_implementation cache_config max_cache_len return_dict_in_generate
    output_attentions output_hidden_states output_scores output_logits is_assistant
    num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold
    assistant_early_exit assistant_lookbehind target_lookbehind prompt_lookup_num_tokens
    max_matching_ngram_size compile_config disable_compile prefill_chunk_size low_memory
    """.split()
)


@dataclasses.dataclass(frozen=True)
class Defaults:
    """Options of a checkpoint, by the names that `LanguageModel.generate` has for them."""

    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    ignored: tuple[str, ...] = ()  # what else the file says of texts, which nothing here follows
    text: str = dataclasses.field(default="", compare=False, repr=False)  # the whole file

    def fill(self, said: Mapping[str, Any]) -> dict[str, Any]:
        """Returns what a user says, and where that leaves options open what the file says.

        What draws and what searches exclude each other: the user's word decides which counts.
        """
        options = {name: value for name, value in self.options.items() if name not in said}
        if any(said.get(name) for name in (*_DRAWS, "draft")):
            options.pop("num_beams", None)
        if {**said, **options}.get("num_beams", 1) > 1:
            options = {name: value for name, value in options.items() if name not in _DRAWS}
        else:
            options = {name: value for name, value in options.items() if name not in _BEAMS}
        return {**said, **options}

    def report(self, said: Mapping[str, Any]) -> str:
        """Returns in a line what `fill` takes from the file, and what it cannot; "" if nothing."""
        taken = {name: value for name, value in self.fill(said).items() if name not in said}
        words = []
        if taken:
            words.append(", ".join(f"{name} {brief(value)}" for name, value in taken.items()))
        if self.ignored:
            words.append(f"not followed: {', '.join(self.ignored)}")
        return f"{FILE}: {'; '.join(words)}" if words else ""

    def save(self, folder: Path) -> None:
        """Writes the file as it was read, if there was one."""
        if self.text:
            (folder / FILE).write_text(self.text, encoding="utf-8")


def read_defaults(folder: Path, config: ModelConfig) -> tuple[Defaults, ModelConfig]:
    """Reads the generation_config.json of a folder, if it has one.

    Returns:
      The defaults, and the configuration whose texts end at the ids of either file.

    Raises:
      NeoError: the file cannot be read, or holds a value that is out of its range.
    """
    path = folder / FILE
    if not path.is_file():
        return Defaults(), config
    fields = {name: value for name, value in read_json(path).items() if value is not None}
    try:
        ends = fields.get("eos_token_id", [])
        ends = ends if isinstance(ends, list) else [ends]
        config = dataclasses.replace(config, eos_token_id=[*config.eos_ids, *ends])  # type: ignore[arg-type]
        text = path.read_text(encoding="utf-8")
        return dataclasses.replace(_defaults(fields), text=text), config
    except NeoError as error:
        raise NeoError(f"{path}: {error}") from error


def _defaults(fields: Mapping[str, Any]) -> Defaults:
    renamed = {"stop_strings": "stop"}
    options = {renamed.get(name, name): value for name, value in fields.items()}
    ignored = [
        name
        for name, value in options.items()
        if name not in _KNOWN | _SILENT
        and not name.startswith("_")
        and value not in (False, [], {}, _NEUTRAL.get(name))
    ]
    options = {name: value for name, value in options.items() if name in _KNOWN}
    ends = options.get("forced_eos_token_id")
    if isinstance(ends, list):
        del options["forced_eos_token_id"]
        if len(ends) == 1:
            options["forced_eos_token_id"] = ends[0]
        else:
            ignored.append("forced_eos_token_id")  # one of several
    for kind in (SamplingOptions, BeamOptions, TextOptions):  # raises for what is out of range
        made = kind(**pick(options, kind))
        options |= {name: getattr(made, name) for name in pick(options, kind)}
    drawn = fields.get("do_sample")
    if drawn and options.get("num_beams", 1) > 1:
        ignored.append("num_beams")  # of which tokens are drawn
        options = {name: value for name, value in options.items() if name not in _BEAMS}
    if drawn:
        options = _DRAWN | options
    elif drawn is False or options.get("num_beams", 1) > 1:
        options = {name: value for name, value in options.items() if name not in _DRAWS}
        options["temperature"] = 0.0
    return Defaults(options, tuple(ignored))
