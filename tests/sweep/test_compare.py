"""`evolora compare` as a user runs it: processes of its own, killed, failing, interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

FILE = """
streams:
  small:
    stream: {name: mosaic/domains, order: [digits, flags], limit: 16, test_limit: 10}
    backbone: clip-tiny
    training: {max_steps: 2, per_device_train_batch_size: 4, warmup_steps: 1, augment: false,
               max_classes_per_step: 8, logging_steps: 1}
methods:
  - zero-shot
  - linear-probe
  - {name: low, method: {type: sequential-lora, r: 2, target_modules: [q_proj]},
     training: {max_steps: 12}}
seeds: 2
"""


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "evolora", "compare", str(folder / "grid.yaml")),
            *("--out", str(folder / "out"), "--workers", "1", "--json", "--quiet", *words),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # what started the tests in the background may have had it ignored, and children inherit it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, dict[str, Any], str]:
    out, err = process.communicate(timeout=280)
    return process.returncode, json.loads(out) if out else {}, err


def finished(folder: Path) -> dict[Path, int]:
    """Run files of finished cells and when they were written."""
    return {
        path.relative_to(folder): path.stat().st_mtime_ns
        for path in folder.glob("out/cells/*/*/*/run.json")
        if json.loads(path.read_bytes())["finished"] and (path.parent / "evolora.json").exists()
    }


def until(condition: Any, seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison of six cells that was killed in the middle of the third."""
    folder = tmp_path_factory.mktemp("killed")
    (folder / "grid.yaml").write_text(FILE)
    process = start(folder)
    cells = folder / "out/cells/small/low"
    half = "*/checkpoints/001-000000/state.json"
    until(lambda: bool(list(cells.glob(half))) or process.poll() is not None)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    until(lambda: not alive_in(folder))
    return folder


def learned(folder: Path) -> list[dict[str, Any]]:
    """Tasks that the third cell has learned, with the seconds that they took, from its log."""
    (log,) = folder.glob("out/cells/small/low/default-0-*/log.jsonl")
    events = [json.loads(line) for line in log.read_text().splitlines()]
    return [event for event in events if event["event"] == "task"]


def alive_in(folder: Path) -> list[int]:
    """Processes that work in the comparison's folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            files = [os.readlink(link) for link in (entry / "fd").iterdir()]
        except OSError:
            continue
        if any(name.startswith(str(folder)) for name in files):
            found.append(int(entry.name))
    return found


@pytest.fixture(scope="module")
def half_way(killed: Path) -> list[dict[str, Any]]:
    """What the third cell had learned when it was killed."""
    return learned(killed)


@pytest.fixture(scope="module")
def again(killed: Path, half_way: Any) -> tuple[dict[Path, int], dict[Path, int], dict[str, Any]]:
    """Finished cells before and after a second start, and its result."""
    before = finished(killed)
    code, value, err = finish(start(killed))
    assert code == 0, err
    return before, finished(killed), value


def test_killed_and_started_again_repeats_no_finished_cell(
    again: tuple[dict[Path, int], dict[Path, int], dict[str, Any]],
) -> None:
    before, after, value = again
    assert 2 <= len(before) < 6
    assert len(after) == 6
    assert {path: after[path] for path in before} == before
    assert value["finished"]
    assert [cell["state"] for cell in value["cells"]] == ["finished"] * 6


def test_the_cell_that_broke_off_goes_on_from_its_checkpoint(
    killed: Path, half_way: list[dict[str, Any]], again: Any
) -> None:
    assert [event["task"] for event in half_way] == ["digits"]
    whole = learned(killed)
    assert [event["task"] for event in whole] == ["digits", "flags"]
    assert whole[0] == half_way[0]  # to the millisecond: it was not learned again


def test_a_finished_comparison_is_only_read(killed: Path, again: Any) -> None:
    before = finished(killed)
    code, value, _ = finish(start(killed))
    assert code == 0
    assert finished(killed) == before
    assert value["streams"] == again[2]["streams"]


def test_numbers_of_a_comparison_are_those_of_its_runs(killed: Path, again: Any) -> None:
    value = again[2]
    (stream,) = value["streams"]
    for entry in stream["methods"]:
        lasts = []
        for cell in value["cells"]:
            if cell["method"] == entry["method"]:
                values = json.loads((killed / "out" / cell["folder"] / "matrix.json").read_bytes())
                lasts.append(sum(values["values"][-1]) / 2)
        mean = sum(lasts) / 2
        assert len(lasts) == entry["n"] == 2
        assert entry["metrics"]["last"]["mean"] == pytest.approx(mean)
        spread = ((lasts[0] - mean) ** 2 + (lasts[1] - mean) ** 2) ** 0.5
        assert entry["metrics"]["last"]["std"] == pytest.approx(spread)


def test_a_failing_cell_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    text = FILE.replace("seeds: 2", "seeds: 1").replace(
        "target_modules: [q_proj]", "target_modules: [no_such_layer]"
    )
    (tmp_path / "grid.yaml").write_text(text + "  \n")
    code, value, err = finish(start(tmp_path))
    assert code == 1
    states = {cell["method"]: cell["state"] for cell in value["cells"]}
    assert states == {"zero-shot": "finished", "linear-probe": "finished", "low": "failed"}
    failed = next(cell for cell in value["cells"] if cell["state"] == "failed")
    assert "no_such_layer" in failed["error"]
    assert "small/low" in err and failed["log"] in err
    assert "Traceback" in (tmp_path / "out" / failed["log"]).read_text()
    assert not value["finished"]


def test_a_method_that_suits_no_backbone_is_not_applicable_and_no_failure(tmp_path: Path) -> None:
    text = FILE.replace("- linear-probe", "- {name: probe, method: map}")
    (tmp_path / "grid.yaml").write_text(text.replace("  - zero-shot\n", ""))
    process = start(tmp_path)
    code, value, err = finish(process)
    assert code == 0, err
    probe = next(entry for entry in value["streams"][0]["methods"] if entry["method"] == "probe")
    assert (probe["state"], probe["n"]) == ("not applicable", 0)
    assert "one sequence" in probe["reason"]
    logs = list(tmp_path.glob("out/cells/small/probe/*/output.log"))
    assert len(logs) == 1  # the other seed was not tried


def test_an_interrupted_comparison_leaves_its_result_and_no_process(tmp_path: Path) -> None:
    (tmp_path / "grid.yaml").write_text(FILE.replace("seeds: 2", "seeds: 20"))
    process = start(tmp_path)
    until(lambda: bool(finished(tmp_path)) or process.poll() is not None)
    os.killpg(process.pid, signal.SIGINT)  # a terminal tells all of them
    code, _, err = finish(process)
    assert code == 130
    assert "interrupted" in err and "Traceback" not in err
    assert not alive_in(tmp_path)
    value = json.loads((tmp_path / "out" / "comparison.json").read_bytes())
    states = [cell["state"] for cell in value["cells"]]
    assert "finished" in states and "waiting" in states


def test_two_comparisons_in_one_folder_at_once_are_refused(tmp_path: Path) -> None:
    (tmp_path / "grid.yaml").write_text(FILE.replace("seeds: 2", "seeds: 20"))  # still at it
    first = start(tmp_path)
    try:
        until(lambda: (tmp_path / "out" / ".lock").exists())
        code, _, err = finish(start(tmp_path))
        assert code == 2
        assert f"process {first.pid}" in err
    finally:
        first.kill()
        first.communicate(timeout=60)
        until(lambda: not alive_in(tmp_path))
