"""Folders of GPT-Neo 125M and GPT-2 124M with drawn weights, which every server loads.

The tokenizer has a word for each of the 50,257 ids, and no text ever ends by itself.
"""

import dataclasses
import json
from pathlib import Path

import jax

from neo_jax.checkpoints.save import save_pretrained
from neo_jax.config import preset
from neo_jax.model.transformer import Neo, init_params


def make(folder: Path, name: str) -> Path:
    """Writes the folder of a preset; returns it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    config = dataclasses.replace(preset(name), eos_token_id=-1)
    params = jax.jit(lambda key: init_params(Neo(config), key))(jax.random.key(0))
    save_pretrained(folder, config, params)
    words = {f"w{i}": i for i in range(config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "w0"}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    return folder
