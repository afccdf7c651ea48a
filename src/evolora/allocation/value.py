"""Allocation: which sites have experts of which task. A value to print, save, edit and reuse."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from evolora.errors import ConfigError, EvoloraError, StorageError, unknown_name
from evolora.storage.files import read_json, write_json

FILE = "allocation.json"
FORMAT = 1
MARK, NOTHING = "x", "."


@dataclass(frozen=True, kw_only=True)
class TaskAllocation:
    """The experts of one task.

    Args:
        task: its name.
        experts: site -> number of experts, from 1; sites that are not named have none.
        scores: site -> importance, by which the sites were chosen; empty if nobody scored them.
        settings: how the choice was made (JSON values).
    """

    task: str
    experts: Mapping[str, int]
    scores: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """Which of the candidate sites have experts, task after task.

    Args:
        sites: names of all candidates ("vision.3.q_proj"), by tower and depth.
        tasks: in the order in which they were learned.

    Raises:
        ConfigError: an unknown site, a number of experts below 1, or a task given twice.
    """

    sites: tuple[str, ...]
    tasks: tuple[TaskAllocation, ...] = ()

    def __post_init__(self) -> None:
        names = [entry.task for entry in self.tasks]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"the allocation has task {name!r} twice")
        for entry in self.tasks:
            for site in (*entry.experts, *entry.scores):
                if site not in self.sites:
                    raise ConfigError(
                        f"task {entry.task!r}: {unknown_name('site', site, self.sites)}"
                    )
            for site, count in entry.experts.items():
                if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                    raise ConfigError(
                        f"task {entry.task!r} must have a whole number of experts from 1 at "
                        f"{site!r}; got {count!r} (leave the site out for none)"
                    )

    def of(self, task: str) -> TaskAllocation:
        """Return a task's part; ConfigError if there is none."""
        for entry in self.tasks:
            if entry.task == task:
                return entry
        raise unknown_name("task of the allocation", task, [entry.task for entry in self.tasks])

    def counts(self, task: str) -> list[int]:
        """Return the task's number of experts at each site, in the order of the sites."""
        experts = self.of(task).experts
        return [experts.get(site, 0) for site in self.sites]

    def per_tower(self, task: str) -> dict[str, int]:
        """Return tower -> the task's number of experts."""
        totals = dict.fromkeys((site.split(".")[0] for site in self.sites), 0)
        for site, count in zip(self.sites, self.counts(task), strict=True):
            totals[site.split(".")[0]] += count
        return totals

    def with_task(self, entry: TaskAllocation) -> Allocation:
        """Return the allocation with one more task; what is there stays."""
        return replace(self, tasks=(*self.tasks, entry))

    def changed(self, task: str, experts: Mapping[str, int]) -> Allocation:
        """Return the allocation with other numbers of a task's experts at some sites (0: none)."""
        old = self.of(task)
        new = {**old.experts, **experts}
        kept = {site: count for site, count in new.items() if count != 0}
        return replace(
            self, tasks=tuple(replace(e, experts=kept) if e is old else e for e in self.tasks)
        )

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "format_version": FORMAT,
            "sites": list(self.sites),
            "tasks": [
                {
                    "task": entry.task,
                    "experts": dict(entry.experts),
                    "scores": dict(entry.scores),
                    "settings": dict(entry.settings),
                }
                for entry in self.tasks
            ],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Allocation:
        """Return what :meth:`to_json` described.

        Raises:
            ConfigError: something is missing, unknown or of the wrong kind.
        """
        _keys("an allocation", value, {"format_version", "sites", "tasks"}, {"sites", "tasks"})
        _kind("sites", value["sites"], list)
        tasks = []
        for entry in _kind("tasks", value["tasks"], list):
            _keys("a task", entry, {"task", "experts", "scores", "settings"}, {"task", "experts"})
            name = _kind("task", entry["task"], str)
            parts = {
                part: _kind(f"{part} of task {name!r}", entry.get(part, {}), dict)
                for part in ("experts", "scores", "settings")
            }
            tasks.append(TaskAllocation(task=name, **parts))
        return cls(sites=tuple(str(site) for site in value["sites"]), tasks=tuple(tasks))

    def save(self, path: Path) -> None:
        """Write the allocation as JSON, for a method's ``allocation: path``."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: Path, *, sites: Sequence[str] | None = None) -> Allocation:
        """Return a saved (and perhaps edited) allocation.

        Args:
            path: the file.
            sites: the candidates there are; every site that the file uses must be one of them.

        Raises:
            StorageError: missing, unreadable or damaged; the message names the site or task.
        """
        value = read_json(path, kind="allocation", newest=FORMAT)
        try:
            found = cls.from_json(value)
            return found if sites is None else found.among(sites)
        except EvoloraError as error:
            raise StorageError(f"{path}: {error}") from error

    def among(self, sites: Iterable[str]) -> Allocation:
        """Return the same experts and scores among other candidates, which must have the sites."""
        known = tuple(sites)
        kept = tuple(
            replace(e, scores={site: s for site, s in e.scores.items() if site in known})
            for e in self.tasks
        )
        return Allocation(sites=known, tasks=kept)

    def table(self) -> str:
        """Return the map of layers x tasks as text: a mark for each site of a layer."""
        layers: dict[tuple[str, str], list[str]] = {}
        for site in self.sites:
            tower, layer, *_ = site.split(".")
            layers.setdefault((tower, layer), []).append(site)
        most = max(layers.values(), key=len)
        names = " ".join(site.split(".", 2)[-1] for site in most)
        head = [str(number) for number in range(1, len(self.tasks) + 1)]
        rows = [["", *head]]
        for (tower, layer), own in layers.items():
            marks = ["".join(_mark(e.experts.get(s, 0)) for s in own) for e in self.tasks]
            rows.append([f"{tower} {layer}", *marks])
        for tower in dict.fromkeys(tower for tower, _ in layers):
            totals = [str(self.per_tower(entry.task)[tower]) for entry in self.tasks]
            rows.append([f"{tower}, experts", *totals])
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        legend = [f"{number} {entry.task}" for number, entry in enumerate(self.tasks, start=1)]
        return "\n".join([f"marks of a layer: {names}", *lines, "tasks: " + ", ".join(legend)])


def _mark(count: int) -> str:
    if count <= 1:
        return MARK if count else NOTHING
    return str(count) if count < 10 else "+"


def _keys(what: str, value: Any, known: set[str], needed: set[str]) -> None:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{what} must be an object; got {value!r}")
    for key in value:
        if key not in known:
            raise unknown_name(f"key of {what}", str(key), known)
    for key in sorted(needed):
        if key not in value:
            raise ConfigError(f"{what} lacks {key!r}")


def _kind(what: str, value: Any, kind: type[Any]) -> Any:
    if not isinstance(value, kind):
        name = {"list": "a list", "dict": "an object", "str": "text"}[kind.__name__]
        raise ConfigError(f"{what} must be {name}; got {value!r}")
    return value
