"""Samples with an image, a text, or both, and the two backbones that answer them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tests.conftest import ToyProcessor, toy_model, toy_vilt

from evolora.backbones.base import Backbone
from evolora.backbones.clip_fusion import ClipFusion
from evolora.backbones.memory import ForwardCache, Memory
from evolora.backbones.vilt import Vilt
from evolora.storage.tensor_cache import TensorCache
from evolora.streams.task import Example

TEXTS = ("a red dot", "the blue cross of the bad ring .", "green", "a photo of a ring .")


class Pairs:
    """Rows (missing code 0 complete, 1 without text, 2 without image) of seeded samples."""

    def __init__(self, codes: Sequence[int] = (0, 1, 2, 0), *, several: bool = False) -> None:
        self.codes, self.several = codes, several

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, row: int) -> Example:
        draw = torch.Generator().manual_seed(row)
        image = torch.randint(0, 256, (3, 20, 24), generator=draw, dtype=torch.uint8)
        inputs: dict[str, Any] = {"image": image, "text": TEXTS[row % len(TEXTS)]}
        if self.codes[row]:
            del inputs[("text", "image")[self.codes[row] - 1]]
        label = (row % 2, 1, 0) if self.several else row % 3
        return Example(inputs=inputs, label=label, key=f"row {row}")

    def all(self) -> list[Example]:
        return [self[row] for row in range(len(self))]


def vilt(**settings: Any) -> Vilt:
    return Vilt(toy_vilt(), ToyProcessor(), name="toy", **settings)


def fusion(kind: str = "clip") -> ClipFusion:
    return ClipFusion(toy_model(kind), ToyProcessor(), name="toy")


def make(kind: str) -> Backbone:
    return vilt() if kind == "vilt" else fusion(kind)


def memory() -> Memory:
    def cache() -> TensorCache:
        return TensorCache(2**24, scan=True)

    return Memory(
        crops=cache(),
        passes=ForwardCache(cache(), rows_per_forward=2),
        prefixes=ForwardCache(cache(), rows_per_forward=2),
    )
