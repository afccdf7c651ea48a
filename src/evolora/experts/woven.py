"""Woven adapters: a new path has an adapter of its own and reuses the frozen ones before it.

    A_i(x)   = s_i (U_i act(D_i x + b_i) + c_i)                 the adapter of path i
    Â_i^t(x) = s_i (U_i F_i^t(act(D_i x + b_i)) + c_i)          the same, reused by path t > i
    y        = W x + sum_{i<t} g_i Â_i^t(x) + g_t A_t(x)        g: one weight per token and expert

All experts of a path are one product of the stacked D and one of the stacked U; the weights are
applied in between, and the biases c_i ride along as further rows of U.

Source: PathWeave (arXiv 2410.20178): adapter-in-adapter.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from evolora.experts.accumulate import accumulate, may_overwrite
from evolora.experts.bank import ExpertBank, GrowingStack
from evolora.experts.in_adapters import InAdapters
from evolora.experts.sites import ExpertLayer, Site
from evolora.routing.path_gates import PathGates
from evolora.routing.route import Route

Mixture = Literal["gate", "mean", "sum"]


class WovenLayer(ExpertLayer):
    """The adapters of all paths at one Linear.

    A route's task is the index of a path here.

    Args:
        site: the Linear.
        r: rank of an adapter.
        activation: "relu" between its halves, or None.
        reuse: whether a path has its predecessors' adapters too.
        mixture: experts are weighed by a "gate", equally ("mean"), or added ("sum").
        inner: in-adapters of reused adapters; None reuses them as they are.
        gates: of mixture "gate".
        branch_scale: whether each path but the first has a factor on all of its experts, zero at
            the start, so that it starts as the base exactly.
    """

    def __init__(
        self,
        site: Site,
        r: int,
        *,
        activation: str | None = None,
        reuse: bool = True,
        mixture: Mixture = "gate",
        inner: InAdapters | None = None,
        gates: PathGates | None = None,
        branch_scale: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.name, self.reuse, self.mixture = site.name, reuse, mixture
        self.bank = ExpertBank(
            site.d_in, site.d_out, r, bias=True, activation=activation, device=device
        )
        self.scale = GrowingStack(1, device=device)
        self.inner, self.gates = inner, gates
        self.branch = GrowingStack(1, device=device) if branch_scale else None
        self.silent: Collection[int] = ()
        """Paths whose experts are left out here (faults of the released code, to reproduce it)."""
        self._lender: tuple[WovenLayer, Collection[int]] | None = None

    def __len__(self) -> int:
        return len(self.bank)

    def borrow(self, lender: WovenLayer, paths: Collection[int]) -> None:
        """Let paths use the in-adapters of another layer (a fault of the released code)."""
        self._lender = (lender, paths)

    def grow(
        self, draw: torch.Generator, *, std: float | None = None, up_std: float | None = None
    ) -> int:
        """Add the adapter of a new path, which adds nothing yet; return the path's index.

        Args:
            draw: randomness.
            std: deviation of D; None draws it as a Linear is drawn.
            up_std: deviation of U; None starts it at zero.
        """
        path, device = len(self.bank), self.scale.active.device
        self.bank.grow(1, draw, std=std)
        if up_std is not None and device.type != "meta":
            drawn = torch.randn(self.bank.B.shape, generator=draw) * up_std
            with torch.no_grad():
                self.bank.B.active[-1].copy_(drawn)
        self.scale.grow(torch.ones(1, 1, device=device))
        if self.gates is not None and self._sources(path):
            self.gates.grow(path)
        if self.branch is not None and self._sources(path):
            self.branch.grow(torch.zeros(1, 1, device=device))
        return path

    def forward(self, x: Tensor, out: Tensor, route: Route) -> Tensor:
        """Return out plus the experts of each row's path, as each token weighs them."""
        if route.uniform is not None:
            return self._on_path(x, out, route.uniform, route)
        for path in torch.unique(route.tasks).tolist():
            rows = torch.nonzero(route.tasks == path)[:, 0]
            part = self._on_path(x[rows], out[rows], path, route.take(rows))
            out = out.index_copy(0, rows, part)
        return out

    def weights(self, x: Tensor, path: int, route: Route) -> Tensor:
        """Return the weight (b, n, k) of each expert of a path, its own last; or (k) for all."""
        count = self._sources(path) + 1
        if self.gates is not None and count > 1:
            found: Tensor = self.gates(x, path, random=route.random, key=self.name)
            return found
        share = 1.0 / count if self.mixture == "mean" else 1.0
        return torch.full((count,), share, device=x.device)

    def flops(self, tokens: int) -> int:
        """Return the extra FLOPs of one row of ``tokens`` tokens on the newest path."""
        path = len(self.bank) - 1
        if path < 0:
            return 0
        sources = self._sources(path)
        total = self.bank.flops(tokens, sources + 1)
        if self.inner is not None and sources:
            total += self.inner.flops(tokens, path)
        gate = 2 * tokens * self.bank.d_in * (sources + 1)
        return total + (gate if self.gates is not None and sources else 0)

    def _sources(self, path: int) -> int:
        return path if self.reuse else 0

    def _on_path(self, x: Tensor, out: Tensor, path: int, route: Route) -> Tensor:
        if path in self.silent:
            return out
        first, bank = path - self._sources(path), self.bank
        assert bank.down_bias is not None and bank.up_bias is not None
        down, bias, up, offset, scale = (
            _rows(stack, first, path).to(out.dtype)
            for stack in (bank.A, bank.down_bias, bank.B, bank.up_bias, self.scale)
        )
        inside = F.linear(x.to(out.dtype), down.flatten(0, 1), bias.flatten())
        hidden = inside.view(*inside.shape[:-1], path + 1 - first, bank.r)
        if bank.activation == "relu":
            hidden = torch.relu(hidden)
        if bank.recorder is not None and hidden.requires_grad and route.uniform is not None:
            again = partial(self._read, down=down[-1], bias=bias[-1])
            bank.recorder.see(bank, hidden[:, :, -1], (path,), None, x, again)
        inner = self._inner(path)
        if inner is not None and path > first:
            hidden = torch.cat([inner(hidden[:, :, :-1], path), hidden[:, :, -1:]], dim=2)
        weights = self.weights(x, path, route).to(out.dtype) * scale.squeeze(-1)
        if self.branch is not None and path > first:
            weights = weights * _rows(self.branch, path - 1, path - 1).to(out.dtype)[0]
        hidden = hidden * weights.unsqueeze(-1)
        wide = torch.cat([hidden.flatten(2), weights.expand(*x.shape[:2], -1)], dim=-1)
        matrix = torch.cat([up.flatten(0, 1), offset])
        return accumulate(out, wide, matrix, inplace=may_overwrite(out))

    def _read(self, x: Tensor, down: Tensor, bias: Tensor) -> Tensor:
        """Return what one adapter makes of x: (b, n, r)."""
        inside = F.linear(x.to(down.dtype), down, bias)
        return torch.relu(inside) if self.bank.activation == "relu" else inside

    def _inner(self, path: int) -> InAdapters | None:
        if self._lender is not None and path in self._lender[1]:
            return self._lender[0].inner
        return self.inner


def _rows(stack: GrowingStack, first: int, last: int) -> Tensor:
    """Return rows first..last of a stack, frozen ones and the trainable last one together."""
    places, count = stack.places(), stack.frozen.shape[0]
    chosen = [places[row] for row in range(first, last + 1)]
    old = [place for place in chosen if place < count]
    new = [place for place in chosen if place >= count]
    parts = [stack.part(part) for part in (old, new) if part]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
