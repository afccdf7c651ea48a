"""Sequential full fine-tuning: all weights follow each task in turn, and forget.

    theta_t = argmin over theta, started at theta_{t-1}, of the loss on task t

Departure: the tuned weights are the method's own copy, run through ``functional_call``; the
backbone's weights stay bit-identical, so the base remains available and comparable. ``logit_scale``
stays frozen, as in ZSCL (arXiv 2303.06628).
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import nn

from evolora.backbones.base import Backbone
from evolora.methods.base import Method
from evolora.registry import METHODS
from evolora.routing.selector import AlwaysSelector

FROZEN = ("logit_scale", "logit_bias")


@dataclass(frozen=True, kw_only=True)
class FullFinetuningConfig:
    """Settings of sequential full fine-tuning.

    Args:
        type: "full-finetuning".
        towers: towers whose weights train; None takes all weights, and where modalities are plugged
            in (a Q-Former, whose encoders are frozen) those of all towers.
    """

    type: Literal["full-finetuning"] = "full-finetuning"
    towers: tuple[str, ...] | None = None

    later: ClassVar[tuple[str, ...]] = ("towers",)


@METHODS.register(
    "full-finetuning", summary="sequential full fine-tuning of every weight (forgets)"
)
class FullFinetuning(Method):
    """All weights train on each task in turn, or those of some towers; the rest is not copied."""

    config_class = FullFinetuningConfig
    replaces_weights = True
    writes = True

    def __init__(self, config: Any, backbone: Backbone, *, seed: int = 0) -> None:
        super().__init__(config, backbone, seed=seed)
        self.selector = AlwaysSelector(0)
        backbone.check_towers(config.towers)
        towers = config.towers or (backbone.towers if backbone.takes_modalities else None)
        chosen = None
        if towers is not None:
            chosen = {id(p) for tower in towers for p in backbone.tower_parameters(tower)}
        self.tuned = nn.ParameterDict(
            {
                name.replace(".", "/"): nn.Parameter(value.detach().clone())
                for name, value in backbone.model.named_parameters()
                if name not in FROZEN and (chosen is None or id(value) in chosen)
            }
        )

    def expert_task(self, task: int) -> int:
        """All tasks share the one set of weights."""
        return 0

    def weights(self) -> AbstractContextManager[None]:
        """Run the backbone with the tuned copy."""
        return self.backbone.with_weights(
            {name.replace("/", "."): value for name, value in self.tuned.items()}
        )
