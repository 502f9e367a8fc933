"""notebooks/: each runs from top to bottom, without a network, and prints what is stored in it."""

import ast
import re
import runpy
import sys
from pathlib import Path

import nbformat
import pytest

pytestmark = pytest.mark.optimized

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
ALWAYS_THERE = {"IPython", "jax", "neo_jax", "numpy"}
EXTRA_OF = {"matplotlib": "plot", "torch": "torch", "transformers": "torch"}
CLOSED = "http://127.0.0.1:9"  # nobody listens

execute = runpy.run_path(str(FOLDER / "execute.py"))["execute"]


def test_they_are_all_there():
    names = ["classify", "context", "finetune", "quickstart", "serve", "sharding"]
    assert [path.stem for path in NOTEBOOKS] == names


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_can_be_opened_in_colab_and_installs_what_it_needs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    title, install, *_ = notebook.cells
    link = (
        r"https://colab\.research\.google\.com/github/([\w-]+/\w+)/blob/main/notebooks/(\w+)\.ipynb"
    )
    repository, name = re.search(link, title.source).groups()
    assert name == path.stem
    assert f"github.com/{repository}" in install.source
    assert 'find_spec("neo_jax") is None' in install.source
    extras = re.search(r"neo_jax\[([\w,]+)\]", install.source)[1].split(",")
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    for package in imported(re.sub(r"%\w+.*", "pass", code)) - ALWAYS_THERE:
        assert EXTRA_OF[package] in extras


def imported(code):
    """Names of the packages that code imports, without the standard library."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        found |= {name.partition(".")[0] for name in names}
    return found - set(sys.stdlib_module_names)


@pytest.mark.tpu_compiler
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_and_shows_what_is_stored(path, monkeypatch):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, CLOSED)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    notebook = execute(path)
    stored = nbformat.read(path, as_version=4)
    shown = list(map(kinds_of, notebook.cells))
    assert shown == list(map(kinds_of, stored.cells)), "run notebooks/execute.py"
    assert any("image/png" in kinds for kinds in shown)


def kinds_of(cell):
    """What the outputs of a cell are: the digits of a text depend on the CPU, and on luck."""
    return sorted({kind for output in cell.get("outputs", []) for kind in of_output(output)})


def of_output(output):
    return [output.name] if output.output_type == "stream" else list(output.data)
