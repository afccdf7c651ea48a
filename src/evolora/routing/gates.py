"""Gates: which experts of a site answer a row, with which weight."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evolora.experts.bank import GrowingStack, Listed
from evolora.randomness import StepRandom

NOISE_FLOOR = 0.01
"""Added to the softplus standard deviation of the gate noise."""


def top_k_softmax(
    logits: Tensor, k: int, ties: Tensor | None = None, *, renormalize: bool = True
) -> tuple[Tensor, Tensor]:
    """Return (ids, gates), both (b, k): softmax over the k largest logits of each row.

    Ties are broken in a fixed order, so that a fresh all-zero router is deterministic.

    Args:
        logits: (b, e).
        k: experts per row.
        ties: (b, e) or (1, e) experts, those that win a tie first; None takes the smaller index.
        renormalize: False leaves the gates what they are in the softmax over all of the row.
    """
    listed = logits if ties is None else logits.gather(-1, ties.expand(logits.shape))
    order = torch.sort(listed, dim=-1, descending=True, stable=True)
    ids = order.indices[:, :k]
    if ties is not None:
        ids = ties.expand(logits.shape).gather(-1, ids)
    if renormalize:
        return ids, torch.softmax(order.values[:, :k], dim=-1)
    return ids, torch.softmax(order.values, dim=-1)[:, :k]


def load_balance(values: Tensor) -> Tensor:
    """Return CV^2 of column sums: unbiased variance over squared mean (Shazeer et al. 2017).

    Args:
        values: (b, e) gates (their sums are the experts' importance) or chances (the load).
    """
    load = values.sum(dim=0)
    if load.numel() == 1:
        return load.new_zeros(())
    return load.var() / (load.mean() ** 2 + 1e-10)


def prob_in_top_k(clean: Tensor, noisy: Tensor, std: Tensor, k: int) -> Tensor:
    """Return (b, e): chance that an expert stays among the top k if its noise alone is drawn again.

        P_i = Phi((clean_i - kth largest of the other noisy logits) / std_i)

    Source: Shazeer et al. 2017 (arXiv 1701.06538), appendix A.

    Args:
        clean: (b, e) logits without noise.
        noisy: (b, e) logits with noise.
        std: (b, e) deviation of the noise.
        k: experts per row, less than e.
    """
    largest = noisy.topk(k + 1, dim=-1).values
    inside, outside = largest[:, k : k + 1], largest[:, k - 1 : k]
    bar = torch.where(noisy > inside, inside, outside)
    chance: Tensor = torch.special.ndtr((clean - bar) / std)
    return chance


@dataclass(frozen=True, eq=False)
class Gating:
    """What routers decide for a batch.

    Args:
        ids, gates: (b, k) expert and its weight.
        chance: (b, e) chance of each expert to be chosen, a smooth count (:func:`prob_in_top_k`);
            without noise, or where k takes all experts, 1 for the chosen and 0 for the others.
    """

    ids: Tensor
    gates: Tensor
    chance: Tensor | None = None


class TaskRouters(nn.Module):
    """One noisy top-k router per task (Shazeer et al. 2017; MoE-Adapters, arXiv 2403.11549).

        clean = c G_t ;  logit = clean + (softplus(c N_t) + 0.01) * normal(0, 1) ;  softmax of top k

    Args:
        d: width of the routing vector c.
        experts: size of the pool.
        k: experts per row.
        noise: whether they have the weights N_t; without, no noise can be drawn.
        renormalize: whether the k gates of a row sum to 1, see :func:`top_k_softmax`.
    """

    pool: Tensor
    ties: Tensor

    def __init__(
        self,
        d: int,
        experts: int,
        k: int,
        *,
        noise: bool = True,
        renormalize: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.d, self.experts, self.k, self.renormalize = d, experts, k, renormalize
        self.gate = GrowingStack(d, experts, device=device)
        self.noise = GrowingStack(d, experts, device=device) if noise else None
        self.register_buffer("pool", torch.empty(0, dtype=torch.long, device="cpu"))
        self.register_buffer("ties", torch.empty(0, experts, dtype=torch.long, device="cpu"))
        self._pool = Listed()

    def __len__(self) -> int:
        return len(self.gate)

    def stacks(self) -> list[GrowingStack]:
        """Return the growing weights, of which every router has one row each."""
        return [stack for stack in (self.gate, self.noise) if stack is not None]

    def grow(self, last: Collection[int] = ()) -> None:
        """Add a router for a new task, all zero as in the paper's code, and freeze the others.

        Args:
            last: experts that lose its ties; a method names the frozen ones, so that a router that
                knows nothing yet starts on experts that may still learn.
        """
        for stack in self.stacks():
            stack.freeze(range(len(stack)))
            stack.grow(torch.zeros(1, self.d, self.experts, device=stack.active.device))
        self.pool = torch.cat([self.pool, self.pool.new_tensor([self.experts])])
        order = sorted(range(self.experts), key=lambda expert: expert in last)
        self.ties = torch.cat([self.ties, self.ties.new_tensor([order])])

    def widen(self, experts: int, *, adopt: bool = False) -> None:
        """Follow a pool that has grown.

        Args:
            experts: new size of the pool.
            adopt: whether routers that exist may pick the new experts, as one router shared by all
                tasks must; otherwise they keep to the experts they knew.
        """
        new = torch.arange(self.experts, experts, device=self.ties.device)
        self.ties = torch.cat([self.ties, new.expand(len(self.ties), -1)], dim=1)
        self.experts = experts
        if adopt:
            self.pool = torch.full_like(self.pool, experts)
        for stack in self.stacks():
            stack.widen(experts)

    def freeze(self) -> None:
        """Freeze every router for good."""
        for stack in self.stacks():
            stack.freeze(range(len(stack)))

    def forward(
        self,
        c: Tensor,
        tasks: Tensor,
        *,
        uniform: int | None = None,
        random: StepRandom | None = None,
        key: str = "",
        chance: bool = False,
    ) -> Gating:
        """Return the experts of each row and their gates.

        Args:
            c: (b, d) routing vectors.
            tasks: (b,) router of each row.
            uniform: the one router of all rows if known.
            random: noise source; None routes without noise.
            key: name under which this site draws its noise.
            chance: whether the chances of all experts are wanted too.
        """
        if torch.compiler.is_compiling():  # a graph must not freeze where routers stand now
            uniform = None
        clean, ties = self._known(self._logits(self.gate, c, tasks, uniform), tasks, uniform)
        noisy, std = clean, None
        if random is not None and self.noise is not None:
            std = F.softplus(self._logits(self.noise, c, tasks, uniform)) + NOISE_FLOOR
            noisy = clean + std * random.normal(f"{key}/gate", tuple(clean.shape), clean)
        ids, gates = top_k_softmax(noisy, self.k, ties, renormalize=self.renormalize)
        if not chance:
            return Gating(ids, gates)
        if std is None or self.k == self.experts:
            return Gating(ids, gates, torch.zeros_like(clean).scatter(1, ids, 1.0))
        return Gating(ids, gates, prob_in_top_k(clean, noisy, std, self.k))

    def _known(self, logits: Tensor, tasks: Tensor, uniform: int | None) -> tuple[Tensor, Tensor]:
        """Return logits without the experts a router does not know, and who wins its ties."""
        if uniform is not None:  # numbers of Python's: nothing is looked up on the device
            known = self._pool(self.pool)[uniform]
            if known < self.experts:
                logits = F.pad(logits[:, :known], (0, self.experts - known), value=float("-inf"))
            return logits, self.ties[uniform : uniform + 1].to(logits.device)
        known_of_row = self.pool.to(logits.device)[tasks].unsqueeze(1)
        unknown = torch.arange(self.experts, device=logits.device) >= known_of_row
        return logits.masked_fill(unknown, float("-inf")), self.ties.to(logits.device)[tasks]

    @staticmethod
    def _logits(stack: GrowingStack, c: Tensor, tasks: Tensor, uniform: int | None) -> Tensor:
        """Return c G of each row's router: of all routers at once, rather than copied per row."""
        if uniform is not None:
            return c @ stack.part([stack.places()[uniform]]).squeeze(0)
        parts = [rows for rows in (stack.frozen, stack.active) if len(rows)]
        every = torch.cat([torch.matmul(c, rows) for rows in parts])  # (t, b, e)
        return every[stack.slot[tasks], torch.arange(len(c), device=c.device)]
