"""One way to read an image, and how training and evaluation cut it to size.

Whatever a user brings (file, bytes, PIL image, array) becomes a uint8 RGB tensor (3, height,
width), or one `DataError` that names the source and the reason; what happens to transparency, 16
bits, EXIF orientation and the like is said in `evolora.streams.decoding`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from evolora.errors import DataError
from evolora.streams.decoding import check_size, decode, from_pil, read_file

Interpolation = Literal["bicubic", "bilinear"]

_PIL_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def read_image(source: Any) -> Tensor:
    """Return the image as a uint8 RGB tensor (3, height, width), in any memory layout.

    An RGB tensor is returned as it is, not copied.

    Args:
        source: file name or `Path`; encoded `bytes`; `PIL.Image.Image`; numpy array (height,
            width), (height, width, 1 | 3 | 4) or torch tensor (height, width), (1 | 3 | 4, height,
            width), both uint8 with RGB or RGBA channels.

    Raises:
        DataError: the source is missing, not a regular file, unreadable, empty, damaged, larger
            than `MAX_PIXELS`, or of a type, shape or dtype that is not listed above.
    """
    if isinstance(source, (str, Path)):
        return read_file(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        data = bytes(source)
        return decode(data, f"bytes ({len(data)} long)")
    if isinstance(source, Image.Image):
        return from_pil(source, getattr(source, "filename", "") or "PIL image")
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

    The result is that of CLIP's processor, which resizes by PIL with antialiasing: to the bit where
    the image is enlarged or tall; else, by torch's byte kernel, four times as fast, but for one
    grey level in about 0.4 % of the values (two in some millionths). An image of the right size is
    returned as it is. Beyond an aspect ratio of 8 the far ends, which the crop would drop anyway,
    are cut off before scaling: 1 x 10,000 pixels would otherwise grow to gigabytes.

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
    image = _resize(image, target, interpolation)
    top, left = (target[0] - size) // 2, (target[1] - size) // 2
    return image[:, top : top + size, left : left + size].contiguous()


def resize_square(image: Tensor, size: int, interpolation: Interpolation = "bicubic") -> Tensor:
    """Return the whole image resized to (3, size, size), whatever its aspect ratio was.

    Args:
        image: uint8 (3, height, width).
        size: side of the result in pixels.
        interpolation: "bicubic" or "bilinear".
    """
    _check_image(image)
    return _resize(image, (size, size), interpolation).contiguous()


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
    part = image[:, top : top + height, left : left + width]
    return _torch_resize(part, (size, size), interpolation).contiguous()


def random_crop_frames(
    frames: Tensor,
    generator: torch.Generator,
    scale: tuple[float, float] = (0.9, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    *,
    flip: bool = False,
) -> Tensor:
    """Return the same random part of all frames (f, 3, h, w), resized to their size.

    Frames of a video, or a picture and its depth map, stay aligned.

    Args:
        frames: uint8 (f, 3, h, w).
        generator: the only source of randomness.
        scale: lowest and highest share of the area, in (0, 1].
        ratio: lowest and highest width / height.
        flip: whether half of the results are mirrored, left to right.
    """
    top, left, height, width = _random_box(frames.shape[-2:], generator, scale, ratio)
    mirrored = flip and bool(torch.rand((), generator=generator) < 0.5)
    parts = frames[:, :, top : top + height, left : left + width]
    found = functional.interpolate(parts, size=frames.shape[-2:], mode="bicubic", antialias=True)
    return found.flip(-1) if mirrored else found


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


def _resize(image: Tensor, target: tuple[int, int], interpolation: Interpolation) -> Tensor:
    height, width = image.shape[-2:]
    if (height, width) == target:
        return image
    # The byte kernel's 16-bit weights are least exact where they are largest, in enlarging; and it
    # takes rows first, which Pillow 13 does not if the image is tall.
    strays = min(height, width) < min(target) or height > 2 * width
    return (_pil_resize if strays else _torch_resize)(image, target, interpolation)


def _pil_resize(image: Tensor, target: tuple[int, int], interpolation: Interpolation) -> Tensor:
    pixels = np.ascontiguousarray(image.cpu().permute(1, 2, 0).numpy())
    resized = Image.fromarray(pixels).resize((target[1], target[0]), _PIL_FILTERS[interpolation])
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).to(image.device)


def _torch_resize(image: Tensor, target: tuple[int, int], interpolation: Interpolation) -> Tensor:
    if image.device.type != "cpu":  # the byte kernel exists on the CPU only
        image = image.float()
    resized = functional.interpolate(image[None], size=target, mode=interpolation, antialias=True)[
        0
    ]
    return resized if resized.dtype == torch.uint8 else resized.round().clamp(0, 255).byte()


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
    if array.shape[2] == 3:
        check_size((array.shape[1], array.shape[0]), what)
        return torch.from_numpy(np.array(array, order="C")).permute(2, 0, 1)
    pixels = array[:, :, 0] if array.shape[2] == 1 else array
    return from_pil(Image.fromarray(np.ascontiguousarray(pixels)), what)


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
    if tensor.shape[0] == 3:
        check_size((tensor.shape[2], tensor.shape[1]), what)
        return tensor.detach().cpu()
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
