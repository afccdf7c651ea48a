"""A vision tower of the benches, small enough for tests."""

from __future__ import annotations

import pytest
import torch

from evolora.bench import towers
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
def tiny_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every tower of the benches small."""
    for name, value in {"WIDTH": 32, "MLP": 64, "HEADS": 2, "IMAGE": 48}.items():
        monkeypatch.setattr(towers, name, value)


@pytest.fixture
def tiny_tower(tiny_sizes: None) -> TinyTower:
    return TinyTower()
