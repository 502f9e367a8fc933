"""files/paths.py: local paths, and gs:// on a stand-in for Google Cloud Storage."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from neo_jax.errors import NeoError
from neo_jax.files import paths
from neo_jax.files.paths import is_file, make_path


def refused(call, *args):
    """The message of the error that a call must raise: one line."""
    with pytest.raises(NeoError) as error:
        call(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_local_paths_are_those_of_pathlib(tmp_path):
    assert make_path("a/b") == Path("a/b")
    assert type(make_path("a")) is type(Path("a"))
    assert paths.absolute(make_path("a")) == Path.cwd() / "a"
    assert not paths.is_remote(tmp_path)


def test_paths_in_the_cloud_keep_their_name(cloud, bucket):
    path = make_path(f"gs://{bucket}/a") / "b.txt"
    assert str(path) == f"gs://{bucket}/a/b.txt"
    assert paths.is_remote(path)
    assert str(make_path(path)) == str(paths.absolute(path)) == str(path)
    path.write_text("grüße")
    assert cloud[f"{bucket}/a/b.txt"].decode() == path.read_text() == "grüße"
    assert paths.file_size(path) == 7
    assert paths.read_range(path, 1, 3) == b"r\xc3"
    with paths.open_binary(path) as file:
        assert list(file) == ["grüße".encode()]


def test_unknown_schemes_are_refused():
    assert "s3://a/b is neither a local path nor one that begins with gs://" in refused(
        make_path, "s3://a/b"
    )
    assert "gs:/a/b is neither" in refused(make_path, Path("gs://a/b"))
    assert make_path("C:/a") == Path("C:/a")


def test_gcsfs_may_be_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert refused(make_path, "gs://a/b") == (
        "gs://a/b needs gcsfs; install it: pip install 'neo_jax[gcs]'"
    )


def test_local_work_imports_no_library_of_the_cloud(tmp_path):
    script = "import sys, neo_jax; neo_jax.load(); print({'fsspec', 'gcsfs'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout == "set()\n"


def test_a_bucket_without_access(cloud, bucket):
    cloud.closed.add(bucket)
    message = refused(make_path, f"gs://{bucket}/a")
    assert message.startswith(f"cannot reach gs://{bucket}/a (Forbidden")
    assert "gcloud auth application-default login" in message


def test_files_below_a_folder_and_by_glob(cloud, bucket, tmp_path):
    names = ["a.txt", "d.bin", "deep/b.txt", "deep/er/c.txt", "deep-sea/f.txt"]
    for name in names:
        cloud[f"{bucket}/data/{name}"] = b"x"
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    for root in (tmp_path, make_path(f"gs://{bucket}/data")):

        def inside(found, root=root):
            return [path.relative_to(root).as_posix() for path in found]

        assert inside(paths.find_files(root)) == names
        assert inside(paths.match(f"{root}/*.txt")) == ["a.txt"]
        assert inside(paths.match(f"{root}/deep/**/*.txt")) == ["deep/b.txt", "deep/er/c.txt"]
        assert inside(paths.match(f"{root}/deep*/*.txt")) == ["deep-sea/f.txt", "deep/b.txt"]
        assert inside(paths.match(f"{root}/nothing*")) == []


def test_what_others_wrote_since_is_seen(cloud, bucket):
    cloud[f"{bucket}/data/a"] = b""
    assert len(list(make_path(f"gs://{bucket}/data").iterdir())) == 1
    cloud[f"{bucket}/data/b"] = b""
    assert len(list(make_path(f"gs://{bucket}/data").iterdir())) == 2


def test_write_access_is_tried_without_a_trace(cloud, bucket, tmp_path):
    paths.check_writable(tmp_path / "new" / "folder")
    assert [path.name for path in tmp_path.rglob("*")] == ["new", "folder"]
    paths.check_writable(make_path(f"gs://{bucket}/run"))
    assert cloud.names(bucket) == []


def test_no_write_access(cloud, bucket, tmp_path):
    (tmp_path / "file").write_text("")
    assert refused(paths.check_writable, tmp_path / "file" / "run") == (
        f"cannot write in {tmp_path}/file/run (Not a directory); choose another output, or ask "
        "for write access."
    )
    cloud.read_only.add(bucket)
    message = refused(paths.check_writable, make_path(f"gs://{bucket}/run"))
    assert message.startswith(f"cannot write in gs://{bucket}/run (Forbidden")
    assert message.endswith("choose another output, or ask for write access.")


ODDITIES = {
    "folder": lambda path: path.mkdir(),
    "pipe": os.mkfifo,
    "link to a folder": lambda path: path.symlink_to(path.parent),
    "link to nothing": lambda path: path.symlink_to("nothing"),
    "loop": lambda path: path.symlink_to(path.name),
}


@pytest.mark.parametrize("kind", ODDITIES)
def test_what_is_no_file_is_not_passed_over(tmp_path, kind):
    """A model whose first file was a broken link was loaded from another; a pipe hung."""
    path = tmp_path / "name"
    assert not is_file(path)
    assert not is_file(path / "below")
    ODDITIES[kind](path)
    with pytest.raises(NeoError, match=r"name( is no file|: Too many| is a link to nothing)"):
        is_file(path)


def test_a_link_to_a_file_is_one(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "link").symlink_to("file")
    assert is_file(tmp_path / "link")
    assert not is_file(tmp_path / "file" / "below")


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b"])
def test_names_that_no_file_can_have(tmp_path, name):
    with pytest.raises(NeoError, match=r"cannot read .*(too long|null)"):
        is_file(tmp_path / name)
