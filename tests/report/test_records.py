"""Run folders: what is read, how routing is counted, and what is refused."""

from __future__ import annotations

import json
import shutil

import pytest

from evolora.errors import StorageError
from evolora.report import RunRecord

THREE = ("a", "b", "c")


def change(path, edit):
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


def set_routes(folder, rows):
    after = [{"task": task, "routes": routes} for task, routes in rows]
    change(folder / "routing.json", lambda data: data.update(after=after))


def test_a_run_folder_is_read_whole(make_run):
    folder = make_run("moe-adapters", seed=3)
    record = RunRecord.load(folder)
    assert record.folder == folder.name
    assert record.run.seed == 3 and record.run.protocol.routing == "task-free"
    assert len(record.run.history) == len(record.run.tasks) == 9
    assert record.scores["stored_parameters"] == record.run.history[-1].stored_parameters
    assert set(record.routing.experts) == {"vision", "text"}


def test_selector_shares_are_pooled_over_samples_as_counted_by_hand(make_run):
    folder = make_run("moe-adapters", tasks=THREE)
    rows = [
        ("a", {"a": {"a": 9, "base": 1}, "b": {"base": 30, "a": 10}, "c": {"base": 5, "a": 5}}),
        ("b", {"a": {"a": 10}, "b": {"b": 40}, "c": {"base": 7, "b": 3}}),
        ("c", {"a": {"a": 8, "b": 2}, "b": {"b": 36, "base": 4}, "c": {"c": 10}}),
    ]
    set_routes(folder, rows)
    record = RunRecord.load(folder)
    assert record.selector_accuracy() == pytest.approx((8 + 36 + 10) / 60)
    assert record.unseen_to_base() == pytest.approx((30 + 5 + 7) / 60)
    assert record.right_route_shares() == [
        [0.9, 0.75, 0.5],
        [1.0, 1.0, pytest.approx(0.7)],
        [0.8, 0.9, 1.0],
    ]


def test_rows_of_an_unfinished_run_count_only_learned_tasks(make_run):
    folder = make_run("moe-adapters", tasks=THREE)
    set_routes(folder, [("a", {"a": {"a": 8, "base": 2}, "b": {"base": 4}, "c": {"a": 4}})])
    record = RunRecord.load(folder)
    assert record.selector_accuracy() == pytest.approx(0.8)
    assert record.unseen_to_base() == pytest.approx(0.5)


def test_a_route_that_is_no_task_counts_as_wrong(make_run):
    folder = make_run("moe-adapters", tasks=THREE)
    set_routes(folder, [("a", {"a": {"a": 6, "all tasks": 4}, "b": {"base": 1, "other": 3}})])
    record = RunRecord.load(folder)
    assert record.selector_accuracy() == pytest.approx(0.6)
    assert record.unseen_to_base() == pytest.approx(0.25)


def test_the_order_of_rows_in_the_file_does_not_matter(make_run):
    folder = make_run("moe-adapters")
    before = RunRecord.load(folder)
    change(folder / "routing.json", lambda data: data["after"].reverse())
    assert RunRecord.load(folder).scores == before.scores


def test_an_oracle_run_has_no_selector_accuracy(make_run):
    folder = make_run("moe-adapters")
    assert RunRecord.load(folder).selector_accuracy() is not None
    change(folder / "run.json", lambda data: data["protocol"].update(routing="oracle"))
    record = RunRecord.load(folder)
    assert record.selector_accuracy() is None and record.unseen_to_base() is None


def test_routing_is_optional(make_run):
    record = RunRecord.load(make_run("lora"))
    assert record.routing is None and record.scores["selector_accuracy"] is None


def test_unknown_fields_of_a_later_version_are_passed_over(make_run):
    folder = make_run("lora")
    change(folder / "run.json", lambda data: data.update(gpu_hours=3))
    assert RunRecord.load(folder).run.name == "lora"


@pytest.mark.parametrize("name", ["run.json", "matrix.json", "routing.json"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-20]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"[]"),
        lambda path: path.write_bytes(b"\xff\xfe\x00"),
        lambda path: change(path, lambda data: data.update(format_version=2)),
        lambda path: change(path, lambda data: data.pop("format_version")),
    ],
    ids=["cut", "empty", "list", "binary", "newer", "versionless"],
)
def test_a_damaged_file_is_named_in_one_line(make_run, name, damage):
    folder = make_run("moe-adapters")
    damage(folder / name)
    with pytest.raises(StorageError) as caught:
        RunRecord.load(folder)
    assert str(folder / name) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["run.json", "matrix.json"])
def test_a_missing_file_is_named(make_run, name):
    folder = make_run("lora")
    (folder / name).unlink()
    with pytest.raises(StorageError, match=name):
        RunRecord.load(folder)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(StorageError, match="no such run folder"):
        RunRecord.load(tmp_path / "none")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda data: data.pop("seed"), "seed"),
        (lambda data: data.update(seconds="long"), "seconds"),
        (lambda data: data["history"][0].update(stored_parameters=-1), "history.0.stored"),
        (lambda data: data["protocol"].update(group_size=0), "protocol.group_size"),
        (lambda data: data.update(tasks=["x"]), "its tasks .* are not those of run.json: x"),
    ],
)
def test_a_wrong_field_of_the_run_is_named(make_run, edit, message):
    folder = make_run("lora")
    change(folder / "run.json", edit)
    with pytest.raises(StorageError, match=message):
        RunRecord.load(folder)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda data: data["after"][0].update(task="x"), "after names the task 'x'"),
        (lambda data: data["after"][0]["routes"].update(x={"base": 1}), "'x'"),
        (lambda data: data["after"][0]["routes"]["digits"].update(base=-1), "negative"),
        (lambda data: data["experts"]["text"]["tasks"]["digits"].pop(), "experts.text"),
    ],
)
def test_routing_of_other_tasks_or_shapes_is_refused(make_run, edit, message):
    folder = make_run("moe-adapters")
    change(folder / "routing.json", edit)
    with pytest.raises(StorageError, match=message):
        RunRecord.load(folder)


def test_a_report_never_names_the_parents_of_a_run_folder(make_run, tmp_path):
    secret = tmp_path / "private" / "run"
    shutil.copytree(make_run("lora"), secret)
    assert RunRecord.load(secret).folder == "run"
