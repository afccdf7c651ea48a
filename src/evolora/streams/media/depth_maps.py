"""One way to read a depth map: three equal channels, near dark and far bright.

A picture of 8 bits is taken as it is. Values with a unit (16-bit PNG, commonly millimetres; .npy,
metres) are spread over the grey levels, from ``near`` to ``far`` if given, else from the map's own
nearest to its farthest; where nothing was measured (0, NaN, infinite) it is 0.
"""

from __future__ import annotations

from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from evolora.errors import DataError
from evolora.streams.images import read_image
from evolora.streams.media.kinds import check_file, is_name, taken

MILLIMETRES = 1000.0
"""Of a metre: what a step of a 16-bit depth picture is (Kinect, NYU, SUN RGB-D after decoding)."""


def read_depth(
    source: Any, *, near: float | None = None, far: float | None = None, asked: str = "depth"
) -> Tensor:
    """Return a depth map as uint8 (3, h, w).

    Args:
        source: name of a picture or of a .npy file (h, w) in metres, a floating array or tensor
            (h, w) in metres, or 8 bits as :func:`evolora.streams.images.read_image` takes them.
        near: metres that are black; None: the map's own nearest.
        far: metres that are white; None: the map's own farthest.
        asked: what the user calls this input, for messages.

    Raises:
        DataError: missing, unreadable, of another kind or shape, or without any value.
    """
    name = str(source) if is_name(source) else asked
    values: Any = source
    if is_name(source):
        kind = check_file(source, "depth", asked=asked)
        values = _array(source) if kind == "array" else _sixteen_bits(source)
    elif isinstance(source, Tensor):
        values = source.detach().cpu().numpy()
    if not isinstance(values, np.ndarray) or values.dtype.kind != "f":
        if values is not None and not isinstance(values, np.ndarray | Image.Image):
            raise DataError(f"{asked} takes {taken('depth')}; got {type(source).__name__}")
        return read_image(source)
    if values.ndim != 2 or not values.size:
        raise DataError(f"the depth map {name!r} must be (h, w) metres; got {values.shape}")
    return _grey(values.astype(np.float64), near, far, name)


def _array(source: Any) -> NDArray[Any]:
    try:
        found = np.load(source, allow_pickle=False)
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise DataError(f"cannot read the depth map {str(source)!r}: {error}") from error
    if not isinstance(found, np.ndarray) or found.dtype.kind not in "fiu":
        raise DataError(f"the depth map {str(source)!r} must hold numbers (h, w)")
    return found.astype(np.float64)


def _sixteen_bits(source: Any) -> NDArray[np.float64] | None:
    """Return the metres of a picture of more than 8 bits, or None for one of 8."""
    try:
        with Image.open(source) as image:
            if image.mode != "I" and not image.mode.startswith("I;16"):
                return None
            return np.array(image).astype(np.float64) / MILLIMETRES
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, zlib errors ...
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"cannot read the depth map {str(source)!r}: damaged ({reason})") from error


def _grey(values: NDArray[np.float64], near: float | None, far: float | None, name: str) -> Tensor:
    known = np.isfinite(values) & (values > 0)
    if not known.any():
        raise DataError(f"the depth map {name!r} has no value above 0")
    low = float(values[known].min()) if near is None else near
    high = float(values[known].max()) if far is None else far
    # 0 is left for what was not measured.
    share = (np.where(known, values, low) - low) / max(high - low, 1e-9)
    levels = np.where(known, 1 + np.clip(share, 0, 1) * 254, 0)
    return torch.from_numpy(levels.round().astype(np.uint8)).expand(3, -1, -1).clone()
