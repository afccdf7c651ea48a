"""A whole run of a model that writes: from a configuration to matrix, artefact and resumption."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.backbones.writers import writer

from evolora.config import parse_config
from evolora.evaluation.inspection import inspect_config, inspect_run
from evolora.learner import Learner
from evolora.methods.branch_lora import BranchLoRAConfig
from evolora.methods.dyn_mole import DynMoLEConfig
from evolora.methods.moe_cl import MoECLConfig
from evolora.methods.moe_lora import MoELoRAConfig
from evolora.registry import METHODS
from evolora.report import RunRecord
from evolora.training.continual import ContinualRun

ASKED = "{} ? what is it ?"
LORA = {"type": "lora-per-task", "r": 4, "target_modules": ["all-linear"]}
BASELINES: dict[str, dict[str, Any]] = {
    "sequential-lora": {},
    "joint-lora": {},
    "ewc": {"fisher_samples": 4},
    "er": {"capacity": 6},
    "lwf": {},
    "o-lora": {"l2": 0.01},
}


@pytest.fixture
def run_of(tmp_path: Path, request: pytest.FixtureRequest) -> Any:
    method, questions = getattr(request, "param", (LORA, {}))
    for name, answer in (("colours", "red dot"), ("captions", "this is it : {} bar .")):
        rows = []
        for index in range(12):
            word = ("red", "green", "blue")[index % 3]
            ask = {"from": "human", "value": questions.get(name, ASKED).format(word)}
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
            "method": method,
            "stream": {
                "name": "conversations", "path": str(tmp_path / "data"), "metric": metric,
                "max_new_tokens": 10, "order": ["colours", "captions"],
                "answer_format": {"colours": "words:2"},
            },
            "backbone": {"name_or_path": str(model)},
            "training": {
                "max_steps": 60, "per_device_train_batch_size": 4, "learning_rate": 2e-2,
                "warmup_steps": 0, "augment": False, "label_smoothing_factor": 0.0,
            },
            "evaluation": {"batch_size": 3},
        }
    )  # fmt: skip

    def make(method: Any = None, **changes: Any) -> ContinualRun:
        if method is not None:
            changes["method"] = method
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
    routing = json.loads((tmp_path / "run" / "routing.json").read_text())
    for after in routing["after"]:  # of the task that asks for a form
        assert after["following"] == {"colours": 1.0} and after["normalised"] == {"colours": 1.0}
    record = RunRecord.load(tmp_path / "run")
    assert record.scores["following"] == record.scores["normalised"] == 1.0
    saved = json.loads((tmp_path / "run" / "run.json").read_text())
    assert saved["backbone"]["type"] == "image-text" and saved["finished"]
    again = run_of().run(resume=True)
    assert (again.values == matrix.values).all()
    learner = Learner.from_pretrained(tmp_path / "run")
    answer = learner.predict(texts="green ? what is it ?", task="captions")[0]
    assert answer.label == "this is it : green bar ."


@pytest.mark.parametrize(
    "method",
    [
        MoELoRAConfig(r=8, num_experts=4, lora_alpha=16.0, target_modules=("all-linear",)),
        BranchLoRAConfig(r=4, lora_alpha=16.0, num_branches=6, target_modules=("all-linear",)),
        DynMoLEConfig(r=4, lora_alpha=8.0, num_experts=3, target_modules=("all-linear",)),
        MoECLConfig(r=4, discriminator_memory=4),
    ],
    ids=lambda method: method.type,
)
def test_what_a_mixture_stores_is_counted_before(method: Any, run_of: Any, tmp_path: Path) -> None:
    run = run_of(method)
    counted = inspect_config(run.config)
    matrix = run.run()
    assert matrix.baseline is not None and matrix.baseline.tolist() == [0.0, 0.0]
    assert matrix.values[0, 0] == 1.0 and matrix.values[1, 1] > 1.0
    assert counted.totals["stored"] == sum(
        tensor.numel()
        for name, tensor in run.learner.method.stored().items()
        if tensor.is_floating_point() and not name.startswith("selector.")
    )
    again = run_of(method).run(resume=True)
    assert (again.values == matrix.values).all()
    learner = Learner.from_pretrained(tmp_path / "run")
    answer = learner.predict(texts="green ? what is it ?")[0]
    known = learner.method.routing == "task-free"
    assert answer.task in ("captions", "colours") if known else answer.label


D_MOLE = {
    "type": "d-mole",
    "r": 4,
    "allocation": {"type": "gradient", "budget": 12, "floors": {"vision": 0.25}, "sample": 6},
    "selector": {"quantile": 1.0, "margin": 1.5},
}


@pytest.mark.parametrize("run_of", [(D_MOLE, {"captions": "where . {} bar ."})], indirect=True)
def test_d_mole_runs_from_a_configuration_to_answers_without_being_told(
    run_of: Any, tmp_path: Path
) -> None:
    run = run_of()
    shapes = inspect_config(run.config)
    autoencoder = 2 * 128 * 64 + 128 + 64  # of the encoder's and the language model's 32 widths
    assert shapes.totals["autoencoder"] == autoencoder
    assert shapes.parameters["autoencoders"] == 2 * autoencoder
    matrix = run.run()
    assert matrix.values[1, 0] == matrix.values[0, 0], "the second task changed the first"
    saved = json.loads((tmp_path / "run" / "run.json").read_text())
    assert saved["finished"] and saved["method"]["type"] == "d-mole"
    found = inspect_run(tmp_path / "run")
    assert found.allocation is not None and len(found.allocation.tasks) == 2
    for entry in found.allocation.tasks:
        assert sum(entry.experts.values()) == 12
        assert sum(name.startswith("vision") for name in entry.experts) >= 3
    assert found.totals["autoencoder"] == autoencoder
    sizes = [site.parameters for site in found.sites]
    assert found.parameters["experts"] == sum(sizes) > 0
    again = run_of().run(resume=True)
    assert (again.values == matrix.values).all()
    learner = Learner.from_pretrained(tmp_path / "run")
    answers = learner.predict(texts=["green ? what is it ?", "where . red bar ."])
    assert [answer.task for answer in answers] == ["colours", "captions"]
    assert answers[0].label == "red dot"
    told = learner.predict(texts="where . green bar .", task="captions")[0]
    assert told.task == "captions" and told.label == "this is it : green bar ."


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
