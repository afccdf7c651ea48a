"""The page, its record and its charts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from evolora.bench.page import chart, write_page
from evolora.bench.results import Result, Table, show
from evolora.errors import ConfigError

ENVIRONMENT = {
    "date": "2026-01-01 00:00 UTC",
    "processor": "a processor",
    "cpu_flags": ["avx2"],
    "cores": 2,
    "torch_threads": 1,
    "clock": "process CPU time",
    "dtype": "float32",
    "load_average": [0.1, 0.1, 0.1],
    "packages": {"torch": "2.13", "peft": None},
    "gemm_gflops": {"768": 80.0},
    "copy_gb_per_s": 9.0,
}


def result(bench: str, **measured: float) -> Result:
    table = Table(title=f"{bench} table", columns=("2", "4", "8"), axis="e", note="a note")
    table.put("loop <all>", **{"2": 2.0, "4": 3.5, "8": 6.9})
    table.put("gather", **{"2": 1.2, "4": None})
    return Result(
        bench=bench,
        settings={},
        environment=ENVIRONMENT,
        tables=[table, Table(title="never filled", columns=("x",))],
        measured=measured,
        complete=True,
    )


def test_numbers_are_written_as_their_column_wants() -> None:
    assert show("error", 3.2e-7) == "3e-07"
    assert show("saved MiB", 162.6) == "163"
    assert show("step", 1.128) == "1.13"
    assert show("step", None) == "–"
    assert show("chosen", "gather") == "gather"


def test_a_bench_that_runs_again_replaces_its_own_part(tmp_path: Path) -> None:
    page = tmp_path / "docs" / "performance.md"
    write_page([result("layer", **{"token-step": 2.0})], page)
    write_page([result("tower", **{"lora-step": 1.5})], page)
    write_page([result("layer", **{"token-step": 9.0})], page)
    text = page.read_text()
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        "## Goals",
        "## tower",
        "## layer",
    ]
    assert "| 9 | missed |" in text and "| ≤ 1.13 | 1.5 | missed |" in text
    assert "never filled" not in text
    record = json.loads(page.with_suffix(".json").read_text())
    assert record["format_version"] == 1 and len(record["results"]) == 2
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert (page.parent / target).exists()


def test_a_result_survives_its_json() -> None:
    before = result("layer", **{"token-step": 2.0})
    after = Result.from_json(json.loads(json.dumps(before.to_json())))
    assert after.to_json() == before.to_json()
    assert after.tables[0].texts() == before.tables[0].texts()


def test_a_chart_is_an_svg_that_names_every_line() -> None:
    drawing = chart(result("layer").tables[0])
    root = ElementTree.fromstring(drawing)
    assert root.tag.endswith("svg")
    texts = [element.text for element in root.iter() if element.tag.endswith("text")]
    assert {"loop <all>", "gather", "e 2", "e 8"} <= set(texts)


def test_only_markdown_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Markdown file \(\.md\)"):
        write_page([], tmp_path / "page.html")
