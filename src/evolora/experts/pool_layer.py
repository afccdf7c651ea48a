"""A layer whose experts are a pool that tasks share: each task has a router over it.

A router mixes the k best experts of a row (:class:`evolora.routing.gates.TaskRouters`). When a task
ends, the experts it used most are frozen: later tasks may use them but not overwrite them, and a
new task always finds some that may still learn. Source: MoE-Adapters (arXiv 2403.11549).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from evolora.errors import ConfigError
from evolora.experts.bank import ExpertBank
from evolora.experts.mixing import mix
from evolora.experts.sites import ExpertLayer, Site
from evolora.experts.task_layer import Draws
from evolora.experts.usage import UsageCounter
from evolora.randomness import StepRandom, derive_seed
from evolora.routing.gates import Gating, TaskRouters, load_balance
from evolora.routing.route import Route
from evolora.routing.spans import TokenSpans


@dataclass(frozen=True, kw_only=True)
class PoolConfig:
    """Size of a pool, how it is protected, and how its routers choose; defaults as for MTIL.

    Args:
        num_experts: experts per site at the start (authors: 22).
        top_k: experts per sample (2).
        dropout: on the bottleneck in training (0.1), in [0, 1).
        routers: "per-task", or one "shared" by all tasks (class-incremental setting).
        freeze_top: most used experts per site to freeze when a task ends (2); 0 freezes none.
        min_free_experts: a new task finds at least so many unfrozen experts; the pool grows to it.
        text_routing: token a prompt is routed on: its "end" (default) or "start" (authors).
        noise: noisy gates in training (True).
        noise_at_test: also at test time (the authors' class-incremental runs); fixed seed.
        load_balance: weight of CV^2 of the experts' importance (summed gates) plus CV^2 of their
            load (summed chances to be chosen), per site (authors: 0.01, computed and dropped; 0).
    """

    num_experts: int = 22
    top_k: int = 2
    dropout: float = 0.1
    routers: Literal["per-task", "shared"] = "per-task"
    freeze_top: int = 2
    min_free_experts: int = 2
    text_routing: Literal["end", "start"] = "end"
    noise: bool = True
    noise_at_test: bool = False
    load_balance: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.num_experts:
            raise ConfigError(
                f"top_k must be between 1 and num_experts ({self.num_experts}); got {self.top_k}"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"dropout must be in [0, 1); got {self.dropout}")


class PoolLayer(ExpertLayer):
    """A pool of experts and one router per task at one site.

    Args:
        site: where it stands.
        bank: the experts.
        config: of pool and routers.

    Attributes:
        balance: the load-balancing term of the training forward that ran last, if it has a weight.
    """

    def __init__(
        self, site: Site, bank: ExpertBank, config: PoolConfig, device: torch.device
    ) -> None:
        super().__init__()
        self.name, self.tower, self.config, self.bank = site.name, site.tower, config, bank
        self.routers = TaskRouters(site.d_in, config.num_experts, config.top_k, device=device)
        self.usage = UsageCounter(config.num_experts)
        self.usage.replicated = site.tower == "text"
        self.balance: Tensor | None = None

    def forward(self, x: Tensor, out: Tensor, route: Route) -> Tensor:
        """Return out + the gated experts of each row's task."""
        balancing = route.random is not None and self.config.load_balance > 0
        gating = route.once(self.name, lambda: self._decide(x, route, balancing))
        ids, gates = gating.ids, gating.gates
        if route.random is not None:
            self.usage.add(ids, gates.detach(), forward=route)
        if balancing:
            assert gating.chance is not None
            dense = gates.new_zeros(len(gates), len(self.bank)).scatter(1, ids, gates)
            self.balance = load_balance(dense) + load_balance(gating.chance)
        return mix(
            out,
            x,
            self.bank,
            ids,
            gates,
            dropout=self.config.dropout,
            random=route.random,
            key=self.name,
            formulation=self.formulation,
            inplace=True,
        )

    def flops(self, tokens: int) -> int:
        """Return the extra FLOPs of one row of ``tokens`` tokens: its router and its experts."""
        router = 2 * self.routers.d * self.routers.experts
        return router + self.bank.flops(tokens, self.config.top_k)

    def begin_task(self, draws: Draws) -> None:
        """Give the task a router and enough unfrozen experts."""
        draw = draws()
        if len(self.bank) == 0:
            self.bank.grow(self.config.num_experts, draw)
        free = len(self.bank) - len(self.bank.frozen_ids())
        if free < self.config.min_free_experts:
            self.bank.grow(self.config.min_free_experts - free, draw)
            self.routers.widen(len(self.bank), adopt=self.config.routers == "shared")
            self.usage.widen(len(self.bank))
        if self.config.routers == "per-task" or len(self.routers) == 0:
            self.routers.grow(last=self.bank.frozen_ids())
        self.usage.reset()

    def finish_task(self) -> None:
        """Freeze the experts this task used most, and its router."""
        self.bank.freeze(self.usage.most_used(self.config.freeze_top))
        if self.config.routers == "per-task":
            self.routers.freeze()

    def _decide(self, x: Tensor, route: Route, balancing: bool) -> Gating:
        """Return which experts answer each row, by what speaks for the row."""
        start = self.tower == "text" and self.config.text_routing == "start"
        if isinstance(route.spans, TokenSpans):  # a prompt's first token is the same in all rows
            c = route.mean(x).to(self.routers.gate.active.dtype)
        else:
            c = x[:, 0] if start else route.summarize(x)
        noise = route.random if self.config.noise else None
        if self.config.noise_at_test and noise is None:
            noise = StepRandom(derive_seed("noise-at-test", self.name))
        found: Gating = self.routers(
            c,
            route.tasks,
            uniform=route.uniform,
            random=noise,
            key=self.name,
            chance=balancing,
        )
        return found
