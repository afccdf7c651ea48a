"""D-MoLE: a budget of LoRA experts per task, put where the task needs them; auto-encoders route.

One idea: tasks need adaptation at different depths and in different towers. So each task gets its
experts where gradients of the untouched model are largest, under a budget that the towers share;
all older experts are frozen. Auto-encoders on frozen features recognise an input's task, and may
switch one earlier task's experts on beside it; what no task knows is answered by the base.

    y = W x + s * sum_{k in S, k has an expert here} B_k A_k drop(x) ,   |S| <= 2 ,  s = alpha / r
    e_k = mean((AE_k(z) - z)^2) ,  C = {k : e_k < tau_k} ,  task = argmin over C of e_k, or the base
    helper of a row of task k = argmin over {j in C : j < k} of e_j, or nobody

symbol -> code: S -> Route.tasks and Route.helpers ; A_k, B_k -> ExpertBank row ; z -> the feature
"max-pooled" ; AE_k, tau_k -> AutoEncoderSelector ; where experts are -> Allocator.

A row that is routed to k has the helper at test that such a row had while k was learned: helpers
come before k, and their auto-encoders never change. So later tasks cannot change what k answers,
only whether it is asked, and nothing of a sample need be remembered.

Source: Ge et al., "Dynamic Mixture of Curriculum LoRA Experts for Continual Multimodal Instruction
Tuning", ICML 2025, arXiv 2506.11672. The full text was not available to us: what is above is the
released code's, and what is known of the paper, mended.

Departures from the authors' code (each with the option that brings their behaviour back):
- each row is routed alone; theirs lets a batch elect its tasks (``router: batch-vote``);
- a helper at test comes before the task, theirs may be any task with 0.3 of the votes (the same);
- thresholds are calibrated on held-out errors; theirs are read from a file that nothing writes
  (``selector.threshold``); auto-encoders begin at the task's mean, so that a few hundred samples do
  (``selector.training``, whose docstring has their recipe);
- experts may stand at every Linear; theirs reach attention alone (``target_modules``), and the
  paper counts layers (``allocation.unit``). ``allocation.floors`` is theirs, and cannot crash;
- gradients of all processes count, and the feature is masked, so padding and batch-mates do not;
- dropout is on the bottleneck, one draw per expert, not on the input.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from evolora.allocation.settings import (
    AllocationConfig,
    GradientAllocationConfig,
    check_allocation,
)
from evolora.backbones.base import Backbone
from evolora.backbones.families import PROJECTION
from evolora.methods.lora import LoRAConfig, LoRAPerTask
from evolora.methods.selectors import use_selector
from evolora.registry import METHODS
from evolora.routing.selector import Helper, RecogniserConfig, Router

FLOORS = {"vision": 0.25}
"""Share of the budget that a tower has at least; only the authors' code has it."""


@dataclass(frozen=True, kw_only=True)
class DMoLEConfig(LoRAConfig):
    """Settings of D-MoLE; see :class:`evolora.methods.lora.LoRAConfig` for those of an expert.

    Args:
        type: "d-mole".
        r, lora_alpha, lora_dropout: 8, 16 and 0.05 (authors).
        target_modules: candidates for an expert; "all-linear" (ours) or names of Linears (the
            authors' are those of attention).
        towers: towers of candidates; None takes all but the projection, which stays frozen.
        allocation: the budget per task, how it is shared and what scores the candidates (half of
            them, by gradients, a quarter at least to vision where there is such a tower); the path
            of a saved allocation; or None for an expert at every candidate.
        selector: the auto-encoders that recognise a task.
        router: "per-sample"; "batch-vote" (authors'), which depends on the batch; or "oracle", told
            the true task.
        helper: which earlier task may help a row: the nearest that takes it ("threshold"), the
            "nearest" whether it does or not (as the paper is said to do), or "none".
    """

    type: Literal["d-mole"] = "d-mole"
    lora_dropout: float = 0.05
    target_modules: tuple[str, ...] = ("all-linear",)
    allocation: AllocationConfig | str | None = field(
        default_factory=lambda: GradientAllocationConfig(floors=FLOORS)
    )
    selector: RecogniserConfig = field(default_factory=RecogniserConfig)
    router: Router = "per-sample"
    helper: Helper = "threshold"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_allocation(self.allocation)


@METHODS.register(
    "d-mole", summary="D-MoLE: LoRA experts where gradients say, under a budget; one task may help"
)
class DMoLE(LoRAPerTask):
    """The method; see the module docstring."""

    config_class: ClassVar[Any] = DMoLEConfig

    def __init__(self, config: DMoLEConfig, backbone: Backbone, *, seed: int = 0) -> None:
        super().__init__(_for_towers(config, backbone), backbone, seed=seed)
        self.config = config

    def choose_selector(self, config: DMoLEConfig) -> None:
        """Let auto-encoders tell the tasks and who helps."""
        use_selector(self, config.selector, router=config.router, helper=config.helper)


def _for_towers(config: DMoLEConfig, backbone: Backbone) -> DMoLEConfig:
    """Return the settings for the towers that a backbone has: without floors of others."""
    towers = config.towers or tuple(name for name in backbone.towers if name != PROJECTION)
    allocation = config.allocation
    if allocation == DMoLEConfig().allocation and isinstance(allocation, GradientAllocationConfig):
        floors = {name: share for name, share in FLOORS.items() if name in towers}
        allocation = replace(allocation, floors=floors)
    return replace(config, towers=towers, allocation=allocation)
