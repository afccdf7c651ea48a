"""The demo: its configurations, its parallel runs, what it keeps when it is run again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from evolora import demo
from evolora.config import RunConfig, parse_config
from evolora.errors import EvoloraError

QUICK = {"max_steps": 2, "warmup_steps": 1, "per_device_train_batch_size": 4, "save_steps": 1}


Configs = Callable[..., dict[str, RunConfig]]


def quick(full: Configs) -> Configs:
    """Return the demo's configurations cut down to two methods, two tasks, two steps."""

    def configs(methods: object = None, seed: int = 0) -> dict[str, RunConfig]:
        result = {}
        for name in ("zero-shot", "sequential-lora"):
            value = json.loads(json.dumps(full([name], seed)[name].to_json()))
            value["stream"] |= {"limit": 8, "test_limit": 4, "order": ["digits", "shapes"]}
            value["training"] |= QUICK
            result[name] = parse_config(value)
        return result

    return configs


def test_the_demo_compares_the_main_job_with_its_baselines_at_equal_steps() -> None:
    configs = demo.demo_configs()
    assert set(configs) == {
        *("zero-shot", "linear-probe", "full-finetuning", "sequential-lora", "lora-per-task"),
        *("joint-lora", "moe-adapters"),
    }
    assert len({config.training.max_steps for config in configs.values()}) == 1
    assert len({json.dumps(config.stream, sort_keys=True) for config in configs.values()}) == 1


def test_demo_runs_reports_and_keeps_what_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "demo_configs", quick(demo.demo_configs))
    result = demo.run_demo(tmp_path / "out", progress=False)
    page = result.report.read_text()
    assert "sequential-lora" in page and "<svg" in page
    shown = result.to_json()["runs"]
    assert set(shown) == {"zero-shot", "sequential-lora"}
    before = (tmp_path / "out/sequential-lora/run.json").read_bytes()
    again = demo.run_demo(tmp_path / "out", progress=False)
    assert again.to_json()["runs"] == shown
    assert (tmp_path / "out/sequential-lora/run.json").read_bytes() == before


def test_a_file_in_the_place_of_the_folder_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(EvoloraError, match="cannot make the folder"):
        demo.run_demo(tmp_path / "out", methods=["zero-shot"], progress=False)
