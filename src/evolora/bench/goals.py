"""What the measured numbers are held against, in one table.

Ratios hold on any machine of the kind (CPU, float32, one thread); absolute sizes hold for the
benches' own sizes only, and are not judged at others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from evolora.errors import unknown_name

SLACK = 0.25
"""Share by which a checked run, usually of small sizes and few rounds, may miss a goal."""


@dataclass(frozen=True, kw_only=True)
class Goal:
    """A bound on one measured number.

    Args:
        key: its name.
        bench: which bench measures it.
        what: the number in words.
        usual: what the implementations that people use today reach.
        limit: the bound.
        at_least: the number must not be below the bound (else: not above it).
        absolute: the bound is a size, not a ratio.
        noise: what counts as equal to the bound; for goals that say "the same as".
    """

    key: str
    bench: str
    what: str
    usual: str
    limit: float
    at_least: bool = False
    absolute: bool = False
    noise: float = 0.0

    def met(self, value: float, slack: float = 0.0) -> bool:
        """Return whether a value reaches the goal, or misses it by less than the slack."""
        room = 1.0 + self.noise + slack
        return value >= self.limit / room if self.at_least else value <= self.limit * room

    @property
    def bound(self) -> str:
        """The bound in words."""
        if self.noise:
            return f"{self.limit:g} (±{self.noise:g})"
        return f"{'≥' if self.at_least else '≤'} {self.limit:g}"


GOALS = {
    goal.key: goal
    for goal in (
        Goal(
            key="lora-forward",
            bench="tower",
            what="LoRA r 16: forward over the frozen base",
            usual="PEFT 1.08-1.15",
            limit=1.07,
        ),
        Goal(
            key="lora-step",
            bench="tower",
            what="LoRA r 16: step over the floor",
            usual="PEFT 1.18-1.25",
            limit=1.13,
        ),
        Goal(
            key="lora-peak",
            bench="tower",
            what="LoRA r 16: peak memory of a step over full fine-tuning's",
            usual="PEFT 1.2-1.35",
            limit=1.05,
        ),
        Goal(
            key="moe-step",
            bench="tower",
            what="top-2 of 22 experts, h 64: step over its floor",
            usual="loop 1.07-1.12",
            limit=1.05,
        ),
        Goal(
            key="moe-flat",
            bench="tower",
            what="the same, slowest over fastest from e = 4 to 128",
            usual="–",
            limit=1.10,
        ),
        Goal(
            key="moe-saved",
            bench="tower",
            what="the same, MiB kept for backward",
            usual="loop 229",
            limit=165,
            absolute=True,
        ),
        Goal(
            key="many-merged",
            bench="tower",
            what="20 experts on for all, frozen ones merged: step over the floor",
            usual="loop 2.3",
            limit=1.15,
        ),
        Goal(
            key="many-stacked",
            bench="tower",
            what="20 experts on for all, stacked: step over the floor",
            usual="loop 2.3",
            limit=1.5,
        ),
        Goal(
            key="many-speedup",
            bench="tower",
            what="20 experts on for all: loop's step over the merged one",
            usual="1",
            limit=2.0,
            at_least=True,
        ),
        Goal(
            key="many-peak",
            bench="tower",
            what="20 experts on for all, merged: MiB by which a step raises the peak",
            usual="loop 990-1590",
            limit=480,
            absolute=True,
        ),
        Goal(
            key="agreement",
            bench="tower",
            what="float32 against a float64 loop, largest relative difference",
            usual="–",
            limit=1e-5,
        ),
        Goal(
            key="token-step",
            bench="layer",
            what="a route per token, e = 64, one layer: step over the bare Linear",
            usual="loop 14.5",
            limit=2.2,
        ),
        Goal(
            key="prefix-half",
            bench="train",
            what="top half adapted, activations below cached: speed-up over all layers",
            usual="1",
            limit=2.0,
            at_least=True,
        ),
        Goal(
            key="prefix-quarter",
            bench="train",
            what="top quarter adapted, activations below cached: speed-up over all layers",
            usual="1",
            limit=4.5,
            at_least=True,
        ),
        Goal(
            key="text-cached",
            bench="train",
            what="64 prompts of a frozen text tower: step over the image step alone",
            usual="re-encoded 2.4",
            limit=1.0,
            noise=0.03,
        ),
        Goal(
            key="serve-mixed",
            bench="serve",
            what="up to 64 adapters in a batch: forward over the base",
            usual="PEFT 1.25 mixed, 2.1 one pass each",
            limit=1.15,
        ),
        Goal(
            key="serve-one",
            bench="serve",
            what="one adapter for the batch, merged: forward over the base",
            usual="1.2-3",
            limit=1.0,
            noise=0.03,
        ),
        Goal(
            key="selector-share",
            bench="serve",
            what="recognising one of 16 tasks: share of a forward",
            usual="–",
            limit=0.01,
        ),
        Goal(
            key="delo-step",
            bench="pairs",
            what="DeLo on ViLT, without the consistency term: step over the floor",
            usual="–",
            limit=1.15,
        ),
        Goal(
            key="delo-consistency",
            bench="pairs",
            what="DeLo on ViLT: step over the floor of its forward and its second one",
            usual="–",
            limit=1.15,
        ),
        Goal(
            key="delo-streams",
            bench="pairs",
            what="DeLo on two-stream CLIP, all losses: step over the floor",
            usual="–",
            limit=1.15,
        ),
        Goal(
            key="task-free",
            bench="pairs",
            what="DeLo, not told the task: frozen forwards more than told",
            usual="2 forwards in all",
            limit=1.05,
        ),
        Goal(
            key="growth-step",
            bench="growth",
            what="a LoRA per task, allocated: slowest step of tasks 1 to 20 over the first's",
            usual="–",
            limit=1.15,
        ),
        Goal(
            key="resora-step",
            bench="resora",
            what="ReSoRA-style, the default measure: step over the same LoRA's without it",
            usual="–",
            limit=1.05,
        ),
        Goal(
            key="regret",
            bench="route",
            what="dispatcher's choice over the fastest formulation, worst of the grid",
            usual="–",
            limit=1.10,
        ),
    )
}


@dataclass(frozen=True)
class Verdict:
    """A goal, what was measured, and whether it was met within the slack."""

    goal: Goal
    value: float
    met: bool
    within_slack: bool

    @property
    def word(self) -> str:
        """Verdict in a word."""
        return "met" if self.met else "near" if self.within_slack else "missed"


def judge(measured: Mapping[str, float], slack: float = 0.0) -> list[Verdict]:
    """Return verdicts in the order of the table.

    Raises:
        ConfigError: something was measured under a name that is no goal's.
    """
    for key in measured:
        if key not in GOALS:
            raise unknown_name("goal", key, GOALS)
    return [
        Verdict(goal, measured[key], goal.met(measured[key]), goal.met(measured[key], slack))
        for key, goal in GOALS.items()
        if key in measured
    ]
