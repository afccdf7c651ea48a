"""Timing variants side by side: shuffled rounds in one process, compared round by round.

A machine's speed drifts by more than the differences that matter. So all variants are timed in
every round, in an order drawn anew, and a ratio is the median over rounds of (variant's time /
base's time in the same round); beside it stands the ratio of the two fastest times.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from evolora.bench.memory import return_free_memory
from evolora.errors import ConfigError, unknown_name

Pass = Literal["forward", "step"]
Cell = tuple[str, Pass]
MIN_SECONDS = 0.01
"""A timing repeats its variant until it lasts about so long."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Variant:
    """One way of doing the work that a comparison is about.

    Args:
        name: unique within the comparison.
        run: from an input to an output that a step can start its backward pass at.
        passes: "forward" runs without gradient; "step" runs forward and backward.
        modules: whose gradients a step leaves behind; they are dropped at its end.
        after: ends a step while the gradients are there: an optimizer.
        forward_base, step_base: the variants whose pass counts as 1.
        reference: float64 output on the first input; None where there is nothing to compare with.
        max_error: relative difference from it that rounding explains; None takes the dtype's.
    """

    name: str
    run: Callable[[Any], Tensor]
    passes: tuple[Pass, ...] = ("forward", "step")
    modules: tuple[nn.Module, ...] = ()
    after: Callable[[], None] = lambda: None
    forward_base: str = "frozen base"
    step_base: str = "floor"
    reference: Tensor | None = None
    max_error: float | None = None

    def once(self, which: Pass, x: Any) -> Tensor:
        """Run one pass and return its output."""
        if which == "forward":
            with torch.no_grad():
                return self.run(x)
        with torch.enable_grad():
            out = self.run(x)
            # The output is its own gradient: dense, contiguous, and it costs nothing to make.
            torch.autograd.backward(out, out.detach())
        self.after()
        for module in self.modules:
            module.zero_grad(set_to_none=True)
        if isinstance(x, Tensor):
            x.grad = None
        return out.detach()

    def base(self, which: Pass) -> str:
        """Return the name of the variant this one's pass is compared with."""
        return self.forward_base if which == "forward" else self.step_base


@dataclass(frozen=True)
class Ratio:
    """A variant's time over its base's: median of the rounds, and fastest over fastest."""

    median: float
    of_minima: float


class Clock(ABC):
    """Measures how long a call takes, in seconds."""

    @abstractmethod
    def seconds(self, call: Callable[[], Any]) -> float:
        """Return the duration of one call."""


class HostClock(Clock):
    """CPU: process CPU time, which others on the machine do not change, or wall-clock time."""

    def __init__(self, *, wall: bool = False) -> None:
        self._now = time.perf_counter if wall else time.process_time

    def seconds(self, call: Callable[[], Any]) -> float:
        start = self._now()
        call()
        return self._now() - start


class CudaClock(Clock):
    """CUDA: events around the call on the current stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def seconds(self, call: Callable[[], Any]) -> float:
        event: Any = torch.cuda.Event
        start, end = event(enable_timing=True), event(enable_timing=True)
        torch.cuda.synchronize(self._device)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize(self._device)
        return float(start.elapsed_time(end)) / 1000.0


def clock_for(device: torch.device, *, wall: bool = False) -> Clock:
    """Return the clock of a device."""
    return CudaClock(device) if device.type == "cuda" else HostClock(wall=wall)


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch's CPU kernels on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Comparison:
    """Variants timed against each other.

    Args:
        variants: at least one; names are unique and every base is among them.
        inputs: handed to the variants in turn, so that a GPU's cache does not hold the next one.
        clock: measures one call.
        seed: of the order within rounds.
    """

    def __init__(
        self, variants: Sequence[Variant], inputs: Sequence[Any], clock: Clock, seed: int = 0
    ) -> None:
        self.variants = {variant.name: variant for variant in variants}
        if len(self.variants) != len(variants) or not variants:
            raise ConfigError("a comparison needs variants of different names")
        self.rounds: list[dict[Cell, float]] = []
        self._inputs, self._clock = inputs, clock
        self._order = random.Random(seed)
        self._cells: list[Cell] = [(v.name, which) for v in variants for which in v.passes]
        for name, which in self._cells:
            base = self.variants[name].base(which)
            if (base, which) not in self._cells:
                raise unknown_name(f"{which} base", base, self.variants)
        self._repeats = dict.fromkeys(self._cells, 1)
        self._turn = 0

    def warm_up(self) -> None:
        """Run every cell before it counts, and settle how often a timing repeats it."""
        for cell in self._cells:
            took = self._time(cell)
            if took < 10 * MIN_SECONDS:  # much of a first call may be setting up
                took = self._time(cell)
            self._repeats[cell] = max(1, math.ceil(MIN_SECONDS / max(took, 1e-6)))

    def play_round(self) -> None:
        """Time every cell once, in an order of its own."""
        order = self._order.sample(self._cells, len(self._cells))
        with _clean_memory():
            self._call(order[0])  # the first finds no memory of its own yet
            times = {cell: self._time(cell) for cell in order}
        self.rounds.append(times)

    def ratio(self, name: str, which: Pass) -> Ratio | None:
        """Return the variant's time over its base's, or None where nothing was timed."""
        if which not in self._variant(name).passes or not self.rounds:
            return None
        return self.between((name, which), (self.variants[name].base(which), which))

    def ratios(self) -> dict[Cell, Ratio]:
        """Return :meth:`ratio` of every cell that was timed."""
        found = {cell: self.ratio(*cell) for cell in self._cells}
        return {cell: ratio for cell, ratio in found.items() if ratio is not None}

    def between(self, cell: Cell, other: Cell) -> Ratio:
        """Return the ratio of any two cells."""
        for name, _ in (cell, other):
            self._variant(name)
        ours, theirs = ([times[which] for times in self.rounds] for which in (cell, other))
        each = [a / b for a, b in zip(ours, theirs, strict=True)]
        return Ratio(statistics.median(each), min(ours) / min(theirs))

    def extra(self, cell: Cell, other: Cell, unit: Cell) -> float:
        """Return by how many times the unit a cell takes longer than another (median)."""
        for name, _ in (cell, other, unit):
            self._variant(name)
        return statistics.median((r[cell] - r[other]) / r[unit] for r in self.rounds)

    def seconds(self, name: str, which: Pass) -> float:
        """Return the median time of one call."""
        self._variant(name)
        return statistics.median(times[name, which] for times in self.rounds)

    def _variant(self, name: str) -> Variant:
        if name not in self.variants:
            raise unknown_name("variant", name, self.variants)
        return self.variants[name]

    def _time(self, cell: Cell) -> float:
        repeats = self._repeats[cell]
        return self._clock.seconds(lambda: self._call(cell, repeats)) / repeats

    def _call(self, cell: Cell, repeats: int = 1) -> None:
        name, which = cell
        for _ in range(repeats):
            self._turn += 1
            self.variants[name].once(which, self._inputs[self._turn % len(self._inputs)])


@contextmanager
def _clean_memory() -> Iterator[None]:
    """Collect garbage now and not within the block."""
    gc.collect()
    return_free_memory()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
