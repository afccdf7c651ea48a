"""Layers of linear experts: accumulated ones that all answer, or one per row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from evolora.experts.bank import ExpertBank
from evolora.experts.merge import AlwaysOn
from evolora.experts.mixing import mix
from evolora.experts.sites import FoldableLayer
from evolora.routing.route import Route


class SumLayer(FoldableLayer):
    """Experts that answer together:  out + scale * sum_i g_i B_i A_i x.

    By default all experts of the bank answer every row. A subclass says otherwise in
    :meth:`experts`. Where all rows have the same experts, frozen ones are folded by the host into
    the weight of the Linear, and what is left takes one thin product each way; never a loop.

    Args:
        bank: the experts.
        name: under which dropout is drawn.
        dropout: probability of zeroing a bottleneck unit in training.
        gates: constant weight of each expert of the bank; None for ones.
    """

    def __init__(
        self,
        bank: ExpertBank,
        *,
        name: str = "",
        dropout: float = 0.0,
        gates: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.bank, self.name, self.dropout = bank, name, dropout
        self.gates = None if gates is None else tuple(gates)
        self._constants: dict[tuple[tuple[float, ...], torch.device], Tensor] = {}

    def experts(self, route: Route) -> AlwaysOn | tuple[Tensor, Tensor | None]:
        """Return the experts of all rows, or ids and gates of each row (see :func:`mix`)."""
        return AlwaysOn(tuple(range(len(self.bank))), self.gates)

    def always_on(self, route: Route) -> AlwaysOn | None:
        """Return what may be folded: linear experts of all rows, without dropout."""
        bank = self.bank
        if bank.activation is not None or bank.down_bias is not None or self._drops(route):
            return None
        experts = self.experts(route)
        return experts if isinstance(experts, AlwaysOn) else None

    def forward(
        self, x: Tensor, out: Tensor, route: Route, folded: frozenset[int] = frozenset()
    ) -> Tensor:
        """Return out plus the experts of each row, less those that are folded into ``out``."""
        experts = self.experts(route)
        ids: Tensor | Sequence[int]
        if isinstance(experts, AlwaysOn):
            left = experts.without(folded)
            ids, gates = left.ids, self._constant(left.gates, x.device)
        else:
            ids, gates = experts
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
        """Return the extra FLOPs of one row of ``tokens`` tokens, nothing folded."""
        return self.bank.flops(tokens, len(self.bank))

    def _drops(self, route: Route) -> bool:
        return self.dropout > 0.0 and route.random is not None

    def _constant(self, gates: tuple[float, ...] | None, device: torch.device) -> Tensor | None:
        """Return constant gates (1, k) on the device; sent there once, not at every forward."""
        if gates is None:
            return None
        key = (gates, device)
        if key not in self._constants:
            self._constants = {key: torch.tensor([gates]).to(device)}
        return self._constants[key]
