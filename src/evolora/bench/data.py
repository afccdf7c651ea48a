"""Bench "data": JPEG files to the tensors a vision tower takes, images per second and core."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from evolora.bench.session import Session
from evolora.bench.timing import Variant
from evolora.streams.decoding import jpeg_library
from evolora.streams.images import read_image, resize_center_crop

SIDE = 224
MEAN, STD = (0.481, 0.458, 0.408), (0.269, 0.261, 0.276)  # CLIP's, rounded
SIZES = ((500, 375), (1600, 1200))
USUAL = "transformers, PIL processor"


def measure(session: Session) -> None:
    """Time every way of reading images, at two sizes."""
    s = session.settings
    for size in SIZES:
        files = [jpeg(size, seed) for seed in range(s.either(8, 3))]
        kilobytes = sum(len(file) for file in files) / len(files) / 1000
        title = f"{size[0]} × {size[1]} pixels, {kilobytes:.0f} KB"
        table = session.table(title, ("img/s", "time", "fastest time"))
        variants = [
            Variant(name=name, run=run, passes=("forward",), forward_base=USUAL)
            for name, run in readers().items()
        ]
        comparison = session.time(title, variants, files, rounds=s.either(15, 5))
        for variant in variants:
            ratio = comparison.ratio(variant.name, "forward")
            assert ratio is not None
            speed = 1.0 / comparison.seconds(variant.name, "forward")
            values = {"img/s": speed, "time": ratio.median, "fastest time": ratio.of_minima}
            table.put(variant.name, **values)


def readers() -> dict[str, Callable[[bytes], Tensor]]:
    """Return functions from a JPEG file's bytes to a normalised tensor (1, 3, 224, 224)."""
    made = {USUAL: _transformers(), "PIL and numpy": _pil_numpy}
    made["Evolora, decoded by PIL"] = lambda file: _ours(Image.open(io.BytesIO(file)))
    if jpeg_library() is not None:
        made["Evolora, decoded by simplejpeg"] = _ours
    return made


def jpeg(size: tuple[int, int], seed: int) -> bytes:
    """Return a JPEG of smooth shapes with some grain, about as large as a photograph's file."""
    width, height = size
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), dtype=np.float32)
    grain = random.normal(0.0, 9.0, (height, width, 1)).astype(np.float32)
    pixels = np.clip(smooth + grain, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=88)
    return buffer.getvalue()


def _transformers() -> Callable[[bytes], Tensor]:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor: Any = CLIPImageProcessorPil()

    def read(file: bytes) -> Tensor:
        image = Image.open(io.BytesIO(file)).convert("RGB")
        pixels: Tensor = processor(images=image, return_tensors="pt")["pixel_values"]
        return pixels

    return read


def _pil_numpy(file: bytes) -> Tensor:
    image = Image.open(io.BytesIO(file)).convert("RGB")
    scale = SIDE / min(image.size)
    width, height = (int(side * scale) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - SIDE) // 2, (height - SIDE) // 2
    pixels = np.asarray(image.crop((left, top, left + SIDE, top + SIDE)), dtype=np.float32)
    mean, std = np.asarray(MEAN, np.float32), np.asarray(STD, np.float32)
    pixels = (pixels / 255.0 - mean) / std
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


def _ours(file: bytes | Image.Image) -> Tensor:
    image = resize_center_crop(read_image(file), SIDE)[None]
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (image.float() / 255.0 - mean) / std
