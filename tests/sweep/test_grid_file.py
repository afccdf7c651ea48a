"""What a comparison file says, and what it may not say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from evolora.config import read_config
from evolora.errors import ConfigError
from evolora.sweep.grid import Cell
from evolora.sweep.grid_file import merged, read_grid

ROOT = Path(__file__).parents[2]
COMPARISONS = sorted((ROOT / "configs" / "compare").glob("*.yaml"))
TRAINING = {"max_steps": 2, "learning_rate": 1e-3}


def comparison(**changes: Any) -> dict[str, Any]:
    value: dict[str, Any] = {
        "streams": {
            "one": {"stream": "mosaic/domains", "training": TRAINING},
            "two": {
                "stream": {"name": "mosaic/missing", "missing": {"kind": "both", "seed": "$seed"}},
                "backbone": "vilt-tiny",
                "training": TRAINING,
            },
        },
        "methods": [
            "zero-shot",
            {
                "name": "low",
                "method": {"type": "sequential-lora", "r": 2},
                "on": {"two": {"method": {"lora_alpha": 7}, "training": {"max_steps": 5}}},
            },
        ],
        "seeds": 2,
    }
    return {**value, **changes}


def write(folder: Path, value: Any, name: str = "grid.yaml") -> Path:
    path = folder / name
    path.write_text(yaml.safe_dump(value, sort_keys=False))
    return path


def cell(cells: tuple[Cell, ...], stream: str, method: str, seed: int = 0) -> Cell:
    return next(c for c in cells if (c.stream, c.method, c.seed) == (stream, method, seed))


def test_every_method_meets_every_stream_under_every_seed(tmp_path: Path) -> None:
    grid = read_grid([write(tmp_path, comparison())])
    assert [(c.seed, c.stream, c.method) for c in grid.cells] == [
        (seed, stream, method)
        for seed in (0, 1)
        for stream in ("one", "two")
        for method in ("zero-shot", "low")
    ]
    assert grid.methods == {"zero-shot": "zero-shot", "low": "sequential-lora"}
    assert len({c.folder for c in grid.cells}) == len(grid.cells)


def test_a_cell_is_the_run_that_a_configuration_of_its_own_would_be(tmp_path: Path) -> None:
    grid = read_grid([write(tmp_path, comparison())])
    own = write(
        tmp_path,
        {
            "stream": {"name": "mosaic/missing", "missing": {"kind": "both", "seed": 1}},
            "backbone": "vilt-tiny",
            "training": {"max_steps": 5, "learning_rate": 1e-3},
            "method": {"type": "sequential-lora", "r": 2, "lora_alpha": 7},
            "seed": 1,
        },
        "run.yaml",
    )
    found = cell(grid.cells, "two", "low", seed=1)
    assert found.config_hash == read_config(own).hash()
    assert str(found.folder) == f"cells/two/low/default-1-{found.config_hash[:8]}"


def test_words_of_the_command_line_win_over_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, comparison())
    grid = read_grid([path], seeds=[4, 7], orders=["reversed"], reference="low")
    assert (grid.seeds, grid.orders, grid.reference) == ((4, 7), ("reversed",), "low")
    assert len(grid.cells) == 8


def test_orders_are_of_the_streams_own_tasks(tmp_path: Path) -> None:
    value = comparison()
    value["streams"] = {"one": {**value["streams"]["one"], "orders": {"mine": ["flags", "digits"]}}}
    value["methods"] = ["zero-shot"]
    path = write(tmp_path, value)
    grid = read_grid([path], seeds=[0], orders=["default", "reversed", "shuffled-3", "mine"])
    default, back, shuffled, mine = (c.config.stream.get("order") for c in grid.cells)
    assert default is None
    assert back[0] == "furniture" and back[-1] == "digits"
    assert sorted(shuffled) == sorted(back) and shuffled not in (back, back[::-1])
    assert mine == ["flags", "digits"]
    again = read_grid([path], seeds=[5], orders=["shuffled-3"])
    assert again.cells[0].config.stream["order"] == shuffled


def test_a_method_may_be_for_some_streams_alone(tmp_path: Path) -> None:
    methods = ["zero-shot", {"method": "linear-probe", "streams": ["two"]}]
    grid = read_grid([write(tmp_path, comparison(methods=methods, seeds=[3]))])
    assert [(c.stream, c.method) for c in grid.cells] == [
        ("one", "zero-shot"),
        ("two", "zero-shot"),
        ("two", "linear-probe"),
    ]


def test_another_type_replaces_the_settings_of_the_older_one() -> None:
    base = {"method": {"type": "lora", "r": 8, "selector": {"type": "keys", "metric": "l2"}}}
    assert merged(base, {"method": {"selector": {"type": "oracle"}}}) == {
        "method": {"type": "lora", "r": 8, "selector": {"type": "oracle"}}
    }
    assert merged(base, {"method": {"type": "ewc"}}) == {"method": {"type": "ewc"}}
    assert merged(base, {"method": {"r": 2}})["method"]["r"] == 2
    assert base["method"]["r"] == 8


def test_configurations_of_runs_are_compared_where_their_stream_is_the_same(tmp_path: Path) -> None:
    def run(name: str, method: str, stream: str) -> Path:
        value = {"method": method, "stream": stream, "training": TRAINING, "name": name}
        return write(tmp_path, value, f"{name or method}-{stream[-4:]}.yaml")

    paths = [
        run("a", "zero-shot", "mosaic/domains"),
        run("", "linear-probe", "mosaic/domains"),
        run("a", "zero-shot", "mosaic/missing"),
    ]
    grid = read_grid(paths, seeds=[0])
    assert [(c.stream, c.method) for c in grid.cells] == [
        ("mosaic-domains", "a"),
        ("mosaic-domains", "linear-probe-ains"),
        ("mosaic-missing", "a"),
    ]
    assert grid.cells[0].config_hash == read_config(paths[0]).hash()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"methods": ["zero-shoot"]}, "did you mean 'zero-shot'"),
        ({"methods": []}, "methods: expected a list"),
        ({"methods": ["ewc", "ewc"]}, "a second method 'ewc'"),
        ({"methods": [{"method": "ewc", "on": {"too": {}}}]}, "unknown stream 'too'"),
        ({"methods": [{"method": "ewc", "training_": {}}]}, "methods[0].training_: unknown key"),
        ({"methods": [{"name": "a/b", "method": "ewc"}]}, "names a folder; got 'a/b'"),
        ({"streams": {}}, "streams: expected a mapping"),
        ({"streams": {"x": {"stream": "mosaic/domain"}}}, "did you mean 'mosaic/domains'"),
        ({"seeds": 0}, "seeds: expected their number"),
        ({"orders": ["backwards"]}, "unknown order 'backwards'"),
        ({"metric": "lats"}, "did you mean 'last'"),
        ({"reference": "nobody"}, "unknown method 'nobody'"),
        ({"seed": 3}, "did you mean 'seeds'"),
        ({"seeds": [0, 2, 0]}, "seeds: 0 is given twice"),
        ({"orders": ["reversed", "reversed"]}, "orders: reversed is given twice"),
        ({"methods": [{"method": "ewc", "streams": []}]}, "expected a list of streams; got []"),
        ({"methods": [{"method": "ewc", "streams": [[]]}]}, "unknown stream '[]'"),
        ({"methods": [{"method": "ewc", "on": ["one"]}]}, "a mapping of streams to sections"),
        ({"methods": [{"method": 3}]}, "needs a name, or a method with a type"),
        ({"streams": {"x": {"stream": {"name": ["a"]}}}}, "unknown stream"),
        (
            {"streams": {"x": {"stream": "mosaic/domains", "orders": 3}}},
            "names with lists of tasks",
        ),
        (
            {
                "streams": {
                    "x": {"stream": {"name": "mosaic/domains", "order": ["flags", "flaggs"]}}
                },
                "methods": ["zero-shot"],
            },
            "did you mean 'flags'",
        ),
        (
            {
                "streams": {"x": {"stream": "mosaic/domains", "orders": {"own": ["digit"]}}},
                "orders": ["own"],
                "methods": ["zero-shot"],
            },
            "did you mean 'digits'",
        ),
    ],
)
def test_a_fault_is_named_with_its_place(tmp_path: Path, change: Any, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_grid([write(tmp_path, comparison(**change))])
    assert told in str(caught.value)


def test_a_fault_of_several_cells_is_told_once_with_all_of_them(tmp_path: Path) -> None:
    methods = [{"name": "bad", "method": {"type": "ewc", "rank": 3}}]
    with pytest.raises(ConfigError) as caught:
        read_grid([write(tmp_path, comparison(methods=methods))])
    assert str(caught.value).count("method.rank") == 1
    assert "one × bad, two × bad" in str(caught.value)


def test_a_comparison_file_is_compared_alone(tmp_path: Path) -> None:
    path = write(tmp_path, comparison())
    with pytest.raises(ConfigError, match="compare it alone"):
        read_grid([path, path])


@pytest.mark.parametrize("path", sorted((ROOT / "configs/compare").glob("*.yaml")), ids=str)
def test_committed_comparisons_are_read(path: Path) -> None:
    grid = read_grid([path])
    assert grid.cells


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs/compare").glob("*.yaml")), ids=lambda p: p.stem
)
def test_every_comparison_of_the_project_can_be_read(path: Path) -> None:
    grid = read_grid([path], seeds=[0])
    assert len({cell.folder for cell in grid.cells}) == len(grid.cells) > 1
    named = re.findall(r"evolora compare (\S+)", path.read_text())
    assert set(named) == {f"configs/compare/{path.name}"}
