"""The report on continual learning of modalities: its table, its figure, and the terminal's."""

from __future__ import annotations

import json
import re
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from evolora.cli import main
from evolora.errors import StorageError
from evolora.evaluation.matrix import Matrix
from evolora.report import RunRecord, write_report
from evolora.report.modalities import stage_table, stages_json

STAGES = ("image", "video", "audio")
SITES = {
    "qformer/0/attention/query": [0.3, 0.7],
    "qformer/0/attention/dense": [0.5, 0.5],
    "qformer/0/crossattention/key": [0.9, 0.1],
    "qformer/1/attention/query": [0.2, 0.8],
}


def stage_run(make_run: Any, **changes: Any) -> Path:
    """A run of three stages on a Q-Former, whose numbers are known."""
    folder: Path = make_run("moe-adapters", tasks=STAGES, stream="mosaic/modalities", **changes)
    values = np.array([[60, 0, 0], [58, 40, 0], [54, 39, 30]]) / 100
    Matrix(tasks=STAGES, values=values, counts=np.array([9, 9, 9])).save(folder / "matrix.json")
    run = json.loads((folder / "run.json").read_text())
    for step, trained, full in zip(run["history"], (0, 50, 200), (0, 10_000, 10_000), strict=True):
        step.update(trainable_parameters=trained, full_tuning=full)
    run["backbone"] = {"type": "qformer"}
    (folder / "run.json").write_text(json.dumps(run))
    path = folder / "routing.json"
    routing = json.loads(path.read_text())
    for entry in routing["after"]:
        entry["questions"] = {stage: 0.25 for stage in STAGES} | {entry["task"]: 0.5}
        entry["captions"] = {stage: 1.0 for stage in STAGES} | {entry["task"]: 2.5}
    routing["after"][2]["sources"] = {"paths": ["video", "audio"], "sites": SITES}
    path.write_text(json.dumps(routing))
    return folder


def page_of(folders: list[Path], out: Path) -> str:
    return write_report([RunRecord.load(folder) for folder in folders], out).read_text()


def test_each_stage_shows_what_it_learned_lost_and_cost(make_run: Any, tmp_path: Path) -> None:
    plain = make_run("lora", tasks=STAGES)
    assert "Modality after modality" not in page_of([plain], tmp_path / "a.html")
    page = page_of([stage_run(make_run)], tmp_path / "b.html")
    part = page[page.index("Modality after modality") :]
    body = part[part.index("<tbody>") : part.index("</tbody>")]
    rows = [
        [re.sub("<[^>]+>", "", one) for one in re.findall(r"<td.*?</td>", row)]
        for row in body.split("</tr>")[1:-1]  # the first one is the method's name
    ]
    assert rows == [
        ["video", "40.0", "2.0", "50.0", "2.50", "50", "0.5"],
        ["audio", "30.0", "3.5", "50.0", "2.50", "200", "2.0"],
    ]


def test_the_figure_has_the_mean_share_of_each_source_by_layer(
    make_run: Any, tmp_path: Path
) -> None:
    page = page_of([stage_run(make_run)], tmp_path / "a.html")
    part = page[page.index("Which modality each layer draws on") :]
    part = part[: part.index("<h2>Accuracy")]
    assert part.count("<svg") == 2, "the scale, and the one stage that has a choice"
    hovers = re.findall(r"<title>(audio, block .*?)</title>", part)
    assert hovers == [
        "audio, block 0 self: video 40.0 %", "audio, block 0 self: audio (its own) 60.0 %",
        "audio, block 0 cross: video 90.0 %", "audio, block 0 cross: audio (its own) 10.0 %",
        "audio, block 1 self: video 20.0 %", "audio, block 1 self: audio (its own) 80.0 %",
    ]  # fmt: skip
    assert "video 50.0 %, audio 50.0 %" in part and "<td>50.0</td>" in part
    assert not re.search(r"(src|href)=.http", page)


def test_seeds_are_averaged_and_a_run_without_gates_has_no_figure(
    make_run: Any, tmp_path: Path
) -> None:
    first, second = (stage_run(make_run, seed=seed) for seed in (0, 1))
    path = second / "routing.json"
    routing = json.loads(path.read_text())
    sites = {site: [0.5, 0.5] for site in SITES}
    routing["after"][2]["sources"]["sites"] = sites
    path.write_text(json.dumps(routing))
    page = page_of([first, second], tmp_path / "a.html")
    assert "audio, block 0 cross: video 70.0 %" in page
    del routing["after"][2]["sources"]
    path.write_text(json.dumps(routing))
    page = page_of([second], tmp_path / "b.html")
    assert "Modality after modality" in page and "draws on" not in page
    routing["after"][2]["sources"] = {"paths": ["video", "audio"], "sites": {"a/0/b": [1.0]}}
    path.write_text(json.dumps(routing))
    with pytest.raises(StorageError, match="a site needs a share of each of video, audio"):
        RunRecord.load(second)


def test_the_terminal_has_the_same_numbers(
    make_run: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = stage_run(make_run)
    record = RunRecord.load(folder)
    table = stage_table([record])
    assert table is not None and stage_table([RunRecord.load(make_run("lora"))]) is None
    console = Console(width=80, file=StringIO(), force_terminal=False)
    console.print(table)
    lines = [line.split() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    assert ["audio", "30.0", "3.5", "50.0", "2.50", "200", "2.0"] in lines
    with pytest.raises(SystemExit) as end:
        main(["report", str(folder), "--out", str(tmp_path / "a.html"), "--json"])
    assert end.value.code == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["stages"] == stages_json(record)
    assert found["stages"][1] == {
        "stage": "audio", "T": 0.3, "F": pytest.approx(0.035), "exact": 0.5, "CIDEr-D": 2.5,
        "trained": 200.0, "of full": 0.02,
    }  # fmt: skip
