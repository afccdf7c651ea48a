"""The pictures of the pretraining corpus: how they are drawn into batches, and augmented."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clip_pretraining.prompts import Prompts

GROUP_SHARE = {"emoji": 0.30, "icons": 0.34, "flags": 0.06, "scripts": 0.30}
FOCUS = 4.0  # how much more often names are drawn that some domain of the suite has as a class
SYNONYM = 0.85  # names whose embeddings are closer than this are not each other's negatives


class Corpus:
    """Pictures, names, balanced sampling weights and the teacher's embeddings of the names."""

    def __init__(self, folder: Path, prompts: Prompts) -> None:
        self.images = np.load(folder / "images.npy", mmap_mode="r")
        labels = np.load(folder / "labels.npz")
        head = json.loads((folder / "corpus.json").read_text())
        self.names = torch.from_numpy(labels["name"].astype(np.int64))
        groups = torch.from_numpy(labels["group"].astype(np.int64))
        per_name = torch.bincount(self.names)[self.names].double()
        classes = {name for labels in prompts.suite for name in labels.classes}
        focus = torch.tensor([FOCUS if name in classes else 1.0 for name in head["names"]])
        weights = per_name.rsqrt() * focus[self.names]
        for number, group in enumerate(head["groups"]):
            weights[groups == number] *= GROUP_SHARE[group] / weights[groups == number].sum()
        self.weights, self.groups = weights, [head["groups"][group] for group in groups.tolist()]
        self.grey = torch.zeros(len(self.names), dtype=torch.bool)
        for start in range(0, len(self.images), 4096):
            block = self.images[start : start + 4096, ::4, ::4].astype(np.int16)
            spread = (block.max(-1) - block.min(-1)).mean((1, 2))
            self.grey[start : start + 4096] = torch.from_numpy(spread < 2)
        self.embeddings = prompts.of_corpus()
        bare = self.embeddings[:, 0]
        self.synonyms = (bare @ bare.T) > SYNONYM
        self.synonyms.fill_diagonal_(False)

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Returns pictures uint8 [b, 64, 64, 3], grey [b] and name indices [b]."""
        rows = self.rows(size, generator)
        return self.pictures(rows), self.grey[rows], self.names[rows]

    def rows(self, size: int, generator: torch.Generator) -> Tensor:
        """Returns drawn rows [b], in order: so is the file read."""
        rows = torch.multinomial(self.weights, size, replacement=True, generator=generator)
        return rows.sort().values

    def pictures(self, rows: Tensor) -> Tensor:
        """Returns the pictures uint8 [b, 64, 64, 3] of rows [b]."""
        return torch.from_numpy(self.images[rows.numpy()])


def augment(pictures: Tensor, grey: Tensor, generator: torch.Generator) -> Tensor:
    """Returns normalized float pictures [b, 3, 64, 64], recolored, moved, scaled and turned.

    Args:
        pictures: uint8 [b, 64, 64, 3] on white.
        grey: bool [b], the near-grey drawings, whose ink and paper may be recolored.
        generator: source of randomness.
    """

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    b = len(pictures)
    x = pictures.permute(0, 3, 1, 2).float() / 255
    paper = torch.ones(b, 3, 1, 1)
    chosen = (grey & (rand(b) < 0.6)).nonzero()[:, 0]
    if len(chosen):
        n = len(chosen)
        dark = rand(n, 3, 1, 1) * 0.45
        light = 0.75 + 0.25 * rand(n, 3, 1, 1)
        inverted = (rand(n, 1, 1, 1) < 0.4).float()
        ink = dark * (1 - inverted) + light * inverted
        sheet = light * (1 - inverted) + dark * inverted
        level = x[chosen].mean(1, keepdim=True)
        x[chosen] = ink + (sheet - ink) * level
        paper[chosen] = sheet
    tinted = (~grey & (rand(b) < 0.5)).nonzero()[:, 0]
    if len(tinted):  # colored drawings on tinted paper: chat bubbles, skies, studio walls
        tint = 0.6 + 0.4 * rand(len(tinted), 3, 1, 1)
        white = (x[tinted].amin(1, keepdim=True) > 0.97).float()
        x[tinted] = x[tinted] * (1 - white) + tint * white
        paper[tinted] = tint
    angle, size = (rand(b) - 0.5) * 0.5, 0.7 + 0.45 * rand(b)
    cos, sin = angle.cos() / size, angle.sin() / size
    shift = (rand(b, 2) - 0.5) * 0.24
    stretch = 1 + (rand(b) - 0.5) * 0.2
    theta = torch.stack([cos * stretch, -sin, shift[:, 0], sin, cos / stretch, shift[:, 1]], 1)
    grid = F.affine_grid(theta.view(b, 2, 3), [b, 3, 64, 64], align_corners=False)
    x = F.grid_sample(x - paper, grid, align_corners=False) + paper
    if float(rand(1)) < 0.15:
        x = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2.0)
    contrast, brightness = 0.75 + 0.5 * rand(b, 1, 1, 1), (rand(b, 1, 1, 1) - 0.5) * 0.25
    x = ((x - 0.5) * contrast + 0.5 + brightness).clamp(0, 1)
    return (x - 0.5) / 0.5
