"""From a folder's files to the `tokenizers` library, with the ids of transformers' AutoTokenizer.

Three files may name tokens, and a class may replace what tokenizer.json says. The rules here are
those of transformers 5; a folder is refused where its files contradict each other.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from neo_jax.errors import NeoError, brief, reason
from neo_jax.families import FAMILIES
from neo_jax.files.json_text import read_json
from neo_jax.files.streams import muted

END_OF_TEXT = "<|endoftext|>"

_ROLES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_GPT2 = "GPT2Tokenizer"  # takes vocabulary and merges of tokenizer.json, and what follows them
_PLAIN = ("PreTrainedTokenizer", "TokenizersBackend", "PythonBackend")  # take all of it
_CONFIG = "tokenizer_config.json"


_FILES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))


def find_byte_pairs(folder: Path) -> tuple[Path, Path] | None:
    """Returns the files of a vocabulary and its merges, by transformers' or OpenAI's names."""
    pairs = ((folder / vocab, folder / merges) for vocab, merges in _FILES)
    return next((pair for pair in pairs if all(path.is_file() for path in pair)), None)


class Built(NamedTuple):
    """A tokenizer, and which of its tokens ends a text."""

    tokenizer: Any  # of the library
    eos_id: int | None


@contextlib.contextmanager
def library(words: str) -> Iterator[None]:
    """Turns what the library raises, its panics too, into an error of one line.

    Args:
      words: what cannot be done and how to fix it, with "{}" for the library's reason.
    """
    try:
        yield
    except NeoError:
        raise
    except BaseException as error:
        # A panic of Rust is no Exception; interrupts and exits are not the library's.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise NeoError(words.replace("{}", reason(error))) from error


def build(folder: Path, file: Path | None) -> Built:
    """Returns the tokenizer of a folder.

    Args:
      folder: has tokenizer_config.json and what else names tokens.
      file: the tokenizer.json, or None for what `find_byte_pairs` finds.

    Raises:
      NeoError: a file is missing or corrupt, or files contradict each other.
    """
    config = _read(folder / _CONFIG)
    kind = _kind(folder, config)
    document = read_json(file) if file else {}
    if file:
        with muted(), library(f"{file} is not a tokenizer.json ({{}}); is it whole?"):
            tokenizer = _from_json(document, kind, config)
    else:
        vocab, merges = find_byte_pairs(folder) or (folder / name for name in _FILES[0])
        with (
            muted(),
            library(f"cannot read {vocab} and {merges.name} ({{}}); are they whole?"),
        ):
            tokenizer = _from_vocab_and_merges(vocab, merges, config)
    if not tokenizer.get_vocab_size():
        raise NeoError(f"{folder}: the tokenizer's vocabulary is empty; is it whole?")
    with library(f"{folder}: the special tokens cannot be read ({{}}); correct {_CONFIG}."):
        padding = document.get("padding") if kind in _PLAIN else None
        parts = {"pad_token": padding["pad_token"]} if padding else {}
        added, special = _added(folder, parts | config, document)
        eos = _text(special.get("eos_token"))
        if eos and tokenizer.token_to_id(eos) is None and eos not in map(_text, added.values()):
            raise NeoError(
                f"{folder}: the end-of-text token '{eos}' is not in the vocabulary; correct "
                f"eos_token in {_CONFIG}."
            )
        eos_id = tokenizer.token_to_id(END_OF_TEXT)
        if kind == _GPT2 or (not file and eos_id is not None):
            special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT) | special
        tokenizer.add_tokens(_new_tokens(tokenizer, added, special))
        tokenizer.encode_special_tokens = bool(config.get("split_special_tokens"))
        if not file:
            _add_ends(tokenizer, config, special)
    for index, token in added.items():
        found = tokenizer.token_to_id(token.content)
        if found != index:
            raise NeoError(
                f"{folder}: the token {token.content!r} has the id {index} in files and {found} "
                f"by its place in the vocabulary; correct added_tokens_decoder in {_CONFIG}."
            )
    return Built(tokenizer, tokenizer.token_to_id(eos) if eos else eos_id)


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _kind(folder: Path, config: Mapping[str, Any]) -> str:
    """Returns the class that the files name, without "Fast"; "" where they name none."""
    model = _read(folder / "config.json")
    name = config.get("tokenizer_class") or model.get("tokenizer_class")
    if not name:
        return _GPT2 if model.get("model_type") in [*FAMILIES] else ""
    kind = str(name).removesuffix("Fast")
    if kind not in (_GPT2, *_PLAIN):
        raise NeoError(
            f"{folder}: the tokenizer_class {brief(name)} may make other ids than tokenizer.json "
            f"alone; if it does not, name PreTrainedTokenizerFast in {_CONFIG}."
        )
    return kind


def _from_json(document: dict[str, Any], kind: str, config: Mapping[str, Any]) -> Any:
    import tokenizers

    if kind == _GPT2:
        _check_parts(document)
        document = document | {"added_tokens": []}  # they come back from where they are named
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(document))
    if kind == _GPT2:
        tokenizer.pre_tokenizer = _byte_level(config)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _check_parts(document: Mapping[str, Any]) -> None:
    """Refuses parts of a tokenizer.json that a version of GPT2Tokenizer has otherwise."""
    import tokenizers

    model, cutter = document["model"], document.get("pre_tokenizer") or {}
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    differs = {
        "model": model.get("type", "BPE") != "BPE",
        "normalizer": document.get("normalizer"),
        "pre_tokenizer": cutter.get("type") != "ByteLevel" or cutter.get("use_regex") is False,
        "unk_token": model.get("unk_token") and not {*alphabet} <= {*model["vocab"]},
    }
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback",
                 "ignore_merges"):  # fmt: skip
        differs[name] = model.get(name)
    for name in filter(differs.get, differs):
        raise NeoError(
            f"the {name} of tokenizer.json is not that of its class, GPT2Tokenizer; name "
            f"PreTrainedTokenizerFast as tokenizer_class in {_CONFIG} to follow the file."
        )


def _from_vocab_and_merges(vocab: Path, merges: Path, config: Mapping[str, Any]) -> Any:
    import tokenizers

    ids = read_json(vocab)
    lines = filter(None, merges.read_text(encoding="utf-8").split("\n"))
    pairs = [tuple(line.split(" ")) for line in lines if not line.startswith("#version")]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(ids, pairs))  # type: ignore[arg-type]
    tokenizer.pre_tokenizer = _byte_level(config)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer


def _byte_level(config: Mapping[str, Any]) -> Any:
    import tokenizers

    space = bool(config.get("add_prefix_space"))
    return tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=space)


def _added(
    folder: Path, config: Mapping[str, Any], document: Mapping[str, Any]
) -> tuple[dict[int, Any], dict[str, Any]]:
    """Reads which tokens files add to a vocabulary.

    Returns:
      Those that have an id, and the special ones by what they are for, tokens or texts; those
      without a purpose have numbers.
    """
    fields = dict(config)
    listed = config.get("added_tokens_decoder") or {}
    added = {int(i): _token(token) for i, token in listed.items()}
    has_extra = "extra_special_tokens" in config or "additional_special_tokens" in config
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    if "added_tokens_decoder" not in config:  # which replaces all other files
        others = _read(folder / "special_tokens_map.json")
        fields |= others
        more = others.get("extra_special_tokens")
        if more is None and not has_extra:
            more = others.get("additional_special_tokens")
        extra = [*extra, *(more or [])] if isinstance(extra, list) else extra
    named = {name: _token(fields[name]) for name in _ROLES if name in fields}
    named |= {  # such as image_token
        name: _token(token)
        for name, token in fields.items()
        if name.endswith("_token") and isinstance(token, str | dict)
    }
    more = extra.items() if isinstance(extra, dict) else enumerate(extra)
    named |= {str(name): _token(token) for name, token in more}
    if "added_tokens_decoder" not in config:
        texts = {*map(_text, named.values())}
        for text, index in _read(folder / "added_tokens.json").items():
            added[index] = _token({"content": text, "special": text in texts})
        for token in document.get("added_tokens") or []:
            added[token["id"]] = _token(token)
    return added, named


def _token(value: Any) -> Any:
    """Returns a token of the library for its fields; texts and None are passed through."""
    import tokenizers

    if value is None or isinstance(value, str):
        return value
    fields = {name: x for name, x in value.items() if name not in ("__type", "id", "content")}
    return tokenizers.AddedToken(value["content"], **fields)


def _text(token: Any) -> str | None:
    return getattr(token, "content", token)


def _new_tokens(tokenizer: Any, added: Mapping[int, Any], special: Mapping[str, Any]) -> list[Any]:
    """Returns the tokens to add in the order in which they get their ids."""
    import tokenizers

    tokens = [token for _, token in sorted(added.items())]
    known = {token.content for token in tokens}
    known |= {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    for token in special.values():
        if token is not None and _text(token) not in known:
            text = isinstance(token, str)
            tokens.append(tokenizers.AddedToken(token, special=True) if text else token)
    names = {_text(token) for name, token in special.items() if not name.isdigit()}
    for token in tokens:
        token.special = token.special or token.content in names
    return tokens


def _add_ends(tokenizer: Any, config: Mapping[str, Any], special: Mapping[str, Any]) -> None:
    """Lets a text begin or end with a token, as some configurations have it."""
    import tokenizers

    wanted = {"bos_token": config.get("add_bos_token"), "eos_token": config.get("add_eos_token")}
    ends = {name: _text(special.get(name)) for name, add in wanted.items() if add}
    if any(ends.values()):
        template = [ends.get("bos_token"), "$A", ends.get("eos_token")]
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=[part for part in template if part],
            special_tokens=[(end, tokenizer.token_to_id(end)) for end in ends.values() if end],
        )
