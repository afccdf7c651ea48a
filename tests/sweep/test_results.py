"""What a comparison makes of its cells: pairs, the best method, ranks; and its page once more."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tests.report.conftest import write_run

from evolora.cli import main
from evolora.evaluation.matrix import Matrix
from evolora.report.records import RunRecord
from evolora.sweep.grid import Cell, Grid
from evolora.sweep.grid_file import read_grid
from evolora.sweep.results import CellResult, comparison_of, write_comparison

METHODS = {
    "a": {"type": "sequential-lora"},
    "b": {"type": "lora-per-task"},
    "told": {"type": "lora-per-task", "selector": {"type": "oracle"}},
    "joint": {"type": "joint-lora"},
}
LAST = {
    ("a", "default"): (0.50, 0.60, 0.73),
    ("a", "reversed"): (0.20, 0.30, 0.40),
    ("b", "default"): (0.40, 0.55, 0.55),
    ("b", "reversed"): (0.60, 0.10, 0.40),
    ("told", "default"): (0.80, 0.80, 0.81),
    ("told", "reversed"): (0.80, 0.80, 0.81),
    ("joint", "default"): (0.90, 0.90, 0.90),
    ("joint", "reversed"): (0.90, 0.90, 0.90),
}
"""Scores after the last task: method, order -> of seeds 0, 1, 2. The last is a tie."""
JUST_LEARNED = {"a": 0.75, "b": 0.6, "told": 0.81, "joint": 0.9}
"""Scores on the first task when it was learned; less the last one, they are the forgetting."""
Make = Callable[..., tuple[Grid, list[CellResult]]]


@pytest.fixture
def cells(tmp_path: Path) -> Make:
    """Return a function that reads a grid and gives each of its cells a finished run."""

    def make(methods: Sequence[str] = tuple(METHODS), **given: Any) -> tuple[Grid, list[Any]]:
        value = {
            "streams": {"one": {"stream": "mosaic/domains"}},
            "methods": [{"name": name, "method": METHODS[name]} for name in methods],
            "seeds": 3,
            "orders": ["default", "reversed"],
            **given,
        }
        (tmp_path / "grid.yaml").write_text(yaml.safe_dump(value))
        grid = read_grid([tmp_path / "grid.yaml"])
        return grid, [CellResult(cell=c, state="finished", record=run(c)) for c in grid.cells]

    def run(cell: Cell) -> RunRecord:
        kind, last = METHODS[cell.method]["type"], LAST[cell.method, cell.order][cell.seed]
        routing = "oracle" if cell.method == "told" else "none"
        name = str(kind).removeprefix("sequential-")
        folder = write_run(tmp_path / "runs", name, routing=routing, tasks=("x", "y"))
        values = np.array([[JUST_LEARNED[cell.method], 0.1], [last, last]])
        Matrix(tasks=("x", "y"), values=values, counts=[10, 10], baseline=values[0]).save(
            folder / "matrix.json"
        )
        return RunRecord.load(folder)

    return make


def entry(value: Any, method: str) -> dict[str, Any]:
    return next(one for one in value["streams"][0]["methods"] if one["method"] == method)


def without(results: list[CellResult], method: str, seed: int) -> list[CellResult]:
    """The same, with one cell (in both orders) that failed."""
    return [
        replace(r, state="failed", error="broke", record=None)
        if (r.cell.method, r.cell.seed) == (method, seed)
        else r
        for r in results
    ]


def test_the_best_is_neither_told_the_task_nor_has_all_tasks_at_once(cells: Make) -> None:
    value = comparison_of(*cells())
    assert value["streams"][0]["reference"] == "a"  # 0.455 against 0.433
    assert [row["method"] for row in value["ranks"]["methods"]] == ["joint", "told", "a", "b"]
    only_bounds = comparison_of(*cells(("told", "joint")))
    assert only_bounds["streams"][0]["reference"] == "joint"


def test_the_best_is_judged_by_the_main_metric_whichever_way_is_better(cells: Make) -> None:
    forgetting = comparison_of(*cells(("a", "b"), metric="forgetting"))
    assert forgetting["streams"][0]["reference"] == "b"
    assert forgetting["ranks"]["methods"][0]["method"] == "b"


def test_a_named_reference_is_taken_and_without_a_finished_cell_there_is_none(cells: Make) -> None:
    grid, results = cells(("a", "b"), reference="b")
    value = comparison_of(grid, results)
    assert value["streams"][0]["reference"] == "b" and not entry(value, "b")["paired"]
    gone = [
        replace(r, state="waiting", record=None) if r.cell.method == "b" else r for r in results
    ]
    value = comparison_of(grid, gone)
    assert value["streams"][0]["reference"] is None
    assert not entry(value, "a")["paired"] and entry(value, "b")["state"] == "waiting"


def test_differences_pair_cells_of_one_seed_and_order(cells: Make) -> None:
    grid, results = cells(("a", "b"), reference="a")
    value = comparison_of(grid, without(results, "b", 2))
    found = entry(value, "b")
    # order default: -0.10, -0.05; reversed: 0.40, -0.20; their mean is 0.0125
    assert found["paired"]["last"]["n"] == found["n"] == 4
    assert found["paired"]["last"]["mean"] == pytest.approx(0.0125)
    gaps = np.array([-0.10, -0.05, 0.40, -0.20])
    assert found["paired"]["last"]["std"] == pytest.approx(gaps.std(ddof=1))
    half = 3.182446305284263 * gaps.std(ddof=1) / 2  # t table: 3 degrees of freedom, 97.5 %
    assert found["paired"]["last"]["high"] == pytest.approx(0.0125 + half)
    assert (found["state"], found["reason"]) == ("partial", "broke")
    assert not value["finished"]


def test_ranks_are_taken_within_a_seed_and_order_and_ties_share(cells: Make) -> None:
    value = comparison_of(*cells(("a", "b")))
    rows = {row["method"]: row["streams"]["one"] for row in value["ranks"]["methods"]}
    # a wins under default thrice and once reversed, b once, and once both have 0.4
    assert rows["a"]["rank"] == pytest.approx((1 * 4 + 2 + 1.5) / 6)
    assert rows["b"]["rank"] == pytest.approx((2 * 4 + 1 + 1.5) / 6)
    assert (rows["a"]["n"], rows["a"]["of"]) == (6, 2)


def test_report_writes_the_page_of_a_comparison_elsewhere(
    cells: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid, results = cells(("a", "b"))
    kept = write_comparison(replace(grid, command="evolora compare g.yaml"), results, tmp_path)
    page = tmp_path / "elsewhere" / "page.html"
    for words, told in ((["--json"], '"config_hash"'), ([], f"report: {page}")):
        with pytest.raises(SystemExit) as end:
            main(["report", str(tmp_path), "--out", str(page), *words])
        out = capsys.readouterr().out
        assert not end.value.code and told in out
        if words:
            assert json.loads(out) == kept == json.loads((tmp_path / "comparison.json").read_text())
        assert page.read_text() == (tmp_path / "comparison.html").read_text()
        page.unlink()
    assert "evolora compare g.yaml" in (tmp_path / "comparison.html").read_text()
