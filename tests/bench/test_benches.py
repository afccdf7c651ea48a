"""Every bench from end to end, on towers of toy size."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from evolora.bench import BENCHES, growth, layer, pairs, route, runner, tower
from evolora.bench.goals import GOALS
from evolora.bench.layer import Shape
from evolora.bench.memory import saved_bytes
from evolora.bench.settings import Settings
from evolora.errors import ConfigError

pytestmark = pytest.mark.usefixtures("no_calibration")
TINY = Settings(quick=True, layers=1, batch=1, rounds=1)
ABSOLUTE = {key for key, goal in GOALS.items() if goal.absolute}


def goals_of(bench: str) -> set[str]:
    return {key for key, goal in GOALS.items() if goal.bench == bench} - ABSOLUTE


def run(bench: str, settings: Settings = TINY, **options: bool) -> runner.Report:
    return runner.run([bench], settings, **options)


@pytest.mark.parametrize("bench", ["tower", "serve", "pairs", "growth", "resora", "data"])
def test_a_bench_fills_its_tables_and_measures_its_goals(bench: str, tiny_sizes: None) -> None:
    result = run(bench).results[0]
    assert result.complete and result.tables
    assert all(table.cells for table in result.tables)
    assert set(result.measured) == goals_of(bench) - {"lora-peak"}, "memory is for full runs"
    numbers = [
        value
        for table in result.tables
        for row in table.cells.values()
        for value in row.values()
        if isinstance(value, float)
    ]
    assert numbers and all(math.isfinite(number) and number >= 0 for number in numbers)
    json.dumps(result.to_json())


def test_a_full_tower_bench_weighs_its_steps_and_sweeps(tiny_sizes: None) -> None:
    result = run("tower", replace(TINY, quick=False)).results[0]
    assert set(result.measured) == goals_of("tower")
    assert result.tables[0].cells[tower.LORA]["saved MiB"] > 0
    assert [table.axis for table in result.tables[1:]] == ["e", "e", "t", "t"]


def test_train_needs_four_layers_to_adapt_a_quarter(tiny_sizes: None) -> None:
    result = run("train", replace(TINY, layers=4)).results[0]
    assert set(result.measured) == goals_of("train")
    assert set(run("train").results[0].measured) == {"text-cached"}


def test_every_variant_of_the_tower_agrees_with_float64(tiny_sizes: None) -> None:
    result = run("tower", replace(TINY, layers=2)).results[0]
    errors = {row: cells["error"] for row, cells in result.tables[0].cells.items()}
    checked = {row for row, error in errors.items() if error is not None}
    assert {tower.LORA, tower.MOE, tower.LOOP, tower.STACKED, tower.MERGED} <= checked
    assert max(errors[row] for row in checked) < 1e-5
    assert result.measured["agreement"] == max(
        errors[row] for row in (tower.LORA, tower.MOE, tower.STACKED, tower.MERGED)
    )


def test_delo_of_the_bench_agrees_with_loops_in_float64(tiny_sizes: None) -> None:
    result = run("pairs", Settings(layers=2, batch=4, rounds=1)).results[0]
    steps = [table for table in result.tables if pairs.WHOLE in table.cells]
    assert len(steps) == 2
    for table in steps:
        assert table.cells[pairs.EXPERTS]["error"] < 1e-5
        assert table.cells[pairs.WHOLE]["saved MiB"] > 0
    assert pairs.TWICE in steps[0].cells and pairs.ANEW in steps[1].cells


def last_of(
    title: str, count: int
) -> tuple[growth.Method, growth.Variant, dict[str, growth.Batch]]:
    """A method in training on the last of so many tasks, its step, and the batch."""
    settings = Settings(layers=2)
    model = growth.ImageText(growth.llava(settings, 2), growth.Shapes(), name="toy")
    method = growth.taught(growth.METHODS[title](), model, settings, count, 3)
    name = growth.row_of(count)
    batches = {name: growth.samples(settings, 3, count - 1, growth.LAST)}
    return method, growth.step(name, method, name), batches


@pytest.mark.parametrize("title", growth.METHODS)
def test_a_step_does_the_same_after_any_number_of_tasks(title: str, tiny_sizes: None) -> None:
    done = {}
    for count in (2 if title == growth.HELPED else 1, 6):
        method, variant, batches = last_of(title, count)
        own = {key: layer.bank for key, layer in method.layers.items() if layer.places.newest()}
        assert own and sum(bank.A.active.numel() for bank in own.values()) > 0
        with FlopCounterMode(display=False) as counted:
            out = variant.once("step", batches)
        trained = sum(p.numel() for p in method.trainable().values())
        saved = saved_bytes(lambda v=variant, b=batches: v.run(b))
        done[count] = (set(own), counted.get_total_flops(), trained, saved, out.shape)
    first, last = done.values()
    assert first[0] == last[0] and first[2] == last[2] > 0 and first[4] == last[4]
    if title == growth.HELPED:  # earlier experts that help are work too, two tasks' or five tasks'
        assert last[1] < 1.1 * first[1]
    else:
        assert first[1] == last[1] > 0
        assert last[3] == pytest.approx(first[3], rel=0.02) and first[3] > 0


@pytest.mark.parametrize("title", growth.METHODS)
def test_what_is_stored_grows_with_the_tasks_and_steps_change_no_weight(
    title: str, tiny_sizes: None
) -> None:
    stored = {}
    for count in (1, 2, 3):
        method, variant, batches = last_of(title, count)
        before = {name: t.clone() for name, t in method.stored().items()}
        assert all(p.grad is None for p in method.trainable().values())
        variant.once("step", batches)
        assert all(torch.equal(t, before[name]) for name, t in method.stored().items())
        stored[count] = sum(t.nbytes for t in before.values())
    assert stored[1] < stored[2] < stored[3]


def test_a_full_growth_bench_weighs_steps_and_what_is_stored(tiny_sizes: None) -> None:
    result = run("growth", replace(TINY, quick=False)).results[0]
    assert len(result.tables) == len(growth.METHODS)
    for title, table in zip(growth.METHODS, result.tables, strict=True):
        first = 2 if title == growth.HELPED else 1
        assert list(table.cells) == [growth.row_of(n) for n in (first, *growth.TASKS[1:])]
        assert all(cells["saved MiB"] > 0 for cells in table.cells.values())
        sizes = [cells["stored MiB"] for cells in table.cells.values()]
        assert sizes == sorted(set(sizes))
        assert len({cells["trainable"] for cells in table.cells.values()}) == 1


@pytest.fixture
def tiny_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"d_in": 32, "d_out": 32, "tokens": 6, "batch": 2}
    original = layer.case
    monkeypatch.setattr(
        layer, "case", lambda shape, settings: original(replace(shape, **small), settings)
    )
    monkeypatch.setattr(route, "case", layer.case)


def test_the_layer_bench_times_every_formulation(tiny_shapes: None) -> None:
    result = run("layer").results[0]
    assert set(result.measured) == goals_of("layer")
    per_sample, per_token = result.tables[:2]
    assert set(layer.PER_SAMPLE) < set(per_sample.cells)
    assert set(layer.PER_TOKEN) < set(per_token.cells)
    assert layer.CHOSEN in per_sample.cells and layer.CHOSEN in per_token.cells


def test_a_full_layer_bench_sweeps_every_size() -> None:
    titles = [title for title, _, _ in layer.sweeps(Shape())]
    assert len(set(titles)) == len(titles) == 7
    shapes = [s for _, _, by_label in layer.sweeps(Shape()) for s in by_label.values()]
    assert {s.experts for s in shapes} >= {4, 8, 16, 32, 64, 128}
    assert {s.r for s in shapes} >= {4, 8, 16, 64}
    assert {s.k for s in shapes} == {1, 2, 4}
    assert {s.tokens for s in shapes} == {1, 16, 50, 197}
    assert {(s.routes, s.per_token) for s in shapes} == {
        (routes, per_token) for routes in ("uniform", "zipf") for per_token in (False, True)
    }


def test_zipf_routes_prefer_the_first_experts() -> None:
    shape = Shape(experts=16, k=1, tokens=500, batch=2, d_in=4, d_out=4, per_token=True)
    ids = layer.case(replace(shape, routes="zipf"), Settings()).ids
    even = layer.case(shape, Settings()).ids
    assert (ids == 0).float().mean() > 3 * (even == 0).float().mean()


def test_fitting_keeps_the_thresholds_for_the_next_forward(
    tiny_shapes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = {}
    monkeypatch.setattr(route, "save_thresholds", lambda kind, table: kept.update({kind: table}))
    result = run("route", fit=True).results[0]
    assert set(kept) == {"cpu"}
    assert [table.title for table in result.tables] == [
        "dispatcher, as it is",
        "thresholds of cpu",
        "dispatcher, with the fitted thresholds",
    ]
    assert result.measured["regret"] >= 1.0


def test_an_interrupted_run_ends_there_and_keeps_what_it_has(
    tiny_shapes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(layer.Session, "goal", interrupt)
    report = runner.run(["layer", "route"], TINY)
    assert report.interrupted and [result.bench for result in report.results] == ["layer"]
    assert report.results[0].tables[0].cells and not report.results[0].complete


def test_unknown_benches_and_misplaced_options_are_refused() -> None:
    assert runner.names_of("all") == list(BENCHES)
    with pytest.raises(ConfigError, match="did you mean 'tower'"):
        runner.names_of("towr")
    with pytest.raises(ConfigError, match="--fit is for bench 'route'"):
        runner.run(["data"], TINY, fit=True)


def evolora(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "evolora", *words], capture_output=True, text=True, timeout=240
    )


def test_the_command_prints_json() -> None:
    done = evolora("bench", "data", "--quick", "--rounds", "1", "--json", "--quiet")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    (result,) = report["results"]
    assert result["bench"] == "data" and result["complete"] and not report["interrupted"]
    assert {"torch_threads", "load_average", "gemm_gflops", "cpu_flags"} <= set(
        result["environment"]
    )
    assert result["environment"]["torch_threads"] == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("towr",), "did you mean 'tower'"),
        (("tower", "--quick", "--write", "page.md"), "leave out --quick"),
        (("tower", "--dtype", "float23"), "did you mean 'float32'"),
    ],
)
def test_a_user_s_fault_is_one_line(words: tuple[str, ...], said: str) -> None:
    done = evolora("bench", *words)
    assert done.returncode == 2 and done.stdout == ""
    assert said in done.stderr and len(done.stderr.splitlines()) == 1
