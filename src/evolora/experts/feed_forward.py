"""Whole MLPs as experts: each goes on from what the base's own Linears projected, once for all.

    base:      down(act(up x))              or, gated,  down(act(gate x) * up x)
    expert e:  the same with W + s B_e A_e in place of each W

The base's MLP runs as it stands. Hooks keep what it projected up, hand it to the layer, and put the
layer's mixture of hidden states in place of the base's before ``down``; after it, the layer adds
the experts' low-rank parts of ``down``. As ``down`` is linear, one product serves the mixture of
all experts: beside their low-rank parts, experts cost no product more than the base.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

if TYPE_CHECKING:
    from evolora.experts.sites import FeedForwardLayer, Site, SiteHost


@dataclass(frozen=True, kw_only=True, eq=False)
class FeedForward:
    """The parts of a block's MLP.

    Args:
        up, down: its Linears (w3 and w2 in a gated MLP).
        activation: between them.
        gate: the Linear whose activation multiplies that of ``up`` (w1), or None.
    """

    up: nn.Linear
    down: nn.Linear
    activation: Callable[[Tensor], Tensor]
    gate: nn.Linear | None = None

    def hidden(self, up: Tensor, gate: Tensor | None) -> Tensor:
        """Return what ``down`` gets, (b, n, f), of projections (b, n, f)."""
        return self.activation(up) if gate is None else self.activation(gate) * up

    def project(self, hidden: Tensor) -> Tensor:
        """Return what ``down`` makes of hidden states, without its hooks."""
        result: Tensor = self.down.forward(hidden)
        return result


@dataclass(frozen=True, eq=False)
class Projected:
    """What the base's MLP has computed before its activation: not to be written to.

    Args:
        x: (b, n, d) input.
        up, gate: (b, n, f) its projections; no ``gate`` where there is none.
    """

    x: Tensor
    up: Tensor
    gate: Tensor | None = None

    def take(self, rows: Tensor) -> Projected:
        """Return the same of some rows."""
        gate = None if self.gate is None else self.gate[rows]
        return Projected(self.x[rows], self.up[rows], gate)


class FeedForwardHooks:
    """The hooks of one MLP.

    Args:
        host: whose route they follow.
        site: the MLP.
        layer: what stands there.
    """

    def __init__(self, host: SiteHost, site: Site, layer: FeedForwardLayer) -> None:
        assert site.mlp is not None
        self.host, self.site, self.layer, self.mlp = host, site, layer, site.mlp
        self._up: tuple[Tensor, Tensor] | None = None
        self._gate: Tensor | None = None
        self._kept: tuple[Tensor, tuple[Tensor, ...]] | None = None

    def insert(self) -> list[RemovableHandle]:
        """Put the hooks in place; return their handles."""
        handles = [
            self.mlp.up.register_forward_hook(self._after_up),
            self.mlp.down.register_forward_pre_hook(self._before_down),
            self.mlp.down.register_forward_hook(self._after_down),
        ]
        if self.mlp.gate is not None:
            handles.append(self.mlp.gate.register_forward_hook(self._after_gate))
        return handles

    def _after_up(self, _: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        self._kept = None  # of a pass that broke off
        self._up = (args[0], out)

    def _after_gate(self, _: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        self._gate = out

    def _before_down(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        up, gate = self._up, self._gate
        self._up = self._gate = None
        base: Tensor = args[0]
        route = self.host.acting(self.site.tower, self.site.place, base.shape[0])
        if route is None:
            return None
        assert up is not None, "down ran without up"
        seen = Projected(*up, gate)
        if route.everybody:
            parts = self.layer.hidden(seen, route)
            hidden = parts[0]
        else:
            seen = seen.take(route.active)
            parts = self.layer.hidden(seen, route.of_active)
            hidden = base.index_copy(0, route.active, parts[0].to(base.dtype))
        self._kept = (seen.x, parts)
        return (hidden, *args[1:])

    def _after_down(self, _: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        if self._kept is None:
            return out
        (x, parts), self._kept = self._kept, None
        route = self.host.route_of(self.site.tower)
        if route.everybody:
            result: Tensor = self.layer(x, out, route, parts)
            return result
        rows = route.active
        return out.index_copy(0, rows, self.layer(x, out[rows], route.of_active, parts))
