"""A bench that runs: it times variants, fills tables, and keeps what it has when interrupted."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from evolora.bench.environment import describe
from evolora.bench.goals import GOALS
from evolora.bench.memory import peak_rise, saved_bytes
from evolora.bench.results import Result, Table
from evolora.bench.settings import Settings
from evolora.bench.timing import Cell, Comparison, Pass, Ratio, Variant, clock_for, one_thread
from evolora.errors import EvoloraError, unknown_name
from evolora.training.progress import Reporter

COLUMNS = ("forward", "fastest forward", "step", "fastest step", "saved MiB", "peak MiB", "error")
MIB = 2**20
MAX_ERROR = {"float32": 1e-4, "bfloat16": 1e-1}
"""Relative differences that no rounding explains: such a variant computes something else."""


class DisagreementError(EvoloraError, RuntimeError):
    """A variant does not compute what it is compared as; its timing would mean nothing."""


class Session:
    """Runs one bench and collects its result.

    Args:
        bench: name of the bench.
        settings: sizes, rounds, device.
        reporter: shows progress.
    """

    def __init__(self, bench: str, settings: Settings, reporter: Reporter | None = None) -> None:
        self.settings = settings
        self.device = torch.device(settings.device)
        self.reporter = reporter or Reporter()
        self.result = Result(bench=bench, settings=asdict(settings), environment={})

    @contextmanager
    def running(self) -> Iterator[Session]:
        """Describe the machine, pin one thread, and time the whole."""
        start = time.perf_counter()
        with one_thread():
            self.result.environment = describe(self.settings)
            try:
                yield self
                self.result.complete = True
            finally:
                self.result.seconds = round(time.perf_counter() - start, 1)

    def table(
        self, title: str, columns: Sequence[str] = COLUMNS, *, note: str = "", axis: str = ""
    ) -> Table:
        """Add an empty table to the result; it is shown as far as it was filled."""
        table = Table(title=title, columns=columns, note=note, axis=axis)
        self.result.tables.append(table)
        return table

    def goal(self, key: str, value: float | None) -> None:
        """Record the number a goal is about; absolute ones count at the standard sizes only."""
        if key not in GOALS:
            raise unknown_name("goal", key, GOALS)
        if value is not None and (self.settings.standard or not GOALS[key].absolute):
            self.result.measured[key] = value

    def time(
        self,
        title: str,
        variants: Sequence[Variant],
        inputs: Sequence[Any],
        *,
        rounds: int,
        table: Table | None = None,
    ) -> Comparison:
        """Return the variants timed in so many rounds.

        Args:
            title: shown beside the progress bar.
            variants: what is compared.
            inputs: handed to the variants in turn.
            rounds: when the settings name none.
            table: gets the ratios, also those of the rounds before an interruption.
        """
        rounds = self.settings.rounds or rounds
        clock = clock_for(self.device, wall=self.settings.wall)
        comparison = Comparison(variants, inputs, clock, self.settings.seed)
        with self.reporter.bar(title, rounds + 1) as bar:
            comparison.warm_up()
            bar.advance()
            try:
                for _ in range(rounds):
                    comparison.play_round()
                    bar.advance()
            finally:
                if table is not None:
                    fill(table, comparison)
        return comparison

    def compare(
        self,
        title: str,
        variants: Sequence[Variant],
        inputs: Sequence[Any],
        *,
        rounds: int,
        memory: bool = True,
    ) -> Comparison:
        """Check, weigh (unless not wanted) and time the variants; put all of it into a table."""
        table = self.table(title)
        for variant in variants:
            table.put(variant.name, error=self.check(variant, inputs[0]))
        for variant in variants:
            if memory and "step" in variant.passes:
                table.put(variant.name, **self.weigh(variant, inputs[0]))
        return self.time(title, variants, inputs, rounds=rounds, table=table)

    def sweep(
        self,
        title: str,
        axis: str,
        values: Sequence[int | str],
        build: Callable[[Any], tuple[Sequence[Variant], Sequence[Any]]],
        *,
        rounds: int,
        passes: Sequence[Pass] = ("forward", "step"),
        note: str = "",
    ) -> dict[int | str, dict[Cell, Ratio]]:
        """Time what ``build`` makes (variants, inputs) of each value; one table per pass.

        Variants keep their names over the sweep; bases, which are 1 throughout, are left out. The
        tables show medians; the ratios of the fastest times are in their JSON. Only ratios are
        returned and kept: the variants of one value are gone before those of the next are made.
        """
        columns = [str(value) for value in values]
        tables = {
            which: self.table(f"{title}: {which}", columns, note=note, axis=axis)
            for which in passes
        }
        done: dict[int | str, dict[Cell, Ratio]] = {}
        for value in values:
            done[value] = self._against_bases(f"{title}, {axis} {value}", *build(value), rounds)
            gc.collect()  # models and their hooks refer to one another
            for (name, which), ratio in done[value].items():
                both = {str(value): ratio.median, f"fastest {value}": ratio.of_minima}
                tables[which].put(name, **both)
        return done

    def _against_bases(
        self, title: str, variants: Sequence[Variant], inputs: Sequence[Any], rounds: int
    ) -> dict[Cell, Ratio]:
        """Check and time variants; return the ratios of those that are no base themselves."""
        for variant in variants:
            self.check(variant, inputs[0])
        comparison = self.time(title, variants, inputs, rounds=rounds)
        return {
            (name, which): ratio
            for (name, which), ratio in comparison.ratios().items()
            if comparison.variants[name].base(which) != name
        }

    def check(self, variant: Variant, x: Any) -> float | None:
        """Return the largest difference from the float64 reference, relative to its largest value.

        Raises:
            DisagreementError: rounding cannot explain the difference.
        """
        if variant.reference is None:
            return None
        error = relative_error(variant.once("forward", x), variant.reference)
        allowed = variant.max_error or MAX_ERROR[self.settings.dtype]
        if not error <= allowed:
            raise DisagreementError(
                f"{variant.name!r} differs from its reference by {error:.1e} "
                f"(allowed: {allowed:.0e}); it is not timed"
            )
        return error

    def weigh(self, variant: Variant, x: Any) -> Mapping[str, float | None]:
        """Return the MiB a step keeps for backward, and by how many it raises the peak."""
        saved = saved_bytes(lambda: variant.run(x))
        variant.once("step", x)  # what is allocated once, at the first step, is not the step's
        peak = peak_rise(lambda: variant.once("step", x), self.device)
        return {"saved MiB": saved / MIB, "peak MiB": None if peak is None else peak / MIB}


def fill(table: Table, comparison: Comparison) -> None:
    """Write median ratios and ratios of the fastest times into a table."""
    for (name, which), ratio in comparison.ratios().items():
        table.put(name, **{which: ratio.median, f"fastest {which}": ratio.of_minima})


def relative_error(out: Tensor, reference: Tensor) -> float:
    """Return max |out - reference| / max |reference|."""
    difference = (out.double() - reference.to(out.device)).abs().max()
    return float(difference / reference.abs().max())


def rotated(make: Callable[[], Tensor], device: torch.device) -> list[Tensor]:
    """Return inputs to hand out in turn: on a GPU, more of them than its L2 cache holds."""
    first = make()
    if device.type != "cuda":
        return [first]
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    count = min(16, 2 + int(2 * cache / max(1, first.numel() * first.element_size())))
    return [first, *(make() for _ in range(count - 1))]
