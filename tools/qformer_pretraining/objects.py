"""Renders of the objects that no stream uses, kept as shade and cover, and painted when drawn."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from evolora.storage.files import read_json
from evolora.streams.mosaic.modality_words import COLORS
from qformer_pretraining.about_views import View
from qformer_pretraining.drawn import JITTER

FILE = "qformer-objects"
SIDES = ("pretrain", "val")
"""Of the stream's objects: what training draws, and what only scores are asked about."""

WHITE = 0.7  # share on white paper, the others on any color
LIGHT = 0.2  # of the light's strength
SMALLEST = 0.5  # of a render's size


class Objects:
    """Renders in random colors; each noun as often as the others.

    Args:
        planes: uint8 [n, 2, 64, 64], shade in white and cover.
        rows: noun and shape ("" for none) of each.
    """

    def __init__(self, planes: Tensor, rows: list[tuple[str, str]]) -> None:
        self.planes, self.rows = planes, rows
        counts = Counter(noun for noun, _ in rows)
        self.weights = torch.tensor([1 / counts[noun] for noun, _ in rows])

    def batch(self, size: int, draw: torch.Generator, words: Random) -> tuple[Tensor, list[View]]:
        """Returns normalized pictures [b, 3, 64, 64] and what they show."""
        rows = torch.multinomial(self.weights, size, replacement=True, generator=draw)
        colors = [words.choice(tuple(COLORS)) for _ in range(size)]
        found = [self.rows[row] for row in rows.tolist()]
        views = [
            View(noun, "what", color, shape or None)
            for (noun, shape), color in zip(found, colors, strict=True)
        ]
        inks = torch.tensor([COLORS[color] for color in colors]).float()
        inks += (torch.rand(size, 3, generator=draw) - 0.5) * 2 * JITTER
        paper = 255 * torch.rand(size, 3, generator=draw)
        paper[torch.rand(size, generator=draw) < WHITE] = 255
        shade, cover = moved(self.planes[rows].float() / 255, draw).unsqueeze(2).unbind(1)
        shown = shade * inks[..., None, None] + (1 - cover) * paper[..., None, None]
        light = 1 + LIGHT * (2 * torch.rand(size, 1, 1, 1, generator=draw) - 1)
        return (shown * light).clamp(0, 255) / 127.5 - 1, views


def moved(planes: Tensor, draw: torch.Generator) -> Tensor:
    """Returns planes [b, k, 64, 64] shrunk, moved, mirrored and a little skewed; 0 comes in."""
    b = len(planes)
    size = SMALLEST + (1.1 - SMALLEST) * torch.rand(b, generator=draw)
    angle = 0.3 * (torch.rand(b, generator=draw) - 0.5)
    side = 1 - 2 * (torch.rand(b, generator=draw) < 0.5).float()
    free = (1 - size).clamp_min(0) + 0.1
    shift = (2 * torch.rand(b, 2, generator=draw) - 1) * (free / size)[:, None]
    skew = 0.24 * (torch.rand(b, generator=draw) - 0.5)
    wide = 1 + 0.2 * (torch.rand(b, generator=draw) - 0.5)
    cos, sin = angle.cos() / size, angle.sin() / size
    rows = [side * cos * wide, skew - side * sin, shift[:, 0], sin, cos / wide, shift[:, 1]]
    theta = torch.stack(rows, dim=1)
    grid = F.affine_grid(theta.view(b, 2, 3), list(planes.shape), align_corners=False)
    return F.grid_sample(planes, grid, align_corners=False)


def load_objects(work: Path, side: str = SIDES[0]) -> Objects | None:
    """Returns the renders of the stage ``objects``, or None where it has not run."""
    head = work / f"{FILE}-{side}.json"
    if not head.is_file():
        return None
    rows = read_json(head, kind="list of renders")["rows"]
    return Objects(
        torch.from_numpy(np.load(work / f"{FILE}-{side}.npy")), [tuple(row) for row in rows]
    )
