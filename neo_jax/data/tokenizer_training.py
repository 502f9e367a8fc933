"""Training a tokenizer: SentencePiece, or byte-level BPE as GPT-Neo's."""

import io
import os
import re
from collections.abc import Iterable, Iterator

from neo_jax.errors import NeoError
from neo_jax.files.paths import is_remote, make_path
from neo_jax.text.tokenizer import (
    END_OF_TEXT,
    BytePairTokenizer,
    SentencePieceTokenizer,
    check_unicode,
)

_SENTENCE = 1000  # characters: four bytes each at most, within SentencePiece's limit of 4192
_MOST_CHARACTERS = 200_000_000  # SentencePiece holds them in memory, several times over


def train_sentencepiece(
    texts: Iterable[str], vocab_size: int, output: str | os.PathLike[str]
) -> SentencePieceTokenizer:
    """Trains a unigram SentencePiece model; the same texts and size always give the same file.

    Newlines, runs of spaces and, by their bytes, all other characters survive encoding and
    decoding; only U+2581, by which SentencePiece writes a space, comes back as a space. A text is
    encoded as if a space preceded it, so that its first word has the ids it has further on.

    Args:
      texts: the documents to learn from; reading stops after about 200 million characters.
      vocab_size: the number of pieces, of which 256 are the bytes, and three <unk>, the end of
        text and the newline.
      output: the .model file to write, or a folder, in which it becomes tokenizer.model.

    Raises:
      NeoError: the texts are empty or too few for so many pieces, or the pieces too few for the
        characters of the texts.
    """
    import sentencepiece

    path = make_path(output)
    path = path if path.suffix == ".model" else path / "tokenizer.model"
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=_sentences(texts),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            hard_vocab_limit=True,
            character_coverage=0.99999,  # the rarest characters are left to the bytes
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,  # indentation is one piece, not one a space
            add_dummy_prefix=True,
            user_defined_symbols=["\n"],
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            eos_piece=END_OF_TEXT,
            num_threads=8,  # the sums, and so the pieces, depend on it: not the number of cores
            minloglevel=3,
        )
    except RuntimeError as error:
        raise NeoError(_training_error(str(error), vocab_size)) from error
    if not is_remote(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.getvalue())
    return SentencePieceTokenizer(path)


def train_byte_pairs(
    texts: Iterable[str], vocab_size: int, output: str | os.PathLike[str]
) -> BytePairTokenizer:
    """Trains byte-level BPE as GPT-2's, whose <|endoftext|> has id 0; transformers loads it too.

    Every text survives encoding and decoding. In memory are the different words of the texts.

    Args:
      texts: the documents to learn from; reading stops after about 200 million characters.
      vocab_size: the number of tokens, of which 256 are the bytes and one the end of text.
      output: the folder to write.

    Raises:
      NeoError: the texts are empty or too few for so many tokens, or the tokens fewer than 257.
    """
    import tokenizers

    if vocab_size < 257:
        raise NeoError(f"{vocab_size} tokens are too few for bytes; ask for at least 257.")
    folder = make_path(output)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_first_texts(texts), trainer)
    found = tokenizer.get_vocab_size()
    if found < vocab_size:
        raise NeoError(f"the text is too small for {vocab_size} tokens; ask for at most {found}.")
    if not is_remote(folder):
        folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    return BytePairTokenizer(folder)


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """Yields lines, the long ones cut at spaces; the space of a cut is implied by the next."""
    for text in _first_texts(texts):
        for line in text.split("\n"):
            start = 0
            while len(line) - start > _SENTENCE:
                cut = line.rfind(" ", start + 1, start + _SENTENCE)
                end = cut if cut > 0 else start + _SENTENCE
                yield line[start:end]
                start = end + 1 if cut > 0 else end
            if start < len(line):
                yield line[start:]


def _first_texts(texts: Iterable[str]) -> Iterator[str]:
    read = 0
    for text in texts:
        check_unicode(text)
        yield from filter(None, text.split(END_OF_TEXT))  # no piece is made of its characters
        read += len(text)
        if read > _MOST_CHARACTERS:
            return


def _training_error(message: str, vocab_size: int) -> str:
    fewer = re.search(r"Vocabulary size too high.*<= (\d+)", message, re.DOTALL)
    if fewer:
        return f"the text is too small for {vocab_size} pieces; ask for at most {fewer[1]}."
    more = re.search(r"smaller than required_chars\. (?:\d+) vs (\d+)", message)
    if more:
        return f"{vocab_size} pieces are too few for this text; ask for at least {more[1]}."
    if "sentences_.empty()" in message:
        return "there is no text to train a tokenizer on; is the input empty?"
    return f"cannot train a tokenizer of {vocab_size} pieces: {' '.join(message.split())}"
