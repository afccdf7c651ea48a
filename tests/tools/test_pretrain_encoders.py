"""What the small encoders are trained on: labels belong to what is heard and seen."""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor

from encoder_pretraining.clouds import DENSE, POINTS, Solid, view
from encoder_pretraining.clouds import Heads as CloudHeads
from encoder_pretraining.sounds import NAMES, SECONDS, TOKENS, UNKNOWN, Stroke, mel, mixture
from encoder_pretraining.training import train
from evolora.backbones.encoders.pointnet import PointNet, PointNetConfig
from evolora.streams.media.sounds import RATE
from evolora.streams.mosaic.modality_words import COLORS


def tone(note: int, name: int) -> Stroke:
    frequency = 440 * 2 ** ((note - 69) / 12)
    time = torch.arange(RATE * 3 // 2) / RATE
    return Stroke(0.8 * torch.sin(2 * math.pi * frequency * time), name, note)


def test_moments_are_labelled_with_what_sounds_then() -> None:
    draw = torch.Generator().manual_seed(0)
    bank = [tone(69, 0), tone(81, 1), Stroke(torch.randn(9_000, generator=draw), 10, UNKNOWN)]
    seen = set()
    for _ in range(20):
        wave, labels = mixture(bank, draw)
        assert wave.shape == (round(SECONDS * RATE),) and labels.shape == (3, TOKENS)
        loud = wave.view(TOKENS, -1).std(1)
        sounding = labels[0] != UNKNOWN
        assert float(loud[sounding].median()) > 5 * float(loud[~sounding].median())
        assert bool((labels[1][~sounding] == UNKNOWN).all())
        seen |= set(labels[0][sounding].tolist())
        middle = [
            place for place in range(2, TOKENS - 3)
            if labels[1, place - 2] == labels[1, place + 2] == labels[1, place] != UNKNOWN
        ]  # fmt: skip
        for place in middle[:1]:
            step = len(wave) // TOKENS
            part = wave[(place - 1) * step : (place + 2) * step]
            peak = float(torch.fft.rfft(part, 1 << 15).abs().argmax()) * RATE / (1 << 15)
            assert abs(69 + 12 * math.log2(peak / 440) - int(labels[1, place])) < 0.7
    assert seen == {0, 1, 10} and max(seen) < len(NAMES)
    assert mel(torch.zeros(2, RATE)).shape == (2, 64, 100)


def box(name: int) -> Solid:
    draw = torch.Generator().manual_seed(name)
    places = torch.rand(DENSE, 3, generator=draw) - 0.5
    return Solid(places * torch.tensor([0.2, 2.0, 0.2]), torch.full((DENSE, 1), 0.8), name)


def test_a_cloud_is_placed_and_painted_as_its_labels_say() -> None:
    draw = torch.Generator().manual_seed(0)
    for _ in range(12):
        cloud, labels, sizes = view(box(3), draw, change=False)
        assert cloud.shape == (POINTS, 6) and int(labels[0]) == 3
        spread = cloud[:, :3].amax(0) - cloud[:, :3].amin(0)
        assert (float(spread[1]) > 1.8) == (int(labels[1]) != 1)  # lying: long in another direction
        tint = torch.tensor(list(COLORS.values())[int(labels[2])]) / 255
        assert torch.allclose(cloud[0, 3:], 0.8 * tint)
        assert abs(math.exp(float(sizes[0])) - 2.0) < 0.05


def test_training_tells_two_objects_apart() -> None:
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(0)
    flat = Solid(box(1).places[:, [1, 0, 2]], torch.full((DENSE, 1), 0.8), 1)
    bank = [box(0), flat]

    def batch() -> tuple[Tensor, ...]:
        views = [view(solid, draw, change=True) for solid in bank for _ in range(2)]
        clouds, labels, sizes = zip(*views, strict=True)
        return torch.stack(clouds), torch.stack(labels), torch.stack(sizes)

    config = PointNetConfig(colours=True, hidden=8, width=16, groups=2, neighbours=4)
    model = CloudHeads(PointNet(config))
    given = batch()
    with torch.no_grad():
        before = float(model.eval()(*given))
    train(model, batch, argparse.Namespace(steps=150, minutes=1.0, rate=1e-2))
    with torch.no_grad():
        after = float(model(*given))
    assert after < 0.8 * before
