"""The shape of the package: who may import whom, how long a file is, what has a docstring.

`python tests/test_architecture.py` writes the tree of rooms into README.md.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "neo_jax"
FILES = sorted(path for path in PACKAGE.rglob("*.py") if "bundled" not in path.parts)

ROOMS = [
    "errors", "fields", "axes", "files", "families", "labels", "config", "devices", "sharding",
    "ops", "model", "transforms", "checkpoints", "decode", "text", "data", "training", "evaluation",
    "serving", "tools", "cli",
]  # fmt: skip
"""In reading order. Imports go to earlier rooms, and within a room."""
RANK = {room: rank for rank, room in enumerate(ROOMS)}


def name(path):
    """The module of a file, as in "neo_jax.decode.engine"."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def room(module):
    """The first name below the package."""
    return module.split(".")[1]


def imports(path):
    """Every module of the package that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the layer"
            # `from neo_jax.model import cache` names a module, `from neo_jax.config import preset`
            # does not
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            found = [dotted if is_module(dotted) else node.module for dotted in inner]
        else:
            continue
        yield from (module for module in found if module.split(".")[0] == "neo_jax")


def is_module(dotted):
    path = PACKAGE.parent.joinpath(*dotted.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


OUTER = ("__init__", "__main__", "lora")  # the last for the configs of version 0.1.0
INNER = [path for path in FILES if path.parent != PACKAGE or path.stem not in OUTER]


def test_every_module_is_in_a_room():
    assert {room(name(path)) for path in INNER} == set(RANK)


@pytest.mark.parametrize("path", INNER, ids=name)
def test_imports_go_one_way(path):
    mine = room(name(path))
    for module in imports(path):
        if module == "neo_jax":  # the version, and the package's folder
            assert mine in ("cli", "evaluation", "training")
            continue
        theirs = room(module)
        assert theirs == mine or RANK[theirs] < RANK[mine], f"{name(path)} imports {module}"
        if mine in ("sharding", "ops", "model", "decode"):  # mathematics, of arrays alone
            assert theirs not in ("files", "checkpoints"), f"{name(path)} imports {module}"


def test_the_test_of_imports_sees_them_all():
    found = {name(path): set(imports(path)) for path in FILES}
    assert {"neo_jax.model.cache", "neo_jax.config", "neo_jax.ops.attention"} <= found[
        "neo_jax.model.transformer"
    ]
    assert {"neo_jax.checkpoints.save", "neo_jax.decode.options"} <= found[
        "neo_jax.text.language_model"
    ]
    assert "neo_jax.training.loop" in found["neo_jax.cli.train"]  # inside a function


@pytest.mark.parametrize("path", FILES, ids=name)
def test_files_are_short_and_explain_themselves(path):
    source = path.read_text()
    assert len(source.splitlines()) <= (300 if path == PACKAGE / "model/transformer.py" else 400)
    assert "TODO" not in source
    tree = ast.parse(source)
    assert ast.get_docstring(tree)
    for node, owner in definitions(tree):
        assert ast.get_docstring(node), f"{name(path)}: {owner}{node.name} has no docstring"


def tree():
    """README's list of rooms, each with the first sentence of its docstring."""
    lines = ["neo_jax/"]
    for name_ in ROOMS:
        folder = PACKAGE / name_
        source = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
        says = ast.get_docstring(ast.parse(source.read_text())).split("\n")[0].rstrip(".")
        lines.append(f"  {name_ + ('/' if folder.is_dir() else '.py'):14}{says}")
    return "\n".join(lines) + "\n"


TREE = re.compile(r"neo_jax/\n.*?(?=configs/ )", re.DOTALL)


def test_the_tree_in_the_readme():
    found = TREE.search((PACKAGE.parent / "README.md").read_text())
    assert found[0] == tree(), "run `python tests/test_architecture.py`"


def definitions(node, owner=""):
    """Public functions, classes and methods; what is inside a function is its own affair."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.ClassDef) and not child.name.startswith("_"):
            if not any(ast.unparse(mark) == "overload" for mark in child.decorator_list):
                yield child, owner
            if isinstance(child, ast.ClassDef):
                yield from definitions(child, f"{owner}{child.name}.")
        elif isinstance(child, ast.If):
            yield from definitions(child, owner)


@pytest.mark.parametrize("path", FILES, ids=name)
def test_partition_specs_are_made_in_two_files(path):
    made_here = (PACKAGE / "sharding/rules.py", PACKAGE / "sharding/fsdp.py")
    assert "PartitionSpec" not in path.read_text() or path in made_here


@pytest.mark.parametrize("path", INNER, ids=name)
def test_nothing_asks_which_family_a_model_is(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Compare | ast.MatchValue) and path.stem != "config":
            says = ast.unparse(node)
            assert not re.search(r"\b(family|gpt2|gpt_neo|GPT2|GPT_NEO)\b", says), says


def test_platforms_are_told_apart_in_three_rooms():
    """Elsewhere a function of `ops` or `devices` has the form, or the answer, for each of them."""
    asks = re.compile(
        r"platform_dependent|optimization_barrier|\.platform\b(?!\()|default_backend|compiler_options"
    )
    found = {name(path) for path in FILES if asks.search(path.read_text())}
    assert {"ops", "devices", "tools"} == {room(module) for module in found}, sorted(found)


def test_importing_the_package_imports_nothing_heavy(tmp_path):
    script = (
        "import sys, neo_jax, neo_jax.errors, neo_jax.config, neo_jax.cli\n"
        "print(sorted({'jax', 'flax', 'numpy', 'torch', 'tyro'} & set(sys.modules)))\n"
        "neo_jax.NeoError\n"
        "print('jax' in sys.modules)\n"
        "neo_jax.load\n"
        "print('jax' in sys.modules, 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["[]", "False", "True False False"]


if __name__ == "__main__":
    readme = PACKAGE.parent / "README.md"
    readme.write_text(TREE.sub(lambda _: tree(), readme.read_text()))
