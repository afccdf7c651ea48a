"""`evolora eval`: a run tested again, as it was and under other missing tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evolora.cli import main
from evolora.evaluation import robustness

CONFIG = """
backbone: {type: clip-fusion, name_or_path: clip-tiny}
stream:
  name: mosaic/missing
  limit: 12
  test_limit: 10
  order: [food, animals]
  missing: {kind: both, rate: 0.7, seed: 4}
method: {type: delo, num_factors: 4, r: 2}
training:
  {max_steps: 3, per_device_train_batch_size: 8, learning_rate: 1e-2, warmup_steps: 1,
   augment: false}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    (folder / "delo.yaml").write_text(CONFIG)
    call("run", str(folder / "delo.yaml"), "--out", str(folder / "delo"), "--quiet")
    return folder / "delo"


def call(*words: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(words)
    return int(end.value.code or 0)


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert call("eval", *words, "--quiet") == 2
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.strip().splitlines()) == 1
    return said.err


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_a_run_is_tested_on_its_own_stream_to_the_same_scores(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("eval", str(run), "--json", "--quiet") == 0
    found = json.loads(capsys.readouterr().out)
    scores = [result["score"] for result in found.values()]
    assert list(found) == ["food", "animals"] and scores == read(run / "matrix.json")["values"][-1]
    after = read(run / "routing.json")["after"][-1]
    assert {name: r["routes"] for name, r in found.items()} == after["routes"]
    assert {name: r["by_missing"] for name, r in found.items()} == after["scores_by_missing"]


def test_a_curve_is_written_printed_and_holds_the_run_s_own_point(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--missing-rates", "0.9, 0,0.7", "--missing-kinds", "both,image", "--quiet")
    assert call("eval", str(run), *words) == 0
    assert "robustness.json" in capsys.readouterr().out
    found = read(run / "robustness.json")
    assert found["rates"] == [0.0, 0.7, 0.9] and found["kinds"] == ["both", "image"]
    assert found["trained"] == {"kind": "both", "rate": 0.7, "both_ratio": 0.5}
    assert found["seeds"] == [4] and len(found["points"]) == 6
    last = read(run / "matrix.json")["values"][-1]
    assert list(found["own"]["task_free"]["tasks"].values()) == last
    same = [p for p in found["points"] if (p["kind"], p["rate"]) == ("both", 0.7)]
    assert same == [found["own"]]
    assert call("eval", str(run), "--missing-kinds", "text", "--json", "--quiet") == 0
    assert json.loads(capsys.readouterr().out) == read(run / "robustness.json")
    assert read(run / "robustness.json")["rates"] == [0.0, 0.3, 0.5, 0.7, 0.9]


def test_ctrl_c_leaves_the_older_file_as_it_was(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run / "robustness.json").write_text("older")
    names = {path.name for path in run.iterdir()}
    answer, tasks = robustness.answer_states, []

    def stopped(*given: Any) -> Any:
        tasks.append(given[1].name)
        if len(tasks) == 2:
            raise KeyboardInterrupt
        return answer(*given)

    monkeypatch.setattr(robustness, "answer_states", stopped)
    assert call("eval", str(run), "--missing-rates", "0.5", "--quiet") == 130
    assert tasks == ["food", "animals"] and (run / "robustness.json").read_text() == "older"
    assert {path.name for path in run.iterdir()} == names
    (run / "robustness.json").unlink()


def test_faults_are_one_line(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    capsys.readouterr()
    here = str(run)
    assert "did you mean 'image'" in refused(capsys, here, "--missing-kinds", "images")
    assert "got 70.0" in refused(capsys, here, "--missing-rates", "0,70")
    assert "takes numbers between commas" in refused(capsys, here, "--missing-rates", "half")
    assert "goes with --missing-rates" in refused(capsys, here, "--missing-seeds", "1")
    assert "did you mean" in refused(capsys, here, "--stream", "mosaic/mising")
    words = (here, "--missing-rates", "0.5", "--stream", "mosaic/domains")
    assert "unknown task 'food'" in refused(capsys, *words)
    for name in ("evolora.json", "experts.safetensors"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    assert "give --stream" in refused(capsys, str(tmp_path))
    assert not (run / "robustness.json").exists()
