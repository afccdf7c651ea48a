"""``comparison.json``, which ``evolora compare`` writes: what it must hold."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from evolora.report.files import _Known
from evolora.report.tables import Column, Unit, Value

State = Literal["finished", "partial", "failed", "not applicable", "waiting"]


class Metric(_Known):
    """A score or cost: its heading, its unit, and whether more is better."""

    title: str
    unit: Unit
    better: Literal["more", "less"] | None = None
    about: str = ""


class Interval(_Known):
    """How intervals of differences were made, and how sure they are, in (0, 1)."""

    kind: str
    level: float = Field(gt=0, lt=1)


class Protocol(_Known):
    """What every method was run with, and which metric ranks them."""

    seeds: tuple[int, ...]
    orders: tuple[str, ...]
    metric: str
    reference: str
    spread: str = ""
    interval: Interval


class Named(_Known):
    """A method's name in this comparison, and the method that it is."""

    name: str
    type: str


class Mean(_Known):
    """Mean over finished cells and their sample standard deviation (None of one cell)."""

    n: int = Field(ge=1)
    mean: float
    std: float | None = None

    @property
    def value(self) -> Value:
        """The same as tables show it."""
        return Value(mean=self.mean, spread=self.std)


class Difference(Mean):
    """Mean of paired differences with its confidence interval (None of one pair)."""

    low: float | None = None
    high: float | None = None


class Result(_Known):
    """One method on one stream; ``paired`` is this method minus the stream's reference."""

    method: str
    routing: Literal["task-free", "oracle", "none"] | None = None
    state: State
    reason: str | None = None
    n: int = Field(ge=0)
    metrics: dict[str, Mean | None] = Field(default_factory=dict)
    paired: dict[str, Difference | None] = Field(default_factory=dict)

    def value(self, key: str) -> Value | None:
        """Return the mean and spread of a metric; None where it is not known."""
        found = self.metrics.get(key)
        return None if found is None else found.value


class Majority(_Known):
    """What the commonest answers score, without a look and without learning."""

    score: float
    tasks: dict[str, float] = Field(default_factory=dict)


class Stream(_Known):
    """One stream and what every method did on it."""

    name: str
    stream: str
    backbone: str = ""
    tasks: tuple[str, ...] = ()
    source: str = ""
    label_space: str = ""
    reference: str | None = None
    majority: Majority | None = None
    methods: tuple[Result, ...]

    @property
    def results(self) -> tuple[Result, ...]:
        """The methods with at least one finished cell."""
        return tuple(one for one in self.methods if one.n)


class Place(_Known):
    """A method's rank on a stream (1 is best), of how many methods."""

    rank: float = Field(ge=1)
    of: int = Field(ge=1)


class Ranked(_Known):
    """A method's mean rank over the streams it ran on."""

    method: str
    mean: float = Field(ge=1)
    streams: dict[str, Place]


class Ranks(_Known):
    """The methods by mean rank, best first."""

    metric: str
    methods: tuple[Ranked, ...] = ()


class Cell(_Known):
    """One method on one stream in one order with one seed; ``matrix`` as `Matrix.to_json`."""

    stream: str
    method: str
    order: str
    seed: int
    config_hash: str = ""
    folder: str = ""
    state: State
    error: str | None = None
    log: str | None = None
    matrix: dict[str, Any] | None = None
    metrics: dict[str, float | None] = Field(default_factory=dict)
    seconds: float | None = None


class ComparisonFile(_Known):
    """``comparison.json``."""

    format_version: Literal[1]
    title: str
    command: str = ""
    finished: bool
    started: str = ""
    seconds: float = Field(default=0, ge=0)
    versions: dict[str, str] = Field(default_factory=dict)
    protocol: Protocol
    metrics: dict[str, Metric]
    methods: tuple[Named, ...]
    streams: tuple[Stream, ...]
    ranks: Ranks
    cells: tuple[Cell, ...] = ()

    @property
    def main(self) -> Column:
        """The metric that ranks methods."""
        return self.column(self.protocol.metric)

    def column(self, key: str) -> Column:
        """Return a metric as a column of a table; one that is not described has its key's name."""
        metric = self.metrics.get(key) or Metric(title=key, unit="percent")
        return Column(
            key=key,
            title=metric.title,
            narrow=metric.title,
            unit=metric.unit,
            better=metric.better,
            about=metric.about,
        )

    def type_of(self, method: str) -> str:
        """Return which method stands behind a name."""
        return next((one.type for one in self.methods if one.name == method), method)
