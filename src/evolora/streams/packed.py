"""Data sets that keep many small images in one file: CIFAR-100's binary version and MNIST's IDX."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evolora.errors import DataError
from evolora.streams.sampling import row_index
from evolora.streams.task import Example

if TYPE_CHECKING:  # listing the streams' names must not import numpy
    import numpy as np

_CIFAR_ROW = 2 + 3 * 32 * 32  # coarse label, fine label, planes R, G, B
_IDX_IMAGES, _IDX_LABELS = 0x0803, 0x0801  # magic numbers: unsigned bytes in 3 and in 1 dimensions


@dataclass(frozen=True, kw_only=True)
class PackedImages:
    """Images of one file with their labels.

    Args:
        pixels: uint8 (rows, channels, height, width) with 1 or 3 channels.
        labels: class index per row.
        name: file name, the first part of every key.
    """

    pixels: np.ndarray[Any, Any] = field(repr=False)
    labels: Sequence[int] = field(repr=False)
    name: str

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        import torch

        index = row_index(index, len(self))
        # A copy: the file is mapped read-only and tensors have no such notion.
        image = torch.from_numpy(self.pixels[index].copy()).expand(3, -1, -1).contiguous()
        return Example(
            inputs={"image": image}, label=self.labels[index], key=f"{self.name}:{index}"
        )


def cifar100_split(path: Path, classes: int) -> PackedImages:
    """Return a split of CIFAR-100 (binary version), labelled with the fine classes.

    Args:
        path: ``train.bin`` or ``test.bin``; mapped, not loaded.
        classes: number of fine classes, which every label must be below.

    Raises:
        DataError: the file is missing, cut short, or holds a label that is not a class.
    """
    import numpy as np

    size = path.stat().st_size if path.is_file() else 0
    if size == 0 or size % _CIFAR_ROW:
        raise DataError(
            f"{path} is missing or damaged: its size must be a multiple of {_CIFAR_ROW} bytes; "
            f"got {size}"
        )
    rows = np.memmap(path, dtype=np.uint8, mode="r").reshape(-1, _CIFAR_ROW)
    labels = rows[:, 1].astype(int).tolist()
    if max(labels) >= classes:
        raise DataError(f"{path} holds label {max(labels)}, but there are {classes} classes")
    return PackedImages(pixels=rows[:, 2:].reshape(-1, 3, 32, 32), labels=labels, name=path.stem)


def idx_split(folder: Path, split: str) -> PackedImages:
    """Return a split of MNIST or a data set in the same format.

    Args:
        folder: holds ``<split>-images-idx3-ubyte`` and ``<split>-labels-idx1-ubyte``, plain or
            ``.gz``, with "-" or "." before "idx".
        split: "train" or "t10k".

    Raises:
        DataError: a file is missing, damaged, or images and labels differ in number.
    """
    pixels = _read_idx_file(folder, f"{split}-images", "idx3-ubyte", _IDX_IMAGES)
    labels = _read_idx_file(folder, f"{split}-labels", "idx1-ubyte", _IDX_LABELS)
    if len(pixels) != len(labels):
        raise DataError(f"{folder}: {split} has {len(pixels)} images but {len(labels)} labels")
    if len(labels) and int(labels.max()) > 9:
        raise DataError(f"{folder}: {split} holds label {int(labels.max())}; digits end at 9")
    return PackedImages(pixels=pixels[:, None], labels=labels.astype(int).tolist(), name=split)


def _read_idx_file(folder: Path, stem: str, kind: str, magic: int) -> np.ndarray[Any, Any]:
    import numpy as np

    candidates = [folder / f"{stem}{dot}{kind}{gz}" for dot in "-." for gz in ("", ".gz")]
    path = next((path for path in candidates if path.is_file()), None)
    if path is None:
        raise DataError(f"{candidates[0]} (or .gz) is missing")
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix == ".gz" else data
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is damaged: {error}") from error
    start = 4 * (1 + (magic & 0xFF))  # magic number, then one length per dimension
    header = struct.unpack(f">{start // 4}I", data[:start]) if len(data) >= start else (0,)
    shape = header[1:]
    if header[0] != magic or len(data) - start != math.prod(shape):
        raise DataError(f"{path} is damaged: header and size do not agree with {kind}")
    return np.frombuffer(data, dtype=np.uint8, offset=start).reshape(shape)
