"""Configs as the files that `neo-jax train` reads."""

import dataclasses
from pathlib import Path


def write_config(path: Path, config) -> None:
    """Writes a program that makes a config, with the imports of all dataclasses that it holds."""
    imports = [f"from {each.__module__} import {each.__qualname__}\n" for each in _types(config)]
    path.write_text(f"{''.join(imports)}config = {config!r}\n")


def _types(value):
    yield type(value)
    for field in dataclasses.fields(value):
        held = getattr(value, field.name)
        if dataclasses.is_dataclass(held):
            yield from _types(held)
