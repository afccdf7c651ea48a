"""The demo: its configurations, its parallel runs, what it keeps when it is run again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from evolora import demo
from evolora.config import RunConfig, parse_config
from evolora.errors import EvoloraError
from evolora.evaluation.inspection import inspect_config

QUICK = {"max_steps": 2, "warmup_steps": 1, "per_device_train_batch_size": 4, "save_steps": 1}


CHOSEN = {
    "zero-shot": ["digits", "shapes"],
    "sequential-lora": ["digits", "shapes"],
    "missing-delo": ["animals", "furniture"],
    "modalities-pathweave": ["image", "audio"],
}
Configs = Callable[..., dict[str, RunConfig]]


def quick(full: Configs) -> Configs:
    """Return the demo's configurations cut down to three methods, two tasks, two steps."""

    def configs(methods: object = None, seed: int = 0) -> dict[str, RunConfig]:
        result = {}
        for name, order in CHOSEN.items():
            value = json.loads(json.dumps(full([name], seed)[name].to_json()))
            value["stream"] |= {"limit": 8, "test_limit": 4, "order": order}
            value["training"] |= QUICK
            result[name] = parse_config(value)
        return result

    return configs


def test_the_demo_compares_the_main_job_with_its_baselines_at_equal_steps() -> None:
    configs = demo.demo_configs()
    parts = [
        {"zero-shot", "linear-probe", "full-finetuning", "sequential-lora", "lora-per-task"}
        | {"joint-lora", "moe-adapters"},
        {"missing-linear-probe", "missing-sequential-lora", "missing-delo"},
        {"modalities-sequential-lora", "modalities-pathweave"},
    ]
    assert set(configs) == set.union(*parts)
    for names in parts:
        part = [configs[name] for name in names]
        assert len({config.training.max_steps for config in part}) == 1
        assert len({json.dumps(config.stream, sort_keys=True) for config in part}) == 1


def test_delo_and_the_lora_beside_it_train_as_many_parameters() -> None:
    configs = demo.demo_configs(["missing-sequential-lora", "missing-delo"])
    lora, delo = (inspect_config(config).trainable for config in configs.values())
    assert lora == pytest.approx(delo, rel=0.01)


def test_demo_runs_reports_asks_and_keeps_what_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "demo_configs", quick(demo.demo_configs))
    result = demo.run_demo(tmp_path / "out", progress=False)
    page = result.report.read_text()
    assert "sequential-lora" in page and "<svg" in page and "With modalities missing" in page
    shown = result.to_json()
    assert set(shown["runs"]) == set(CHOSEN)
    asked = shown["asked"]
    assert asked["task"] == "furniture" and asked["text"]
    assert [answer["used"] for answer in asked["answers"]] == [
        ("image", "text"),
        ("image",),
        ("text",),
    ]
    assert {answer["task"] for answer in asked["answers"]} <= {"animals", "furniture"}
    assert [one["modality"] for one in shown["heard"]] == ["image", "audio"]
    assert [one["answer"]["task"] for one in shown["heard"]] == ["base", "audio"]
    assert "Modality after modality" in page
    result.print()
    printed = capsys.readouterr().out
    assert "No text" in printed and f'"{asked["text"]}"' in printed
    assert all(f"from {used}\n" in printed for used in ("image and text", "image", "text"))

    before = (tmp_path / "out/sequential-lora/run.json").read_bytes()
    again = demo.run_demo(tmp_path / "out", progress=False).to_json()
    assert (again["runs"], again["asked"]) == (shown["runs"], asked)
    assert (tmp_path / "out/sequential-lora/run.json").read_bytes() == before


def test_a_file_in_the_place_of_the_folder_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(EvoloraError, match="cannot make the folder"):
        demo.run_demo(tmp_path / "out", methods=["zero-shot"], progress=False)
