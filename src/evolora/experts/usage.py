"""Usage: how often each expert of each site was chosen, the one thing a forward pass may record."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class UsageCounter(nn.Module):
    """Integer counts per expert, kept as a buffer so that they are saved and resumed with the rest.

    Args:
        experts: size of the pool.
    """

    counts: Tensor

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(experts, dtype=torch.long))
        self._last: object = None
        self.replicated = False
        """True where every process of a distributed run sees the same rows (class prompts)."""

    def add(self, ids: Tensor, gates: Tensor, forward: object = None) -> None:
        """Count every expert with a gate other than zero once per row; ids and gates (b, k).

        Args:
            ids: experts.
            gates: their gates.
            forward: what identifies this forward pass (its route). Gradient checkpointing runs the
                same pass again in backward; it is counted once.
        """
        if forward is not None and forward is self._last:
            return
        self._last = forward
        used = (gates != 0).to(self.counts)
        self.counts.index_add_(0, ids.expand_as(used).flatten().to(used.device), used.flatten())

    def reset(self) -> None:
        """Forget all counts (done at the start of every task)."""
        self.counts.zero_()

    def widen(self, experts: int) -> None:
        """Make room for a pool that has grown to ``experts``."""
        self.counts = torch.nn.functional.pad(self.counts, (0, experts - len(self.counts)))

    def most_used(self, count: int) -> list[int]:
        """Return the ``count`` most used experts, never unused ones; ties: the smaller index."""
        order = torch.sort(self.counts, descending=True, stable=True)
        pairs = zip(order.indices.tolist(), order.values.tolist(), strict=True)
        return [expert for expert, uses in list(pairs)[:count] if uses > 0]
