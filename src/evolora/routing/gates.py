"""Gates: which experts of a site answer a row, with which weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evolora.experts.bank import GrowingStack
from evolora.randomness import StepRandom

NOISE_FLOOR = 0.01
"""Added to the softplus standard deviation of the gate noise."""


def top_k_softmax(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return (ids, gates), both (b, k): softmax over the k largest logits of each row.

    Ties are broken toward the smaller index, so that a fresh all-zero router is deterministic.
    """
    order = torch.sort(logits, dim=-1, descending=True, stable=True)
    return order.indices[:, :k], torch.softmax(order.values[:, :k], dim=-1)


def load_balance(gates: Tensor) -> Tensor:
    """Return CV^2 of the summed gates (b, e): unbiased variance over squared mean (Shazeer 2017)."""
    load = gates.sum(dim=0)
    if load.numel() == 1:
        return load.new_zeros(())
    return load.var() / (load.mean() ** 2 + 1e-10)


class TaskRouters(nn.Module):
    """One noisy top-k router per task (Shazeer et al. 2017; MoE-Adapters, arXiv 2403.11549).

        clean = c G_t ;  logit = clean + (softplus(c N_t) + 0.01) * normal(0, 1) ;  softmax of top k

    Args:
        d: width of the routing vector c.
        experts: size of the pool.
        k: experts per row.
    """

    pool: Tensor

    def __init__(
        self, d: int, experts: int, k: int, *, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.d, self.experts, self.k = d, experts, k
        self.gate = GrowingStack(d, experts, device=device)
        self.noise = GrowingStack(d, experts, device=device)
        self.register_buffer("pool", torch.empty(0, dtype=torch.long))

    def __len__(self) -> int:
        return len(self.gate)

    def grow(self) -> None:
        """Add a router for a new task, all zero as in the paper's code, and freeze the others."""
        for stack in (self.gate, self.noise):
            stack.freeze(range(len(stack)))
            stack.grow(torch.zeros(1, self.d, self.experts, device=stack.active.device))
        self.pool = torch.cat([self.pool, self.pool.new_tensor([self.experts])])

    def widen(self, experts: int) -> None:
        """Follow a pool that has grown; routers that exist keep to the experts they knew."""
        self.experts = experts
        self.gate.widen(experts)
        self.noise.widen(experts)

    def freeze(self) -> None:
        """Freeze every router for good."""
        for stack in (self.gate, self.noise):
            stack.freeze(range(len(stack)))

    def forward(
        self,
        c: Tensor,
        tasks: Tensor,
        *,
        uniform: int | None = None,
        random: StepRandom | None = None,
        key: str = "",
    ) -> tuple[Tensor, Tensor]:
        """Return (ids, gates), both (b, k).

        Args:
            c: (b, d) routing vectors.
            tasks: (b,) router of each row.
            uniform: the one router of all rows if known.
            random: noise source; None routes without noise.
            key: name under which this site draws its noise.
        """
        logits = self._logits(self.gate, c, tasks, uniform)
        known = self.pool[tasks if uniform is None else [uniform]].to(c.device)
        if random is not None:
            std = F.softplus(self._logits(self.noise, c, tasks, uniform)) + NOISE_FLOOR
            logits = logits + std * random.normal(f"{key}/gate", tuple(logits.shape), logits)
        unknown = torch.arange(self.experts, device=c.device) >= known.unsqueeze(1)
        logits = logits.masked_fill(unknown, float("-inf"))
        return top_k_softmax(logits, self.k)

    @staticmethod
    def _logits(stack: GrowingStack, c: Tensor, tasks: Tensor, uniform: int | None) -> Tensor:
        if uniform is not None:
            return c @ stack.take(torch.tensor(uniform, device=c.device))
        return torch.bmm(c.unsqueeze(1), stack.take(tasks)).squeeze(1)
