"""Settings of an allocation: how large the budget is, how it is shared, what scores the sites.

The defaults are D-MoLE's (ICML 2025, arXiv 2506.11672): half of the candidates, scored by gradient
norms on 1 % of the task, towers sharing by their sums ("inter-modal curriculum"). Its authors' code
also gives the vision tower ``floors: {vision: 0.25}``, of which the paper says nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from evolora.errors import ConfigError
from evolora.experts.budget import TIE_SEED, check_floors

Unit = Literal["experts", "layers", "parameters"]


@dataclass(frozen=True, kw_only=True)
class BudgetConfig:
    """How many experts a task gets and how towers share them.

    Args:
        budget: a whole number counts units, a fraction (written with a point, 0 < budget <= 1) is
            the share of what all candidates together would take.
        unit: what the budget counts: "experts" (one per site), "layers" (blocks that get an expert
            at each of their sites), or "parameters" of experts.
        candidate: what is chosen as one: a "module" (site) or a "block", whose score is the sum of
            its sites'; "auto" is a block for layers, else a module.
        curriculum: towers share the budget by their sums of scores; False: by their sizes.
        floors: tower -> share of the budget that it gets whatever its scores.
        tie_seed: decides between equal scores, see :func:`evolora.experts.budget.choose_experts`.
    """

    budget: int | float = 0.5
    unit: Unit = "experts"
    candidate: Literal["auto", "module", "block"] = "auto"
    curriculum: bool = True
    floors: Mapping[str, float] = field(default_factory=dict)
    tie_seed: int = TIE_SEED

    def __post_init__(self) -> None:
        _check_amount("budget", self.budget)
        if self.unit == "layers" and self.candidate == "module":
            raise ConfigError("unit: layers chooses whole blocks; candidate: module cannot be had")
        check_floors(self.floors)
        if not 0 <= self.tie_seed < 2**32:
            raise ConfigError(f"tie_seed must be in [0, 2**32); got {self.tie_seed}")

    @property
    def by_block(self) -> bool:
        """Whether blocks are chosen, not sites."""
        return self.candidate == "block" or self.unit == "layers"

    def amount(self, total: int) -> int:
        """Return the budget in units, of candidates that take ``total`` together."""
        if isinstance(self.budget, float):
            return int(total * self.budget + 0.5)
        if self.budget > total:
            raise ConfigError(
                f"allocation.budget is {self.budget} {self.unit}, all candidates together take "
                f"{total}"
            )
        return self.budget


@dataclass(frozen=True, kw_only=True)
class GradientAllocationConfig(BudgetConfig):
    """Sites are scored by gradient norms, see :mod:`evolora.allocation.gradients`.

    Args:
        sample: training samples that are looked at: a whole number, or a fraction of the task's.
        min_samples: at least so many where ``sample`` is a fraction (1 % of a small task is noise).
        reduction: "norm_of_mean" gradient over samples, or "mean_of_norms" of each sample's.
        normalize: divide a site's norm by the square root of its number of weights.
    """

    type: Literal["gradient"] = "gradient"
    sample: int | float = 0.01
    min_samples: int = 16
    reduction: Literal["norm_of_mean", "mean_of_norms"] = "norm_of_mean"
    normalize: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_amount("sample", self.sample)
        if self.min_samples < 1:
            raise ConfigError(f"min_samples must be at least 1; got {self.min_samples}")

    def samples(self, rows: int) -> int:
        """Return how many of a task's training samples are looked at."""
        if isinstance(self.sample, int):
            return min(rows, self.sample)
        return min(rows, max(self.min_samples, math.ceil(self.sample * rows)))


@dataclass(frozen=True, kw_only=True)
class UniformAllocationConfig(BudgetConfig):
    """All sites score the same: towers share by size, ``tie_seed`` picks, for each task alike."""

    type: Literal["uniform"] = "uniform"


@dataclass(frozen=True, kw_only=True)
class RandomAllocationConfig(BudgetConfig):
    """Scores are drawn from [0, 1), for each task anew."""

    type: Literal["random"] = "random"


AllocationConfig = GradientAllocationConfig | UniformAllocationConfig | RandomAllocationConfig


def check_allocation(chosen: AllocationConfig | str | None) -> None:
    """Refuse a word that is no file of an allocation."""
    if isinstance(chosen, str) and not chosen.endswith(".json"):
        raise ConfigError(
            "allocation is a configuration (type gradient, uniform or random) or the path of a "
            f".json file with one; got {chosen!r}"
        )


def _check_amount(name: str, value: int | float) -> None:
    whole = isinstance(value, int)
    if isinstance(value, bool) or (value < 1 if whole else not 0.0 < value <= 1.0):
        raise ConfigError(
            f"{name} must be a whole number from 1, or a fraction in (0, 1]; got {value!r}"
        )
