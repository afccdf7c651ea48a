"""Route: the per-sample decision which tasks' experts answer, or that the base model does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from evolora.errors import RouteError
from evolora.randomness import StepRandom
from evolora.routing.spans import Spans, TokenSpans

BASE = -1
"""Task index that means: no expert runs, the untouched base model answers."""

T = TypeVar("T")


class Decisions:
    """What gates decided on a prompt, kept for the tokens that are written after it.

    A model that writes runs its later tokens without the prompt. There is one such object for each
    generation, in its route, and it goes with it.
    """

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def once(self, key: str, decide: Callable[[], T]) -> T:
        """Return what ``decide`` returned when it was first asked under this key."""
        if key not in self._made:
            self._made[key] = decide()
        found: T = self._made[key]
        return found


@dataclass(frozen=True, eq=False)
class Route:
    """Which task's experts answer each row of a batch. A value: never mutated, never global.

    Args:
        tasks: (b,) int64 task index per row, or :data:`BASE`.
        uniform: the one task of all rows when it is known, so that no tensor must be read back.
        helpers: (b,) a second task whose experts are added to those of the row's own, or
            :data:`BASE` for none; a row of the base has none. None: no row has one.
        summary: where the vector that speaks for a row is found in a (b, n, d) sequence: "first"
            token, "mean" over tokens, or a (b,) index per row (a text's end token).
        random: randomness of a training step; None outside training (nothing is drawn then).
        spans: where the modalities stand in a fused sequence; set by the backbone that makes it.
        queries: (b, m, q) descriptor of each modality of the row, for gates that read the same one
            at every site; None where they read hidden states.
        stage: which of a method's passes over the samples this is; "" is the one that answers.
        decisions: those made on a prompt that is being answered; None where a row is run once.
        paths: modality -> experts that answer its tokens, where they go by the modality and not by
            the row; the base answers those of one that is not named. None: the row's task does.
    """

    tasks: Tensor
    uniform: int | None = None
    helpers: Tensor | None = None
    summary: str | Tensor = "first"
    random: StepRandom | None = None
    spans: Spans | TokenSpans | None = None
    queries: Tensor | None = None
    stage: str = ""
    decisions: Decisions | None = None
    paths: Mapping[str, int] | None = None

    @classmethod
    def of(
        cls,
        task: int,
        rows: int,
        *,
        device: torch.device | str = "cpu",
        summary: str | Tensor = "first",
        random: StepRandom | None = None,
    ) -> Route:
        """Return the route that sends all ``rows`` to one task (or to the base)."""
        tasks = torch.full((rows,), task, dtype=torch.long, device=device)
        return cls(tasks, uniform=task, summary=summary, random=random)

    @property
    def rows(self) -> int:
        """Number of rows this route speaks for."""
        return self.tasks.shape[0]

    @cached_property
    def active(self) -> Tensor:
        """Indices of the rows that any expert answers."""
        return torch.nonzero(self.tasks != BASE).squeeze(1)

    @property
    def alone(self) -> int | None:
        """The one task whose experts, without a helper's, answer all rows, when it is known."""
        return self.uniform if self.helpers is None else None

    @cached_property
    def helping(self) -> list[int]:
        """The tasks that help any row."""
        if self.helpers is None:
            return []
        return [task for task in torch.unique(self.helpers).tolist() if task != BASE]

    @property
    def nobody(self) -> bool:
        """True when the base answers every row, so that no expert code may run."""
        return self.uniform == BASE if self.uniform is not None else self.active.numel() == 0

    @property
    def everybody(self) -> bool:
        """True when experts answer every row."""
        if self.uniform is not None:
            return self.uniform != BASE
        return self.active.numel() == self.rows

    @cached_property
    def of_active(self) -> Route:
        """The same route for the active rows alone."""
        return self.take(self.active)

    def take(self, rows: Tensor) -> Route:
        """Return the same route for some of the rows."""
        summary = self.summary if isinstance(self.summary, str) else self.summary[rows]
        spans = None if self.spans is None else self.spans.take(rows)
        queries = None if self.queries is None else self.queries[rows]
        helpers = None if self.helpers is None else self.helpers[rows]
        return replace(
            self,
            tasks=self.tasks[rows],
            helpers=helpers,
            summary=summary,
            spans=spans,
            queries=queries,
        )

    def summarize(self, tokens: Tensor) -> Tensor:
        """Return the vector (b, d) that speaks for each row of ``tokens`` (b, n, d)."""
        if self.rows != tokens.shape[0]:
            raise RouteError(
                f"the route speaks for {self.rows} rows, the input has {tokens.shape[0]}"
            )
        if isinstance(self.summary, Tensor):
            return tokens[torch.arange(self.rows, device=tokens.device), self.summary]
        return tokens[:, 0] if self.summary == "first" else tokens.mean(dim=1)

    def real(self, tokens: Tensor, *, answers: bool = False) -> Tensor | None:
        """Return (b, n) bool: positions of ``tokens`` (b, n, d) that hold the row's own sample.

        Padding does not, nor do answers after a prompt, unless they are wanted too. None: all
        positions do.
        """
        if self.spans is not None:
            return self.spans.real if answers else self.spans.mask
        if isinstance(self.summary, Tensor):  # a text, with padding behind its end
            return torch.arange(tokens.shape[1], device=tokens.device) <= self.summary[:, None]
        return None

    def mean(self, tokens: Tensor, *, answers: bool = False) -> Tensor:
        """Return the mean (b, d) of the tokens of each row that are its sample's own."""
        real = self.real(tokens, answers=answers)
        if real is None:
            return tokens.mean(dim=1)
        weights = real.to(tokens.dtype)
        total = torch.bmm(weights.unsqueeze(1), tokens).squeeze(1)
        return total / weights.sum(dim=1, keepdim=True).clamp_min(1.0)

    def first(self, tokens: Tensor) -> Tensor:
        """Return the first token (b, d) of each row that is its sample's own."""
        real = self.real(tokens)
        if real is None:
            return tokens[:, 0]
        return tokens[torch.arange(len(tokens), device=tokens.device), real.int().argmax(dim=1)]

    def once(self, key: str, decide: Callable[[], T]) -> T:
        """Return what a gate decides; on a prompt that is being answered it is asked once."""
        return decide() if self.decisions is None else self.decisions.once(key, decide)
