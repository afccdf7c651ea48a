"""Run folders as the training code leaves them, with scores simulated from a seed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.report.browser import Browser, find_browser

from evolora.evaluation.matrix import Matrix

TASKS = (
    "digits", "fashion", "fluent-emoji", "country-flags", "material-icons", "braille",
    "furniture renders", "logos", "weather",
)  # fmt: skip
# name -> what is kept of a learned task (0..1), change of unseen tasks, routing, trainable, stored
METHODS: dict[str, tuple[float, float, str, int, int]] = {
    "zero-shot": (0.0, 0.0, "none", 0, 0),
    "linear-probe": (1.0, 0.0, "oracle", 49_152, 49_152),
    "full-finetuning": (0.35, -0.6, "none", 11_300_000, 11_300_000),
    "lora": (0.45, -0.45, "none", 393_216, 393_216),
    "lora-per-task": (1.0, 0.0, "oracle", 393_216, 393_216),
    "joint-lora": (1.0, 0.3, "none", 393_216, 393_216),
    "moe-adapters": (0.985, -0.01, "task-free", 1_204_224, 1_204_224),
}


def _scores(rng: np.random.Generator, kept: float, drift: float, learns: bool, size: int):
    base = rng.uniform(0.08, 0.4, size)
    top = rng.uniform(0.7, 0.97, size)
    values = np.empty((size, size))
    for i in range(size):
        for j in range(size):
            if not learns:
                values[i, j] = base[j]
            elif j > i:
                values[i, j] = base[j] * (1 + drift * (i + 1) / size) + 0.01 * rng.normal()
            else:
                fade = kept ** (1.0 if kept > 0.9 else (i - j) / 3)
                fade = 1 - (1 - fade) * (i > j)
                values[i, j] = base[j] * 0.4 + (top[j] - base[j] * 0.4) * fade
    return base, np.clip(values, 0, 1)


def _routing(rng: np.random.Generator, tasks: tuple[str, ...]) -> dict[str, Any]:
    after = []
    for i, task in enumerate(tasks):
        routes: dict[str, dict[str, int]] = {}
        for j, tested in enumerate(tasks):
            wrong = int(rng.integers(0, 12))
            right = tested if j <= i else "base"
            other = tasks[int(rng.integers(0, i + 1))] if j > i else "base"
            routes[tested] = {right: 400 - wrong}
            routes[tested][other] = routes[tested].get(other, 0) + wrong
        after.append({"task": task, "routes": routes})
    experts = {}
    for tower, layers in (("vision", 4), ("text", 3)):
        counts = {
            task: rng.multinomial(2000, rng.dirichlet([0.25] * 12), size=layers).tolist()
            for task in tasks
        }
        frozen = [sorted(set(rng.integers(0, 12, 6).tolist())) for _ in range(layers)]
        experts[tower] = {"tasks": counts, "frozen": frozen}
    return {"format_version": 1, "after": after, "experts": experts}


def write_run(
    root: Path,
    name: str = "moe-adapters",
    *,
    seed: int = 0,
    tasks: tuple[str, ...] = TASKS,
    method: dict[str, Any] | None = None,
    routing: str | None = None,
    stream: str = "mosaic/domains",
    label_space: str = "task",
) -> Path:
    """Write one run folder and return it."""
    kept, drift, default_routing, trainable, stored = METHODS[name]
    routing = routing or default_routing
    size = len(tasks)
    rng = np.random.default_rng([seed, 7])
    baseline, values = _scores(rng, kept, drift, name != "zero-shot", size)
    folder = root / f"{name}-{len(list(root.iterdir())) if root.exists() else 0}"
    folder.mkdir(parents=True)
    if name == "joint-lora":
        values[:-1] = np.nan
    if label_space == "seen":
        values[np.triu_indices(size, 1)] = np.nan
    matrix = Matrix(tasks=tasks, values=values, counts=[400] * size, baseline=baseline)
    matrix.save(folder / "matrix.json")
    growing = name in ("linear-probe", "lora-per-task", "moe-adapters")
    run = {
        "format_version": 1,
        "name": name,
        "method": {"type": name, **(method or {})},
        "stream": stream,
        "tasks": list(tasks),
        "protocol": {"label_space": label_space, "routing": routing, "group_size": 1},
        "seed": seed,
        "config_hash": f"{name[:2]}{len(method or {}):02d}",
        "versions": {"evolora": "0.1.0", "torch": "2.13.0"},
        "device": "cpu",
        "processes": 1,
        "started": "2026-03-01T10:00:00+00:00",
        "seconds": 20.0 + 5 * size + float(rng.uniform(0, 9)),
        "history": [
            {
                "task": task,
                "seconds_learn": 4.0,
                "seconds_evaluate": 1.0,
                "trainable_parameters": trainable,
                "stored_parameters": stored * (i + 1 if growing else 1),
                "stored_bytes": 4 * stored * (i + 1 if growing else 1),
                "final_loss": None if name == "zero-shot" else 0.3,
            }
            for i, task in enumerate(tasks)
        ],
    }
    (folder / "run.json").write_text(json.dumps(run))
    if routing == "task-free":
        (folder / "routing.json").write_text(json.dumps(_routing(rng, tasks)))
    return folder


@pytest.fixture
def make_run(tmp_path):
    """Return a function that writes a run folder below the test's own folder."""

    def make(*args: Any, **kwargs: Any) -> Path:
        return write_run(tmp_path / "runs", *args, **kwargs)

    return make


@pytest.fixture
def all_methods(make_run):
    """Return run folders of seven methods, three seeds each for two of them."""
    folders = [make_run(name) for name in METHODS]
    folders += [make_run(name, seed=s) for s in (1, 2) for name in ("lora", "moe-adapters")]
    return folders


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """Return a browser; tests that need it are skipped where none is installed."""
    program = find_browser()
    if program is None:
        pytest.skip("no Chromium on this machine")
    try:
        browser = Browser(program, tmp_path_factory.mktemp("browser"))
    except (OSError, RuntimeError) as fault:
        pytest.skip(f"{program} does not start: {fault}")
    yield browser
    browser.close()
