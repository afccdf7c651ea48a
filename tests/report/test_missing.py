"""What the report shows of missing modalities: scores by case, curves, floors."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from evolora.errors import StorageError
from evolora.report import RunRecord, write_report
from evolora.report.svg import Line, LineChart

TASKS = ("a", "b")


def table(kind: str, rate: float, ap: float) -> dict[str, Any]:
    """A point of robustness.json; told, every score is 0.1 higher."""

    def scores(value: float) -> dict[str, Any]:
        by = {"complete": value + 0.05, "text_missing": value, "image_missing": value - 0.05}
        return {"ap": value, "tasks": {"a": value + 0.02, "b": value - 0.02}, "by_missing": by}

    both = {"task_free": scores(ap), "oracle": scores(ap + 0.1)}
    return {"kind": kind, "rate": rate, **both, "task_identification": 0.75}


def add_missing(
    folder,
    missing: dict[str, Any],
    *,
    kinds=("text", "image", "both"),
    rates=(0.0, 0.9),
    curve=True,
):
    """Make a run folder one of a stream with missing modalities."""
    config = {"stream": {"name": "x", "missing": missing}}
    (folder / "config.json").write_text(json.dumps({"format_version": 1, "config": config}))
    path = folder / "routing.json"
    start = {"format_version": 1, "after": [], "experts": {}}
    routing = json.loads(path.read_text()) if path.exists() else start
    routes = routing["after"][-1]["routes"] if routing["after"] else {}
    case = {"text": "text_missing", "image": "image_missing"}.get(missing["kind"], "complete")
    cases = {"a": {case: 0.4, "image_missing": 0.2}, "b": {case: 0.5}}
    if missing["rate"] == 1.0:
        cases = {task: {case: 0.3} for task in TASKS}
    routing["after"] = [{"task": "b", "routes": routes, "scores_by_missing": cases}]
    path.write_text(json.dumps(routing))
    if curve:
        points = [table(kind, rate, 0.6 - 0.3 * rate) for kind in kinds for rate in rates]
        value = {"format_version": 1, "samples": {"a": 9, "b": 9}, "seeds": [0], "points": points}
        value["own"] = table(missing["kind"], missing["rate"], 0.444)
        (folder / "robustness.json").write_text(json.dumps(value))
    return folder


@pytest.fixture
def delo(make_run):
    return add_missing(
        make_run("moe-adapters", tasks=TASKS, label_space="seen"),
        {"kind": "both", "rate": 0.7, "seed": 1},
    )


def page(folders, tmp_path):
    out = write_report([RunRecord.load(folder) for folder in folders], tmp_path / "r.html")
    return out.read_text()


def rows_of(text: str, heading: str) -> list[list[str]]:
    part = text[text.index(heading) :]
    body = part[part.index("<tbody>") : part.index("</tbody>")]
    rows = re.findall(r"<tr>(.*?)</tr>", body)
    return [[re.sub("<[^>]+>", "", one) for one in re.findall(r"<td.*?</td>", row)] for row in rows]


def test_final_scores_are_split_by_what_is_missing_and_by_who_tells_the_task(delo, tmp_path):
    record = RunRecord.load(delo)
    inferred, told = rows_of(page([delo], tmp_path), "With modalities missing")
    scores = record.scores
    expected = [scores["cmml_ap"], scores["cmml_fg"], scores["cmml_last"], 0.45, None, 0.2]
    shown = ["–" if value is None else f"{100 * value:.1f}" for value in expected]
    assert inferred[:8] == ["moe-adapters", "inferred", *shown]
    assert inferred[8] == f"{100 * record.selector_accuracy():.1f}"
    assert told == ["moe-adapters", "told", "54.4", "–", "52.4", "59.4", "54.4", "49.4", "–"]


def test_one_method_has_one_drawing_with_a_line_per_kind(delo, tmp_path):
    text = page([delo], tmp_path)
    part = text[text.index("Robustness to what is missing") :]
    part = part[: part.index("<details>")]
    for kind in ("Text missing", "Image missing", "Text or image missing"):
        assert f"<title>{kind} (0: 60, 90: 33)</title>" in part
    assert part.count('class="event"') == 1 and "vertical line): both 70 %" in part
    numbers = rows_of(text, "The curves in numbers")
    assert ["moe-adapters", "text missing", "AP, task told", "70.0", "43.0"] in numbers
    assert ["moe-adapters", "text missing", "task recognised", "75.0", "75.0"] in numbers


def test_several_methods_have_a_drawing_per_kind_and_floors_where_they_belong(
    delo, make_run, tmp_path
):
    other = add_missing(
        make_run("lora", tasks=TASKS, label_space="seen"), {"kind": "both", "rate": 0.7}
    )
    only = [
        add_missing(
            make_run("moe-adapters", tasks=TASKS, label_space="seen", seed=seed),
            {"kind": kind, "rate": 1.0},
            curve=False,
        )
        for kind in ("text", "image")
        for seed in (0, 1)
    ]
    text = page([delo, other, *only], tmp_path)
    part = text[text.index("Robustness to what is missing") :]
    drawings = re.findall(
        r"<figure><h3>(.*?)</h3>(.*?)</figure>", part[: part.index("<details>")], re.S
    )
    assert [name for name, _ in drawings] == [
        "Text missing",
        "Image missing",
        "Text or image missing",
    ]
    floors = [
        re.findall(r'class="line s\d floor"><title>(.*?) \(0', drawn) for _, drawn in drawings
    ]
    image, words = "moe-adapters (missing text 100 %)", "moe-adapters (missing image 100 %)"
    assert floors == [
        [f"{image}, image alone"],
        [f"{words}, text alone"],
        [f"{image}, image alone", f"{words}, text alone"],
    ]
    assert all(drawn.count("<circle") == 4 for _, drawn in drawings)  # two methods, two rates


def test_runs_without_missing_modalities_have_no_such_part(make_run, tmp_path):
    text = page([make_run("moe-adapters"), make_run("lora")], tmp_path)
    assert "With modalities missing" not in text and "Robustness" not in text


def test_runs_of_other_tables_are_other_methods_and_other_seeds_are_not(make_run, tmp_path):
    folders = [
        add_missing(
            make_run("lora", tasks=TASKS, seed=seed), {"kind": "both", "rate": rate, "seed": seed}
        )
        for seed in (0, 1)
        for rate in (0.3, 0.7)
    ]
    names = {row[0] for row in rows_of(page(folders, tmp_path), "With modalities missing")}
    assert names == {"lora (missing both 30 %)", "lora (missing both 70 %)"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"points": []}, "points"),
        ({"samples": {"a": 9}}, "measure it again"),
        ({"format_version": 2}, "not readable"),
        ({"points": [{"kind": "sound", "rate": 0.5}]}, "kind"),
        ({"points": [{"kind": "text", "rate": 7}]}, "rate"),
    ],
)
def test_a_file_that_is_not_as_it_must_be_is_named(delo, change, message):
    path = delo / "robustness.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(StorageError, match=rf"robustness\.json.*{message}"):
        RunRecord.load(delo)


def test_a_missing_manifest_that_is_gone_does_not_stop_a_report(delo):
    config = {"stream": {"name": "x", "missing": "gone.json"}}
    (delo / "config.json").write_text(json.dumps({"format_version": 1, "config": config}))
    assert RunRecord.load(delo).missing is None


def test_positions_of_a_line_are_where_their_values_are():
    chart = LineChart(
        lines=[Line(label="m", style=0, values=(0.5, 0.5, 0.5))],
        ticks=("0", "50", "90"),
        label="x",
        top=1.0,
        unit=str,
        at=(0.0, 0.5, 0.9),
        event=0.7,
    ).draw()
    first, half, last = (float(x) for x in re.findall(r'cx="([\d.]+)"', chart))
    assert (last - first) / (half - first) == pytest.approx(1.8, abs=0.01)
    event = float(re.search(r'class="event" d="M([\d.]+)', chart).group(1))
    assert (event - first) / (half - first) == pytest.approx(1.4, abs=0.01)
