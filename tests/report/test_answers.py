"""What the report shows of answers' forms: shares at the end and when a task was just learned."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from evolora.report import RunRecord, summary_table, to_markdown, write_report

TASKS = ("shapes", "boxes")
AFTER = [
    {"following": {"shapes": 1.0, "boxes": 0.25}, "normalised": {"shapes": 0.875}},
    {"following": {"shapes": 0.125, "boxes": 0.75}, "normalised": {"shapes": 0.625}},
]


@pytest.fixture
def run(make_run: Any) -> Path:
    folder = Path(make_run("moe-adapters", tasks=TASKS))
    path = folder / "routing.json"
    routing = json.loads(path.read_text())
    for after, more in zip(routing["after"], AFTER, strict=True):
        after.update(more)
    path.write_text(json.dumps(routing))
    return folder


def test_a_run_knows_its_shares_at_the_end_and_when_just_learned(run: Path) -> None:
    record = RunRecord.load(run)
    assert record.final("following") == AFTER[1]["following"]
    assert record.fresh("following") == {"shapes": 1.0, "boxes": 0.75}
    assert record.fresh("normalised") == {"shapes": 0.875}
    assert record.scores["following"] == pytest.approx(0.4375)
    assert record.scores["normalised"] == 0.625


def test_an_unfinished_run_has_no_final_share(run: Path) -> None:
    path = run / "routing.json"
    routing = json.loads(path.read_text())
    path.write_text(json.dumps({**routing, "after": routing["after"][:1]}))
    record = RunRecord.load(run)
    assert record.final("following") == {} and record.scores["following"] is None


def test_the_page_and_the_tables_show_them(run: Path, tmp_path: Path) -> None:
    record = RunRecord.load(run)
    page = write_report([record], tmp_path / "page.html").read_text()
    section = page.partition("<h2>Instruction following</h2>")[2].partition("<h2>")[0]
    rows = [row.split("<td")[2:] for row in section.split("<tr>")[2:]]
    shown = {cells[0].split(">")[1].split("<")[0]: cells[1:] for cells in rows}
    texts = {name: [c.split(">")[1].split("<")[0] for c in cells] for name, cells in shown.items()}
    accuracy = f"{100 * record.matrix.values[-1, 0]:.1f}"
    assert texts == {
        "Accuracy": [accuracy, "–", accuracy],
        "Whatever the format": ["62.5", "–", "62.5"],
        "In the format": ["12.5", "75.0", "43.8"],
        "… when just learned": ["100.0", "75.0", "87.5"],
    }
    assert "Follows format" in to_markdown([record]) and "| 43.8 |" in to_markdown([record])
    out = io.StringIO()
    Console(file=out, width=80).print(summary_table([record]))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 80 and "43.8" in out.getvalue() and "…" not in out.getvalue()


def test_a_run_without_forms_has_no_such_section(make_run: Any, tmp_path: Path) -> None:
    record = RunRecord.load(make_run("moe-adapters", tasks=TASKS))
    assert "Instruction following" not in write_report([record], tmp_path / "p.html").read_text()
    assert "Follows" not in to_markdown([record])
