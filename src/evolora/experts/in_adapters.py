"""In-adapters: small maps between the two halves of a frozen adapter, which make it serve anew.

    in  D x + b   --F_i^t-->   U (.) + b_U       F_i^t: r -> r, one for each (path t, source i < t)

kind -> F: "linear" one Linear; "mlp" r -> 2r -> 2r -> r with ReLU, ReLU and a sigmoid at the end;
"two-linear" r -> 2r -> r, two Linears. Source: PathWeave (arXiv 2410.20178) and its released code,
whose ablation the last two are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from evolora.experts.bank import GrowingStack, fresh_rows

InAdapterKind = Literal["linear", "mlp", "two-linear"]
InAdapterStart = Literal["identity", "zero", "normal"]
WIDTHS: Mapping[str, tuple[int, ...]] = {
    "linear": (1, 1),
    "mlp": (1, 2, 2, 1),
    "two-linear": (1, 2, 1),
}
"""Kind -> widths of its layers, in units of r."""
ACTIVATIONS: Mapping[str, tuple[Callable[[Tensor], Tensor], ...]] = {
    "mlp": (torch.relu, torch.relu, torch.sigmoid)
}


class InAdapters(nn.Module):
    """The in-adapters of all pairs (path, source) at one site.

    Args:
        r: width of the adapters' bottleneck.
        kind: see the module docstring.
        shared: one per source, which later paths go on training, as in the released code; else one
            per pair, which is nobody else's.
    """

    def __init__(
        self,
        r: int,
        kind: InAdapterKind = "linear",
        *,
        shared: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.r, self.kind, self.shared = r, kind, shared
        widths = [r * factor for factor in WIDTHS[kind]]
        steps = list(pairwise(widths))
        self.weights = nn.ModuleList(GrowingStack(out, into, device=device) for into, out in steps)
        self.biases = nn.ModuleList(GrowingStack(out, device=device) for _, out in steps)

    def rows(self, path: int) -> range:
        """Return the in-adapters of a path, one for each source in order."""
        return range(path) if self.shared else range(path * (path - 1) // 2, path * (path + 1) // 2)

    def grow(self, path: int, draw: torch.Generator, *, start: InAdapterStart, std: float) -> None:
        """Add what a path needs; the paths before it have theirs.

        Args:
            path: index of the path.
            draw: randomness.
            start: of a "linear" one: the "identity", "zero", or "normal" of deviation ``std``; the
                other kinds are normal, or where ``start`` is not, as a Linear is drawn.
            std: see ``start``.
        """
        count = min(path, 1) if self.shared else path
        if count == 0:
            return
        for weight, bias in zip(self.weights, self.biases, strict=True):
            assert isinstance(weight, GrowingStack) and isinstance(bias, GrowingStack)
            fresh = fresh_rows(count, weight, draw, std=std if start == "normal" else None)
            if self.kind == "linear" and start != "normal":
                one = torch.eye(self.r, device=fresh.device) * float(start == "identity")
                fresh = one.expand_as(fresh).clone()
            weight.grow(fresh)
            bias.grow(torch.zeros(count, *bias.shape, device=bias.active.device))

    def forward(self, hidden: Tensor, path: int) -> Tensor:
        """Return what a path's in-adapters make of bottlenecks (b, n, path, r) of its sources."""
        rows, functions = self.rows(path), ACTIVATIONS.get(self.kind, ())
        for depth, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            assert isinstance(weight, GrowingStack) and isinstance(bias, GrowingStack)
            places = weight.places()
            chosen = [places[row] for row in rows]
            w, c = (stack.part(chosen).to(hidden.dtype) for stack in (weight, bias))
            hidden = torch.einsum("bnki,koi->bnko", hidden, w) + c
            hidden = functions[depth](hidden) if functions else hidden
        return hidden

    def flops(self, tokens: int, path: int) -> int:
        """Return the FLOPs of ``tokens`` tokens on a path."""
        stacks = [stack for stack in self.weights if isinstance(stack, GrowingStack)]
        return 2 * tokens * path * sum(math.prod(stack.shape) for stack in stacks)
