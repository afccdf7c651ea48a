"""Reads the packed files of the mosaic suite: encoded pictures in one tensor, facts in JSON."""

from __future__ import annotations

import io
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from evolora.assets import ROOT
from evolora.errors import StreamError

SPLITS = ("train", "val", "test")
FORMATS = ("PNG", "WEBP")
"""What pictures are packed as; PIL need not try all others first."""


def decode_image(packed: dict[str, Tensor], row: int) -> Tensor:
    """Return one picture of a packed file, uint8 (3, height, width)."""
    start, stop = packed["offsets"][row : row + 2].tolist()
    return decode_bytes(packed["bytes"][start:stop].numpy().tobytes())


def decode_bytes(encoded: bytes) -> Tensor:
    """Return a picture, uint8 (3, height, width)."""
    pixels = np.asarray(Image.open(io.BytesIO(encoded), formats=FORMATS).convert("RGB"))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


def packed_text(packed: dict[str, Tensor], column: str, row: int) -> str:
    """Return the text that a column of a packed file names in a row."""
    place = int(packed[column][row])
    start, stop = packed["text_offsets"][place : place + 2].tolist()
    return packed["text_bytes"][start:stop].numpy().tobytes().decode()


def read_packed(root: str | Path | None, stem: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of ``<stem>.safetensors`` and the content of ``<stem>.json``.

    Args:
        root: their folder; None for the embedded one.
        stem: name of the stream below ``mosaic/``.

    Raises:
        StreamError: a file is missing or damaged, or of another format.
    """
    return _read(ROOT / "mosaic" if root is None else Path(root), stem)


@lru_cache(maxsize=4)
def _read(folder: Path, stem: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        info = json.loads((folder / f"{stem}.json").read_text(encoding="utf-8"))
        packed = load_file(folder / f"{stem}.safetensors")
    except FileNotFoundError as error:
        raise StreamError(
            f"no mosaic/{stem} in {folder}: {Path(error.filename).name} is missing; "
            f"make it with: evolora data build mosaic/{stem} --out DIR"
        ) from None
    except (OSError, ValueError, SafetensorError) as error:
        raise StreamError(f"mosaic/{stem} in {folder} cannot be read: {error}") from error
    if info.get("format_version") != 1:
        raise StreamError(f"{folder / f'{stem}.json'}: format_version 1 expected")
    return packed, info
