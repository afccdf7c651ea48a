"""Settings of the ReSoRA-style regulariser, see :mod:`evolora.regularizers.resora`."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from evolora.errors import ConfigError, unknown_name
from evolora.regularizers import between
from evolora.regularizers.redundancy import DOWN, OF_FEATURES, OF_PAIRS, UP, Side

Across = Literal["none", "experts", "tasks"]
Adaptivity = Literal["const", "pairwise", "ratio", "learned"]
SIDES: tuple[Side, ...] = ("down", "up")


@dataclass(frozen=True, kw_only=True)
class ResoraConfig:
    """Settings; measure and weight are what won our study, docs/resora.md (no paper's are known).

    Args:
        type: "resora".
        measure_down: of what updates read: "w_cos" (squared cosine of ranks), "w_orth", "gor",
            "gor_intra", "f_corr" (correlation of the bottleneck's activations), "f_dist", "f_hsic"
            or "none". Between experts (``across``): "w_cos" or "overlap" (O-LoRA's).
        measure_up: of what they write: "w_cos", "w_orth", "gor", "gor_intra", "f_contrib",
            "f_dist" or "none".
        groups: into how many contiguous groups the ranks fall; None is one rank each (for GOR, its
            own 32 groups of a weight's rows).
        weight: lambda; 0 turns the regulariser off, and nothing is hooked or computed. The default
            is for "w_cos"; measures that are not in [0, 1] need a small one, "ratio" one below 1.
        w_down, w_up: share of each side.
        warmup: share of the steps in which lambda grows linearly, in [0, 1].
        up_delay: share of the steps before the up side begins (and then grows as long), in [0, 1).
            B starts at zero, where its directions mean nothing.
        adaptivity: "const"; "pairwise" (pairs are weighed by the softmax of how alike they are);
            "ratio" (lambda is a share of the task's loss: lambda * L_task / R, of which no gradient
            is taken); "learned" (exp(-s) R + s for each side, s a scalar that is trained along and
            thrown away).
        detach_input: the gradient does not flow on into what the updates read.
        min_tokens: updates that saw fewer are left out: correlations of few tokens are large by
            chance. None is four per rank.
        max_tokens: more tokens are drawn from, the same ones at every step and run; None takes all.
        layers: regular expression that is searched in the names of layers; None takes all.
        adapters: names of PEFT adapters; None takes all that are active and train.
        every_n_steps: the term is there in every n-th optimizer step.
        across: "none" compares the ranks of an update with one another; "experts" compares the
            updates that train at one layer; "tasks" those that train with the frozen ones.
        reduction: "mean" over updates, or "sum" (as O-LoRA, GOR and KaSA have it).
        whole_batch: correlations are those of all processes' tokens; False takes each process's own
            (needed where they run different layers).
    """

    type: Literal["resora"] = "resora"
    measure_down: str = "w_cos"
    measure_up: str = "w_cos"
    groups: int | None = None
    weight: float = 1.0
    w_down: float = 1.0
    w_up: float = 1.0
    warmup: float = 0.1
    up_delay: float = 0.0
    adaptivity: Adaptivity = "const"
    detach_input: bool = False
    min_tokens: int | None = None
    max_tokens: int | None = None
    layers: str | None = None
    adapters: tuple[str, ...] | None = None
    every_n_steps: int = 1
    across: Across = "none"
    reduction: Literal["mean", "sum"] = "mean"
    whole_batch: bool = True

    def __post_init__(self) -> None:
        for side, measure in self.measures.items():
            allowed: Sequence[str] = DOWN if side == "down" else UP
            if self.across != "none":
                allowed = between.MEASURES
            if measure not in allowed:
                raise unknown_name(f"measure_{side} (across {self.across})", measure, allowed)
        for name in ("weight", "w_down", "w_up"):
            value = getattr(self, name)
            if not value >= 0.0 or not math.isfinite(value):
                raise ConfigError(f"{name} must be at least 0; got {value}")
        if not 0.0 <= self.warmup <= 1.0:
            raise ConfigError(f"warmup is a share of the steps, in [0, 1]; got {self.warmup}")
        if not 0.0 <= self.up_delay < 1.0:
            raise ConfigError(f"up_delay is a share of the steps, in [0, 1); got {self.up_delay}")
        for name in ("groups", "min_tokens", "max_tokens", "every_n_steps"):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise ConfigError(f"{name} must be at least 1; got {count}")
        if self.adaptivity == "pairwise" and (
            self.across != "none" or not any(name in OF_PAIRS for name in self.measures.values())
        ):
            raise ConfigError(
                f"adaptivity 'pairwise' weighs pairs of ranks, which only {', '.join(OF_PAIRS)} "
                f"compare; got {', '.join(self.measures.values())} across {self.across!r}"
            )
        try:
            re.compile(self.layers or "")
        except re.error as error:
            raise ConfigError(
                f"layers must be a regular expression; {self.layers!r}: {error}"
            ) from error

    @property
    def measures(self) -> dict[Side, str]:
        """The measure of each side."""
        return {"down": self.measure_down, "up": self.measure_up}

    @property
    def active(self) -> bool:
        """Whether there is any term."""
        return self.weight > 0 and any(self.share(side) > 0 for side in SIDES)

    @property
    def reads_features(self) -> bool:
        """Whether activations are needed, not the weights alone."""
        used = [name for side, name in self.measures.items() if self.share(side) > 0]
        return self.active and any(name in OF_FEATURES for name in used)

    @property
    def reads_tokens(self) -> bool:
        """Whether activations of each token are needed, not their moments alone."""
        return self.measure_down == "f_dist"

    def share(self, side: Side) -> float:
        """Return the weight of a side beside the other, 0 where it has no measure."""
        weight = self.w_down if side == "down" else self.w_up
        return 0.0 if self.measures[side] == "none" else weight

    def due(self, step: int) -> bool:
        """Return whether optimizer step ``step`` (from 0) has the term."""
        return self.active and step % self.every_n_steps == 0

    def strength(self, side: Side, step: int, total: int) -> float:
        """Return lambda(t) times the side's share at optimizer step ``step`` (from 0) of ``total``.

        0 before the side begins, then linear over ``warmup``.
        """
        begun = step + 1 - (self.up_delay * total if side == "up" else 0.0)
        ramp = min(1.0, begun / max(1.0, self.warmup * total)) if begun > 0 else 0.0
        return self.weight * self.share(side) * ramp

    def selects(self, layer: str) -> bool:
        """Return whether a layer's updates are regularised."""
        return self.layers is None or re.search(self.layers, layer) is not None
