"""Bench "route": the formulation the dispatcher picks, against the fastest one, over many shapes.

regret = time of the chosen formulation / time of the fastest: the median over rounds. With ``fit``
the dispatcher's thresholds are set to what makes the regrets smallest here, and kept for this type
of device.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from evolora.bench.layer import Shape, case
from evolora.bench.session import Session
from evolora.bench.timing import Comparison, Pass
from evolora.experts.dispatch import Thresholds, choose, save_thresholds, thresholds_for

PASSES: tuple[Pass, ...] = ("forward", "step")
CANDIDATES: dict[str, tuple[float, ...]] = {
    "gather_min_tokens": (2, 4, 8, 16, 32, 64),
    "gather_max_rank_per_token": (0.25, 0.5, 1.0, 2.0, 4.0, 8.0),
    "stacked_max_rows_single": (0, 64, 128, 256, 512, 1024, 2048, 4096),
    "stacked_max_rows_token": (0, 64, 128, 256, 512, 1024, 2048, 4096),
    "segments_min_rows": (0, 8, 16, 32, 64, 128, 256, 2**31),
}
"""Values tried for each threshold that decides between formulations."""
MIN_GAIN = 0.005
"""Mean log regret that a new value must save: less is noise."""


@dataclass(frozen=True)
class Timed:
    """How much slower than the fastest one every formulation of a shape is, per pass."""

    shape: Shape
    slowness: Mapping[tuple[str, Pass], float]

    @classmethod
    def of(cls, shape: Shape, comparison: Comparison, names: Sequence[str]) -> Timed:
        """Compare each formulation with the fastest one, round by round."""
        slowness: dict[tuple[str, Pass], float] = {}
        for which in PASSES:
            best = min(names, key=lambda name: comparison.seconds(name, which))
            for name in names:
                ratio = comparison.between((name, which), (best, which)).median
                slowness[name, which] = 1.0 if name == best else max(1.0, ratio)
        return cls(shape, slowness)

    def choice(self, thresholds: Thresholds) -> str:
        """Return the formulation that thresholds pick for this shape."""
        s = self.shape
        return choose(
            s.experts,
            s.r,
            s.batch,
            s.tokens,
            s.k,
            per_token=s.per_token,
            thresholds=thresholds,
        )

    def fastest(self, which: Pass) -> str:
        """Return the fastest formulation of a pass."""
        timed = [formulation for formulation, when in self.slowness if when == which]
        return min(timed, key=lambda formulation: self.slowness[formulation, which])

    def regret(self, thresholds: Thresholds, which: Pass) -> float:
        """Return how much slower the choice is; a choice not timed is the worst."""
        return self.slowness.get((self.choice(thresholds), which), math.inf)


def measure(session: Session, *, fit: bool = False) -> None:
    """Time the grid and judge the dispatcher; with ``fit``, fit its thresholds and judge again."""
    kind = session.device.type
    before = thresholds_for(kind)
    timed = time_grid(session, grid(quick=session.settings.quick), before)
    if fit:
        after = fitted(timed, before)
        path = save_thresholds(kind, after)
        changes = session.table(f"thresholds of {kind}", ("before", "now"), note=f"kept in {path}")
        for name, value in asdict(before).items():
            changes.put(name, before=f"{value:g}", now=f"{getattr(after, name):g}")
        show(session, timed, after, "with the fitted thresholds")


def grid(*, quick: bool) -> list[Shape]:
    """Return the shapes: routes per sample over tokens, rank, pool and k, and routes per token."""
    sizes = [(1, 64), (50, 8)] if quick else [(1, 64), (16, 32), (50, 32), (197, 8)]
    pools = [(8, 16, 2), (64, 16, 2), (22, 64, 2)]
    pools_token = [(8, 16, 2), (64, 16, 2)]
    if not quick:
        pools.insert(0, (16, 4, 1))
        pools_token.append((128, 8, 1))
    return [
        Shape(tokens=n, batch=b, experts=e, r=r, k=k, per_token=per_token)
        for per_token, chosen in ((False, pools), (True, pools_token))
        for (n, b), (e, r, k) in itertools.product(sizes[-2:] if per_token else sizes, chosen)
    ]


def time_grid(session: Session, shapes: Sequence[Shape], thresholds: Thresholds) -> list[Timed]:
    """Time every formulation of every shape, and show the choice of the thresholds for each."""
    timed: list[Timed] = []
    left_out = {"segments"} if session.device.type == "cuda" else set()  # it asks the device
    try:
        for number, shape in enumerate(shapes, start=1):
            made = case(shape, session.settings)
            names = [name for name in shape.formulations if name not in left_out]
            variants = [v for v in made.variants(loops=False) if v.name in names]
            variants = [
                replace(v, forward_base=v.name, step_base=v.name, reference=None) for v in variants
            ]
            comparison = session.time(
                f"shape {number} of {len(shapes)}",
                variants,
                made.inputs,
                rounds=session.settings.either(7, 5),
            )
            timed.append(Timed.of(shape, comparison, names))
    finally:
        show(session, timed, thresholds, "as it is")
    return timed


def show(session: Session, timed: Sequence[Timed], thresholds: Thresholds, title: str) -> None:
    """Add a table of choices and regrets, and the goal's number."""
    columns = ("chosen", "fastest forward", "regret forward", "fastest step", "regret step")
    table = session.table(f"dispatcher, {title}", columns)
    regrets = []
    for one in timed:
        row: dict[str, float | str] = {"chosen": one.choice(thresholds)}
        for which in PASSES:
            row[f"fastest {which}"] = one.fastest(which)
            row[f"regret {which}"] = one.regret(thresholds, which)
            regrets.append(one.regret(thresholds, which))
        table.put(_label(one.shape), **row)
    if regrets:
        table.note = f"median regret {statistics.median(regrets):.2f}, worst {max(regrets):.2f}"
        session.goal("regret", max(regrets))


def fitted(timed: Sequence[Timed], start: Thresholds) -> Thresholds:
    """Return the thresholds with the smallest mean log regret, changed two at a time.

    Two, because where one formulation ends decides which threshold is asked next. Values that gain
    nothing are left as they were.
    """

    def loss(thresholds: Thresholds) -> float:
        regrets = [one.regret(thresholds, which) for one in timed for which in PASSES]
        return statistics.fmean(map(math.log, regrets)) if regrets else 0.0

    best = start
    for names in itertools.combinations(CANDIDATES, 2):
        columns = [dict.fromkeys((getattr(best, name), *CANDIDATES[name])) for name in names]
        kinds = [type(getattr(start, name)) for name in names]
        for values in itertools.product(*columns):
            cast = {n: kind(v) for n, kind, v in zip(names, kinds, values, strict=True)}
            tried = replace(best, **cast)
            if loss(tried) < loss(best) - MIN_GAIN:
                best = tried
    return best


def _label(shape: Shape) -> str:
    per = "token" if shape.per_token else "sample"
    return f"per {per}, {shape.batch} × {shape.tokens}, e {shape.experts}, r {shape.r}, k {shape.k}"
