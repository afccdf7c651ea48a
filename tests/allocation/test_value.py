"""An allocation is a value: printed, saved, edited, read again, and refused with a reason."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest

from evolora.allocation.value import Allocation, TaskAllocation
from evolora.errors import ConfigError, StorageError

SITES = ("vision.0.q_proj", "vision.0.fc1", "vision.1.q_proj", "vision.1.fc1", "text.0.q_proj")


def two_tasks() -> Allocation:
    first = TaskAllocation(
        task="digits",
        experts={"vision.0.q_proj": 1, "text.0.q_proj": 1},
        scores={site: 0.1 * place for place, site in enumerate(SITES)},
        settings={"type": "gradient", "budget": 2},
    )
    second = TaskAllocation(task="flags", experts={"vision.1.q_proj": 1, "vision.1.fc1": 3})
    return Allocation(sites=SITES).with_task(first).with_task(second)


def test_the_map_of_layers_and_tasks() -> None:
    assert two_tasks().table().splitlines() == [
        "marks of a layer: q_proj fc1",
        "                 1   2",
        "vision 0         x.  ..",
        "vision 1         ..  x3",
        "text 0           x   .",
        "vision, experts  1   4",
        "text, experts    1   0",
        "tasks: 1 digits, 2 flags",
    ]


def test_saved_and_loaded_is_equal(tmp_path: Path) -> None:
    value = two_tasks()
    value.save(tmp_path / "a.json")
    again = Allocation.load(tmp_path / "a.json", sites=SITES)
    assert again == value
    again.save(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["a.json", "b.json"]


def test_tasks_are_only_appended_and_nothing_is_written_to() -> None:
    value = two_tasks()
    longer = value.with_task(TaskAllocation(task="emoji", experts={}))
    assert longer.tasks[:2] == value.tasks and len(value.tasks) == 2
    with pytest.raises(ConfigError, match="task 'flags' twice"):
        value.with_task(TaskAllocation(task="flags", experts={}))
    with pytest.raises(FrozenInstanceError):
        value.sites = ()  # type: ignore[misc]


def test_a_changed_task_and_no_other() -> None:
    value = two_tasks()
    changed = value.changed("digits", {"vision.0.q_proj": 0, "vision.0.fc1": 1})
    assert changed.of("digits").experts == {"text.0.q_proj": 1, "vision.0.fc1": 1}
    assert changed.of("digits").scores == value.of("digits").scores
    assert changed.of("flags") == value.of("flags")
    assert changed.counts("digits") == [0, 1, 0, 0, 1]
    assert changed.per_tower("flags") == {"vision": 4, "text": 0}
    with pytest.raises(ConfigError, match=r"unknown site 'vision.0.fc3'; did you mean"):
        value.changed("digits", {"vision.0.fc3": 1})
    with pytest.raises(ConfigError, match=r"unknown task of the allocation 'flag'; did you mean"):
        value.changed("flag", {})


def test_other_candidates_must_have_the_sites() -> None:
    value = two_tasks()
    more = value.among((*SITES, "text.1.q_proj"))
    assert more.counts("digits") == [1, 0, 0, 0, 1, 0]
    with pytest.raises(ConfigError, match=r"task 'flags': unknown site 'vision\.1\.fc1'"):
        value.among([site for site in SITES if site != "vision.1.fc1"])


def edited(path: Path, **changes: Any) -> Path:
    value = two_tasks().to_json()
    task = value["tasks"][0]
    for key, change in changes.items():
        (task if key in task or key == "expert" else value)[key] = change
    path.write_text(json.dumps(value))
    return path


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"experts": {"vision.0.qproj": 1}}, r"'digits': unknown site 'vision.0.qproj'; did you"),
        ({"experts": {"vision.0.fc1": 0}}, "whole number of experts from 1 at 'vision.0.fc1'"),
        ({"experts": {"vision.0.fc1": True}}, "got True"),
        ({"experts": ["vision.0.fc1"]}, "experts of task 'digits' must be an object"),
        ({"scores": {"nowhere": 1.0}}, "unknown site 'nowhere'"),
        ({"expert": {}}, r"unknown key of a task 'expert'; did you mean 'experts'"),
        ({"task": "flags"}, "has task 'flags' twice"),
        ({"task": 3}, "task must be text; got 3"),
        ({"tasks": [3]}, "a task must be an object; got 3"),
        ({"tasks": [{"task": "digits"}]}, "a task lacks 'experts'"),
        ({"tasks": {}}, "tasks must be a list"),
        ({"sites": 3}, "sites must be a list"),
        ({"format_version": 2}, "reads up to 1"),
    ],
)
def test_a_file_that_is_wrong_is_named_with_what_is_wrong(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    path = edited(tmp_path / "a.json", **changes)
    with pytest.raises(StorageError, match=words) as caught:
        Allocation.load(path, sites=SITES)
    assert str(path) in str(caught.value)


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"no allocation at .*: a.json is missing"):
        Allocation.load(tmp_path / "a.json")
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(StorageError, match="not valid JSON"):
        Allocation.load(tmp_path / "a.json")
