"""From a file's bytes, or a PIL image, to a uint8 RGB tensor, or one `DataError` that says why not.

Rules that change pixels:

- transparency is composited on white; palette, grey, CMYK and the like are converted to RGB;
- 16-bit images are scaled to 8 bits (65535 -> 255), not clipped; 32-bit integers are taken as
  16-bit values and refused beyond 65535;
- the EXIF orientation is applied; of an animation only the first frame is read;
- a JPEG above `DRAFT_PIXELS` is decoded at 1/2, 1/4 or 1/8 of its size (never below
  `DRAFT_SHORT_SIDE` pixels on the shorter side), because no tower looks at more.

JPEGs are decoded by simplejpeg where it is installed, to the same pixels as by PIL and about twice
as fast. PIL reads the header first and takes over whenever anything is out of the ordinary (CMYK,
damage), so what is accepted and what is said about the rest does not depend on the decoder.
"""

from __future__ import annotations

import io
import math
import stat
import warnings
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from evolora.errors import DataError

MAX_PIXELS = 178_956_970  # 512 MiB of RGB; a header that claims more is refused before decoding
DRAFT_PIXELS = 16_000_000
DRAFT_SHORT_SIDE = 1024
_TOO_LARGE = f"more than the limit of {MAX_PIXELS:,} pixels; shrink it first"

# Raster formats only: EPS and WMF would start another program to draw themselves.
_FORMATS = (
    *("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "MPO"),
    *("PCX", "PNG", "PPM", "QOI", "TGA", "TIFF", "WEBP"),
)
_ORIENTATION_TAG = 0x0112
# EXIF orientation -> exchange rows and columns?, then flip these dimensions of (3, h, w)
_ORIENTATIONS: dict[int, tuple[bool, tuple[int, ...]]] = {
    2: (False, (2,)),
    3: (False, (1, 2)),
    4: (False, (1,)),
    5: (True, ()),
    6: (True, (2,)),
    7: (True, (1, 2)),
    8: (True, (1,)),
}


@cache
def jpeg_library() -> ModuleType | None:
    """Return simplejpeg, or None where it is not installed and PIL decodes JPEGs too."""
    try:
        import simplejpeg
    except ImportError:
        return None
    library: ModuleType = simplejpeg
    return library


def read_file(source: str | Path) -> Tensor:
    """Return the image in a file; `DataError` where there is none, no right to it, or damage."""
    name = str(source)
    if "://" in name:
        raise DataError(f"cannot read image {name!r}: addresses are not fetched; give a file name")
    try:
        mode = Path(source).stat().st_mode
        if stat.S_ISDIR(mode):
            raise DataError(f"cannot read image {name!r}: it is a folder")
        if not stat.S_ISREG(mode):  # opening a pipe would wait for ever
            raise DataError(f"cannot read image {name!r}: it is not a regular file")
        data = Path(source).read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"cannot read image {name!r}: no such file") from error
    except PermissionError as error:
        raise DataError(f"cannot read image {name!r}: permission denied") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the name
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"cannot read image {name!r}: {reason}") from error
    return decode(data, name)


def decode(data: bytes, name: str) -> Tensor:
    """Return the image in a file's bytes; ``name`` is what errors call it."""
    if not data:
        raise DataError(f"cannot read image {name!r}: it is empty")
    Image.init()
    formats = [key for key in _FORMATS if key in Image.OPEN]
    try:
        with warnings.catch_warnings():
            # Our own limit below is the one that counts; PIL warns at half of it.
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=formats)
    except Image.DecompressionBombError as error:
        raise DataError(f"cannot read image {name!r}: it is {_TOO_LARGE}") from error
    except UnidentifiedImageError as error:
        raise DataError(
            f"cannot read image {name!r}: its content is not an image in a known format "
            f"({', '.join(formats)})"
        ) from error
    except Exception as error:  # a damaged header makes the format plug-ins raise anything
        raise DataError(f"cannot read image {name!r}: damaged ({error})") from error
    with image:
        return from_pil(image, name, data)


def from_pil(image: Image.Image, name: str, encoded: bytes | None = None) -> Tensor:
    """Return the image as a uint8 RGB tensor (3, height, width), its memory channels last.

    Args:
        image: opened, maybe not decoded yet.
        name: what errors call it.
        encoded: the file it was opened from, where another decoder may read that instead.

    Raises:
        DataError: it has no pixels, too many, damaged ones, or ones of no agreed range.
    """
    if image.width == 0 or image.height == 0:
        raise DataError(f"cannot read image {name!r}: it has no pixels ({image.size})")
    check_size(image.size, name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pixels = None if encoded is None else _fast_jpeg(image, encoded)
            if pixels is None:
                if image.format in ("JPEG", "MPO"):
                    _draft(image)
                image.load()
                pixels = np.array(_to_rgb(image, name), dtype=np.uint8)
            return _upright(torch.from_numpy(pixels).permute(2, 0, 1), image)
    except DataError:
        raise
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, zlib and struct errors
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"cannot read image {name!r}: damaged or truncated ({reason})") from error


def check_size(size: tuple[int, int], name: str) -> None:
    """Raise `DataError` for more than `MAX_PIXELS` pixels; ``size`` is (width, height)."""
    if size[0] * size[1] > MAX_PIXELS:
        what = f"{size[0]} x {size[1]} pixels are"
        raise DataError(f"cannot read image {name!r}: {what} {_TOO_LARGE}")


def _fast_jpeg(image: Image.Image, encoded: bytes) -> NDArray[np.uint8] | None:
    """Return the pixels (height, width, 3), or None for PIL to decode what is not plain."""
    library = jpeg_library()
    plain = image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L")
    if library is None or not plain or image.width * image.height > DRAFT_PIXELS:
        return None
    try:
        pixels: NDArray[np.uint8] = library.decode_jpeg(encoded, "RGB", strict=True)
    except ValueError:  # damaged: PIL says whether it can be read all the same
        return None
    return pixels if pixels.shape == (image.height, image.width, 3) else None


def _draft(image: Image.Image) -> None:
    """Tell the JPEG decoder to skip detail that no tower can use."""
    if image.width * image.height <= DRAFT_PIXELS:
        return
    factor = DRAFT_SHORT_SIDE / min(image.size)
    if factor < 1:
        image.draft(None, (math.ceil(image.width * factor), math.ceil(image.height * factor)))


def _upright(pixels: Tensor, image: Image.Image) -> Tensor:
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG)
    except Exception:  # unreadable EXIF says nothing about the pixels
        return pixels
    if not isinstance(orientation, int) or orientation not in _ORIENTATIONS:
        return pixels
    exchange, flipped = _ORIENTATIONS[orientation]
    return (pixels.transpose(1, 2) if exchange else pixels).flip(flipped)


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _sixteen_bit(image, name)
    if image.mode == "F":
        raise DataError(
            f"cannot read image {name!r}: floating-point pixels have no agreed range; "
            "save it with 8 or 16 bits per channel"
        )
    if image.mode == "La":  # premultiplied grey: PIL converts it to LA only
        image = image.convert("LA")
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _sixteen_bit(image: Image.Image, name: str) -> Image.Image:
    values = np.array(image).astype(np.int64)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise DataError(
            f"cannot read image {name!r}: pixel values {low} to {high} do not fit 16 bits"
        )
    grey = ((values + 128) // 257).astype(np.uint8)  # 65535 = 255 * 257, rounded to nearest
    return Image.fromarray(grey).convert("RGB")
