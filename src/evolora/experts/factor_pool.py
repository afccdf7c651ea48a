"""Pools of rank-one factors: an expert composed anew for every input (DeLo, after MixLoRA).

A pool has E down-factors a_e and E up-factors b_e per task. For a query q of a sample

    s_A = W_A q + c_A                          I = the r best of s_A, best first
    s_B = W_B q + c_B  (+)  C[k]^T sg(a_{I_k}) summed over k          J = the r best of s_B
    dW  = alpha * sum_k g_k b_{J_k} a_{I_k}^T

sg stops the gradient; the k-th best down-factor is paired with the k-th best up-factor. "(+)" and
the gates g are options: see :class:`FactorConfig`. Source: DeLo, arXiv 2603.01632 (its idea; the
formulas are those of its released code, repaired: its own expert layer raises an error and is never
reached) and MixLoRA, arXiv 2402.15896 (independent and conditional factor selection).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evolora.errors import ConfigError
from evolora.experts.bank import Factors, GrowingStack


@dataclass(frozen=True, kw_only=True)
class FactorConfig:
    """How a pool is made and how factors are chosen.

    Args:
        num_factors: factors of each kind per task and pool, E (authors: 16).
        r: factors of each kind that answer one sample (authors: 4).
        alpha: constant factor of the update; a plain multiplier, not divided by r (authors: 2).
        router_grad: how a hard choice teaches the routers. "weighted": gates
            g_k = r p_A[I_k] p_B[J_k] / sum_j p_A[I_j] p_B[J_j] with p = softmax(s); equal scores
            give gates of 1. "straight_through": gates of 1 with the gradient of "weighted". "none":
            gates of 1 without gradient, so routers stay as drawn (the released code).
        cfs_mode: what the chosen down-factors say about up-factors. "softmax_sum": softmax(W_B q +
            c_B) + softmax(sum_k softmax(C[k]^T a_k)) (MixLoRA). "logit_sum": raw logits added (the
            released code; at real widths the conditional part drowns the other). "off": nothing.
        factor_init: down-factors drawn from N(0, 1/d_in) ("scaled"), or N(0, 1) ("unit", authors').
    """

    num_factors: int = 16
    r: int = 4
    alpha: float = 2.0
    router_grad: Literal["weighted", "straight_through", "none"] = "weighted"
    cfs_mode: Literal["softmax_sum", "logit_sum", "off"] = "softmax_sum"
    factor_init: Literal["scaled", "unit"] = "scaled"

    def __post_init__(self) -> None:
        if not 1 <= self.r <= self.num_factors:
            raise ConfigError(
                f"r must be between 1 and num_factors ({self.num_factors}); got {self.r}"
            )


class FactorPool(nn.Module):
    """The pools of all tasks at one site for one modality; those of finished tasks are frozen.

    Args:
        d_in, d_out: widths of the site.
        d_query: width of the query.
        config: sizes and routing.
        device: where it is.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        d_query: int,
        config: FactorConfig,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.d_in, self.d_out, self.d_query, self.config = d_in, d_out, d_query, config
        e, r = config.num_factors, config.r
        self.A = GrowingStack(d_in, device=device)
        self.B = GrowingStack(d_out, device=device)
        self.down_router = GrowingStack(e, d_query, device=device)
        self.down_offset = GrowingStack(e, device=device)
        self.up_router = GrowingStack(e, d_query, device=device)
        self.up_offset = GrowingStack(e, device=device)
        conditional = config.cfs_mode != "off"
        self.conditional = GrowingStack(r, d_in, e, device=device) if conditional else None

    def __len__(self) -> int:
        """Return the number of tasks that have a pool."""
        return len(self.down_router)

    def stacks(self) -> list[GrowingStack]:
        """Return the growing tensors."""
        return [stack for stack in self.children() if isinstance(stack, GrowingStack)]

    def grow(self, draw: torch.Generator) -> None:
        """Give a new task its pool, which outputs exactly zero; all older ones are frozen."""
        self.freeze()
        e, deviation = self.config.num_factors, 1.0
        if self.config.factor_init == "scaled":
            deviation = self.d_in**-0.5
        self.A.grow(deviation * torch.randn(e, self.d_in, generator=draw))
        self.B.grow(torch.zeros(e, self.d_out))
        bound = self.d_query**-0.5  # as nn.Linear draws
        for stack in (self.down_router, self.down_offset, self.up_router, self.up_offset):
            stack.grow(bound * (2 * torch.rand(1, *stack.shape, generator=draw) - 1))
        if self.conditional is not None:
            self.conditional.grow(torch.randn(1, *self.conditional.shape, generator=draw))

    def freeze(self) -> None:
        """Freeze the pools of every task there is."""
        for stack in self.stacks():
            stack.freeze(range(len(stack)))

    def pairs(self, *, frozen: bool = False) -> tuple[Tensor, Tensor]:
        """Return A (t, E, d_in) and B (t, E, d_out) of the task that trains, or of the others."""
        a, b = (self.A.frozen, self.B.frozen) if frozen else (self.A.active, self.B.active)
        e = self.config.num_factors
        return a.view(-1, e, self.d_in), b.view(-1, e, self.d_out)

    def choose(
        self, query: Tensor, tasks: Tensor, *, uniform: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return down-factors (b, r), up-factors (b, r), best first, and gates (b, r) or None.

        Args:
            query: (b, d_query).
            tasks: (b,) task of each row; factors are counted through all tasks, E each.
            uniform: the task of all rows where it is known.
        """
        config = self.config
        first = (tasks * config.num_factors).unsqueeze(1)
        scores = self._scores(self.down_router, self.down_offset, query, tasks, uniform)
        down = scores.topk(config.r, dim=1)
        scores = self._scores(self.up_router, self.up_offset, query, tasks, uniform)
        if self.conditional is not None:
            given = self._given(down.indices, tasks, uniform).to(query.dtype)
            if config.cfs_mode == "logit_sum":
                scores = scores + given.sum(dim=1)
            else:
                scores = scores.softmax(dim=1) + given.softmax(dim=2).sum(dim=1).softmax(dim=1)
        up = scores.topk(config.r, dim=1)
        gates = None
        if config.router_grad != "none":
            # What divides p is the same for all chosen factors and cancels: logarithms suffice.
            logs = up.values.log() if config.cfs_mode == "softmax_sum" else up.values
            gates = config.r * (down.values + logs).softmax(dim=1)
            if config.router_grad == "straight_through":
                gates = gates - gates.detach() + 1.0
        return first + down.indices, first + up.indices, gates

    def factors(self, down: Tensor, up: Tensor, *, uniform: int | None = None) -> Factors:
        """Return the chosen factors of each sample: (b, r, d_in) and (b, r, d_out)."""
        return Factors(a=self._taken(self.A, down, uniform), b=self._taken(self.B, up, uniform))

    def flops(self, tokens: int) -> int:
        """Return the extra FLOPs of one row of ``tokens`` tokens: its routers and its factors."""
        e, r = self.config.num_factors, self.config.r
        given = 0 if self.conditional is None else 2 * r * self.d_in * e
        return 4 * e * self.d_query + given + 2 * tokens * r * (self.d_in + self.d_out)

    def parameters_per_task(self) -> int:
        """Return the number of values that one task's pool stores."""
        factors = self.config.num_factors * (self.d_in + self.d_out)
        return factors + sum(
            math.prod(stack.shape) for stack in self.stacks() if stack not in (self.A, self.B)
        )

    def _taken(self, stack: GrowingStack, factors: Tensor, uniform: int | None) -> Tensor:
        """Return factors (b, r) of the stack, from one task's part of it where that is known."""
        if uniform is None:
            return stack.take(factors)
        first, count = uniform * self.config.num_factors, self.config.num_factors
        places = stack.places()[first : first + count]
        return F.embedding(factors - first, stack.part(places))

    def _scores(
        self,
        router: GrowingStack,
        offset: GrowingStack,
        query: Tensor,
        tasks: Tensor,
        uniform: int | None,
    ) -> Tensor:
        if uniform is not None:
            weight, bias = _row(router, uniform), _row(offset, uniform)
            return F.linear(query, weight.to(query.dtype), bias.to(query.dtype))
        weight, bias = router.take(tasks).to(query.dtype), offset.take(tasks).to(query.dtype)
        return torch.bmm(weight, query.unsqueeze(2)).squeeze(2) + bias

    def _given(self, down: Tensor, tasks: Tensor, uniform: int | None) -> Tensor:
        """Return C[k]^T a_k of every chosen down-factor (b, r), counted within its task: (b, r, E).

        They depend on the pool alone: of one task, those of every factor are a table (r, E, E).
        """
        assert self.conditional is not None
        r, e = self.config.r, self.config.num_factors
        if uniform is None:
            chosen = self.A.take((tasks * e).unsqueeze(1) + down).detach()
            return torch.einsum("brd,brde->bre", chosen, self.conditional.take(tasks))
        factors = self.A.part(self.A.places()[uniform * e : (uniform + 1) * e]).detach()
        table = torch.bmm(factors.expand(r, -1, -1), _row(self.conditional, uniform))
        return F.embedding(torch.arange(r, device=down.device) * e + down, table.flatten(0, 1))


def _row(stack: GrowingStack, row: int) -> Tensor:
    """Return one row, known to Python: a view."""
    return stack.part([stack.places()[row]]).squeeze(0)
