"""Finding a checkpoint: a folder, a name on the Hugging Face hub, or the bundled model."""

import importlib.resources
import importlib.util
import os
import re
from pathlib import Path

from neo_jax.errors import NeoError, brief, reason, suggest
from neo_jax.files.paths import is_remote, make_path

PUBLISHED = {
    "gpt-neo-125m": "EleutherAI/gpt-neo-125m",
    "gpt-neo-1.3b": "EleutherAI/gpt-neo-1.3B",
    "gpt-neo-2.7b": "EleutherAI/gpt-neo-2.7B",
    "distilgpt2": "distilbert/distilgpt2",
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
}
"""Short names of models, and theirs on the hub."""

BUNDLED = "bundled"
"""The name of the model that comes with the package, where one is requested."""

_ADAPTER = "adapter_config.json"
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_FILES = (
    "config.json", "generation_config.json", _ADAPTER,
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "encoder.json", "vocab.bpe", "*.model",
)  # fmt: skip
_SAFETENSORS = ("*.safetensors", "*.safetensors.index.json")
_TORCH = (
    "pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json", "adapter_model.bin",
)  # fmt: skip
_FLAX = ("flax_model.msgpack", "flax_model-*.msgpack", "flax_model.msgpack.index.json")
_TENSORFLOW = ("checkpoint", "*.index", "*.data-*-of-*")


def resolve(
    model: str | os.PathLike[str] | None,
    *,
    revision: str | None = None,
    token: str | None = None,
    weights: bool = True,
) -> Path:
    """Returns the folder of a checkpoint, downloading it where need be.

    In the folder of a run of neo-jax train it is model/, or adapter/ where there is that alone.

    Args:
      model: a folder, also gs://bucket/folder; a published model, "gpt-neo-1.3b"; a name on the
        Hugging Face hub, "org/name"; "bundled" or None for the small model that comes with the
        package.
      revision: branch, tag or commit on the hub.
      token: for gated and private repositories; by default what `hf auth login` or HF_TOKEN set.
      weights: whether to download these too; without them it is for the tokenizer.

    Raises:
      NeoError: nothing has this name, or the hub does not hand it out; the message says which.
    """
    if model is None or (model == BUNDLED and not Path(BUNDLED).is_dir()):
        folder = Path(str(importlib.resources.files("neo_jax") / "bundled"))
        if not folder.is_dir():
            raise NeoError("this installation came without its bundled model; name a model.")
    elif not isinstance(model, str | os.PathLike):
        raise NeoError(f"a model is named by a folder or a hub name, not by {brief(model)}.")
    else:
        name = os.fspath(model)
        folder = make_path(name) if is_remote(name) else _local(name)
        if folder.is_file():
            raise NeoError(f"{name} is a file; name the folder that holds it.")
        if is_remote(folder) and not folder.is_dir():
            raise NeoError(f"there is no folder {name}; check the name of the bucket and the path.")
        if not name or not folder.is_dir():
            return _download(_hub_name(name), revision, token, _formats() if weights else [()])
        folder = _in_run(folder)
    if revision is not None:
        raise NeoError(f"revision '{revision}' is for names on the hub; {folder} is a folder.")
    return folder


def _local(name: str) -> Path:
    path = Path(os.path.expanduser(name))  # pathlib's raises for unknown users
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:  # too long, a loop of links, not ours to see
        raise NeoError(f"cannot look for the folder {name}: {reason(error)}.") from error
    return path


def _in_run(folder: Path) -> Path:
    """Returns what a run left in its folder for use; any other folder is itself."""
    for part, file in (("", "config.json"), ("", _ADAPTER), ("model", "config.json"),
                       ("adapter", _ADAPTER)):  # fmt: skip
        if (folder / part / file).is_file():
            return folder / part
    return folder


def _hub_name(name: str) -> str:
    """Returns "org/name" for a published model or a name that already has this form."""
    if name.lower() in PUBLISHED:
        return PUBLISHED[name.lower()]
    if not _HUB_NAME.fullmatch(name):
        raise NeoError(
            f"there is no folder and no published model '{name}'; give a folder, a hub name such "
            f"as org/name, or a published model.{suggest(name.lower(), [*PUBLISHED, BUNDLED])}"
        )
    return name


def _download(
    name: str, revision: str | None, token: str | None, formats: list[tuple[str, ...]]
) -> Path:
    """Returns the folder of a snapshot in the hub's cache; the hub library reports progress.

    Of the formats of its weights, which repositories may hold side by side, only the first comes.
    """
    import huggingface_hub  # slow to import, and needed for nothing else
    from huggingface_hub import errors

    try:
        for weights in formats:
            folder = huggingface_hub.snapshot_download(
                name,
                revision=revision,
                token=token,
                allow_patterns=[*_FILES, *weights],
                ignore_patterns=["*/*"],  # sub-folders hold other formats and training checkpoints
            )
            if any(next(Path(folder).glob(pattern), None) for pattern in weights):
                break
    except errors.GatedRepoError as error:
        raise NeoError(
            f"'{name}' is gated: accept its licence at https://huggingface.co/{name}, then pass "
            "your token or set HF_TOKEN."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise NeoError(
            f"'{name}' has no revision '{revision}'; see https://huggingface.co/{name}/commits."
        ) from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise NeoError(
            f"'{name}' is neither a folder nor a repository on the Hugging Face hub; check the "
            "name, and for a private repository pass your token or set HF_TOKEN."
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        if huggingface_hub.constants.HF_HUB_OFFLINE:
            fix = "HF_HUB_OFFLINE is set: unset it to download, or name a folder"
        else:
            fix = "the hub does not answer: check the connection, or name a folder"
        raise NeoError(
            f"'{name}' is no folder, no whole copy of it is in the hub's cache, and {fix}."
        ) from error
    except (OSError, errors.HTTPError) as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise NeoError(
            f"could not download '{name}' ({why}); try again, or name a folder."
        ) from error
    return Path(folder)


def _formats() -> list[tuple[str, ...]]:
    """Returns the names of files with weights, a format after another, the best first."""
    if importlib.util.find_spec("torch"):
        return [_SAFETENSORS, _TORCH, _FLAX, _TENSORFLOW]
    return [_SAFETENSORS, _FLAX, _TORCH, _TENSORFLOW]
