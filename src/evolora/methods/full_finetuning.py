"""Sequential full fine-tuning: all weights follow each task in turn, and forget.

    theta_t = argmin over theta, started at theta_{t-1}, of the loss on task t

Departure: the tuned weights are the method's own copy, run through ``functional_call``; the
backbone's weights stay bit-identical, so the base remains available and comparable. ``logit_scale``
stays frozen, as in ZSCL (arXiv 2303.06628).
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

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
    """

    type: Literal["full-finetuning"] = "full-finetuning"


@METHODS.register(
    "full-finetuning", summary="sequential full fine-tuning of every weight (forgets)"
)
class FullFinetuning(Method):
    """All weights train on each task in turn."""

    config_class = FullFinetuningConfig
    replaces_weights = True
    writes = True

    def __init__(self, config: Any, backbone: Backbone, *, seed: int = 0) -> None:
        super().__init__(config, backbone, seed=seed)
        self.selector = AlwaysSelector(0)
        self.tuned = nn.ParameterDict(
            {
                name.replace(".", "/"): nn.Parameter(value.detach().clone())
                for name, value in backbone.model.named_parameters()
                if name not in FROZEN
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
