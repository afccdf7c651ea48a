"""A whole run of a model that writes: from a configuration to matrix, artefact and resumption."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.backbones.writers import writer

from evolora.config import parse_config
from evolora.evaluation.inspection import inspect_config
from evolora.learner import Learner
from evolora.registry import METHODS
from evolora.training.continual import ContinualRun

BASELINES: dict[str, dict[str, Any]] = {
    "sequential-lora": {},
    "joint-lora": {},
    "ewc": {"fisher_samples": 4},
    "er": {"capacity": 6},
    "lwf": {},
    "o-lora": {"l2": 0.01},
}


@pytest.fixture
def run_of(tmp_path: Path) -> Any:
    for name, answer in (("colours", "red dot"), ("captions", "this is it : {} bar .")):
        rows = []
        for index in range(12):
            word = ("red", "green", "blue")[index % 3]
            ask = {"from": "human", "value": f"{word} ? what is it ?"}
            rows.append({"conversations": [ask, {"from": "gpt", "value": answer.format(word)}]})
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{name}.json").write_text(json.dumps(rows))
    model = tmp_path / "model"
    backbone = writer("idefics3")
    backbone.model.save_pretrained(model)  # type: ignore[operator]
    backbone.processor.save_pretrained(model)
    metric = {"captions": "cider-d", "colours": "exact-match"}
    config = parse_config(
        {
            "method": {"type": "lora-per-task", "r": 4, "target_modules": ["all-linear"]},
            "stream": {
                "name": "conversations", "path": str(tmp_path / "data"), "metric": metric,
                "max_new_tokens": 10, "order": ["colours", "captions"],
            },
            "backbone": {"name_or_path": str(model)},
            "training": {
                "max_steps": 60, "per_device_train_batch_size": 4, "learning_rate": 2e-2,
                "warmup_steps": 0, "augment": False, "label_smoothing_factor": 0.0,
            },
            "evaluation": {"batch_size": 3},
        }
    )  # fmt: skip

    def make(**changes: Any) -> ContinualRun:
        return ContinualRun(replace(config, **changes), tmp_path / "run")

    return make


def test_the_cost_of_a_run_is_counted_on_shapes(run_of: Any, tmp_path: Path) -> None:
    run = run_of()
    counted = inspect_config(run.config)
    assert counted.tasks == 2 and set(counted.flops) == {"language"}
    sites = run.learner.backbone.sites("linear", target_modules=["all-linear"])
    assert counted.trainable == [sum(4 * (site.d_in + site.d_out) for site in sites)] * 2
    assert [site.name for site in counted.sites] == [site.name for site in sites]
    own = run.learner.backbone.model.parameters()
    assert counted.backbone_parameters == sum(parameter.numel() for parameter in own)
    assert counted.training["language"].lowest == 0


def test_a_run_fills_a_matrix_whose_scores_reach_ten(run_of: Any, tmp_path: Path) -> None:
    matrix = run_of().run()
    assert matrix.largest.tolist() == [1.0, 10.0]
    assert matrix.values[1, 0] == matrix.values[0, 0] == 1.0
    # an unlearned task goes to the base: it is what the base had before
    assert matrix.baseline is not None and matrix.values[0, 1] == matrix.baseline[1]
    assert 0.0 <= matrix.baseline[1] < matrix.values[1, 1] <= 10.0
    saved = json.loads((tmp_path / "run" / "run.json").read_text())
    assert saved["backbone"]["type"] == "image-text" and saved["finished"]
    again = run_of().run(resume=True)
    assert (again.values == matrix.values).all()
    learner = Learner.from_pretrained(tmp_path / "run")
    answer = learner.predict(texts="green ? what is it ?", task="captions")[0]
    assert answer.label == "this is it : green bar ."


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_runs_and_its_artefact_answers_as_it_did(
    run_of: Any, tmp_path: Path, name: str
) -> None:
    method = METHODS.get(name).config_class(r=4, **BASELINES[name])
    config = run_of().config
    run = run_of(
        method=method,
        training=replace(config.training, max_steps=25),
        stream={**config.stream, "metric": "token-f1"},
    )
    matrix = run.run()
    learner = Learner.from_pretrained(tmp_path / "run")
    assert list(learner.method.layers) == list(run.learner.method.layers)
    scores = [learner.evaluate(task).score for task in run.stream]
    assert scores == matrix.values[-1].tolist()
    assert matrix.baseline is not None
    # both tasks ask the same, so a LoRA that learns both at once can answer one of them only
    assert max(scores - matrix.baseline) > 0.1
