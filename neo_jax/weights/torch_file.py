"""Files of `torch.save`, through torch: mapped into memory, and never a pickle that runs code."""

import contextlib
import pickle
from pathlib import Path
from zipfile import is_zipfile

import numpy as np

from neo_jax.errors import NeoError, reason
from neo_jax.paths import is_remote
from neo_jax.weights.stored import StoredTensor


def open_file(path: Path, files: contextlib.ExitStack) -> dict[str, StoredTensor]:
    """Opens a file of tensors by name.

    Raises:
      NeoError: torch is not installed, or the file is damaged, lies in the cloud, or holds more
        than tensors.
    """
    del files  # torch closes what it maps with the last tensor
    if is_remote(path):
        raise NeoError(f"{path}: a .bin file must be on disk; copy its folder there.")
    try:
        import torch
    except ImportError:
        raise NeoError(f"{path} needs torch; install it: pip install 'neo_jax[torch]'") from None
    try:
        # What torch wrote before 1.6 is no zip archive, and cannot be mapped.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise NeoError(
            f"{path} is damaged, or holds more than tensors, which could run code "
            f"({_why(error)}); get the checkpoint as model.safetensors."
        ) from None
    except OSError as error:
        raise NeoError(f"cannot read {path}: {reason(error)}.") from error
    except Exception as error:  # torch shows damage in many ways
        raise NeoError(
            f"{path} is damaged or cut short ({_why(error)}); download or copy it again."
        ) from None
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    ):
        raise NeoError(f"{path} holds no tensors by name; save model.state_dict().")
    found = {}
    for name, tensor in state.items():
        dtype = str(tensor.dtype).removeprefix("torch.")

        def view(tensor: torch.Tensor = tensor, dtype: str = dtype) -> np.ndarray:
            if dtype == "bfloat16":  # numpy knows none
                return tensor.view(torch.int16).numpy().view(dtype)
            return tensor.numpy()

        found[name] = StoredTensor(path, name, dtype, tuple(tensor.shape), view)
    return found


def _why(error: BaseException) -> str:
    """Returns the first line of what torch says, without advice to turn its guard off."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    found = [line for line in lines if "Unsupported" in line or "nsupported" in line]
    return (found or lines or [type(error).__name__])[0][:150].rstrip(".:")
