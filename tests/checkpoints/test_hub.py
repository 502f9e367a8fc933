"""checkpoints/hub.py: from the name of a model to its folder; the network is replaced."""

from pathlib import Path

import httpx2
import huggingface_hub
import pytest
from huggingface_hub import errors as hub_errors

from neo_jax.checkpoints import hub as hub_module
from neo_jax.checkpoints.hub import resolve
from neo_jax.errors import NeoError


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    assert text.endswith((".", "?", ".)"))
    return text


@pytest.fixture
def hub(monkeypatch, tmp_path_factory):
    """Replaces the download; returns its calls, and a function that makes it fail.

    The repository has the weights that a whole model needs once.
    """
    calls = []
    snapshot = tmp_path_factory.mktemp("cache") / "snapshot"
    snapshot.mkdir()
    (snapshot / "model.safetensors").write_bytes(b"")

    def fail(error):
        def download(name, **options):
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)

    def download(name, **options):
        calls.append((name, options))
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return calls, fail


def response(status=404):
    request = httpx2.Request("GET", "https://huggingface.co/api/models/org/name")
    return httpx2.Response(status, request=request)


def failed_resolve(name="org/name", **options):
    with pytest.raises(NeoError) as error:
        resolve(name, **options)
    return one_line(error)


def test_a_folder_is_itself(tmp_path, monkeypatch, hub):
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("org/name") == Path("org/name")
    assert resolve(tmp_path) == tmp_path
    assert hub[0] == []
    assert "is a folder" in failed_resolve("org/name", revision="v1")
    (tmp_path / "file").write_text("")
    assert "file is a file" in failed_resolve("file")


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (["model/config.json", "adapter/adapter_config.json"], "model"),
        (["adapter/adapter_config.json"], "adapter"),
        (["config.json", "model/config.json"], ""),
        (["adapter_config.json", "model/config.json"], ""),
        (["model/tokenizer.json"], ""),
    ],
)
def test_in_a_run_it_is_what_the_run_left(tmp_path, files, found):
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("{}")
    assert resolve(tmp_path) == tmp_path / found


def test_for_a_tokenizer_no_weights_are_downloaded(hub):
    assert resolve("org/name", weights=False).name == "snapshot"
    ((_, options),) = hub[0]
    files = [
        "tokenizer.json",
        "vocab.json",
        "merges.txt",
        "model.safetensors",
        "flax_model.msgpack",
    ]
    patterns = {key: options[key] for key in ("allow_patterns", "ignore_patterns")}
    assert [*huggingface_hub.utils.filter_repo_objects(files, **patterns)] == files[:3]


def test_no_name_is_the_bundled_model(tmp_path, monkeypatch):
    monkeypatch.setattr(hub_module.importlib.resources, "files", lambda package: tmp_path)
    assert "without its bundled model" in failed_resolve(None)
    (tmp_path / "bundled").mkdir()
    assert resolve(None) == tmp_path / "bundled"
    assert resolve("bundled") == tmp_path / "bundled"


@pytest.mark.parametrize(
    ("name", "repository"),
    [
        ("gpt-neo-125m", "EleutherAI/gpt-neo-125m"),
        ("gpt-neo-1.3B", "EleutherAI/gpt-neo-1.3B"),
        ("gpt-neo-2.7b", "EleutherAI/gpt-neo-2.7B"),
        ("roneneldan/TinyStories-1M", "roneneldan/TinyStories-1M"),
    ],
)
def test_other_names_are_downloaded(tmp_path, monkeypatch, hub, name, repository):
    monkeypatch.chdir(tmp_path)
    assert resolve(name, revision="v1", token="t").name == "snapshot"
    ((asked, options),) = hub[0]
    assert asked == repository
    assert (options["revision"], options["token"]) == ("v1", "t")
    files = [
        "config.json", "generation_config.json", "model.safetensors",
        "model-00001-of-00002.safetensors", "model.safetensors.index.json",
        "tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model",
        "pytorch_model.bin", "flax_model.msgpack", "onnx/model.safetensors", "README.md",
    ]  # fmt: skip
    wanted = huggingface_hub.utils.filter_repo_objects(
        files,
        allow_patterns=options["allow_patterns"],
        ignore_patterns=options["ignore_patterns"],
    )
    assert list(wanted) == files[:9]


SMALL = {"config.json", "generation_config.json", "vocab.json", "merges.txt"}
SAFETENSORS = {"model-00001-of-00002.safetensors", "model.safetensors.index.json"}
TORCH = {"pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"}
FLAX = {"flax_model-00001-of-00002.msgpack", "flax_model.msgpack.index.json"}
TENSORFLOW = {"checkpoint", "model.ckpt-9.index", "model.ckpt-9.data-00000-of-00001"}
OTHERS = {"training_args.bin", "optimizer.bin", "tf_model.h5", "onnx/model.safetensors", "a.md"}


@pytest.mark.parametrize(
    ("weights", "torch", "chosen"),
    [
        (SAFETENSORS | TORCH | FLAX, True, SAFETENSORS),
        (TORCH | FLAX, True, TORCH),
        (TORCH | FLAX, False, FLAX),
        ({"pytorch_model.bin", "flax_model.msgpack"}, True, {"pytorch_model.bin"}),
        ({"pytorch_model.bin"}, False, {"pytorch_model.bin"}),  # load tells what to install
        ({"flax_model.msgpack"}, True, {"flax_model.msgpack"}),
        (TENSORFLOW, True, TENSORFLOW),
        ({"adapter_model.safetensors"}, True, {"adapter_model.safetensors"}),
        (set(), True, set()),
    ],
)
def test_one_format_of_the_weights_is_downloaded(tmp_path, monkeypatch, weights, torch, chosen):
    def download(name, **options):
        patterns = {key: options[key] for key in ("allow_patterns", "ignore_patterns")}
        for file in huggingface_hub.utils.filter_repo_objects(SMALL | weights | OTHERS, **patterns):
            (tmp_path / file).write_text("")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(hub_module.importlib.util, "find_spec", lambda name: torch)
    assert resolve("org/name") == tmp_path
    assert {path.name for path in tmp_path.iterdir()} == SMALL | chosen


@pytest.mark.parametrize(
    "name", ["x" * 5000, "a/" + "x" * 5000, "a\0b", "loop", "~no-such-user/x\0"]
)
def test_names_that_no_file_can_have(tmp_path, monkeypatch, hub, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    assert "cannot look for the folder" in failed_resolve(name)
    assert hub[0] == []


@pytest.mark.parametrize(
    "name",
    [
        "gpt-neo-125",
        "/no/such/folder",
        "a/b/c",
        "",
        "org/na me",
        "x/",
        "~no-such-user",
        "~no-such-user/x",
    ],
)
def test_an_unknown_name(tmp_path, monkeypatch, hub, name):
    monkeypatch.chdir(tmp_path)
    text = failed_resolve(name)
    assert f"no folder and no published model '{name}'" in text
    assert "org/name" in text
    assert "gpt-neo-125m" in text
    assert hub[0] == []


@pytest.mark.parametrize(
    ("error", "parts"),
    [
        (
            hub_errors.GatedRepoError("two\nlines", response=response(403)),
            ["gated", "licence", "HF_TOKEN"],
        ),
        (
            hub_errors.RepositoryNotFoundError("two\nlines", response=response()),
            ["neither a folder nor a repository", "check the name"],
        ),
        (
            hub_errors.RevisionNotFoundError("two\nlines", response=response()),
            ["no revision 'v9'"],
        ),
        (
            hub_errors.LocalEntryNotFoundError("two\nlines"),
            ["hub's cache", "does not answer", "connection"],
        ),
        (hub_errors.HfHubHTTPError("500 error\nmore", response=response(500)), ["500 error"]),
        (httpx2.ProxyError("proxy\nmore"), ["proxy", "try again"]),
        (httpx2.ReadTimeout(""), ["ReadTimeout", "try again"]),
        (OSError(28, "No space left on device"), ["No space left"]),
        (hub_errors.HFValidationError("two\nlines"), ["neither a folder nor a repository"]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_failure_of_the_hub_is_one_line(hub, error, parts):
    hub[1](error)
    text = failed_resolve(revision="v9")
    assert "'org/name'" in text
    assert all(part in text for part in parts), text


def test_offline_without_a_copy(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub[1](hub_errors.LocalEntryNotFoundError("two\nlines"))
    assert "HF_HUB_OFFLINE is set: unset it" in failed_resolve()


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "flax_model.msgpack"])
def test_offline_with_a_copy_uses_it_without_the_network(tmp_path, monkeypatch, file):
    """Runs the hub library itself on a cache as it lays one out."""
    cache = tmp_path / "models--org--name"
    snapshot = cache / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0" * 40)
    (snapshot / "config.json").write_text("{}")
    (snapshot / file).write_bytes(b"")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert resolve("org/name") == snapshot
    assert "HF_HUB_OFFLINE" in failed_resolve("org/other")
    assert "HF_HUB_OFFLINE" in failed_resolve("org/name", revision="other")
