"""Robustness: a learned model tested under other missing tables than it was trained under.

A prediction depends on its own sample alone, so each test sample is answered once in each state
that it can be in (complete, without text, without image), and the score under any table is put
together from these outcomes: a curve over kinds and rates costs three evaluations, not one per
point. Scores are those of :mod:`evolora.evaluation.tally`; AP is their mean over tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from evolora.errors import ConfigError, unknown_name
from evolora.evaluation.outcomes import ORACLE, TASK_FREE, Outcomes, answer_states, judged
from evolora.methods.base import Method
from evolora.streams.missing import CODE_NAMES, Kind, Missing
from evolora.streams.missing_manifest import Manifest, check_modalities
from evolora.streams.task import Stream

if TYPE_CHECKING:
    from evolora.learner import Learner

FILE = "robustness.json"
FORMAT_VERSION = 1
KINDS: tuple[Kind, ...] = ("text", "image", "both")
RATES = (0.0, 0.3, 0.5, 0.7, 0.9)


@dataclass(frozen=True, kw_only=True)
class Tables:
    """The missing tables to test under: every kind at every rate.

    Args:
        kinds: of "text", "image" and "both".
        rates: shares of the samples that are incomplete, in [0, 1].
        both_ratio: of kind "both", the share of the incomplete samples that lose the image.
        seeds: a table is drawn with each, as for a stream; scores are means over them.
    """

    kinds: tuple[Kind, ...] = KINDS
    rates: tuple[float, ...] = RATES
    both_ratio: float = 0.5
    seeds: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        for name in ("kinds", "rates", "seeds"):
            if not getattr(self, name):
                raise ConfigError(f"missing {name}: give at least one")
        for kind in self.kinds:
            if kind not in KINDS:
                raise unknown_name("missing kind", kind, KINDS)
        for rate in self.rates:
            Missing(kind="both", rate=rate, both_ratio=self.both_ratio)


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Scores under one table, in [0, 1].

    Args:
        ap: mean over tasks.
        tasks: per task.
        by_missing: name of a missing code -> mean, over the tasks that have such samples, of the
            score on them.
    """

    ap: float
    tasks: Mapping[str, float]
    by_missing: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Point:
    """How the model does under tables of one kind and rate.

    Args:
        kind, rate: what is missing.
        task_free: nobody tells the task; None for a method that must be told.
        oracle: the task is told; None for a method that answers every task alike.
        task_identification: share of all test samples whose task was recognised; None for a method
            that does not look for it.
    """

    kind: str
    rate: float
    task_free: Scores | None
    oracle: Scores | None
    task_identification: float | None


@dataclass(frozen=True, kw_only=True)
class Robustness:
    """What ``robustness.json`` holds.

    Args:
        stream: name.
        samples: task -> number of test samples.
        routing: of the method.
        tables: what was tested.
        points: one per kind and rate.
        trained: what the training samples lacked (kind, rate, both_ratio); None if unknown.
        own: the run's own test table; None if it has none.
    """

    stream: str
    samples: Mapping[str, int]
    routing: str
    tables: Tables
    points: tuple[Point, ...]
    trained: Missing | None
    own: Point | None

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        values = asdict(self)
        return {"format_version": FORMAT_VERSION, **values.pop("tables"), **values}


def robustness(
    learner: Learner, stream: Stream, tables: Tables, trained: Manifest | None = None
) -> Robustness:
    """Return how a learner answers the test sets of its tasks under other missing tables.

    Args:
        learner: with every task learned that is to be tested.
        stream: those tasks, before a modality is taken away.
        tables: what to take away.
        trained: the table that the learner was trained (and tested) under.

    Raises:
        ConfigError: nothing is learned, a learned task is not in the stream, the model sees only
            one modality, or rows decide in groups.
        StreamError: samples that have no image or no text at all.
    """
    method = learner.method
    _check(method)
    tasks = tuple(stream.reordered(learner.task_names))
    for task in tasks:
        check_modalities(task)
    outcomes = [
        answer_states(learner, task, labels, offset)
        for task, labels, offset in judged(tasks, stream.label_protocol)
    ]
    points = tuple(
        _point(outcomes, Missing(kind=kind, rate=rate, both_ratio=tables.both_ratio), tables.seeds)
        for kind in tables.kinds
        for rate in tables.rates
    )
    return Robustness(
        stream=stream.name,
        samples={task.name: len(task.test) for task in tasks},
        routing=method.routing,
        tables=tables,
        points=points,
        trained=trained.settings.of("train") if trained else None,
        own=_own_point(outcomes, trained) if trained else None,
    )


def _check(method: Method) -> None:
    if not method.task_names:
        raise ConfigError("nothing is learned yet; there is nothing to test")
    seen = method.backbone.modalities
    if not {"image", "text"} <= set(seen):
        raise ConfigError(
            f"{type(method.backbone).__name__} sees only {' and '.join(seen)}; a modality can be "
            "missing only where a model sees image and text"
        )
    size = getattr(getattr(method.selector, "config", None), "group_size", 1)
    if size > 1:
        raise ConfigError(
            f"the selector decides in groups of {size}: answers depend on what is tested together; "
            "curves need group_size 1"
        )


def _point(outcomes: Sequence[Outcomes], missing: Missing, seeds: Sequence[int]) -> Point:
    drawn = [[one.codes(missing, seed) for one in outcomes] for seed in seeds]
    return _scored(outcomes, missing, drawn)


def _own_point(outcomes: Sequence[Outcomes], trained: Manifest) -> Point:
    codes = [torch.tensor(trained.codes_of(one.task, "test")) for one in outcomes]
    return _scored(outcomes, trained.settings.of("test"), [codes])


def _scored(
    outcomes: Sequence[Outcomes], missing: Missing, drawn: Sequence[Sequence[Tensor]]
) -> Point:
    """Return the means over tables; ``drawn`` has the codes of each task for each table."""
    return Point(
        kind=missing.kind,
        rate=missing.rate,
        task_free=_way(outcomes, TASK_FREE, drawn),
        oracle=_way(outcomes, ORACLE, drawn),
        task_identification=_recognised(outcomes, drawn),
    )


def _way(
    outcomes: Sequence[Outcomes], way: str, drawn: Sequence[Sequence[Tensor]]
) -> Scores | None:
    if any(way not in one.marks for one in outcomes):
        return None
    tables = [
        [one.score(way, codes) for one, codes in zip(outcomes, table, strict=True)]
        for table in drawn
    ]
    tasks = {
        one.task.name: fmean(table[place][0] for table in tables)
        for place, one in enumerate(outcomes)
    }
    by_missing = {}
    for name in CODE_NAMES:
        found = [
            [cases[name] for _, cases in table if name in cases]
            for table in tables
            if any(name in cases for _, cases in table)
        ]
        if found:
            by_missing[name] = fmean(fmean(scores) for scores in found)
    return Scores(ap=fmean(tasks.values()), tasks=tasks, by_missing=by_missing)


def _recognised(outcomes: Sequence[Outcomes], drawn: Sequence[Sequence[Tensor]]) -> float | None:
    """Return the share over the samples of all tasks, as reports count it."""
    right = total = 0
    for table in drawn:
        for one, codes in zip(outcomes, table, strict=True):
            if one.recognised is None:
                return None
            right += int(one.recognised[torch.arange(len(codes)), codes].sum())
            total += len(codes)
    return right / total
