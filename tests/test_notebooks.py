"""notebooks/: each runs from top to bottom, without a network, and was stored without outputs."""

import re
from pathlib import Path

import nbclient
import nbformat
import pytest

pytestmark = pytest.mark.optimized

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
CLOSED = "http://127.0.0.1:9"  # nobody listens


def test_they_are_all_there():
    assert [path.stem for path in NOTEBOOKS] == ["finetune", "quickstart", "sharding"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_can_be_opened_in_colab_and_installs_what_it_needs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    title, install, *rest = notebook.cells
    link = (
        r"https://colab\.research\.google\.com/github/([\w-]+/\w+)/blob/main/notebooks/(\w+)\.ipynb"
    )
    repository, name = re.search(link, title.source).groups()
    assert name == path.stem
    assert f"github.com/{repository}" in install.source
    assert 'find_spec("neo_jax") is None' in install.source
    for cell in (install, *rest):
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


@pytest.mark.tpu_compiler
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path, tmp_path, monkeypatch):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, CLOSED)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()
    pictures = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert pictures
