"""One way to read a video: some of its frames, at equal distances, uint8 RGB.

Animated GIF, WebP and PNG are read by Pillow; MP4, WebM, MKV, MOV and AVI by PyAV
(``pip install 'evolora[video]'``); a folder or list of pictures is its frames in order.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from evolora.errors import ConfigError, DataError
from evolora.streams.decoding import check_size, from_pil
from evolora.streams.images import read_image
from evolora.streams.media.kinds import KINDS, check_file, is_name

MAX_FRAMES = 100_000
"""Of a file; more are refused."""


def equally_spaced(count: int, frames: int) -> list[int]:
    """Return which of ``count`` frames to take: the first, the last and some between.

    One frame is the first; the last of too few is repeated.
    """
    if count <= frames:
        return [min(place, count - 1) for place in range(frames)]
    return [round(place * (count - 1) / max(1, frames - 1)) for place in range(frames)]


def read_video(source: Any, *, frames: int, asked: str = "video") -> list[Tensor]:
    """Return frames of a video, uint8 RGB (3, h, w) each, at equal distances.

    Args:
        source: name of a video or animation, or of a folder of pictures; a list of what
            :func:`evolora.streams.images.read_image` reads; uint8 (f, 3, h, w) tensor or
            (f, h, w, 3) array.
        frames: how many; the last of fewer is repeated.
        asked: what the user calls this input, for messages.

    Raises:
        DataError: missing, unreadable, without frames, or of another kind.
        ConfigError: PyAV is needed and not installed.
    """
    if is_name(source) and not Path(source).is_dir():
        animated = check_file(source, "video", asked=asked) == "animation"
        return (_animation if animated else _film)(Path(source), frames)
    if isinstance(source, str | Path):
        source = _pictures(Path(source), asked)
    several = isinstance(source, Tensor | np.ndarray) and source.ndim == 4
    images: Sequence[Any] = list(source) if several or isinstance(source, list | tuple) else ()
    if not images:
        raise DataError(
            f"{asked} takes a file, a folder or list of pictures, or uint8 frames (f, 3, h, w); "
            f"got {type(source).__name__}"
        )
    return [read_image(images[place]) for place in equally_spaced(len(images), frames)]


def _pictures(folder: Path, asked: str) -> list[Path]:
    """Return the pictures of a folder; "frame10" comes after "frame9"."""
    found = [path for path in folder.iterdir() if path.suffix.lower() in KINDS["picture"].endings]
    if not found:
        endings = ", ".join(KINDS["picture"].endings)
        raise DataError(f"{folder} holds no pictures ({endings}) that {asked} could be made of")

    def order(path: Path) -> list[tuple[bool, int, str]]:
        parts = re.split(r"(\d+)", path.name)
        return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts]

    return sorted(found, key=order)


def _animation(path: Path, frames: int) -> list[Tensor]:
    try:
        with Image.open(path) as image:
            check_size(image.size, str(path))
            count = int(getattr(image, "n_frames", 1))
            wanted = equally_spaced(min(count, MAX_FRAMES), frames)
            found: dict[int, Tensor] = {}
            for place in sorted(set(wanted)):  # forward only: each frame builds on those before
                image.seek(place)
                found[place] = from_pil(image.copy(), f"{path}, frame {place}")
    except DataError:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, EOFError, SyntaxError ...
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"cannot read {str(path)!r}: damaged or truncated ({reason})") from error
    return [found[place] for place in wanted]


def _film(path: Path, frames: int) -> list[Tensor]:
    try:
        import av
    except ImportError:
        raise ConfigError(
            f"{path} is a video file, which PyAV reads: pip install 'evolora[video]'; animated "
            "GIF, WebP and PNG and folders of pictures need nothing more"
        ) from None
    try:
        count = _count(av, path)
        wanted = equally_spaced(count, frames)
        found: dict[int, Tensor] = {}
        with av.open(str(path)) as container:
            for place, frame in enumerate(container.decode(video=0)):
                if place in wanted:
                    found[place] = torch.from_numpy(frame.to_ndarray(format="rgb24"))
                if place >= wanted[-1]:
                    break
    except (av.error.FFmpegError, IndexError, OSError, ValueError) as error:
        raise DataError(f"cannot read the video {str(path)!r}: {error}") from error
    return [found[place].permute(2, 0, 1) for place in wanted]


def _count(av: Any, path: Path) -> int:
    """Return how many frames can be decoded; what the header says is often wrong."""
    with av.open(str(path)) as container:
        if not container.streams.video:
            raise ValueError("it has no pictures, only sound")
        stream = container.streams.video[0]
        check_size((stream.width, stream.height), str(path))
        count = 0
        for _ in container.decode(stream):
            count += 1
            if count > MAX_FRAMES:
                raise ValueError(f"more than {MAX_FRAMES:,} frames; cut it first")
    if not count:
        raise ValueError("it has no frames")
    return count
