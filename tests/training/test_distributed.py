"""Two processes learn what one learns on the same global batch, and speak with one voice.

``accelerate launch --cpu --num_processes 2`` of accelerate 1.x starts one process (the second is
left to mpirun); ``--multi_gpu`` with ACCELERATE_USE_CPU starts two on the CPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.training import worker
from tests.training.test_resume import log_of

ROOT = Path(__file__).parents[2]


def launch(
    folder: Path,
    method: str,
    *launcher: str,
    cpu: bool = True,
    fails: bool = False,
    **settings: Any,
) -> subprocess.CompletedProcess[str]:
    """Run the worker under ``accelerate launch``; port 0 lets the launcher find a free one."""
    command = [
        sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *launcher,
        "--main_process_port", "0", "tests/training/worker.py", str(folder), method,
        json.dumps(settings),
    ]  # fmt: skip
    paths = os.pathsep.join([str(ROOT), str(ROOT / "src")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    if cpu:
        environment["ACCELERATE_USE_CPU"] = "true"
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )
    assert (done.returncode != 0) == fails, done.stderr[-3000:]
    return done


def two(folder: Path, method: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    done = launch(folder, method, "--multi_gpu", "--num_processes", "2", **settings)
    assert settings.get("fails") or rank(folder, 1)["processes"] == 2
    return done


def rank(folder: Path, index: int) -> dict[str, Any]:
    return dict(json.loads((folder.parent / f"{folder.name}-rank{index}.json").read_text()))


def assert_same_result(run: Path, expected: Path) -> None:
    """Matrix, routes and counts are equal, tensors and losses within float tolerance."""
    for name in ("matrix.json", "routing.json"):
        assert json.loads((run / name).read_text()) == json.loads((expected / name).read_text())
    mine, theirs = (load_file(folder / "experts.safetensors") for folder in (run, expected))
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        if name.endswith("k_proj/bias"):
            continue  # no output depends on it: its gradient is rounding, which Adam blows up
        torch.testing.assert_close(mine[name], value, rtol=1e-4, atol=1e-4, msg=name)
    for a, b in zip(log_of(run), log_of(expected), strict=True):
        assert a.keys() == b.keys() and a.get("step") == b.get("step")
        losses = [e["loss"] for e in (a, b) if "loss" in e]
        assert not losses or np.isclose(*losses, atol=1e-4)


# Noisy gates, dropout, augmentation and label subsets are all on: they are the hard part.
HARD: dict[str, Any] = {"augment": True, "max_classes_per_step": 2, "max_grad_norm": 1.0}


@pytest.mark.parametrize(
    "method",
    [
        "moe-adapters",
        "allocated-lora",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                "d-mole",
                "er",
                "ewc",
                "full-finetuning",
                "joint-lora",
                "linear-probe",
                "zero-shot",
            )
        ),
    ],
)
def test_two_processes_equal_one_on_the_same_global_batch(method: str, tmp_path: Path) -> None:
    # Adam turns the rounding of a gradient near zero into whole steps: small steps for all weights.
    rate = {"learning_rate": 5e-4} if method == "full-finetuning" else {}
    two(tmp_path / "two", method, per_device_train_batch_size=4, **HARD, **rate)
    worker.toy_run(tmp_path / "one", method, per_device_train_batch_size=8, **HARD, **rate).run()
    assert_same_result(tmp_path / "two", tmp_path / "one")
    first, second = rank(tmp_path / "two", 0), rank(tmp_path / "two", 1)
    assert first["counts"] == second["counts"]
    assert first["frozen"] == second["frozen"]
    assert first["shown"] > 0 and second["shown"] == 0  # one progress display, one log
    settings = json.loads((tmp_path / "two" / "run.json").read_text())
    assert settings["processes"] == 2


@pytest.mark.parametrize("method", ["lwf", pytest.param("o-lora", marks=pytest.mark.slow)])
def test_two_processes_write_what_one_writes(method: str, tmp_path: Path) -> None:
    """Each process answers its part of a test set; texts are gathered and judged together."""
    # Prompts, answers and images of the processes differ in size, and dropout is on in all towers.
    small: dict[str, Any] = {
        "max_steps": 14, "learning_rate": 2e-2, "augment": False, "label_smoothing_factor": 0.0
    }  # fmt: skip
    two(tmp_path / "two", method, per_device_train_batch_size=2, **small)
    one = worker.toy_run(tmp_path / "one", method, per_device_train_batch_size=4, **small)
    with worker.texts_written() as texts:
        matrix = one.run()
    assert matrix.values[0, 0] > 0 and matrix.values[1, 1] > 0
    assert_same_result(tmp_path / "two", tmp_path / "one")
    assert len(texts) == 6 and {len(written) for written in texts} == {6}
    assert len({text for written in texts for text in written}) > 6
    for index in (0, 1):
        assert rank(tmp_path / "two", index)["texts"] == texts


@pytest.mark.slow
def test_two_processes_with_accumulation_equal_one(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"gradient_accumulation_steps": 2, **HARD}
    two(tmp_path / "two", "moe-adapters", per_device_train_batch_size=2, **settings)
    worker.toy_run(
        tmp_path / "one", "moe-adapters", per_device_train_batch_size=4, **settings
    ).run()
    assert_same_result(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_a_killed_run_of_two_processes_resumes_to_the_same_result(tmp_path: Path) -> None:
    small: dict[str, Any] = {"per_device_train_batch_size": 4}
    two(tmp_path / "whole", "moe-adapters", **small)
    # Killed in the fifth step of the second task, after the checkpoint of its third.
    kill = {"kill": 31, "kill_rank": 0, "fails": True}
    two(tmp_path / "killed", "moe-adapters", **kill, **small)
    assert (tmp_path / "killed" / "checkpoints").exists()
    assert not (tmp_path / "killed" / "experts.safetensors").exists()
    two(tmp_path / "killed", "moe-adapters", **small)
    assert_same_result(tmp_path / "killed", tmp_path / "whole")
    assert log_of(tmp_path / "killed") == log_of(tmp_path / "whole")
    whole, killed = rank(tmp_path / "whole", 0), rank(tmp_path / "killed", 0)
    assert whole["counts"] == killed["counts"] and whole["frozen"] == killed["frozen"]


@pytest.mark.slow
def test_accelerate_launch_on_the_cpu_says_that_it_starts_one_process(tmp_path: Path) -> None:
    done = launch(
        tmp_path / "run", "moe-adapters", "--cpu", "--num_processes", "2", cpu=False,
        per_device_train_batch_size=8,
    )  # fmt: skip
    assert rank(tmp_path / "run", 0)["processes"] == 1
    assert "has started one process only" in done.stderr
    assert "--multi_gpu --num_processes" in done.stderr
    worker.toy_run(tmp_path / "one", "moe-adapters", per_device_train_batch_size=8).run()
    assert_same_result(tmp_path / "run", tmp_path / "one")
