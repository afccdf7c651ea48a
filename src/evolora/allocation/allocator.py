"""Allocator: decides where a task's experts stand, and remembers it for the sites."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from evolora.allocation.gradients import gradient_scores
from evolora.allocation.sample import TaskSamples
from evolora.allocation.settings import (
    AllocationConfig,
    BudgetConfig,
    GradientAllocationConfig,
    RandomAllocationConfig,
)
from evolora.allocation.value import Allocation, TaskAllocation
from evolora.errors import ConfigError
from evolora.experts.bank import Listed
from evolora.experts.budget import Candidate, choose_experts
from evolora.experts.sites import Site
from evolora.randomness import generator

if TYPE_CHECKING:
    from evolora.methods.base import Method


class Allocator(nn.Module):
    """One row per task that was decided, one column per site: what its tensors hold.

    The tensors are part of a method's state, so that loading it restores where experts stand;
    ``scores`` are kept for the record and decide nothing later.

    Args:
        chosen: how to decide, or the path of a saved :class:`Allocation` that says it.
        sites: the candidates.
        costs: parameters of one expert at each site.
        seed: run seed.
        most: experts of a task that a site can have.
    """

    experts: Tensor
    scores: Tensor

    def __init__(
        self,
        chosen: AllocationConfig | str,
        sites: Sequence[Site],
        costs: Sequence[int],
        *,
        seed: int = 0,
        most: int = 1,
    ) -> None:
        super().__init__()
        self.chosen, self.seed, self.most = chosen, seed, most
        self.sites, self.costs = tuple(sites), tuple(costs)
        # Read by Python: real even where weights are shapes.
        shape = (0, len(self.sites))
        self.register_buffer("experts", torch.empty(shape, dtype=torch.long, device="cpu"))
        self.register_buffer("scores", torch.empty(shape, device="cpu"))
        self._listed = Listed()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the sites."""
        return tuple(site.name for site in self.sites)

    def rows(self) -> list[list[int]]:
        """Return the number of experts of each task at each site."""
        found: Any = self._listed(self.experts)
        return list(found)

    def decide(self, method: Method, task: int, samples: TaskSamples | None) -> list[int]:
        """Decide where the experts of a method's newest task stand; return their number by site.

        Args:
            method: begun on the task.
            task: its index.
            samples: of the task; None where there are shapes only. Gradients are then unknown, and
                all sites score the same: how many experts there are is right, where is a guess.

        Raises:
            StorageError: the file of the allocation is missing or does not fit.
            ConfigError: the budget buys nothing, the file lacks the task, or it wants more experts
                than a site can have.
        """
        if isinstance(self.chosen, str):
            entry = self._read(self.chosen, method.task_names[task], task, samples is None)
            counts = [entry.experts.get(name, 0) for name in self.names]
            scores = [entry.scores.get(name, float("nan")) for name in self.names]
        else:
            scores = self._score(self.chosen, method, task, samples)
            counts = allocate(self.chosen, self.sites, scores, self.costs)
        for name, count in zip(self.names, counts, strict=True):
            if count > self.most:
                raise ConfigError(
                    f"{method.config.type} has at most {self.most} expert per site and task; the "
                    f"allocation of {method.task_names[task]!r} wants {count} at {name!r}"
                )
        device = self.experts.device
        row = torch.tensor([counts], device=device)
        self.experts = torch.cat([self.experts, row])
        self.scores = torch.cat([self.scores, torch.tensor([scores], device=device)])
        return counts

    def allocation(self, tasks: Sequence[str]) -> Allocation:
        """Return what was decided so far as a value, given the names of the tasks."""
        found = Allocation(sites=self.names)
        rows = zip(tasks, self.rows(), self.scores.tolist(), strict=False)  # one may be undecided
        for task, counts, scores in rows:
            experts = zip(self.names, counts, strict=True)
            known = zip(self.names, scores, strict=True)
            found = found.with_task(
                TaskAllocation(
                    task=task,
                    experts={name: count for name, count in experts if count},
                    scores={name: score for name, score in known if score == score},
                    settings=self._settings(),
                )
            )
        return found

    def _settings(self) -> Mapping[str, Any]:
        if isinstance(self.chosen, str):
            return {"file": self.chosen}
        return asdict(self.chosen)

    def _read(self, path: str, name: str, task: int, shapes_only: bool) -> TaskAllocation:
        """Return a task's part of a file; where only shapes count, tasks need not have names."""
        found = Allocation.load(Path(path), sites=self.names)
        known = [entry.task for entry in found.tasks]
        if shapes_only and name not in known and task < len(known):
            name = known[task]
        try:
            return found.of(name)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    def _score(
        self, chosen: AllocationConfig, method: Method, task: int, samples: TaskSamples | None
    ) -> list[float]:
        if isinstance(chosen, GradientAllocationConfig) and samples is not None:
            return gradient_scores(
                method,
                self.sites,
                samples,
                samples.drawn(chosen.samples(samples.rows), self.seed, "allocation", task),
                reduction=chosen.reduction,
                normalize=chosen.normalize,
            )
        if isinstance(chosen, RandomAllocationConfig):
            draw = generator(self.seed, "allocation", task)
            return [float(value) for value in torch.rand(len(self.sites), generator=draw)]
        return [1.0] * len(self.sites)


class SiteExperts:
    """Which expert of one site's bank answers a task: experts are numbered as tasks came.

    Args:
        allocator: remembers the tasks.
        column: of the site.
    """

    def __init__(self, allocator: Allocator, column: int) -> None:
        self.allocator, self.column = allocator, column

    def of_task(self, task: int) -> int | None:
        """Return the one expert of a task, or None if it has none here (nor has the base)."""
        counts = self._counts()
        if not 0 <= task < len(counts) or not counts[task]:
            return None
        return sum(counts[:task])

    def anywhere(self, task: int | None) -> bool:
        """Return whether a task has an expert here; of None: whether any has."""
        return any(self._counts()) if task is None else self.of_task(task) is not None

    def newest(self) -> bool:
        """Return whether the newest task has an expert here."""
        return bool(self._counts()[-1:] == [1])

    def of_rows(self, tasks: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the expert (b, 1) of each row's task (b,), and gates: 0 where there is none.

        The gates are None where every task has an expert.
        """
        counts = self.allocator.experts[:, self.column]
        ids, own = (counts.cumsum(0) - counts)[tasks], counts[tasks]
        if all(self._counts()):
            return ids.unsqueeze(1), None
        return (ids * own).unsqueeze(1), own.unsqueeze(1).float()

    def _counts(self) -> list[int]:
        return [row[self.column] for row in self.allocator.rows()]


def allocate(
    chosen: BudgetConfig, sites: Sequence[Site], scores: Sequence[float], costs: Sequence[int]
) -> list[int]:
    """Return 1 for each site that gets an expert under the budget, else 0.

    Args:
        chosen: the budget and how towers share it.
        sites: candidates.
        scores: of each site.
        costs: parameters of an expert at each site.

    Raises:
        ConfigError: the budget buys no expert at all, or is more than all candidates take.
    """
    members: dict[str, list[int]] = {}
    for place, site in enumerate(sites):
        name = f"{site.tower}.{site.layer}" if chosen.by_block else site.name
        members.setdefault(name, []).append(place)
    candidates = []
    for name, places in members.items():
        count = 1 if chosen.unit == "layers" else len(places)
        cost = sum(costs[place] for place in places) if chosen.unit == "parameters" else count
        score = sum(scores[place] for place in places)
        tower = sites[places[0]].tower
        candidates.append(Candidate(name=name, tower=tower, score=score, cost=cost))
    budget = chosen.amount(sum(candidate.cost for candidate in candidates))
    names = choose_experts(
        candidates,
        budget,
        curriculum=chosen.curriculum,
        floors=chosen.floors,
        tie_seed=chosen.tie_seed,
    )
    if not names:
        raise ConfigError(
            f"allocation.budget of {chosen.budget} buys {budget} {chosen.unit}, which is not one "
            f"expert (the cheapest candidate takes {min(c.cost for c in candidates)})"
        )
    chosen_places = {place for name in names for place in members[name]}
    return [int(place in chosen_places) for place in range(len(sites))]
