"""Who recognises the task and where its experts come from: "selector" and "allocation"."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from evolora.allocation.settings import (
    GradientAllocationConfig,
    RandomAllocationConfig,
    UniformAllocationConfig,
)
from evolora.errors import ConfigError
from evolora.registry import ALLOCATIONS, SELECTORS
from evolora.routing.selector import (
    AutoEncoderSelectorConfig,
    Helper,
    NoSelectorConfig,
    OracleSelectorConfig,
)
from evolora.routing.task_keys import BoundedTaskKeySelectorConfig

Kind = Literal["private", "budget", "pool", "shared", "modality"]
"""Whose experts are: a task's own, at every site or where a budget puts them; a pool's; all
tasks'; a modality's."""


@SELECTORS.register(
    "auto-encoder", summary="DDAS: one auto-encoder per task; what none takes is the base's"
)
@dataclass(frozen=True, kw_only=True)
class AutoEncoderPart(AutoEncoderSelectorConfig):
    """See :class:`AutoEncoderSelectorConfig`.

    Args:
        helper: which earlier task's experts are added to those of the row's own (D-MoLE): the
            nearest that takes the row ("threshold"), the "nearest", or "none".
    """

    helper: Helper = "none"


SELECTORS.register(
    "task-keys", summary="the nearest mean of training inputs; by `quantile` also the base"
)(BoundedTaskKeySelectorConfig)
SELECTORS.register("oracle", summary="the true task is told (upper bound)")(OracleSelectorConfig)
SELECTORS.register("none", summary="nobody: one set of experts answers every input")(
    NoSelectorConfig
)


@SELECTORS.register("modality", summary="known from the input: what modalities it has (PathWeave)")
@dataclass(frozen=True, kw_only=True)
class ModalityPart:
    """Each modality of an input goes by its own experts; nothing is recognised.

    Args:
        type: "modality".
    """

    type: Literal["modality"] = "modality"


@ALLOCATIONS.register("every-site", summary="each task its own experts, at every site")
@dataclass(frozen=True, kw_only=True)
class EverySite:
    """Each task has experts of its own at every site; those of finished tasks are frozen.

    Args:
        type: "every-site".
    """

    type: Literal["every-site"] = "every-site"


@ALLOCATIONS.register("shared", summary="one set of experts, which every task goes on training")
@dataclass(frozen=True, kw_only=True)
class Shared:
    """One set of experts for all tasks, never frozen (forgets).

    Args:
        type: "shared".
    """

    type: Literal["shared"] = "shared"


@ALLOCATIONS.register("pool", summary="a pool per site; what a task used most is frozen after it")
@dataclass(frozen=True, kw_only=True)
class Pool:
    """A pool of experts that tasks share; what a task used most is frozen when it ends.

    Args:
        type: "pool".
        num_experts: experts per site at the start (22).
        freeze_top: most used experts per site to freeze when a task ends (2); 0 freezes none.
        min_free_experts: a new task finds at least so many unfrozen experts; the pool grows to it.
    """

    type: Literal["pool"] = "pool"
    num_experts: int = 22
    freeze_top: int = 2
    min_free_experts: int = 2

    def __post_init__(self) -> None:
        if self.num_experts < 1:
            raise ConfigError(f"num_experts must be at least 1; got {self.num_experts}")
        for name in ("freeze_top", "min_free_experts"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be at least 0; got {getattr(self, name)}")


@ALLOCATIONS.register("per-modality", summary="each new modality its own experts, at every site")
@dataclass(frozen=True, kw_only=True)
class PerModality:
    """Each new modality has experts of its own; a task without a new one trains none.

    Args:
        type: "per-modality".
    """

    type: Literal["per-modality"] = "per-modality"


ALLOCATIONS.register("gradient", summary="a budget per task, shared by gradient norms (D-MoLE)")(
    GradientAllocationConfig
)
ALLOCATIONS.register("uniform", summary="a budget per task, shared by size alone")(
    UniformAllocationConfig
)
ALLOCATIONS.register("random", summary="a budget per task, sites drawn anew for each")(
    RandomAllocationConfig
)
KINDS: dict[str, Kind] = {
    "every-site": "private",
    "shared": "shared",
    "pool": "pool",
    "per-modality": "modality",
}


def kind_of(allocation: object) -> Kind:
    """Return whose experts they are; what is not listed is a budget, or a file that says it."""
    return KINDS.get(getattr(allocation, "type", ""), "budget")
