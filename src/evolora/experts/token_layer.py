"""A layer of experts that every token weighs anew, shared by all tasks (MoELoRA, arXiv 2403.08350).

y = W x + sum_i p_i E_i(x) ,  p = softmax(W_r x) for each token
"""

from __future__ import annotations

import torch
from torch import Tensor

from evolora.experts.bank import ExpertBank
from evolora.experts.mixing import mix
from evolora.experts.sites import ExpertLayer, Site
from evolora.experts.task_layer import Draws
from evolora.routing.route import Route
from evolora.routing.token_router import TokenRouter


class TokenLayer(ExpertLayer):
    """Experts and their router at one site.

    Args:
        site: where it stands.
        bank: the experts.
        num_experts: how many there are.
        top_k: experts of a token, their weights then sum to 1; None takes all.
        dropout: probability of zeroing a bottleneck unit in training.
        std: deviation of fresh experts' A; None draws them as a Linear is drawn.
    """

    def __init__(
        self,
        site: Site,
        bank: ExpertBank,
        num_experts: int,
        *,
        top_k: int | None = None,
        dropout: float = 0.0,
        std: float | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.name, self.bank, self.num_experts = site.name, bank, num_experts
        self.top_k, self.dropout, self.std = top_k, dropout, std
        self.router = TokenRouter(site.d_in, num_experts, device=device)

    def begin_task(self, draws: Draws) -> None:
        """Make the experts and the router; all later tasks go on with them."""
        draw = draws()
        self.bank.grow(self.num_experts, draw, std=self.std)
        self.router.grow(draw)

    def forward(self, x: Tensor, out: Tensor, route: Route) -> Tensor:
        """Return out + the experts as each token weighs them."""
        gates = self.router(x)
        ids: Tensor | range = range(self.num_experts)
        if self.top_k is not None:
            top = gates.topk(self.top_k, dim=-1)
            ids, gates = top.indices, top.values / top.values.sum(dim=-1, keepdim=True)
        return mix(
            out,
            x,
            self.bank,
            ids,
            gates,
            dropout=self.dropout,
            random=route.random,
            key=self.name,
            formulation=self.formulation,
            inplace=True,
        )

    def flops(self, tokens: int) -> int:
        """Return the extra FLOPs of one row of ``tokens`` tokens: its router and its experts."""
        active = self.top_k or self.num_experts
        return self.router.flops(tokens) + self.bank.flops(tokens, active)
