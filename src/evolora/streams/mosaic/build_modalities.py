"""Builds `mosaic/modalities`: pictures, films, recordings, depth maps and clouds, with questions.

An item is kept once, however many questions are about it, in the form of its modality: a picture,
four frames below each other in one picture, Ogg Opus, a grey picture, or packed bytes. Everything
is decided by the plan (`modality_questions`) and a seed; two builds from the same packages are
equal.
"""

from __future__ import annotations

import io
import struct
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from evolora.streams.mosaic.build_domains import Progress, check_size, encode, write_stream
from evolora.streams.mosaic.build_instructions import few_colors, packed
from evolora.streams.mosaic.modality_questions import Item, Numbers, Question, plan
from evolora.streams.mosaic.modality_sources import Thing
from evolora.streams.mosaic.modality_suite import TASKS
from evolora.streams.mosaic.modality_views import (
    RATE,
    Wave,
    animated,
    clip,
    cloud,
    depth_map,
    film,
    heard,
    painted,
    picture,
    upright,
)
from evolora.streams.mosaic.modality_words import MODALITIES, WORDINGS
from evolora.streams.mosaic.samples import SPLITS, Size

_QUALITY = 72  # of a film's frames, lossy WebP
_OPUS_COMPRESSION = 0.92  # soundfile's scale from 0 to 1; about 24 kbit/s
_SERIAL = 2026  # of every Ogg stream; libsndfile draws one by lot

_COLUMNS = {
    "task": np.uint8,
    "split": np.uint8,
    "kind": np.uint8,
    "source": np.int16,
    "item": np.int32,
    "question": np.int32,
    "answers": np.int32,
}


def build(
    out: Path,
    size: Size,
    cache: Path | None = None,
    progress: Progress | None = None,
    numbers: Numbers | None = None,
) -> Path:
    """Writes `modalities.safetensors` and `modalities.json`; returns the JSON's path.

    Args:
        out: folder, made if missing.
        size: "compact" (as embedded in the package) or "large".
        cache: folder of the registry packages; see `sources.fetch`.
        progress: called with a line now and then.
        numbers: items per modality and split, if not those of the size.
    """
    from safetensors.numpy import save

    check_size(size)
    planned = list(plan(cache, size, numbers))
    # items of one object follow each other, so that its mesh is read once
    order = sorted(range(len(planned)), key=lambda index: planned[index][0].sources[0].key)
    made: dict[int, bytes] = {}
    for done, index in enumerate(order, start=1):
        made[index] = make(planned[index][0])
        if progress and done % 100 == 0:
            progress(f"modalities: {done} of {len(order)} items made")
    table = _Table()
    for index, (item, questions) in enumerate(planned):
        table.add(item, made[index], questions)
    manifest = {
        "size": size,
        "kinds": list(WORDINGS),
        "tasks": [task.described() for task in TASKS],
        "sources": list(table.sources),
    }
    return write_stream(out, "modalities", save(table.tensors()), manifest, cache)


def make(item: Item) -> bytes:
    """Returns an item in the form of its modality."""
    lots = np.random.default_rng(item.seed)
    first = item.sources[0]
    if item.modality == "audio":
        return _opus(clip([heard(source.path) for source in item.sources]))
    if not isinstance(first, Thing):
        return _frames(animated(first.path))
    mesh = _mesh(first)
    if item.modality == "depth":
        return encode(Image.fromarray(depth_map(mesh, item.ways["distance"], lots)).convert("RGB"))
    mesh = painted(mesh, item.ways["color"])
    if item.modality == "image":
        return encode(few_colors(picture(mesh, lots)))
    if item.modality == "video":
        return _frames(film(mesh, item.ways["motion"], lots))
    return pack_cloud(*cloud(mesh, item.ways["pose"], lots))


_mesh = lru_cache(maxsize=1)(upright)


def _frames(frames: list[Image.Image]) -> bytes:
    side = frames[0].width
    strip = Image.new("RGB", (side, side * len(frames)))
    for index, frame in enumerate(frames):
        strip.paste(frame, (0, index * side))
    written = io.BytesIO()
    strip.save(written, "WEBP", quality=_QUALITY, method=6)
    return written.getvalue()


def pack_cloud(points: NDArray[np.float64], colors: NDArray[np.uint8]) -> bytes:
    """Returns a cloud in bytes: a step in metres, then 8-bit coordinates and colors, deflated."""
    step = float(np.abs(points).max()) / 127
    order = np.lexsort(points.T)
    whole = np.round(points[order] / step).astype(np.int8)
    body = whole.T.tobytes() + colors[order].T.tobytes()
    return struct.pack("<f", step) + zlib.compress(body, 9)


def _opus(wave: Wave) -> bytes:
    import soundfile

    written = io.BytesIO()
    soundfile.write(
        written,
        wave,
        RATE,
        format="OGG",
        subtype="OPUS",
        compression_level=_OPUS_COMPRESSION,
    )
    return fixed_serial(written.getvalue())


def fixed_serial(ogg: bytes) -> bytes:
    """Returns an Ogg file with the serial number `_SERIAL` in all pages, checksums renewed."""
    pages, place = [], 0
    while place < len(ogg):
        lacing = ogg[place + 26]
        end = place + 27 + lacing + sum(ogg[place + 27 : place + 27 + lacing])
        head = ogg[place : place + 14] + struct.pack("<I", _SERIAL) + ogg[place + 18 : place + 22]
        tail = ogg[place + 26 : end]
        pages.append(head + struct.pack("<I", _checksum(head + bytes(4) + tail)) + tail)
        place = end
    return b"".join(pages)


def _checksum(page: bytes) -> int:
    """Returns Ogg's CRC-32: polynomial 0x04C11DB7, nothing reflected, start and end at 0."""
    table = _checksum_table()
    value = 0
    for byte in page:
        value = (value << 8) & 0xFFFFFFFF ^ table[value >> 24 ^ byte]
    return value


@lru_cache(maxsize=1)
def _checksum_table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        value = byte << 24
        for _ in range(8):
            value = (value << 1) ^ 0x04C11DB7 if value & 0x80000000 else value << 1
        table.append(value & 0xFFFFFFFF)
    return tuple(table)


class _Table:
    """The items and questions kept so far, as the columns of the file."""

    def __init__(self) -> None:
        self.files: list[bytes] = []
        self.texts: dict[str, int] = {}
        self.sources: dict[str, int] = {}
        self.columns: dict[str, list[int]] = {name: [] for name in _COLUMNS}

    def add(self, item: Item, content: bytes, questions: list[Question]) -> None:
        """Takes in an item with all questions about it."""
        for question in questions:
            row = {
                "task": MODALITIES.index(item.modality),
                "split": SPLITS.index(item.split),
                "kind": list(WORDINGS).index(question.kind),
                "source": self.sources.setdefault(item.sources[0].key, len(self.sources)),
                "item": len(self.files),
                "question": self._text(question.text),
                "answers": self._text("\n".join(question.answers)),
            }
            for name, value in row.items():
                self.columns[name].append(value)
        self.files.append(content)

    def _text(self, text: str) -> int:
        return self.texts.setdefault(text, len(self.texts))

    def tensors(self) -> dict[str, NDArray[Any]]:
        """Returns the content of `modalities.safetensors`; several answers are lines."""
        columns = self.columns.items()
        return {
            **packed("", self.files),
            **packed("text_", [text.encode() for text in self.texts]),
            **{name: np.asarray(values, dtype=_COLUMNS[name]) for name, values in columns},
        }
