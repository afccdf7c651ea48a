"""What kind of file something is, by its content or else its name, and what each modality takes.

A file of the wrong kind is named as such: "cat.png is a picture; --audio takes sounds (.wav, .flac,
.ogg, .opus, .mp3)".
"""

from __future__ import annotations

import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from PIL import Image

from evolora.errors import DataError

HEAD = 16
"""Bytes that tell a format."""


@dataclass(frozen=True)
class Kind:
    """What a kind of file is called.

    Args:
        one, many: in messages ("a sound", "sounds").
        endings: usual endings of such files; the first ones are named in messages.
    """

    one: str
    many: str
    endings: tuple[str, ...]


KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "picture": Kind(
            "a picture", "pictures",
            (".png", ".jpg", ".webp", ".gif", ".bmp", ".tiff", ".jpeg", ".tif", ".avif", ".ppm"),
        ),
        "animation": Kind("an animated picture", "animated pictures", (".gif", ".webp", ".png")),
        "video": Kind("a video", "videos", (".mp4", ".webm", ".mkv", ".mov", ".avi")),
        "sound": Kind("a sound", "sounds", (".wav", ".flac", ".ogg", ".opus", ".mp3")),
        "points": Kind("a point cloud or mesh", "point clouds and meshes", (".ply", ".obj")),
        "array": Kind("an array", "arrays", (".npy", ".npz")),
    }
)  # fmt: skip
TAKES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "image": ("picture", "animation"),
        "video": ("video", "animation"),
        "audio": ("sound",),
        "depth": ("picture", "array"),
        "pc": ("points", "array"),
    }
)
"""Modality -> kinds of files that hold it; of an animation an image is the first frame."""
_NAMED = 5

_STARTS = {
    b"\x89PNG": "picture", b"\xff\xd8\xff": "picture", b"GIF8": "picture", b"fLaC": "sound",
    b"OggS": "sound", b"ID3": "sound", b"\x1aE\xdf\xa3": "video", b"ply\n": "points",
    b"ply\r": "points", b"\x93NUMPY": "array", b"PK\x03\x04": "array",
}  # fmt: skip
_CONTAINED = {b"WEBP": "picture", b"WAVE": "sound", b"AVI ": "video"}
_BRANDS = {b"avif": "picture", b"avis": "picture", b"heic": "picture", b"M4A ": "sound"}


def kind_of(file: str | Path) -> str | None:
    """Return the kind of a file (a key of :data:`KINDS`), or None where neither tells.

    Raises:
        DataError: there is no such file, or it cannot be read.
    """
    path = regular(file)
    with path.open("rb") as opened:
        head = opened.read(HEAD)
    kind = _by_content(head)
    if kind is None:
        known = (kind for kind, found in KINDS.items() if path.suffix.lower() in found.endings)
        kind = next(known, None)
    return "animation" if kind == "picture" and _moves(path) else kind


def check_file(file: str | Path, modality: str, *, asked: str | None = None) -> str:
    """Return the kind of a file that holds a modality.

    Args:
        file: its name.
        modality: a key of :data:`TAKES`.
        asked: what the user calls that input ("--audio"); None: as the modality.

    Raises:
        DataError: no such file, or one of another kind; names the file, what it is and what is
            taken.
    """
    kind = kind_of(file)
    if kind not in TAKES[modality]:
        what = KINDS[kind].one if kind else "of no kind known here"
        raise DataError(f"{file} is {what}; {asked or modality} takes {taken(modality)}")
    return kind


def taken(modality: str) -> str:
    """Return what a modality takes, in words: "sounds (.wav, .flac)"."""
    kinds = [KINDS[kind] for kind in TAKES[modality]]
    return " or ".join(f"{kind.many} ({', '.join(kind.endings[:_NAMED])})" for kind in kinds)


def regular(file: str | Path) -> Path:
    """Return the path of a file that can be opened; DataError with the reason otherwise."""
    path = Path(file)
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise DataError(f"cannot read {str(file)!r}: it is a folder")
        if not stat.S_ISREG(mode):  # opening a pipe would wait for ever
            raise DataError(f"cannot read {str(file)!r}: it is not a regular file")
        with path.open("rb"):
            return path
    except FileNotFoundError as error:
        raise DataError(f"cannot read {str(file)!r}: no such file") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the name
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"cannot read {str(file)!r}: {reason}") from error


def is_name(source: Any) -> bool:
    """Return whether a value of ``Example.inputs`` names a file."""
    return isinstance(source, str | Path)


def _by_content(head: bytes) -> str | None:
    for start, kind in _STARTS.items():
        if head.startswith(start):
            return kind
    if head.startswith(b"RIFF"):
        return _CONTAINED.get(head[8:12])
    if head[4:8] == b"ftyp":
        return _BRANDS.get(head[8:12], "video")
    return None


def _moves(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            return bool(getattr(image, "is_animated", False))
    except Exception:  # what is damaged is said by who reads its pixels
        return False
