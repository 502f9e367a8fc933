"""files/figure.py: pictures are PNG files, there as a whole or not at all."""

import pytest

from neo_jax.errors import NeoError
from neo_jax.files import figure


def test_a_picture_takes_the_place_of_another(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"older")
    picture = figure.as_png(figure.new_figure(2, 1, "title"))
    figure.write(path, picture)
    assert path.read_bytes() == picture
    assert picture.startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == [path]
    wide = figure.as_png(figure.new_figure(4, 1, dpi=50))
    assert wide[16:24] == (200).to_bytes(4) + (50).to_bytes(4)  # pixels


def test_what_cannot_be_written_is_one_line(tmp_path):
    with pytest.raises(NeoError, match=r"cannot write .*a\.png: No such file or directory"):
        figure.write(tmp_path / "no" / "a.png", b"")


def test_a_device_stays_one(tmp_path):
    (tmp_path / "full").symlink_to("/dev/full")
    with pytest.raises(NeoError, match="No space left on device"):
        figure.write(tmp_path / "full", b"some")
    assert (tmp_path / "full").is_symlink()


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    figure.check_available()
    monkeypatch.setattr(figure, "AVAILABLE", False)
    with pytest.raises(NeoError, match=r"needs matplotlib: pip install 'neo_jax\[plot\]'"):
        figure.check_available()
