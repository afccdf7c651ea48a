"""Stateless randomness: every draw is a function of (run seed, purpose, task, step, row).

Nothing here keeps generator state between steps, so a run that is killed and resumed draws exactly
what it would have drawn, and a run on several processes draws what one process would have: noise is
drawn for the whole global batch and each process takes its own rows. The shape of a row must then
be the same everywhere.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


def derive_seed(*parts: object) -> int:
    """Return a 63-bit seed that depends on every part (their ``repr``) and on nothing else."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(*parts: object, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a fresh generator seeded by :func:`derive_seed`."""
    return torch.Generator(device=device).manual_seed(derive_seed(*parts))


@dataclass(frozen=True)
class StepRandom:
    """Randomness of one training step, shared by all processes.

    Args:
        seed: derived from (run seed, task, step).
        first_row: index of this process's first row in the global batch.
        global_rows: rows of the global batch.
    """

    seed: int
    first_row: int = 0
    global_rows: int | None = None

    def normal(self, key: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Return standard normal noise of ``shape`` (rows first) on ``like``'s device and dtype."""
        return self._own_rows(
            torch.randn(self._full(shape), generator=self._generator(key)), shape, like
        )

    def keep_mask(self, key: str, shape: tuple[int, ...], p: float, like: Tensor) -> Tensor:
        """Return an inverted-dropout mask: 0 with probability ``p``, else 1 / (1 - p)."""
        uniform = torch.rand(self._full(shape), generator=self._generator(key))
        mask = (uniform >= p).to(like.dtype) / (1.0 - p)
        return self._own_rows(mask, shape, like)

    def whole(self) -> StepRandom:
        """Return the same randomness for rows that every process holds in full (class prompts)."""
        return StepRandom(self.seed)

    def _generator(self, key: str) -> torch.Generator:
        return generator(self.seed, key)

    def _full(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (self.global_rows or shape[0], *shape[1:])

    def _own_rows(self, drawn: Tensor, shape: tuple[int, ...], like: Tensor) -> Tensor:
        own = drawn[self.first_row : self.first_row + shape[0]].to(like.dtype)
        if like.is_cuda:  # from pinned memory the host need not wait for the copy
            return own.pin_memory().to(like.device, non_blocking=True)
        return own.to(like.device)
