"""A comparison as a grid: streams × methods × orders × seeds, each cell an ordinary run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath

from evolora.config import RunConfig

DEFAULT_ORDER, REVERSED, SHUFFLED = "default", "reversed", "shuffled-"
"""Orders that every stream has; the last one with a number behind it."""
BEST = "best"
"""In place of a method's name: the best one of each stream."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Cell:
    """One run of a comparison.

    Args:
        stream, method, order: names in the comparison.
        seed: of the run.
        config: what is run.
    """

    stream: str
    method: str
    order: str
    seed: int
    config: RunConfig

    @cached_property
    def config_hash(self) -> str:
        """Hash of what decides the result."""
        return self.config.hash()

    @property
    def folder(self) -> PurePosixPath:
        """Folder of the run, relative to the comparison's."""
        last = f"{self.order}-{self.seed}-{self.config_hash[:8]}"
        return PurePosixPath("cells", self.stream, self.method, last)

    @property
    def name(self) -> str:
        """How messages call it."""
        return f"{self.stream}/{self.method} (order {self.order}, seed {self.seed})"


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What is compared.

    Args:
        title: name of the comparison.
        streams: name -> registered name of the stream.
        methods: name -> type.
        orders, seeds: under which every method meets every stream.
        metric: main metric: it ranks, and says which method is best.
        reference: method that differences are taken from, or "best": of each stream.
        cells: seed after seed, so that an interrupted comparison has whole seeds.
        command: what was typed to get it; its page says so.
    """

    title: str
    streams: Mapping[str, str]
    methods: Mapping[str, str]
    orders: tuple[str, ...]
    seeds: tuple[int, ...]
    metric: str
    reference: str
    cells: tuple[Cell, ...]
    command: str = ""
