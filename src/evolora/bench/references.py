"""Naive loops in the cost shape of published code, to be timed against the library.

Each is an :class:`ExpertLayer` with the weights of a library layer, so that it stands at the same
site, computes the same function, and differs in nothing but how.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from evolora.experts.bank import ExpertBank
from evolora.experts.factor_layer import FactorLayer, Queries
from evolora.experts.sites import ExpertLayer
from evolora.methods.moe_adapters import MoELayer
from evolora.routing.route import Route


class LoopLoRALayer(ExpertLayer):
    """Every expert on for all: one after another, each adding its full-size output.

    The shape of D-MoLE's layer (``result = result + gate * lora_B(lora_A(x)) * scaling``) and of
    PEFT's with several active adapters.

    Args:
        layer: a layer with a bank of linear experts; those frozen there are frozen here.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        bank = layer.bank
        assert isinstance(bank, ExpertBank)
        frozen = set(bank.frozen_ids())
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for expert, (a, b) in enumerate(zip(bank.A.all(), bank.B.all(), strict=True)):
            self.down.append(_linear(a, None, expert in frozen))
            self.up.append(_linear(b.T, None, expert in frozen))
        self.gate, self.scale = 1.0, bank.scale

    def forward(self, x: Tensor, out: Tensor, route: Route) -> Tensor:
        """Return out + sum of gate * scale * B A x."""
        for down, up in zip(self.down, self.up, strict=True):
            out = out + self.gate * up(down(x)) * self.scale
        return out


class RoutedLoopLayer(ExpertLayer):
    """A task's expert for each row: one expert after another on the rows that chose it.

    The shape of PEFT's mixed batches (``adapter_names``).

    Args:
        layer: a layer with a bank of linear experts, which is copied.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.bank = copy.deepcopy(layer.bank)

    def forward(self, x: Tensor, out: Tensor, route: Route) -> Tensor:
        """Return out + scale * B A x of each row's expert."""
        ids = route.tasks.unsqueeze(1)
        bank = self.bank
        assert isinstance(bank, ExpertBank)
        return loop_over_experts(out, x, bank, ids, torch.ones_like(ids), hit_only=True)


class LoopMoELayer(ExpertLayer):
    """Top-k of ReLU bottlenecks as MoE-Adapters' code computes them (SparseDispatcher).

    Rows are sorted by expert and split; each expert runs on its part; full-size outputs are joined,
    weighted by their gates and added up by ``index_add``; the sum is added to the MLP's output.

    Args:
        layer: the library's layer, whose routers and experts are copied.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        assert isinstance(layer, MoELayer)
        bank = layer.bank
        assert bank.down_bias is not None and bank.up_bias is not None
        stacks = (bank.A, bank.down_bias, bank.B, bank.up_bias)
        frozen = set(bank.frozen_ids())
        self.experts = nn.ModuleList()
        for i, (a, a0, b, b0) in enumerate(zip(*(s.all() for s in stacks), strict=True)):
            gone = i in frozen
            self.experts.append(
                nn.Sequential(_linear(a, a0, gone), nn.ReLU(), _linear(b.T, b0, gone))
            )
        gates = layer.routers.gate.all().detach()
        self.routers = nn.ParameterList([gate.clone() for gate in gates])
        self.scale, self.top_k = bank.scale, layer.config.top_k

    def forward(self, x: Tensor, out: Tensor, route: Route) -> Tensor:
        """Return out + the gated experts of each row."""
        assert route.uniform is not None
        logits = route.summarize(x) @ self.routers[route.uniform]
        top, chosen = logits.topk(self.top_k, dim=1)
        gates = torch.zeros_like(logits).scatter(1, chosen, top.softmax(dim=1))
        order, by_expert = torch.nonzero(gates)[:, 1].sort(stable=True)
        rows = torch.nonzero(gates)[by_expert, 0]
        sizes = (gates > 0).sum(dim=0).tolist()
        parts = torch.split(x[rows], sizes)
        pairs = zip(self.experts, parts, strict=True)
        outputs = [expert(part) * self.scale for expert, part in pairs]
        joined = torch.cat([part for part in outputs if part.shape[0]])
        weighted = joined * gates[rows, order][:, None, None]
        return out + torch.zeros_like(out).index_add(0, rows, weighted)


class LoopFactorLayer(ExpertLayer):
    """DeLo's rank-one factors, one after another for one sample after another.

    Args:
        layer: the library's layer, whose pools are copied; weighted gates, MixLoRA's scores.
        queries: what its samples choose by.
    """

    def __init__(self, layer: nn.Module, queries: Queries) -> None:
        super().__init__()
        assert isinstance(layer, FactorLayer)
        self.pools, self.alpha, self.queries = copy.deepcopy(layer.pools), layer.alpha, queries

    def forward(self, x: Tensor, out: Tensor, route: Route) -> Tensor:
        """Return out + alpha * sum of g_k b_{J_k} (a_{I_k} . x) over the modalities."""
        queries, out = self.queries.of(route), out.clone()
        for row, task in enumerate(route.tasks.tolist()):
            for name, pool in self.pools.items():
                query = queries[row, self.queries.modalities.index(name)]
                for a, b, gate in _chosen(pool, task, query):
                    out[row] += self.alpha * gate * torch.outer(x[row] @ a, b)
        return out


def _chosen(pool: Any, task: int, query: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Return a, b and g of each factor that a sample's query chooses from its task's pool."""
    e, r = pool.config.num_factors, pool.config.r
    down_factors, up_factors = (s.all()[task * e : (task + 1) * e] for s in (pool.A, pool.B))
    down = pool.down_router.all()[task] @ query + pool.down_offset.all()[task]
    best = down.argsort(descending=True)[:r]
    scores = (pool.up_router.all()[task] @ query + pool.up_offset.all()[task]).softmax(0)
    given = [pool.conditional.all()[task, k].T @ down_factors[i] for k, i in enumerate(best)]
    scores = scores + torch.stack([one.softmax(0) for one in given]).sum(0).softmax(0)
    up = scores.argsort(descending=True)[:r]
    gates = down.softmax(0)[best] * scores[up]
    for i, j, gate in zip(best, up, r * gates / gates.sum(), strict=True):
        yield down_factors[i], up_factors[j], gate


def loop_over_experts(
    out: Tensor, x: Tensor, bank: ExpertBank, ids: Tensor, gates: Tensor, *, hit_only: bool
) -> Tensor:
    """Return ``out`` plus the gated linear experts of a bank, one expert at a time.

    Args:
        out: (b, n, d_out) base output.
        x: (b, n, d_in) input.
        bank: linear experts.
        ids: (b, k) per sample, or (b, n, k) per token.
        gates: weights of the experts, of the same shape.
        hit_only: index the rows that chose an expert (mixture-of-experts code); otherwise every
            expert runs on everything and is weighted, by zero too (dense gating code).
    """
    if ids.dim() == 2:
        ids, gates = ids.unsqueeze(1), gates.unsqueeze(1)
    factors = zip(bank.A.all().unbind(), bank.B.all().unbind(), strict=True)
    for expert, (a, b) in enumerate(factors):
        weight = (gates * (ids == expert)).sum(dim=-1, keepdim=True) * bank.scale
        if not hit_only:
            out = out + weight * ((x @ a.T) @ b)
        elif ids.shape[1] == 1:  # a route per sample
            rows = torch.nonzero(weight[:, 0, 0]).squeeze(1)
            out = out.index_add(0, rows, weight[rows] * ((x[rows] @ a.T) @ b))
        else:
            rows = torch.nonzero(weight.flatten()).squeeze(1)
            part = weight.flatten(0, 1)[rows] * ((x.flatten(0, 1)[rows] @ a.T) @ b)
            out = out.flatten(0, 1).index_add(0, rows, part).view_as(out)
    return out


def _linear(weight: Tensor, bias: Tensor | None, frozen: bool) -> nn.Linear:
    """Return a Linear with copies of the given tensors."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    made.weight = nn.Parameter(weight.detach().clone(), requires_grad=not frozen)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().clone(), requires_grad=not frozen)
    return made
