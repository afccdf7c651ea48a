"""What experts make of their inputs, kept while somebody asks: bottlenecks z = act(A x + a).

A bank has no recorder but while a regulariser that reads features is at work; then each call of
its experts is noted. Only what autograd keeps anyway is held, by reference, and nothing is computed
here: a block that runs again in backward must find the same forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from evolora.routing.route import Route

if TYPE_CHECKING:
    from evolora.experts.sites import SiteHost

Experts = Sequence[int] | Tensor | slice
"""Which experts a bottleneck is of: identifiers (all rows alike), (p, k) of each row, or places."""


class Recorder(Protocol):
    """What a bank tells its calls."""

    def see(
        self,
        bank: nn.Module,
        z: Tensor,
        experts: Experts,
        gates: Tensor | None,
        x: Tensor,
        again: Callable[[Tensor], Tensor] | None,
        rows: Tensor | None = None,
    ) -> None:
        """Take note of a call.

        Args:
            bank: whose experts ran.
            z: (p, n, k r) bottlenecks, before gates and dropout.
            experts: which k they are of.
            gates: (p, k) or (1, k) weights of the experts; a weight of 0 silences one. None: ones.
            x: what they read.
            again: computes z from x; None where that cannot be done.
            rows: (p) row of the batch that each p is of; None: in order.
        """


@dataclass(frozen=True, eq=False)
class Call:
    """One noted call; see :meth:`Recorder.see`.

    Args:
        shape: (b, n) of what was read.
        route: of its rows.
        again: computes z once more, of an input whose gradient goes no further.
    """

    z: Tensor
    shape: tuple[int, int]
    experts: Experts
    gates: Tensor | None
    rows: Tensor | None
    route: Route
    again: Callable[[], Tensor] | None

    @property
    def tokens(self) -> int:
        """How many tokens it has, padding included."""
        return self.z.shape[0] * self.z.shape[1]


@dataclass(frozen=True)
class Both:
    """Two who are told the same."""

    first: Recorder
    second: Recorder

    def see(self, *call: Any) -> None:
        """See :meth:`Recorder.see`."""
        self.first.see(*call)
        self.second.see(*call)


class BottleneckRecorder:
    """Keeps the last training call of each group of experts of the banks that it was given to.

    A group may be asked twice in a forward, about tokens and about means of them: the call with
    more tokens stays, or the later of equal ones.

    Args:
        host: whose routes say which tokens are padding.
        towers: bank -> the tower where it stands.
    """

    def __init__(self, host: SiteHost, towers: dict[nn.Module, str]) -> None:
        self.host, self.towers = host, towers
        self.calls: dict[nn.Module, dict[object, Call]] = {}

    def see(
        self,
        bank: nn.Module,
        z: Tensor,
        experts: Experts,
        gates: Tensor | None,
        x: Tensor,
        again: Callable[[Tensor], Tensor] | None,
        rows: Tensor | None = None,
    ) -> None:
        """See :meth:`Recorder.see`; calls without a gradient are not of training."""
        if not torch.is_grad_enabled():
            return
        route = self.host.route_of(self.towers[bank])
        route = route if route.everybody else route.of_active
        plain = x.detach()
        gates = None if gates is None else gates.detach()
        repeat = None if again is None else lambda: again(plain)
        call = Call(z, (x.shape[0], x.shape[1]), experts, gates, rows, route, repeat)
        key: object = "rows"
        if isinstance(experts, slice):
            key = (experts.start, experts.stop)
        elif not isinstance(experts, Tensor):
            key = tuple(experts)
        known = self.calls.setdefault(bank, {})
        if key not in known or known[key].tokens <= call.tokens:
            known[key] = call

    def take(self) -> dict[nn.Module, list[Call]]:
        """Return the calls of every bank, and forget them."""
        found = {bank: list(calls.values()) for bank, calls in self.calls.items()}
        self.calls = {}
        return found
