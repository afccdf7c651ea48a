"""Videos: frames at equal distances from animations, folders, lists and video files."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from evolora.errors import ConfigError, DataError
from evolora.streams.images import random_crop_frames
from evolora.streams.media.videos import equally_spaced, read_video

GREYS = [0, 40, 80, 120, 160, 200, 240]


def pictures() -> list[Image.Image]:
    return [Image.new("RGB", (6, 4), (grey, grey, grey)) for grey in GREYS]


def greys(frames: list[Tensor]) -> list[int]:
    assert all(frame.shape == (3, 4, 6) and frame.dtype == torch.uint8 for frame in frames)
    return [int(frame.float().mean().round()) for frame in frames]


def test_frames_are_taken_at_equal_distances() -> None:
    assert equally_spaced(7, 4) == [0, 2, 4, 6]
    assert equally_spaced(72, 4) == [0, 24, 47, 71]
    assert equally_spaced(9, 1) == [0]
    assert equally_spaced(2, 4) == [0, 1, 1, 1]


@pytest.mark.parametrize("ending", ["gif", "webp", "png"])
def test_an_animation_is_read_frame_by_frame(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"moving.{ending}"
    first, *others = pictures()
    lossless = {"lossless": True} if ending == "webp" else {}
    first.save(path, save_all=True, append_images=others, duration=40, **lossless)
    assert greys(read_video(path, frames=4)) == [0, 80, 160, 240]
    assert greys(read_video(str(path), frames=9)) == [*GREYS, 240, 240]


def test_folders_and_lists_of_frames_are_videos(tmp_path: Path) -> None:
    for index, picture in enumerate(pictures()):
        picture.save(tmp_path / f"frame{index + 5}.png")  # frame5 ... frame11
    (tmp_path / "notes.txt").write_text("not a frame")
    assert greys(read_video(tmp_path, frames=4)) == [0, 80, 160, 240]
    assert greys(read_video([tmp_path / "frame11.png", pictures()[1]], frames=2)) == [240, 40]
    held = torch.stack([torch.full((3, 4, 6), grey, dtype=torch.uint8) for grey in GREYS])
    assert greys(read_video(held, frames=4)) == [0, 80, 160, 240]
    assert greys(read_video(held.permute(0, 2, 3, 1).numpy(), frames=1)) == [0]


def test_a_video_file_is_read_by_pyav(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    path = tmp_path / "film.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height = 32, 16
        for grey in GREYS:
            frame = av.VideoFrame.from_ndarray(np.full((16, 32, 3), grey, np.uint8), "rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    found = read_video(path, frames=4)
    assert [one.shape for one in found] == [(3, 16, 32)] * 4
    means = [float(one.float().mean()) for one in found]
    assert np.allclose(means, [0, 80, 160, 240], atol=6)
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(DataError, match="cannot read the video"):
        read_video(path, frames=4)


def test_a_missing_pyav_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "film.mp4"
    path.write_bytes(b"\0\0\0\x18ftypisom")
    real = builtins.__import__

    def without(name: str, *rest: Any, **named: Any) -> Any:
        if name == "av":
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"pip install 'evolora\[video\]'"):
        read_video(path, frames=4)


def test_what_is_no_video_is_named(tmp_path: Path) -> None:
    pictures()[0].save(tmp_path / "still.png")
    with pytest.raises(DataError, match=r"still\.png is a picture; --video takes"):
        read_video(tmp_path / "still.png", frames=4, asked="--video")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no pictures"):
        read_video(tmp_path / "empty", frames=4)
    with pytest.raises(DataError, match="video takes a file, a folder or list"):
        read_video([], frames=4)
    first, *others = pictures()
    cut = tmp_path / "cut.gif"
    first.save(cut, save_all=True, append_images=others)
    cut.write_bytes(cut.read_bytes()[:-120])
    with pytest.raises(DataError, match="damaged or truncated"):
        read_video(cut, frames=7)


def test_all_frames_are_cropped_and_mirrored_alike() -> None:
    draw = torch.Generator().manual_seed(0)
    frame = torch.randint(256, (3, 16, 16), dtype=torch.uint8, generator=draw)
    pair = torch.stack([frame, frame])
    seen = set()
    for _ in range(12):
        found = random_crop_frames(pair, draw, scale=(0.3, 0.9), flip=True)
        assert found.shape == pair.shape and torch.equal(found[0], found[1])
        seen.add(found.sum().item())
    assert len(seen) > 6
    steps = torch.arange(16, dtype=torch.uint8).expand(1, 3, 16, 16)
    rising = {
        bool(one[0, 0, 8, -1] > one[0, 0, 8, 0])
        for one in (random_crop_frames(steps, draw, flip=True) for _ in range(12))
    }
    assert rising == {True, False}
    assert all(
        bool(one[0, 0, 8, -1] > one[0, 0, 8, 0])
        for one in (random_crop_frames(steps, draw) for _ in range(12))
    )
