"""A layer of experts that belong to tasks: a row is answered by its own task's, and its helper's.

y = W x + E_k(x) + E_h(x)        k the row's task, h its helper; E is zero where it has none here
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from evolora.experts.bank import ExpertBank
from evolora.experts.layers import SumLayer
from evolora.experts.merge import AlwaysOn
from evolora.experts.mixing import mix
from evolora.routing.route import BASE, Route

if TYPE_CHECKING:
    from evolora.allocation.allocator import SiteExperts

Draws = Callable[..., torch.Generator]
"""Gives the randomness of a task at one site; words tell several draws apart."""


class TaskLayer(SumLayer):
    """Experts at one site; a row's task is its expert, and that of its helper is added.

    Args:
        bank: the experts.
        name: of the site, under which dropout is drawn.
        dropout: probability of zeroing a bottleneck unit in training.
        places: which tasks have an expert here, and which; None: every task has its own.
    """

    def __init__(
        self,
        bank: ExpertBank,
        *,
        name: str = "",
        dropout: float = 0.0,
        places: SiteExperts | None = None,
    ) -> None:
        super().__init__(bank, name=name, dropout=dropout)
        self.places = places

    # -- tasks -----------------------------------------------------------------------------------

    def begin_task(self, draws: Draws) -> None:
        """Give a new task its expert, which adds nothing yet; older ones are frozen."""
        self.finish_task()
        self.bank.grow(1, draws())

    def finish_task(self) -> None:
        """Freeze every expert there is."""
        self.bank.freeze(range(len(self.bank)))

    def answers(self, task: int | None) -> bool:
        """Return whether the task has an expert here."""
        return self.places is None or self.places.anywhere(task)

    def task_tensors(self, task: int) -> list[Tensor]:
        """Return what answers a task here: its own expert, if it has one."""
        own = task if self.places is None else self.places.of_task(task)
        if own is None:
            return []
        return [stack.take(torch.tensor([own])) for stack in self.bank.stacks()]

    # -- answering -------------------------------------------------------------------------------

    def experts(self, route: Route) -> AlwaysOn | tuple[Tensor, Tensor | None]:
        """Return the task's expert, if it has one here."""
        if self.places is None:
            if route.uniform is not None:
                return AlwaysOn((route.uniform,))
            return route.tasks.unsqueeze(1), None
        if route.uniform is None and len(self.bank) > 0:
            return self.places.of_rows(route.tasks)
        own = None if route.uniform is None else self.places.of_task(route.uniform)
        return AlwaysOn(() if own is None else (own,))

    def forward(
        self, x: Tensor, out: Tensor, route: Route, folded: frozenset[int] = frozenset()
    ) -> Tensor:
        """Return out plus the experts of each row's task and of its helper."""
        out = super().forward(x, out, route, folded)
        if route.helpers is None or len(self.bank) == 0:
            return out
        ids, gates = self._helping(route, route.helpers)
        return mix(
            out,
            x,
            self.bank,
            ids,
            gates,
            dropout=self.dropout,
            random=route.random,
            key=f"{self.name}/helper",  # a draw of its own: that of the task stays what it was
            formulation=self.formulation,
            inplace=True,
        )

    def _helping(
        self, route: Route, helpers: Tensor
    ) -> tuple[Tensor | Sequence[int], Tensor | None]:
        """Return the experts of the rows' helpers and their gates; one helper is looked up free."""
        helped = (helpers != BASE).unsqueeze(1).to(torch.float32)
        if len(route.helping) == 1:
            task = route.helping[0]
            own = task if self.places is None else self.places.of_task(task)
            return ((), None) if own is None else ((own,), helped)
        ids = helpers.clamp_min(0)
        if self.places is None:
            return ids.unsqueeze(1), helped
        experts, here = self.places.of_rows(ids)
        return experts, helped if here is None else helped * here

    def flops(self, tokens: int) -> int:
        """Return the extra FLOPs of one row of ``tokens`` tokens, of the newest task."""
        own = self.places is None or self.places.newest()
        return self.bank.flops(tokens, 1) if own else 0
