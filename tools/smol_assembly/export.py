"""The assembled model as a folder, tried by the library as a user would."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from clip_pretraining.export import staged
from evolora.backbones.base import TextBackbone
from evolora.backbones.loading import load_backbone
from evolora.routing.route import BASE, Route
from evolora.streams.task import Example
from smol_assembly.bridge import AT_ONCE, BRIDGE, load_projection
from smol_assembly.model import load_parts
from smol_assembly.pairs import NAME, Pairs, choose, pictures

LOG = logging.getLogger("assemble_smol_vlm")
SHOWN, TOKENS = 12, 12  # answers that are logged, and their longest


def stage_export(args: argparse.Namespace) -> None:
    """Writes the folder in bfloat16 by temp + rename, once the library can load and use it."""
    model, processor = load_parts(args.work)
    load_projection(model.model.multi_modal_projector, args, BRIDGE)
    with staged(args.out, model.bfloat16(), processor) as folder:
        tried(folder, args.corpus, choose(args.corpus, args.pictures, args.seed), args.tested)
    LOG.info("%.1f M parameters", sum(p.numel() for p in model.parameters()) / 1e6)


@torch.no_grad()
def tried(folder: Path, corpus: Path, pairs: Pairs, count: int) -> None:
    """Logs what held-out pictures' names cost the library, and some of its answers."""
    backbone = load_backbone(str(folder))
    assert isinstance(backbone, TextBackbone)
    rows = pairs.tested(count)
    images = torch.from_numpy(pictures(corpus, pairs.rows[rows])).permute(0, 3, 1, 2)
    names = [pairs.texts[name][0] for name in pairs.names[rows]]
    own = _losses(backbone, images, names)
    another = _losses(backbone, images.roll(len(rows) // 2, 0), names)
    better = float((own < another).float().mean())
    LOG.info(
        "the library: names of %d held-out pictures cost %.2f under their own picture, %.2f under "
        "another; their own is better for %.0f %%",
        *(len(rows), float(own.mean()), float(another.mean()), 100 * better),
    )
    every = max(1, len(rows) // SHOWN)
    batch = backbone.collate(_asked(images[::every], names[::every]))
    route = Route.of(BASE, len(batch), device=backbone.device)
    answers = backbone.write(batch, route, TOKENS)
    for name, answer in zip(names[::every], answers, strict=True):
        LOG.info("%r is told as %r", name, answer)


def _asked(images: Tensor, names: Sequence[str]) -> list[Example]:
    return [
        Example(inputs={"image": image, "text": NAME[0]}, label=name, key=str(row))
        for row, (image, name) in enumerate(zip(images, names, strict=True))
    ]


def _losses(backbone: TextBackbone, images: Tensor, names: Sequence[str]) -> Tensor:
    """Returns the loss [b] of each name."""
    found = []
    for start in range(0, len(names), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        batch = backbone.collate(_asked(images[part], names[part]))
        route = Route.of(BASE, len(batch), device=backbone.device)
        found.append(backbone.answer_losses(batch, route))
    return torch.cat(found)
