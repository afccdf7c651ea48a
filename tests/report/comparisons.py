"""A comparison as ``evolora compare`` writes it, with scores simulated from a seed."""

from __future__ import annotations

from statistics import fmean, stdev
from typing import Any

import numpy as np

from evolora.evaluation.matrix import Matrix
from evolora.evaluation.metrics import summary

STREAMS = {
    "domains": ("digits", "fashion", "shapes", "emoji", "flags", "icons", "scripts", "furniture"),
    "missing": ("drawings", "plants", "tools", "animals", "icons", "logos"),
    "modalities": ("image", "video", "audio", "depth", "pc"),
    "instructions": ("a", "b", "c", "d", "e", "f", "g", "h"),
}
FIRST = ("zero-shot", "joint-lora", "lora-per-task", "lora-blind", "sequential-lora")
KEYS = ("last", "avg", "transfer", "forgetting", "bwt", "average_accuracy")
T = {2: 12.706, 3: 4.303}  # 97.5 % points of Student's t by number of pairs


def simulated(
    methods: int = 5,
    streams: tuple[str, ...] = ("domains", "missing"),
    seeds: tuple[int, ...] = (0, 1, 2),
) -> dict[str, Any]:
    """Return the contents of comparison.json.

    The second stream refuses the zero-shot method, and there the last seed of the last method has
    failed; the third stream has answers in words.
    """
    names = [*FIRST, *(f"method-with-a-name-{i}" for i in range(methods))][:methods]
    cells = [
        _cell(names, stream, method, seed, seeds, streams)
        for stream in streams
        for method in names
        for seed in seeds
    ]
    described = [_stream(stream, names, cells) for stream in streams]
    return {
        "format_version": 1,
        "title": "mosaic",
        "finished": len(streams) < 2,
        "started": "2026-03-01T10:00:00+00:00",
        "seconds": 7500.0,
        "versions": {"evolora": "0.1.0", "torch": "2.13.0"},
        "protocol": {
            "seeds": list(seeds),
            "orders": ["default"],
            "metric": "last",
            "reference": "best",
            "spread": "sample standard deviation over cells (n - 1)",
            "interval": {"kind": "t", "level": 0.95},
        },
        "metrics": {
            **{
                key: {
                    "title": key.replace("_", " ").capitalize(),
                    "unit": "percent",
                    "better": "less" if key == "forgetting" else "more",
                    "about": f"about {key}",
                }
                for key in KEYS
            },
            "trainable_parameters": _cost("Trainable", "count"),
            "seconds": _cost("Seconds", "seconds"),
        },
        "methods": [
            {"name": name, "type": name if name in FIRST[:3] else "lora"} for name in names
        ],
        "streams": described,
        "ranks": {"metric": "last", "methods": _ranks(names, described)},
        "cells": cells,
    }


def _cost(title: str, unit: str) -> dict[str, Any]:
    return {"title": title, "unit": unit, "better": None, "about": title.lower()}


def _cell(
    names: list[str],
    stream: str,
    method: str,
    seed: int,
    seeds: tuple[int, ...],
    streams: tuple[str, ...],
) -> dict[str, Any]:
    cell: dict[str, Any] = {
        "stream": stream, "method": method, "order": "default", "seed": seed,
        "config_hash": f"{names.index(method):02d}{seed:02d}abcdef", "state": "finished",
        "folder": f"cells/{stream}/{method}/default-{seed}", "error": None, "log": None,
        "tasks": [], "matrix": None, "metrics": {}, "seconds": None,
    }  # fmt: skip
    if streams.index(stream) == 1 and method == "zero-shot":
        return cell | {"state": "not applicable", "error": "zero-shot has no names of classes here"}
    if streams.index(stream) == 1 and (method, seed) == (names[-1], seeds[-1]):
        fault = "DataError: <no> sample"
        return cell | {"state": "failed", "error": fault, "log": "cells/output.log"}
    tasks = STREAMS[stream]
    rng = np.random.default_rng([names.index(method), seed, streams.index(stream)])
    place = (names.index(method) * 7 + streams.index(stream) * 2) % len(names)
    skill = 0.3 + 0.6 * place / len(names)
    values = np.clip(skill + 0.05 * rng.normal(size=(len(tasks), len(tasks))), 0.01, 0.99)
    if method == "joint-lora":
        values[:-1] = np.nan
    matrix = Matrix(tasks=tasks, values=values, counts=[100] * len(tasks), baseline=values[0])
    known = summary(matrix)
    metrics = {key: known[key] for key in KEYS if known[key] is not None}
    return cell | {
        "tasks": list(tasks),
        "matrix": matrix.to_json(),
        "metrics": metrics | {"trainable_parameters": 40_960.0, "seconds": 30.0 + seed},
        "seconds": 30.0 + seed,
    }


def _stream(stream: str, names: list[str], cells: list[dict[str, Any]]) -> dict[str, Any]:
    found = {
        name: {
            cell["seed"]: cell["metrics"]
            for cell in cells
            if (cell["stream"], cell["method"], cell["state"]) == (stream, name, "finished")
        }
        for name in names
    }
    means = {name: fmean(m["last"] for m in own.values()) for name, own in found.items() if own}
    reference = max(means, key=lambda name: means[name])
    return {
        "name": stream,
        "stream": f"mosaic/{stream}",
        "backbone": "tiny",
        "tasks": list(STREAMS[stream]),
        "source": "compact version",
        "label_space": "task",
        "reference": reference,
        "majority": {"score": 0.109, "tasks": {}} if stream == "modalities" else None,
        "methods": [
            _result(name, found[name], found[reference] if name != reference else {}, cells, stream)
            for name in names
        ],
    }


def _result(
    name: str,
    own: dict[int, dict[str, float]],
    reference: dict[int, dict[str, float]],
    cells: list[dict[str, Any]],
    stream: str,
) -> dict[str, Any]:
    mine = [cell for cell in cells if (cell["stream"], cell["method"]) == (stream, name)]
    states = {cell["state"] for cell in mine}
    keys = {key for metrics in own.values() for key in metrics}
    paired = {}
    for key in keys:
        both = [s for s in own if key in own[s] and key in reference.get(s, {})]
        if both:
            paired[key] = _difference([own[s][key] - reference[s][key] for s in both])
    return {
        "method": name,
        "routing": "oracle" if name == "lora-per-task" else "none",
        "state": states.pop() if len(states) == 1 else "partial",
        "reason": next((cell["error"] for cell in mine if cell["error"]), None),
        "n": len(own),
        "metrics": {key: _mean([m[key] for m in own.values()]) for key in keys},
        "paired": paired,
    }


def _mean(values: list[float]) -> dict[str, Any]:
    spread = stdev(values) if len(values) > 1 else None
    return {"n": len(values), "mean": fmean(values), "std": spread}


def _difference(values: list[float]) -> dict[str, Any]:
    found = _mean(values) | {"low": None, "high": None}
    if len(values) in T:
        half = T[len(values)] * found["std"] / len(values) ** 0.5
        found |= {"low": found["mean"] - half, "high": found["mean"] + half}
    return found


def _ranks(names: list[str], streams: list[dict[str, Any]]) -> list[dict[str, Any]]:
    places: dict[str, dict[str, Any]] = {name: {} for name in names}
    for stream in streams:
        ran = [one for one in stream["methods"] if one["n"]]
        ran.sort(key=lambda one: -one["metrics"]["last"]["mean"])
        for rank, one in enumerate(ran, 1):
            places[one["method"]][stream["name"]] = {"rank": rank, "of": len(ran), "n": one["n"]}
    ranked = [
        {"method": name, "mean": fmean(p["rank"] for p in own.values()), "streams": own}
        for name, own in places.items()
        if own
    ]
    return sorted(ranked, key=lambda one: one["mean"])
