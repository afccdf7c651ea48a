"""One way to read an image, and the two crops that training and evaluation use.

Whatever a user brings (file, bytes, PIL image, array) becomes a uint8 RGB tensor (3, height,
width), or one `DataError` that names the source and the reason. Rules that change pixels:

- transparency is composited on white; palette, grey, CMYK and the like are converted to RGB;
- 16-bit images are scaled to 8 bits (65535 -> 255), not clipped; 32-bit integers are taken as
  16-bit values and refused beyond 65535;
- the EXIF orientation is applied; of an animation only the first frame is read;
- a JPEG above `DRAFT_PIXELS` is decoded at 1/2, 1/4 or 1/8 of its size (never below
  `DRAFT_SHORT_SIDE` pixels on the shorter side), because no tower looks at more.
"""

from __future__ import annotations

import io
import math
import stat
import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional

from evolora.errors import DataError

MAX_PIXELS = 178_956_970  # 512 MiB of RGB; a header that claims more is refused before decoding
DRAFT_PIXELS = 16_000_000
DRAFT_SHORT_SIDE = 1024

Interpolation = Literal["bicubic", "bilinear"]

# Raster formats only: EPS and WMF would start another program to draw themselves.
_FORMATS = (
    *("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "MPO"),
    *("PCX", "PNG", "PPM", "QOI", "TGA", "TIFF", "WEBP"),
)
_PIL_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_ORIENTATION_TAG = 0x0112
_ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_image(source: Any) -> Tensor:
    """Return the image as a uint8 RGB tensor (3, height, width).

    Args:
        source: file name or `Path`; encoded `bytes`; `PIL.Image.Image`; numpy array (height,
            width), (height, width, 1 | 3 | 4) or torch tensor (height, width), (1 | 3 | 4, height,
            width), both uint8 with RGB or RGBA channels.

    Raises:
        DataError: the source is missing, not a regular file, unreadable, empty, damaged, larger
            than `MAX_PIXELS`, or of a type, shape or dtype that is not listed above.
    """
    if isinstance(source, (str, Path)):
        return _read_file(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        data = bytes(source)
        return _decode(data, f"bytes ({len(data)} long)")
    if isinstance(source, Image.Image):
        return _from_pil(source, getattr(source, "filename", "") or "PIL image")
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Tensor):
        return _from_tensor(source)
    hint = "; pass the images one at a time" if isinstance(source, (list, tuple, set)) else ""
    raise DataError(
        f"cannot read an image from {type(source).__name__}: expected a file name, bytes, "
        f"PIL image, uint8 array or uint8 tensor{hint}"
    )


def resize_center_crop(
    image: Tensor, size: int, interpolation: Interpolation = "bicubic"
) -> Tensor:
    """Return the centre square (3, size, size) after scaling the shorter side to ``size``.

    Antialiased by PIL, whose result CLIP's processor gives: torch's byte kernel is four times
    faster but off by up to two grey levels, which a zero-shot score can see. Beyond an aspect ratio
    of 8 the far ends, which the crop would drop anyway, are cut off before scaling: 1 x 10,000
    pixels would otherwise grow to gigabytes.

    Args:
        image: uint8 (3, height, width).
        size: side of the result in pixels.
        interpolation: "bicubic" or "bilinear".
    """
    _check_image(image)
    image = _cut_far_ends(image)
    height, width = image.shape[-2:]
    short = min(height, width)
    target = (int(size * height / short), int(size * width / short))
    image = _pil_resize(image, target, interpolation)
    top, left = (target[0] - size) // 2, (target[1] - size) // 2
    return image[:, top : top + size, left : left + size].contiguous()


def random_resized_crop(
    image: Tensor,
    size: int,
    generator: torch.Generator,
    scale: tuple[float, float] = (0.9, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    interpolation: Interpolation = "bicubic",
) -> Tensor:
    """Return a random part of the image, resized to (3, size, size).

    The part covers a share of the area drawn from ``scale`` at a width/height ratio drawn
    log-uniformly from ``ratio``; if ten draws do not fit (elongated images) the largest centred
    part within ``ratio`` is taken. (Inception's crop; scale as in MoE-Adapters.) Resized by torch's
    byte kernel, since speed matters here and no reference has to be met.

    Args:
        image: uint8 (3, height, width).
        size: side of the result in pixels.
        generator: the only source of randomness.
        scale: lowest and highest share of the area, in (0, 1].
        ratio: lowest and highest width / height.
        interpolation: "bicubic" or "bilinear".
    """
    _check_image(image)
    top, left, height, width = _random_box(image.shape[-2:], generator, scale, ratio)
    part = image[:, top : top + height, left : left + width].contiguous()
    if part.device.type != "cpu":  # the byte kernel below exists on the CPU only
        part = part.float()
    resized = functional.interpolate(
        part[None], size=(size, size), mode=interpolation, antialias=True
    )[0]
    if resized.dtype != torch.uint8:
        resized = resized.round().clamp(0, 255).to(torch.uint8)
    return resized


def _random_box(
    shape: torch.Size,
    generator: torch.Generator,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
    height, width = shape
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        draw = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
        area = height * width * (scale[0] + (scale[1] - scale[0]) * draw[0])
        aspect = math.exp(log_low + (log_high - log_low) * draw[1])
        box_width, box_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = int(draw[2] * (height - box_height + 1))
            left = int(draw[3] * (width - box_width + 1))
            return top, left, box_height, box_width
    aspect = min(max(width / height, ratio[0]), ratio[1])
    box_width = min(width, max(1, round(height * aspect)))
    box_height = min(height, max(1, round(width / aspect)))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def _check_image(image: Tensor) -> None:
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3 or not image.numel():
        raise DataError(
            f"expected a uint8 image (3, height, width); got {image.dtype} {tuple(image.shape)}"
        )


def _cut_far_ends(image: Tensor) -> Tensor:
    height, width = image.shape[-2:]
    short, long = min(height, width), max(height, width)
    if long <= 8 * short:
        return image
    # Same parity as the long side, so that the window and the image share their centre.
    keep = 5 * short + (long - 5 * short) % 2
    start = (long - keep) // 2
    return image.narrow(2 if width > height else 1, start, keep)


def _pil_resize(image: Tensor, target: tuple[int, int], interpolation: Interpolation) -> Tensor:
    if tuple(image.shape[-2:]) == target:
        return image
    pixels = np.ascontiguousarray(image.cpu().permute(1, 2, 0).numpy())
    resized = Image.fromarray(pixels).resize((target[1], target[0]), _PIL_FILTERS[interpolation])
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).to(image.device)


def _read_file(source: str | Path) -> Tensor:
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
    return _decode(data, name)


def _decode(data: bytes, name: str) -> Tensor:
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
        raise DataError(f"cannot read image {name!r}: {_too_large(None)}") from error
    except UnidentifiedImageError as error:
        raise DataError(
            f"cannot read image {name!r}: its content is not an image in a known format "
            f"({', '.join(formats)})"
        ) from error
    except Exception as error:  # a damaged header makes the format plug-ins raise anything
        raise DataError(f"cannot read image {name!r}: damaged ({error})") from error
    with image:
        return _from_pil(image, name)


def _too_large(size: tuple[int, int] | None) -> str:
    what = f"{size[0]} x {size[1]} pixels are" if size else "it is"
    return f"{what} more than the limit of {MAX_PIXELS:,} pixels; shrink it first"


def _from_pil(image: Image.Image, name: str) -> Tensor:
    if image.width * image.height > MAX_PIXELS:
        raise DataError(f"cannot read image {name!r}: {_too_large(image.size)}")
    if image.width == 0 or image.height == 0:
        raise DataError(f"cannot read image {name!r}: it has no pixels ({image.size})")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if image.format in ("JPEG", "MPO"):
                _draft(image)
            image.load()
            rgb = _upright(_to_rgb(image, name), image)
    except DataError:
        raise
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, zlib and struct errors
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"cannot read image {name!r}: damaged or truncated ({reason})") from error
    return torch.from_numpy(np.array(rgb, dtype=np.uint8)).permute(2, 0, 1).contiguous()


def _draft(image: Image.Image) -> None:
    """Tell the JPEG decoder to skip detail that no tower can use."""
    if image.width * image.height <= DRAFT_PIXELS:
        return
    factor = DRAFT_SHORT_SIDE / min(image.size)
    if factor < 1:
        image.draft(None, (math.ceil(image.width * factor), math.ceil(image.height * factor)))


def _upright(rgb: Image.Image, original: Image.Image) -> Image.Image:
    try:
        orientation = original.getexif().get(_ORIENTATION_TAG)
    except Exception:  # unreadable EXIF says nothing about the pixels
        return rgb
    method = _ORIENTATIONS.get(orientation) if isinstance(orientation, int) else None
    return rgb if method is None else rgb.transpose(method)


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


def _from_array(array: np.ndarray[Any, Any]) -> Tensor:
    what = f"array {array.dtype} {array.shape}"
    if array.dtype != np.uint8:
        raise DataError(f"cannot read an image from {what}: {_dtype_hint(array.dtype.kind == 'f')}")
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or array.size == 0:
        raise DataError(
            f"cannot read an image from {what}: expected (height, width) or (height, width, "
            f"1 | 3 | 4), at least 1 x 1{_layout_hint(array.shape, channels_first=True)}"
        )
    pixels = array[:, :, 0] if array.shape[2] == 1 else array
    return _from_pil(Image.fromarray(np.ascontiguousarray(pixels)), what)


def _from_tensor(tensor: Tensor) -> Tensor:
    what = f"tensor {str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
    if tensor.dtype != torch.uint8:
        hint = _dtype_hint(tensor.is_floating_point())
        raise DataError(f"cannot read an image from {what}: {hint}")
    if tensor.ndim == 2:
        tensor = tensor[None]
    if tensor.ndim != 3 or tensor.shape[0] not in (1, 3, 4) or tensor.numel() == 0:
        raise DataError(
            f"cannot read an image from {what}: expected (height, width) or (1 | 3 | 4, height, "
            f"width), at least 1 x 1{_layout_hint(tuple(tensor.shape), channels_first=False)}"
        )
    return _from_array(tensor.detach().cpu().permute(1, 2, 0).numpy())


def _dtype_hint(floating: bool) -> str:
    if floating:
        return "expected uint8; if the values are in [0, 1], multiply by 255, round and convert"
    return "expected uint8 values 0 to 255"


def _layout_hint(shape: tuple[int, ...], *, channels_first: bool) -> str:
    if len(shape) == 4:
        return "; this looks like a batch: pass one image at a time"
    if len(shape) == 3 and channels_first and shape[0] in (1, 3, 4):
        return "; channels seem to come first: transpose(1, 2, 0)"
    if len(shape) == 3 and not channels_first and shape[2] in (1, 3, 4):
        return "; channels seem to come last: permute(2, 0, 1)"
    return ""
