"""Text to token ids and back: byte-level BPE (GPT-2, GPT-Neo) and SentencePiece.

The libraries are imported by the class that uses them, so importing this module costs nothing.
"""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from neo_jax.checkpoints import hub
from neo_jax.errors import NeoError, brief, reason
from neo_jax.files.json_text import read_json
from neo_jax.files.paths import is_remote, make_path
from neo_jax.text.byte_pair import END_OF_TEXT as END_OF_TEXT
from neo_jax.text.byte_pair import build, find_byte_pairs, library

_NAMES = ("added_tokens.json", "special_tokens_map.json", "tokenizer_config.json")
_BYTE_PAIR_FILES = ("vocab.json", "merges.txt", *_NAMES)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", *_BYTE_PAIR_FILES)
"""Every file that `save` may write."""


class Tokenizer(Protocol):
    """What the package asks of a tokenizer.

    No method truncates or pads, and by default `encode` adds nothing to the ids of the text.
    Special tokens such as the end of text have no text of their own: `decode` leaves them out, and
    ids outside the vocabulary too (a model's vocabulary may be padded beyond its tokenizer's).
    """

    vocab_size: int
    eos_id: int | None  # ends a text; None where the vocabulary has no such token

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Returns the ids of a text.

        Args:
          text: a text.
          add_special_tokens: whether to put before and after it what the files say that a text
            begins and ends with, as a call of transformers' tokenizer does.

        Raises:
          NeoError: the text holds lone surrogates, as undecodable bytes on a command line become.
        """
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of every text, using all cores; raises as `encode` does."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids; bytes that are not UTF-8 become U+FFFD."""
        ...

    def token_name(self, token: int) -> str:
        """Returns how the vocabulary spells a token; raises NeoError for what is none."""
        ...

    def token_bytes(self, token: int) -> bytes:
        """Returns what a token adds to a text, none for special ones; raises as `token_name`.

        Joined they are the UTF-8 of a text, which SentencePiece begins with a space.
        """
        ...

    def save(self, folder: Path) -> None:
        """Copies the tokenizer's files into a folder, from which `load_tokenizer` loads it."""
        ...


class BytePairTokenizer:
    """A tokenizer of the `tokenizers` library, such as the byte-level BPE of GPT-2 and GPT-Neo.

    Its ids are those of transformers' AutoTokenizer: see `neo_jax.text.byte_pair`. Special tokens
    written out in a text ("<|endoftext|>") become their one id.

    Args:
      source: a folder with tokenizer.json, or with vocab.json and merges.txt, which OpenAI calls
        encoder.json and vocab.bpe; or a tokenizer.json.

    Raises:
      NeoError: a file is missing or corrupt, files contradict each other, or the end-of-text token
        is not in the vocabulary.
    """

    def __init__(self, source: str | os.PathLike[str]) -> None:
        source = make_path(source)
        self.folder = source if source.is_dir() else source.parent
        file = source / "tokenizer.json" if source.is_dir() else source
        self._file = file if file.is_file() else None  # None for vocab.json and merges.txt
        self._tokenizer, self.eos_id = build(self.folder, self._file)
        self._changed = False
        self._count()

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Returns the ids of a text."""
        check_unicode(text)
        with library(_FAILS):
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of every text."""
        check_unicode(*texts)
        with library(_FAILS):
            batch = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in batch]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids."""
        with library(_FAILS):
            return self._tokenizer.decode(_known(ids, self.vocab_size), skip_special_tokens=True)

    def token_name(self, token: int) -> str:
        """Returns how the vocabulary spells a token."""
        name = self._tokenizer.id_to_token(token) if 0 <= token < 2**31 else None
        return _named(name, token)

    def token_bytes(self, token: int) -> bytes:
        """Returns what a token adds to a text."""
        name = self.token_name(token)
        added = self._tokenizer.get_added_tokens_decoder().get(token)
        if added is not None and added.special:
            return b""
        if "ByteLevel" not in str(self._tokenizer.decoder):
            return _piece_bytes(name)
        spelled = {*name} <= _BYTES.keys()  # else it was added, and stands for itself
        return bytes(_BYTES[char] for char in name) if spelled else name.encode()

    @property
    def pipeline(self) -> Any:
        """The tokenizer of the `tokenizers` library, to be looked at."""
        return self._tokenizer

    def add_tokens(self, tokens: Sequence[str]) -> None:
        """Adds special tokens at the end of the vocabulary.

        Raises:
          NeoError: a token is empty, or there already.
        """
        for token in tokens:
            if not token or self._tokenizer.token_to_id(token) is not None:
                raise NeoError(f"'{token}' cannot be a new token: it is empty or there already.")
            self._tokenizer.add_special_tokens([token])
        self._changed = True
        self._count()

    def save(self, folder: Path) -> None:
        """Copies the files, and adds those without which transformers cannot load the folder."""
        config = folder / "tokenizer_config.json"
        if self._changed:  # all is in tokenizer.json, and what else names tokens would be wrong
            self._write(folder)
            fields = read_json(source) if (source := self.folder / config.name).is_file() else {}
            fields.pop("added_tokens_decoder", None)
            self._configure(config, fields)
            return
        for name in _BYTE_PAIR_FILES:
            _copy(self.folder / name, folder / name)
        if self._file:
            _copy(self._file, folder / "tokenizer.json")
        else:
            self._write(folder)
        if not config.exists():
            self._configure(config, {})

    def _write(self, folder: Path) -> None:
        if not is_remote(folder):
            folder.mkdir(parents=True, exist_ok=True)
        text = self._tokenizer.to_str(pretty=True)
        (folder / "tokenizer.json").write_text(text, encoding="utf-8")

    def _configure(self, path: Path, fields: dict[str, Any]) -> None:
        end = None if self.eos_id is None else self._tokenizer.id_to_token(self.eos_id)
        fields = dict.fromkeys(("bos_token", "eos_token", "unk_token"), end) | fields
        fields |= {"tokenizer_class": "PreTrainedTokenizerFast"}  # takes tokenizer.json as it is
        path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")

    def _count(self) -> None:
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1


_FAILS = "the tokenizer's library fails ({}); correct the files of the tokenizer."


class SentencePieceTokenizer:
    """A SentencePiece model.

    Args:
      source: a .model file, or a folder with tokenizer.model, spiece.model or one other *.model.

    Raises:
      NeoError: no such file, more than one, or a corrupt one; or the folder names a class of
        transformers, whose ids are others.
    """

    def __init__(self, source: str | os.PathLike[str]) -> None:
        import sentencepiece

        source = make_path(source)
        self._file = _model_file(source)
        self.folder = self._file.parent
        config = source / "tokenizer_config.json"
        kind = read_json(config).get("tokenizer_class") if config.is_file() else None
        if kind:
            raise NeoError(
                f"{source}: the tokenizer_class {brief(kind)} makes other ids than its .model file "
                "alone; add the tokenizer.json that transformers makes of it."
            )
        self._pieces = sentencepiece.SentencePieceProcessor()
        try:
            self._pieces.LoadFromSerializedProto(self._file.read_bytes())
        except OSError as error:
            raise NeoError(f"cannot read {self._file}: {reason(error)}.") from error
        except RuntimeError as error:
            raise NeoError(f"{self._file} is not a SentencePiece model; is it whole?") from error
        self.vocab_size: int = self._pieces.GetPieceSize()
        end = self._pieces.eos_id()
        self.eos_id: int | None = end if end >= 0 else None

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Returns the ids of a text, to which nothing is ever added."""
        check_unicode(text)
        return self._pieces.EncodeAsIds(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of every text."""
        check_unicode(*texts)
        return self._pieces.EncodeAsIds(list(texts)) if texts else []

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids."""
        return self._pieces.DecodeIds(_known(ids, self.vocab_size))

    def token_name(self, token: int) -> str:
        """Returns how the vocabulary spells a token."""
        known = _known([token], self.vocab_size)
        return _named(self._pieces.IdToPiece(token) if known else None, token)

    def token_bytes(self, token: int) -> bytes:
        """Returns what a token adds to a text."""
        name = self.token_name(token)
        if self._pieces.IsUnknown(token):
            return self.decode([token]).encode()
        return b"" if self._pieces.IsControl(token) else _piece_bytes(name)

    def save(self, folder: Path) -> None:
        """Copies the model as tokenizer.model."""
        _copy(self._file, folder / "tokenizer.model")


def load_tokenizer(source: str | os.PathLike[str]) -> Tokenizer:
    """Loads a tokenizer from a folder, or from a tokenizer.json or .model file.

    In a folder tokenizer.json comes first, then vocab.json with merges.txt, encoder.json with
    vocab.bpe, and a *.model.

    Raises:
      NeoError: there is no tokenizer, or a file of it is corrupt.
    """
    path = make_path(source)
    if not path.exists():
        raise NeoError(f"{path} does not exist; name a folder that holds a tokenizer's files.")
    if path.is_file():
        return SentencePieceTokenizer(path) if path.suffix == ".model" else BytePairTokenizer(path)
    kind = _kind(path)
    if kind is not None:
        return kind(path)
    raise NeoError(
        f"{path} holds no tokenizer; put tokenizer.json there, or vocab.json and merges.txt, or a "
        "SentencePiece tokenizer.model."
    )


def find_tokenizer(name: str | os.PathLike[str]) -> Tokenizer:
    """Loads a tokenizer by a name that `neo_jax.load` takes too, or from a file of one.

    From the hub comes the tokenizer alone, without weights.

    Raises:
      NeoError: as `load_tokenizer` and `neo_jax.checkpoints.hub.resolve`.
    """
    if make_path(name).is_file():
        return load_tokenizer(name)
    return load_tokenizer(hub.resolve(name, weights=False))


def has_tokenizer(folder: str | os.PathLike[str]) -> bool:
    """Returns whether a folder holds files that `load_tokenizer` reads."""
    return _kind(make_path(folder)) is not None


def _kind(folder: Path) -> type[BytePairTokenizer] | type[SentencePieceTokenizer] | None:
    if (folder / "tokenizer.json").is_file() or find_byte_pairs(folder):
        return BytePairTokenizer
    return SentencePieceTokenizer if any(folder.glob("*.model")) else None


class StreamDecoder:
    """Text from ids as they arrive.

    Everything `push` and `flush` return, joined, is `decode(prompt_ids + ids)` without the
    `decode(prompt_ids)` it begins with. A character whose bytes have not all arrived is held back;
    one that the prompt leaves unfinished is returned whole.

    Args:
      tokenizer: decodes the ids.
      prompt_ids: the ids that come before; their text is not returned.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        # Only a window is decoded: ids whose text is out already, then the new ones. The old ones
        # are there because SentencePiece drops the space before the first word it decodes.
        self._window = list(prompt_ids)
        self._seen = tokenizer.decode(self._window)  # of the window's text, what is out already
        self._settled = 0 if self._seen.endswith(_BROKEN) else len(self._window)

    def push(self, ids: Sequence[int]) -> str:
        """Returns the text that these ids complete, "" where a character is still unfinished."""
        self._window.extend(ids)
        text = self._tokenizer.decode(self._window)
        # An unfinished character has at most three bytes, and decodes to as many U+FFFD or fewer.
        ready = text
        for _ in range(3):
            ready = ready.removesuffix(_BROKEN)
        new = self._advance(ready)
        if ready == text:
            context = self._window[self._settled :]
            seen = self._tokenizer.decode(context)
            if seen:  # else it is no left context: the next word would lose its space
                self._window, self._seen, self._settled = context, seen, len(context)
        return new

    def flush(self) -> str:
        """Returns what was held back, unfinished bytes as U+FFFD."""
        return self._advance(self._tokenizer.decode(self._window))

    def _advance(self, text: str) -> str:
        pairs = enumerate(zip(text, self._seen, strict=False))
        shared = next((i for i, (a, b) in pairs if a != b), min(len(text), len(self._seen)))
        if shared < len(text):
            self._seen = text
        return text[shared:]


_BROKEN = "\ufffd"


def check_unicode(*texts: str) -> None:
    """Raises NeoError for texts with lone surrogates, which have no UTF-8 form."""
    try:
        for text in texts:
            text.encode()
    except UnicodeEncodeError as error:
        raise NeoError(
            f"the text is not Unicode: character {error.start} is the lone surrogate "
            f"{text[error.start]!r}; was it read from bytes that are not UTF-8?"
        ) from error


def _named(name: str | None, token: int) -> str:
    if name is None:
        raise NeoError(f"token id {token} is not in the vocabulary.")
    return name


def _piece_bytes(piece: str) -> bytes:
    """Returns what a piece of SentencePiece stands for: U+2581 is a space, <0x0A> a byte."""
    found = re.fullmatch("<0x([0-9A-Fa-f]{2})>", piece)
    return bytes.fromhex(found[1]) if found else piece.replace("\u2581", " ").encode()


# Which bytes characters of GPT-2's vocabulary stand for: those that show, themselves.
_SHOWN = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_HIDDEN = [byte for byte in range(256) if byte not in _SHOWN]
_BYTES = {chr(256 + i): b for i, b in enumerate(_HIDDEN)} | {chr(b): b for b in _SHOWN}


def _known(ids: Sequence[int], vocab_size: int) -> list[int]:
    return [int(i) for i in ids if 0 <= i < vocab_size]


def _model_file(source: Path) -> Path:
    if not source.is_dir():
        return source
    found = sorted(source.glob("*.model"))
    usual = [path for path in found if path.name in ("tokenizer.model", "spiece.model")]
    if len(found) == 1 or usual:
        return (usual or found)[-1]  # tokenizer.model, if both are there
    names = ", ".join(path.name for path in found) or "no *.model"
    raise NeoError(f"{source} holds {names}; name one SentencePiece .model file.")


def _copy(source: Path, target: Path) -> None:
    if not is_remote(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_file():
        target.write_bytes(source.read_bytes())  # read before it is written: both may be one file
