"""Data sets of the Hugging Face hub, streamed by the library `datasets`: hf://NAME:CONFIG:SPLIT."""

import importlib.util
import logging
import os
from collections.abc import Iterator
from typing import Any

from neo_jax.errors import NeoError, reason

SCHEME = "hf://"


class HubDataset:
    """A split of a data set, by name or by the path of a folder that `datasets` can load.

    The name is hf://NAME, hf://NAME:CONFIG or hf://NAME:CONFIG:SPLIT; an empty configuration is the
    only one there is, the split is else "train".

    Raises:
      NeoError: `datasets` is not installed, or there is no such data set.
    """

    def __init__(self, name: str, text_field: str) -> None:
        if importlib.util.find_spec("datasets") is None:
            raise NeoError(f"{name} needs datasets; install it: pip install 'neo_jax[datasets]'")
        import datasets

        datasets.logging.set_verbosity(logging.CRITICAL)  # what it logs, it also raises
        self._name, self._field = name, text_field
        path, config, self._split = [*name.removeprefix(SCHEME).split(":"), "", ""][:3]
        try:
            self._builder: Any = datasets.load_dataset_builder(path, config or None)
        except Exception as error:  # of several libraries, which share no base
            raise NeoError(f"cannot load {name}: {reason(error)}") from error

    @property
    def version(self) -> str:
        """Changes when the data does: the commit on the hub, sizes and times of local files."""
        files = self._builder.config.data_files or {}
        names = [str(file) for split in files.values() for file in split]
        stats = [os.stat(name) for name in names if os.path.isfile(name)]
        return f"{self._builder.hash} {[(stat.st_size, stat.st_mtime_ns) for stat in stats]}"

    def texts(self) -> Iterator[str]:
        """Yields the text of every row.

        Raises:
          NeoError: there is no such split or column, or reading fails.
        """
        for number, row in enumerate(self.rows()):
            text = row.get(self._field)
            if not isinstance(text, str):
                raise NeoError(
                    f"{self._name}: row {number} has no text '{self._field}'; name another "
                    f"--text-field of: {', '.join(row)}."
                )
            yield text

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yields every row by its columns, labels by their names.

        Raises:
          NeoError: there is no such split, or reading fails.
        """
        try:
            stream = self._builder.as_streaming_dataset(split=self._split or "train")
            # Of a list of labels, such as of words, its entries have the names.
            features = (stream.features or {}).items()
            found = {name: getattr(feature, "feature", feature) for name, feature in features}
            named = {name: each.names for name, each in found.items() if hasattr(each, "names")}
            for row in stream:
                yield row | {name: _named(row[name], names) for name, names in named.items()}
        except NeoError:
            raise
        except Exception as error:  # of several libraries, which share no base
            raise NeoError(f"cannot read {self._name}: {reason(error)}") from error


def _named(value: Any, names: list[str]) -> Any:
    """Returns the name of a label, or those of a list; what has none is left as it is."""
    if isinstance(value, list):
        return [_named(each, names) for each in value]
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else value
