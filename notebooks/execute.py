"""Runs notebooks and stores their outputs in them: python notebooks/execute.py [NAME.ipynb ...]."""

import os
import sys
import tempfile
from pathlib import Path

import nbclient
import nbformat


def execute(path: Path) -> nbformat.NotebookNode:
    """Returns a notebook with the outputs of a run from top to bottom, in an empty folder."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        options = {"record_timing": False, "coalesce_streams": True, "kernel_name": "python3"}
        client = nbclient.NotebookClient(notebook, timeout=600, resources=resources, **options)
        client.execute(env={**os.environ, "PYTHONWARNINGS": "ignore"})
    for cell in notebook.cells:
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if not is_bar(output)]
    return notebook


def is_bar(output: nbformat.NotebookNode) -> bool:
    """Returns whether an output is but a bar of progress of some library."""
    return output.get("name") == "stderr" and "it/s]" in output.text


def main() -> None:
    """Runs the notebooks that are named, or all."""
    for path in map(Path, sys.argv[1:] or sorted(map(str, Path(__file__).parent.glob("*.ipynb")))):
        nbformat.write(execute(path), path)
        print(path)


if __name__ == "__main__":
    main()
