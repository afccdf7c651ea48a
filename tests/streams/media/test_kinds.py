"""Kinds of files: told by content first, and named where they are the wrong one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from evolora.errors import DataError
from evolora.streams.media.kinds import check_file, kind_of


def test_content_tells_a_kind_before_the_name_does(tmp_path: Path) -> None:
    red, blue = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    red.save(tmp_path / "sound.wav", format="PNG")
    red.save(tmp_path / "moving.gif", save_all=True, append_images=[blue])
    red.save(tmp_path / "still.gif")
    red.save(tmp_path / "moving.webp", save_all=True, append_images=[blue])
    soundfile.write(tmp_path / "tone.wav", np.zeros(9), 16_000)
    np.save(tmp_path / "points.npy", np.zeros((4, 3)))
    (tmp_path / "a.ply").write_text("ply\nformat ascii 1.0\nend_header\n")
    (tmp_path / "a.obj").write_text("v 0 0 0\n")
    (tmp_path / "a.mp4").write_bytes(b"\0\0\0\x18ftypisom")
    (tmp_path / "a.txt").write_text("hello")
    found = {path.name: kind_of(path) for path in tmp_path.iterdir()}
    assert found == {
        "sound.wav": "picture", "moving.gif": "animation", "still.gif": "picture",
        "moving.webp": "animation", "tone.wav": "sound", "points.npy": "array", "a.ply": "points",
        "a.obj": "points", "a.mp4": "video", "a.txt": None,
    }  # fmt: skip


def test_a_file_of_the_wrong_kind_is_named_as_such(tmp_path: Path) -> None:
    picture = tmp_path / "x.png"
    Image.new("RGB", (4, 4)).save(picture)
    assert check_file(picture, "image") == check_file(picture, "depth") == "picture"
    with pytest.raises(
        DataError,
        match=r"x\.png is a picture; --audio takes sounds \(\.wav, \.flac, \.ogg, \.opus, \.mp3\)$",
    ):
        check_file(picture, "audio", asked="--audio")
    with pytest.raises(DataError, match=r"is a picture; video takes videos \(\.mp4.*animated"):
        check_file(picture, "video")
    text = tmp_path / "x.txt"
    text.write_text("hello")
    with pytest.raises(DataError, match=r"x\.txt is of no kind known here; pc takes"):
        check_file(text, "pc")
    with pytest.raises(DataError, match="no such file"):
        check_file(tmp_path / "gone.wav", "audio")
    with pytest.raises(DataError, match="it is a folder"):
        check_file(tmp_path, "audio")
