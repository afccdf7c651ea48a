"""What a bench is run with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch

from evolora.errors import ConfigError, unknown_name

T = TypeVar("T")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of all benches; None takes each bench's own size.

    Args:
        layers: transformer blocks of the tower.
        batch: samples per batch.
        rounds: shuffled rounds a comparison is timed for.
        dtype: "float32" or "bfloat16".
        device: "cpu", "cuda" or "cuda:0".
        quick: small sizes and few rounds, for a check of ratios in under two minutes.
        wall: on the CPU, wall-clock instead of process CPU time.
        seed: order of the rounds, random weights and inputs.
    """

    layers: int | None = None
    batch: int | None = None
    rounds: int | None = None
    dtype: str = "float32"
    device: str = "cpu"
    quick: bool = False
    wall: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("layers", "batch", "rounds"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name} must be at least 1; got {value}")
        if self.dtype not in DTYPES:
            raise unknown_name("dtype", self.dtype, DTYPES)
        kind = self.device.split(":")[0]
        if kind not in ("cpu", "cuda"):
            raise unknown_name("device", self.device, ("cpu", "cuda"))
        if kind == "cuda" and not torch.cuda.is_available():
            raise ConfigError(f"device {self.device!r}: this torch finds no GPU (allowed: cpu)")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch names it."""
        return DTYPES[self.dtype]

    @property
    def standard(self) -> bool:
        """Whether sizes and precision are those the absolute goals (MiB) are stated for."""
        changed = (self.layers, self.batch) != (None, None) or self.dtype != "float32"
        return not (self.quick or changed)

    def either(self, full: T, quick: T) -> T:
        """Return the value for a full or a quick run."""
        return quick if self.quick else full
