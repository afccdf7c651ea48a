"""Selection: what a selector decides of a batch, and what whoever tells the tasks hands on."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from evolora.routing.route import BASE


@dataclass(frozen=True, kw_only=True, eq=False)
class Selection:
    """Which task answers each row, and which one helps it.

    Args:
        tasks: (b,) task index or BASE.
        scores: (b, t) how foreign the row is to each task (smaller is nearer; above 1 is outside),
            or None where no score exists (oracle).
        helpers: (b,) a second task whose experts are added, or BASE; a row of the base has none.
            None: no row has one.
        uniform: the one task of all rows where it is known without looking.
    """

    tasks: Tensor
    scores: Tensor | None = None
    helpers: Tensor | None = None
    uniform: int | None = None

    @classmethod
    def of(cls, given: Chosen, rows: int, device: torch.device | str | None = None) -> Selection:
        """Return what was decided, or was told as the task of each row (b,) or the one of all."""
        if isinstance(given, int):
            return cls(tasks=torch.full((rows,), given, device=device), uniform=given)
        chosen = given if isinstance(given, Selection) else cls(tasks=given)
        scores, helpers = (
            value if value is None else value.to(device)
            for value in (chosen.scores, chosen.helpers)
        )
        return replace(chosen, tasks=chosen.tasks.to(device), scores=scores, helpers=helpers)

    def take(self, rows: Tensor) -> Selection:
        """Return the given rows."""
        scores, helpers = (
            value if value is None else value[rows] for value in (self.scores, self.helpers)
        )
        return replace(self, tasks=self.tasks[rows], scores=scores, helpers=helpers)

    def settled(self) -> Selection:
        """Return the same after one look at it: ``uniform`` is known, and whether anybody helps."""
        pairs = self.pairs()
        tasks = {task for task, _ in pairs}
        nobody = all(helper == BASE for _, helper in pairs)
        uniform = tasks.pop() if len(tasks) == 1 else None
        return replace(self, uniform=uniform, helpers=None if nobody else self.helpers)

    def pairs(self) -> list[tuple[int, int]]:
        """Return the distinct pairs of (task, helper or BASE)."""
        if self.helpers is None:
            return [(task, BASE) for task in torch.unique(self.tasks).tolist()]
        both = torch.stack([self.tasks, self.helpers], dim=1)
        return [(task, helper) for task, helper in torch.unique(both, dim=0).tolist()]


Chosen = Selection | Tensor | int
"""Who answers: a selector's decision, or the task of each row (b,), or the one of all rows."""
