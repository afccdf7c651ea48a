"""Pixels: from uint8 images to the floats a tower was trained on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def mean_std(processor: Any) -> tuple[Tensor, Tensor]:
    """Return mean and deviation (3,) of a processor's images; 0.5 where it names none."""
    image = getattr(processor, "image_processor", processor)
    mean = getattr(image, "image_mean", None) or (0.5, 0.5, 0.5)
    std = getattr(image, "image_std", None) or (0.5, 0.5, 0.5)
    return torch.tensor(mean), torch.tensor(std)


def normalized(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return uint8 images (b, 3, s, s) as normalised floats on their own device."""
    shape = (1, 3, 1, 1)
    scaled = images.float() / 255.0
    return (scaled - mean.to(images.device).view(shape)) / std.to(images.device).view(shape)
