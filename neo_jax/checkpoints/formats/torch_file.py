"""Files of `torch.save`, through torch: mapped into memory, and never a pickle that runs code."""

import contextlib
import functools
import io
import pickle
import pickletools
import warnings
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, ZipFile, is_zipfile

import numpy as np

from neo_jax.checkpoints.formats.stored import StoredTensor
from neo_jax.errors import NeoError, reason
from neo_jax.files.paths import file_size, is_remote

# Of a pickle every byte may become an object of sixty, and its reader takes a piece for each; over
# a text that it does not like, torch takes time that is quadratic in its length. A tensor takes a
# hundred bytes of a pickle; and weights that are packed are little smaller than they were.
_MOST_PICKLE_BYTES = 1 << 20
_LONGEST_TEXT = 4096
_MOST_DIRECTORY_BYTES = 10 << 20
_MOST_UNPACKED = 10  # times the size of the file, where it is more than:
_SMALL_BYTES = 64 << 20


class _BombError(Exception):
    """A file that would take far more memory than its size."""


def open_file(path: Path, files: contextlib.ExitStack) -> dict[str, StoredTensor]:
    """Opens a file of tensors by name.

    An archive whose entries are compressed cannot be mapped and is read whole, as is a file of
    torch before 1.6, which is no archive.

    Raises:
      NeoError: torch is not installed, or the file is damaged, is in the cloud, holds more than
        tensors, or would take far more memory than its size.
    """
    del files  # torch closes what it maps with the last tensor
    if is_remote(path):
        raise NeoError(f"{path}: a .bin file must be on disk; copy its folder there.")
    try:
        import torch
    except ImportError:
        raise NeoError(f"{path} needs torch; install it: pip install 'neo_jax[torch]'") from None
    try:
        file = _Pieces(io.FileIO(path))
    except OSError as error:
        raise NeoError(f"cannot read {path}: {reason(error)}.") from error
    try:
        with file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of kinds of tensors that are refused later
            size, mapped = _look_into(file) if is_zipfile(path) else (file_size(path), False)
            file.longest = _LONGEST_TEXT
            state = torch.load(
                path if mapped else file, map_location="cpu", weights_only=True, mmap=mapped
            )
        state = _weights(state)
        if not isinstance(state, dict) or not all(
            isinstance(name, str) and isinstance(value, torch.Tensor)
            for name, value in state.items()
        ):
            raise NeoError(f"{path} holds no tensors by name; save model.state_dict().")
        found = {
            name: StoredTensor(
                path, name, _kind(tensor), tuple(tensor.shape), functools.partial(_view, tensor)
            )
            for name, tensor in state.items()
        }
        # Tensors may share what is stored, as the output head and the table of tokens do.
        if sum(stored.num_bytes for stored in found.values()) > 2 * size:
            raise _BombError("its tensors are larger than what it stores of them")
        return found
    except NeoError:
        raise
    except pickle.UnpicklingError as error:
        raise NeoError(
            f"{path} is damaged, or holds more than tensors, which could run code "
            f"({_why(error)}); get the checkpoint as model.safetensors."
        ) from None
    except Exception as error:  # torch shows damage in many ways
        raise NeoError(
            f"{path} is damaged or cut short ({_why(error)}); download or copy it again."
        ) from None


def _weights(state: Any) -> Any:
    """Returns what of a training program's checkpoint are the weights; others as they are."""
    nested = (state.get(name) for name in _NESTED) if isinstance(state, dict) else ()
    return next((found for found in nested if isinstance(found, dict)), state)


_NESTED = ("state_dict", "model_state_dict", "model", "module")


class _Pieces(io.BufferedReader):
    """A file of so many pieces at most, and none too long; torch reads storages past it."""

    left = _MOST_PICKLE_BYTES
    longest = _MOST_DIRECTORY_BYTES

    def read(self, size: int | None = -1, /) -> bytes:
        self.left -= 1
        if self.left < 0 or (size or 0) > self.longest:
            raise _BombError(_TOO_MUCH)
        return super().read(size)

    def readline(self, size: int | None = -1, /) -> bytes:
        line = super().readline(self.longest)
        if len(line) == self.longest:
            raise _BombError(_TOO_MUCH)
        return line


_TOO_MUCH = "it holds more objects than any model, or longer names"


def _look_into(file: _Pieces) -> tuple[int, bool]:
    """Returns how many bytes an archive unpacks to, and whether none of them is compressed."""
    with ZipFile(file) as archive:
        entries = archive.infolist()
        packed, unpacked = file.seek(0, io.SEEK_END), sum(entry.file_size for entry in entries)
        if unpacked > max(_MOST_UNPACKED * packed, _SMALL_BYTES):
            raise _BombError(f"its {packed} bytes unpack to {unpacked}")
        for entry in entries:
            if entry.filename.endswith(".pkl"):
                if entry.file_size > _MOST_PICKLE_BYTES:
                    raise _BombError(_TOO_MUCH)
                with archive.open(entry) as pickled:
                    _check_texts(pickled.read(_MOST_PICKLE_BYTES))
    file.seek(0)
    return unpacked, all(entry.compress_type == ZIP_STORED for entry in entries)


def _check_texts(pickled: bytes) -> None:
    for _, argument, _ in pickletools.genops(pickled):
        if isinstance(argument, str | bytes) and len(argument) > _LONGEST_TEXT:
            raise _BombError(_TOO_MUCH)


def _kind(tensor: Any) -> str:
    """Returns the name of a tensor's dtype, after what else is unusual about it."""
    unusual = [] if str(tensor.layout) == "torch.strided" else [str(tensor.layout)]
    unusual += [] if tensor.device.type == "cpu" else [tensor.device.type]
    return " ".join([*unusual, str(tensor.dtype)]).replace("torch.", "")


def _view(tensor: Any) -> np.ndarray:
    tensor = tensor.detach().resolve_neg()
    if str(tensor.dtype) == "torch.bfloat16":  # numpy knows none
        import torch

        return tensor.view(torch.int16).numpy().view("bfloat16")
    return tensor.numpy()


def _why(error: BaseException) -> str:
    """Returns the first line of what torch says, without advice to turn its guard off."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    found = [line for line in lines if "Unsupported" in line or "nsupported" in line]
    first = (found or lines or [type(error).__name__])[0]
    first = first.partition(" In PyTorch")[0].partition(" Please")[0]
    return first[:150].rstrip(".:")
