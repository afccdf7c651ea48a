"""What is compared: regularisers, and the four strengths that each of them may choose from.

"none" has no term; what it may choose from is the weight decay, so that it has as many tries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from evolora.regularizers.settings import ResoraConfig

DEFAULT_PAIR = "f_corr + f_contrib"
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
"""Learning rates: each host and task takes the one that is best for it without a regulariser."""
BOUNDED = (0.01, 0.1, 1.0, 10.0)
"""Strengths of measures in [0, 1]."""


@dataclass(frozen=True)
class Condition:
    """One arm of the comparison.

    Args:
        strengths: it chooses from; of what, see :mod:`resora_study.training`.
        settings: of the regulariser; None: there is none.
        features: it reads activations, which AdaLoRA has none of.
    """

    strengths: tuple[float, float, float, float]
    settings: dict[str, Any] | None = None
    features: bool = False

    def config(self, strength: float) -> ResoraConfig:
        """Returns the regulariser's settings; without one, those of weight 0."""
        if self.settings is None:
            return ResoraConfig(weight=0.0)
        return ResoraConfig(weight=strength, **self.settings)


def _both(down: str, up: str, **other: Any) -> dict[str, Any]:
    return {"measure_down": down, "measure_up": up, **other}


NONE, DROP = "none", "DropLoRA"
CONDITIONS = {
    NONE: Condition((0.0, 0.01, 0.1, 1.0)),
    "w_cos": Condition(BOUNDED, _both("w_cos", "w_cos")),
    "w_orth": Condition((0.001, 0.01, 0.1, 1.0), _both("w_orth", "w_orth")),
    "f_corr": Condition(BOUNDED, _both("f_corr", "none"), features=True),
    "f_contrib": Condition(BOUNDED, _both("none", "f_contrib"), features=True),
    DEFAULT_PAIR: Condition(BOUNDED, _both("f_corr", "f_contrib"), features=True),
    "f_dist": Condition(BOUNDED, _both("f_dist", "f_dist"), features=True),
    "f_hsic, groups of 4": Condition(BOUNDED, _both("f_hsic", "none", groups=4), features=True),
    "GOR": Condition((1e-6, 1e-4, 1e-2, 1.0), _both("gor", "gor", reduction="sum", warmup=0.0)),
    DROP: Condition((0.05, 0.1, 0.3, 0.5)),
}


def conditions_of(host: str) -> dict[str, Condition]:
    """Returns the conditions that a host can have."""
    return {
        name: condition
        for name, condition in CONDITIONS.items()
        if not (condition.features and host == "adalora")
    }
