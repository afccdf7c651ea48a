"""A vision tower of the benches, small enough for tests."""

from __future__ import annotations

import pytest
import torch

from evolora.bench import growth, pairs, towers, train
from evolora.bench.settings import Settings


class TinyTower:
    """Two layers, 32 wide, 10 tokens."""

    def __init__(self) -> None:
        self.backbone = towers.build(Settings(), 2)
        self.x = towers.pixels(Settings(), 4)

    def learn(self, method, config, tasks: int = 1):
        return towers.learner(method, config, self.backbone, tasks)

    def base(self) -> torch.Tensor:
        with torch.no_grad():
            return towers.hidden(self.backbone)(self.x)

    def both(self, method, sites, make, task):
        other = towers.twin(self.backbone)
        towers.insert_copies(other, method, sites, make)
        with torch.no_grad():
            ours = towers.routed(method.backbone, task)(self.x)
            return ours, towers.routed(other, task)(self.x)


@pytest.fixture
def no_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the machine for granted and time every call once: here nobody reads the numbers."""
    monkeypatch.setattr("evolora.bench.session.describe", lambda settings: {})
    monkeypatch.setattr("evolora.bench.timing.MIN_SECONDS", 0.0)  # nothing is repeated


@pytest.fixture
def tiny_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every tower of the benches small, and its list of classes short."""
    monkeypatch.setattr(train, "CLASSES", 3)
    monkeypatch.setattr(pairs, "SIDE", 64)
    monkeypatch.setattr(pairs, "QUICK_SIDE", 64)
    for name, value in {"WIDTH": 24, "HEADS": 2, "WORDS": 64}.items():
        monkeypatch.setattr(growth, name, value)
    for name, value in {"WIDTH": 32, "MLP": 64, "HEADS": 2, "IMAGE": 48}.items():
        monkeypatch.setattr(towers, name, value)


@pytest.fixture
def tiny_tower(tiny_sizes: None) -> TinyTower:
    return TinyTower()
