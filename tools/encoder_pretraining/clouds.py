"""A small PointNet learns what an object is, how it is placed, its color and its size."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from encoder_pretraining.training import probe, train
from evolora.backbones.encoders.pointnet import PointNet, PointNetConfig, save_pointnet
from evolora.streams.mosaic.modality_sources import objects
from evolora.streams.mosaic.modality_views import cloud, painted, upright
from evolora.streams.mosaic.modality_words import COLORS, OBJECTS

NAMES = tuple(OBJECTS)
DENSE, POINTS = 4096, 512
TURNS = (0.0, 0.5, 1.0)  # upright, lying, inverted: about the viewing axis, in pi
TEMPERATURE = 0.1


@dataclass
class Solid:
    """Points of an object on its feet: places (p, 3) in metres, shade (p, 1), and what it is."""

    places: Tensor
    shade: Tensor
    name: int


def solids(args: argparse.Namespace, side: str) -> list[Solid]:
    random = np.random.default_rng(args.seed)
    found = []
    for thing in objects(args.cache):
        if thing.side != side:
            continue
        places, colors = cloud(painted(upright(thing), "gray"), "upright", random, DENSE)
        # The pose turns about the vertical axis at random; another turn changes nothing.
        shade = torch.from_numpy(colors[:, :1].astype(np.float32)) / COLORS["gray"][0]
        found.append(Solid(torch.from_numpy(places).float(), shade, NAMES.index(thing.name)))
    return found


def view(solid: Solid, draw: torch.Generator, *, change: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Returns a cloud (points, 6), (3,) labels (object, pose, color), and log sizes (3,).

    Args:
        solid: what is scanned.
        draw: chooses points, pose, turn and color.
        change: whether to stretch, tilt and roughen it, too.
    """

    def uniform(low: float, high: float, count: int = 1) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=draw)

    chosen = torch.randperm(DENSE, generator=draw)[:POINTS]
    places = solid.places[chosen]
    yaw = float(uniform(0, 2 * torch.pi))
    places = places @ _turn(yaw if not change else 0.0, 2, 0).T
    if change:
        places = places * uniform(0.75, 1.33, 3) * float(uniform(0.8, 1.25))
    spread = places.amax(0) - places.amin(0)
    sizes = torch.stack([spread[1], spread[[0, 2]].amax(), spread.norm()]).clamp_min(0.01).log()
    pose = int(torch.randint(3, (), generator=draw))
    places = places @ _turn(torch.pi * TURNS[pose], 0, 1).T
    if change:
        tilt = uniform(-0.15, 0.15, 2).tolist()
        places = places @ _turn(tilt[0], 0, 1).T @ _turn(tilt[1], 1, 2).T
    places = places @ _turn(float(uniform(0, 2 * torch.pi)), 2, 0).T
    if change:
        rough = float(uniform(0, 0.015)) * float(spread.norm())
        places = places + rough * torch.randn(places.shape, generator=draw)
    color = int(torch.randint(len(COLORS), (), generator=draw))
    tint = torch.tensor(list(COLORS.values())[color]) / 255.0
    shades = solid.shade[chosen] * tint
    if change:
        shades = shades * uniform(0.85, 1.15) + uniform(-0.05, 0.05, 3)
    places = places - places.mean(0)
    whole = torch.cat([places, shades.clamp(0, 1)], dim=1)
    return whole, torch.tensor([solid.name, pose, color]), sizes


def _turn(angle: float, first: int, second: int) -> Tensor:
    matrix, turn = torch.eye(3), torch.tensor(angle)
    matrix[first, first] = matrix[second, second] = torch.cos(turn)
    matrix[second, first], matrix[first, second] = torch.sin(turn), -torch.sin(turn)
    return matrix


class Heads(nn.Module):
    """What the tokens are asked for: by all of them together, and by each alone."""

    def __init__(self, encoder: PointNet) -> None:
        super().__init__()
        self.encoder = encoder
        width = encoder.config.width
        self.tell = nn.ModuleList(
            nn.Linear(width, count) for count in (len(NAMES), len(TURNS), len(COLORS))
        )
        self.size, self.same = nn.Linear(width, 3), nn.Linear(width, 32)

    def forward(self, clouds: Tensor, labels: Tensor, sizes: Tensor) -> Tensor:
        """Returns the loss."""
        tokens = F.dropout(self.encoder(clouds)[:, 0], 0.1, self.training)
        loss = F.smooth_l1_loss(self.size(tokens.mean(1)), sizes)
        for head, target in zip(self.tell, labels.unbind(1), strict=True):
            whole, each = head(tokens.mean(1)), head(tokens)
            loss = loss + F.cross_entropy(whole, target, label_smoothing=0.05)
            loss = loss + 0.5 * F.cross_entropy(
                each.flatten(0, 1), target.repeat_interleave(each.shape[1]), label_smoothing=0.05
            )
        # Two views of an object stand beside each other.
        seen = F.normalize(self.same(tokens.mean(1)), dim=-1)
        alike = (seen @ seen.T / TEMPERATURE).fill_diagonal_(float("-inf"))
        return loss + F.cross_entropy(alike, torch.arange(len(seen)) ^ 1)


def stage_clouds(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    draw = torch.Generator().manual_seed(args.seed)
    bank = solids(args, "pretrain")
    encoder = PointNet(PointNetConfig(colours=True, points=POINTS))
    untrained = {name: value.clone() for name, value in encoder.state_dict().items()}

    def batch() -> tuple[Tensor, ...]:
        chosen = torch.randperm(len(bank), generator=draw)[: args.batch // 2].tolist()
        views = [view(bank[row], draw, change=True) for row in chosen for _ in range(2)]
        clouds, labels, sizes = zip(*views, strict=True)
        return torch.stack(clouds), torch.stack(labels), torch.stack(sizes)

    train(Heads(encoder), batch, args)
    encoder.eval()
    out = args.out or args.assets / "pointnet-tiny"
    save_pointnet(out, encoder)
    encoder.load_state_dict({n: v.half().float() for n, v in encoder.state_dict().items()})
    sides = [solids(args, side) for side in ("train", "test")]
    _report(encoder, sides, "trained")
    encoder.load_state_dict(untrained)
    _report(encoder, sides, "random weights")


def _report(encoder: PointNet, sides: Sequence[Sequence[Solid]], title: str) -> None:
    """Prints linear probes of train -> test objects, in clouds as the stream has them."""
    draw = torch.Generator().manual_seed(1)
    found = []
    for bank in sides:
        views = [view(solid, draw, change=False) for solid in bank for _ in range(4)]
        clouds, labels, sizes = zip(*views, strict=True)
        with torch.inference_mode():
            tokens = torch.cat([encoder(part)[:, 0] for part in torch.stack(clouds).split(64)])
        ratio = torch.stack([size[0] - size[1] for size in sizes]).exp()
        shape = torch.full_like(ratio, -1).long()
        shape[ratio > 1.3], shape[ratio < 0.75], shape[(ratio - 1).abs() < 0.15] = 0, 1, 2
        known = torch.cat([torch.stack(labels), shape[:, None]], dim=1)
        found.append((torch.cat([tokens.mean(1), tokens[:, 0]], dim=1), known))
    for column, asked in enumerate(("object", "pose", "color", "tall, wide or even")):
        probe(title, asked, found, column)
