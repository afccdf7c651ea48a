"""Reads what is to be compared: one comparison file, or several configurations of runs.

``docs/compare.md`` describes the file. Configurations of runs are compared where their stream is
the same.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from evolora.config import RunConfig, load_stream, parse_config
from evolora.config_text import SECTIONS, SHORT, read_yaml
from evolora.errors import ConfigError, EvoloraError, suggest, unknown_name
from evolora.registry import STREAMS
from evolora.sweep.grid import BEST, DEFAULT_ORDER, REVERSED, SHUFFLED, Cell, Grid

SEED = "$seed"
"""A value in a stream's section that stands for the cell's seed."""
KEYS = ("streams", "methods", "seeds", "orders", "metric", "reference")
SHARED = tuple(name for name in SECTIONS if name not in ("seed", "name"))
"""Sections of a run that a stream or a method may set."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def read_grid(
    paths: Sequence[Path],
    *,
    seeds: Sequence[int] | None = None,
    orders: Sequence[str] | None = None,
    reference: str | None = None,
) -> Grid:
    """Return the grid of one comparison file, or of several configurations of runs.

    Args:
        paths: YAML files.
        seeds: instead of the file's.
        orders: instead of the file's.
        reference: instead of the file's.

    Raises:
        ConfigError: unknown or wrong values, all of them with where they stand.
    """
    if not paths:
        raise ConfigError("nothing to compare: name a comparison file, or configurations of runs")
    values = [read_yaml(path) for path in paths]
    if len(paths) == 1 and "methods" in values[0]:
        value, source = values[0], str(paths[0])
    else:
        value, source = _of_runs(paths, values), "the configurations"
    given = {"seeds": seeds, "orders": orders, "reference": reference}
    value = {**value, **{key: part for key, part in given.items() if part is not None}}
    return _Reader(value, source).grid(paths[0].stem)


def _of_runs(paths: Sequence[Path], values: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return configurations of runs as a comparison; equal stream sections are one stream."""
    streams: dict[str, Any] = {}
    entries: list[dict[str, Any]] = []
    seeds: list[Any] = []
    for path, value in zip(paths, values, strict=True):
        if "methods" in value:
            raise ConfigError(f"{path} is a comparison file; compare it alone")
        run = parse_config(value, source=str(path))
        sections = _long(value)
        section = {"stream": sections["stream"]}
        label = str(section["stream"]["name"]).replace("/", "-")
        same = next((name for name, known in streams.items() if known == section), None)
        if same is None:
            same = label if label not in streams else f"{label}-{len(streams) + 1}"
            streams[same] = section
        own = {key: part for key, part in sections.items() if key in SHARED and key != "stream"}
        entries.append({"name": run.name or path.stem, **own, "streams": [same]})
        if run.seed not in seeds:
            seeds.append(run.seed)
    return {"streams": streams, "methods": _one_per_name(entries), "seeds": seeds}


def _one_per_name(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Make one method of runs of one name on several streams."""
    known: dict[str, dict[str, Any]] = {}
    for entry in entries:
        (stream,) = entry["streams"]
        own = {key: part for key, part in entry.items() if key in SHARED}
        method = known.setdefault(entry["name"], {"name": entry["name"], "streams": [], "on": {}})
        if stream in method["on"]:
            raise ConfigError(f"two configurations on one stream are called {entry['name']!r}")
        method["streams"].append(stream)
        method["on"][stream] = own
    return list(known.values())


class _Reader:
    """Reads a comparison file; faults are collected and told together."""

    def __init__(self, value: Mapping[str, Any], source: str) -> None:
        self.value, self.source = value, source
        self.faults: dict[str, list[str]] = {}

    def grid(self, title: str) -> Grid:
        for key in self.value:
            if key not in KEYS:
                self._fault(
                    f"{key}: unknown key{suggest(str(key), KEYS)} (known: {', '.join(KEYS)})"
                )
        streams = self._streams()
        methods = self._methods(streams)
        seeds = self._seeds(self.value.get("seeds", 1))
        orders = self._orders(self.value.get("orders", [DEFAULT_ORDER]))
        metric, reference = self._judged(methods)
        self._stop()
        pairs = {
            (stream, method): self._config(streams[stream], methods[method], stream, method)
            for stream in streams
            for method in methods
            if stream in methods[method].get("streams", streams)
        }
        self._stop()
        lists = {
            (name, order): self._order(streams[name], order) for name in streams for order in orders
        }
        for name in streams:
            self._tasks(streams[name], [lists[name, order] for order in orders], name)
        self._stop()
        cells = tuple(
            Cell(
                stream=stream,
                method=method,
                order=order,
                seed=seed,
                config=_placed(config, seed, lists[stream, order]),
            )
            for seed in seeds
            for order in orders
            for (stream, method), config in pairs.items()
        )
        return Grid(
            title=title,
            streams={name: str(section["stream"]["name"]) for name, section in streams.items()},
            methods={
                name: next(str(pairs[pair].method.type) for pair in pairs if pair[1] == name)
                for name in methods
            },
            orders=orders,
            seeds=seeds,
            metric=metric,
            reference=reference,
            cells=cells,
        )

    # -- parts -----------------------------------------------------------------------------------

    def _streams(self) -> dict[str, dict[str, Any]]:
        given = self.value.get("streams")
        if not isinstance(given, Mapping) or not given:
            self._fault("streams: expected a mapping of names to sections of a run")
            return {}
        found = {}
        for name, section in given.items():
            where = f"streams.{name}"
            self._name(name, where)
            if not isinstance(section, Mapping):
                self._fault(f"{where}: expected a mapping of sections; got {section!r}")
                continue
            self._known(section, (*SHARED, "orders"), where)
            if not _are_lists(own := section.get("orders", {})):
                self._fault(f"{where}.orders: expected names with lists of tasks; got {own!r}")
                continue
            stream = _long(section).get("stream")
            if not isinstance(stream, Mapping) or stream.get("name") not in STREAMS:
                got = stream.get("name") if isinstance(stream, Mapping) else stream
                self._fault(
                    f"{where}.stream.name: {unknown_name('stream', str(got), STREAMS.names())}"
                )
                continue
            found[str(name)] = _long(section)
        return found

    def _methods(self, streams: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        given = self.value.get("methods")
        if not isinstance(given, list) or not given:
            self._fault("methods: expected a list of types or mappings")
            return {}
        found: dict[str, dict[str, Any]] = {}
        for index, entry in enumerate(given):
            where = f"methods[{index}]"
            entry = {"method": entry} if isinstance(entry, str) else entry
            if not isinstance(entry, Mapping):
                self._fault(f"{where}: expected a type or a mapping; got {entry!r}")
                continue
            self._known(entry, (*SHARED, "name", "streams", "on"), where)
            entry = _long(entry)
            method = entry.get("method")
            kind = method.get("type") if isinstance(method, Mapping) else None
            name = str(entry.get("name") or kind or "")
            if not name:
                self._fault(f"{where}: needs a name, or a method with a type")
                continue
            self._name(name, where)
            if name in found:
                self._fault(f"{where}: a second method {name!r}; give it a name of its own")
            self._check_streams(entry, streams, where)
            found[name] = entry
        return found

    def _check_streams(
        self, entry: Mapping[str, Any], streams: Mapping[str, Any], where: str
    ) -> None:
        """Note what is wrong with the streams that a method's entry names."""
        only, on = entry.get("streams"), entry.get("on", {})
        if "streams" in entry and not (isinstance(only, list) and only):
            self._fault(f"{where}.streams: expected a list of streams; got {only!r}")
            only = None
        if not isinstance(on, Mapping) or not all(isinstance(o, Mapping) for o in on.values()):
            self._fault(f"{where}.on: expected a mapping of streams to sections; got {on!r}")
            on = {}
        for key, names in (("streams", only or ()), ("on", on)):
            for name in names:
                if str(name) not in streams:
                    self._fault(f"{where}.{key}: {unknown_name('stream', str(name), streams)}")

    def _seeds(self, given: Any) -> tuple[int, ...]:
        if isinstance(given, int) and not isinstance(given, bool) and given > 0:
            return tuple(range(given))
        listed = isinstance(given, list | tuple) and bool(given)
        if listed and all(isinstance(one, int) and not isinstance(one, bool) for one in given):
            self._once("seeds", given)
            return tuple(given)
        self._fault(f"seeds: expected their number, at least 1, or a list of them; got {given!r}")
        return ()

    def _orders(self, given: Any) -> tuple[str, ...]:
        if isinstance(given, str):
            given = [given]
        if isinstance(given, list | tuple) and given and all(isinstance(one, str) for one in given):
            for name in given:
                self._name(name, "orders")
            self._once("orders", given)
            return tuple(given)
        self._fault(f"orders: expected a list of names; got {given!r}")
        return ()

    def _once(self, key: str, given: Sequence[Any]) -> None:
        """Note what a list names twice: one cell would count as two."""
        for one in dict.fromkeys(one for one in given if list(given).count(one) > 1):
            self._fault(f"{key}: {one} is given twice")

    def _judged(self, methods: Mapping[str, Any]) -> tuple[str, str]:
        from evolora.evaluation.metrics import DEFINITIONS

        metric = str(self.value.get("metric", "last"))
        if metric not in DEFINITIONS:
            self._fault(f"metric: {unknown_name('metric', metric, DEFINITIONS)}")
        reference = str(self.value.get("reference", BEST))
        if reference != BEST and reference not in methods:
            self._fault(f"reference: {unknown_name('method', reference, (BEST, *methods))}")
        return metric, reference

    def _config(
        self, section: Mapping[str, Any], entry: Mapping[str, Any], stream: str, method: str
    ) -> Any:
        """Return the configuration of a pair's runs; None with its faults noted."""
        value = {key: part for key, part in section.items() if key in SHARED}
        for over in (entry, entry.get("on", {}).get(stream, {})):
            value = merged(value, {k: v for k, v in _long(over).items() if k in SHARED})
        try:
            return parse_config({**value, "name": method}, source="")
        except ConfigError as error:
            self._fault(str(error).removeprefix(": "), f"{stream} × {method}")
            return None

    def _order(self, section: Mapping[str, Any], order: str) -> list[str] | None:
        """Return the task names of an order of a stream; None of its own order."""
        if order == DEFAULT_ORDER:
            return None
        own = section.get("orders", {})
        if order in own:
            return list(own[order])
        if order == REVERSED or re.fullmatch(rf"{SHUFFLED}\d+", order):
            return _rearranged(section["stream"], order)
        known = (DEFAULT_ORDER, REVERSED, f"{SHUFFLED}0", *own)
        self._fault(f"orders: {unknown_name('order', order, known)}", section["stream"]["name"])
        return None

    def _tasks(
        self, section: Mapping[str, Any], orders: Sequence[list[str] | None], name: str
    ) -> None:
        """Note what is wrong with orders of tasks that were given as lists."""
        for order in orders:
            options = _with_seed({k: v for k, v in section["stream"].items() if k != "name"}, 0)
            if order is not None:
                options["order"] = order
            if "order" not in options:
                continue  # its own, and its data may be on other machines alone
            try:
                load_stream(str(section["stream"]["name"]), **options)
            except EvoloraError as error:
                self._fault(str(error), name)

    # -- faults ----------------------------------------------------------------------------------

    def _name(self, name: Any, where: str) -> None:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            self._fault(
                f"{where}: a name is letters, digits, '.', '_' and '-', since it names a folder; "
                f"got {name!r}"
            )

    def _known(self, value: Mapping[str, Any], allowed: Sequence[str], where: str) -> None:
        for key in value:
            if key not in allowed:
                hint = suggest(str(key), allowed) or f" (known: {', '.join(allowed)})"
                self._fault(f"{where}.{key}: unknown key{hint}")

    def _fault(self, text: str, place: str = "") -> None:
        places = self.faults.setdefault(text, [])
        if place:
            places.append(place)

    def _stop(self) -> None:
        """Raise what was found so far; a fault that several cells have is told once."""
        if self.faults:
            told = [
                f"{', '.join(places)}: {text}" if places else text
                for text, places in self.faults.items()
            ]
            raise ConfigError(f"{self.source}: " + "; ".join(told))


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of ``base`` with the values of ``over``, mappings merged key by key.

    A mapping with another ``type`` replaces the older one: its settings belong to another thing.
    """
    result = copy.deepcopy(dict(base))
    for key, value in over.items():
        known = result.get(key)
        if (
            isinstance(known, Mapping)
            and isinstance(value, Mapping)
            and value.get("type", known.get("type")) == known.get("type")
        ):
            result[key] = merged(known, value)
        else:
            result[key] = copy.deepcopy(value)
    return result


def _are_lists(orders: Any) -> bool:
    """Return whether these are orders of tasks by name, as a stream's section may have them."""
    return isinstance(orders, Mapping) and all(
        isinstance(tasks, list) and all(isinstance(task, str) for task in tasks)
        for tasks in orders.values()
    )


def _long(sections: Mapping[str, Any]) -> dict[str, Any]:
    """Return sections with short forms (``stream: NAME``) written out."""
    return {
        key: {SHORT[key]: value} if key in SHORT and isinstance(value, str) else value
        for key, value in sections.items()
    }


def _placed(config: RunConfig, seed: int, order: list[str] | None) -> RunConfig:
    """Return a pair's configuration under one seed and order."""
    stream = _with_seed(config.stream, seed)
    if order is not None:
        stream["order"] = order
    return replace(config, seed=seed, stream=stream)


def _with_seed(value: Any, seed: int) -> Any:
    """Return a copy of a stream's section with the seed wherever "$seed" stands."""
    if isinstance(value, Mapping):
        return {key: _with_seed(part, seed) for key, part in value.items()}
    return seed if value == SEED else value


def _rearranged(section: Mapping[str, Any], order: str) -> list[str]:
    """Return a stream's task names from behind, or shuffled by the number in the order's name."""
    import torch

    from evolora.randomness import generator

    options = _with_seed({key: value for key, value in section.items() if key != "name"}, 0)
    names = [task.name for task in load_stream(str(section["name"]), **options)]
    if order == REVERSED:
        return names[::-1]
    drawn = torch.randperm(
        len(names), generator=generator(int(order.removeprefix(SHUFFLED)), "order")
    )
    return [names[index] for index in drawn.tolist()]
