"""Baselines on streams of modalities: how each lets one in, what it trains, what it forgets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.backbones.qformers import qformer, sample
from tests.methods.modalities import task
from tests.methods.test_pathweave import answers_of_base, learner, untouched
from torch import Tensor

from evolora.errors import ConfigError
from evolora.learner import Learner
from evolora.methods.ewc import EWCConfig
from evolora.methods.full_finetuning import FullFinetuningConfig
from evolora.methods.lora import JointLoRAConfig, LoRAPerTaskConfig, SequentialLoRAConfig
from evolora.methods.lwf import LwFConfig
from evolora.methods.pathweave import PathWeaveConfig

SITES: dict[str, Any] = {
    "r": 2,
    "towers": ("qformer", "projection"),
    "target_modules": ("query", "key", "value", "dense", "projection"),
}
SHARED: dict[str, Any] = {
    "sequential-lora": SequentialLoRAConfig(**SITES),
    "ewc": EWCConfig(**SITES, fisher_samples=4),
    "lwf": LwFConfig(**SITES),
    "full-finetuning": FullFinetuningConfig(towers=("qformer", "projection")),
}
APART: dict[str, Any] = {
    "lora-per-task": LoRAPerTaskConfig(**SITES),
    "no reuse": PathWeaveConfig(r=2, reuse=False),
}
STAGES = ("image", "audio", "pc")


def told(learned: Learner, modality: str, index: int) -> Tensor:
    """Logits of two samples' answers under the experts of a task."""
    method, backbone = learned.method, learned.backbone
    batch = backbone.collate([sample(modality, "is it this ?", seed) for seed in (7, 8)])
    with torch.no_grad(), method.weights():
        route = method.make_route(method.expert_task(index), batch)
        if not hasattr(method.config, "lora_alpha"):  # the input says the path
            route = method.make_route(method.route(batch)[1], batch)
        return backbone.answer_logits(batch, route)[0]


@pytest.mark.parametrize("name", [*SHARED, *APART])
def test_each_learns_how_a_modality_enters_and_starts_from_what_the_model_knows(name: str) -> None:
    learned = learner(config={**SHARED, **APART}[name], known_tasks=("image",))
    digest = learned.backbone.fingerprint()
    assert learned.learn(task("image")) is None
    assert learned.costs[0].trainable_parameters == 0
    torch.testing.assert_close(told(learned, "image", 0), untouched("image"))
    blind = answers_of_base(learned, "audio")
    for stage in STAGES[1:]:
        learned.learn(task(stage))
        assert learned.costs[-1].trainable_parameters > 0
    assert not torch.equal(told(learned, "audio", 1), blind)
    assert learned.backbone.fingerprint() == digest
    learned.begin(task("video"))
    entry = {n for n in learned.method.trainable() if n.startswith("entries.")}
    assert {n.split(".")[2] for n in entry} == {"video"}, "the others are finished"


def _again(name: str, stages: tuple[str, ...]) -> Learner:
    learned = learner(config={**SHARED, **APART}[name], known_tasks=("image",))
    for stage in stages:
        learned.learn(task(stage))
    return learned


@pytest.mark.parametrize("name", [*SHARED, *APART])
def test_shared_weights_forget_and_those_of_one_modality_do_not(name: str) -> None:
    learned = _again(name, STAGES[:2])
    before = {modality: told(learned, modality, i) for i, modality in enumerate(STAGES[:2])}
    learned.learn(task("pc"))
    for index, (modality, expected) in enumerate(before.items()):
        kept = torch.equal(told(learned, modality, index), expected)
        assert kept == (name in APART), modality


def test_joint_training_learns_every_entry_at_once_from_all_but_what_is_known() -> None:
    learned = learner(config=JointLoRAConfig(**SITES), known_tasks=("image",), max_steps=2)
    tasks = [task(stage) for stage in STAGES]
    blind = {stage: answers_of_base(learned, stage) for stage in STAGES[1:]}
    assert learned.learn_jointly(tasks) is not None
    names = set(learned.method.trainable())
    assert {f"entries.of.{m}.queries.active" for m in STAGES[1:]} <= names
    for index, stage in enumerate(STAGES[1:], 1):
        assert not torch.equal(told(learned, stage, index), blind[stage])


def test_full_tuning_of_towers_copies_and_trains_nothing_else() -> None:
    config = SHARED["full-finetuning"]
    learned = learner(config=config, known_tasks=("image",))
    method = learned.method
    assert {name.split("/")[0] for name in method.tuned} == {"qformer", "language_projection"}
    every = learner(config=FullFinetuningConfig())
    parts = {name.split("/")[0] for name in every.method.tuned}
    assert parts == {"qformer", "language_projection", "language_model"}, "encoders are frozen"
    learned.learn(task("image"))
    before = {name: value.detach().clone() for name, value in method.tuned.items()}
    for stage in STAGES[1:]:
        learned.learn(task(stage))
        count = learned.costs[-1].trainable_parameters
        place = STAGES.index(stage)
        assert count == method.entries.full_tuning(method.task_modalities, place)
    moved = {name for name, value in method.tuned.items() if not torch.equal(value, before[name])}
    assert any("attention" in name for name in moved) and any("embeddings" in n for n in moved)
    with pytest.raises(ConfigError, match="unknown tower 'vision'"):
        learner(config=FullFinetuningConfig(towers=("vision",)))


def test_encoders_run_once_per_sample_while_the_q_former_is_tuned() -> None:
    calls: dict[str, int] = {}
    for name in ("full-finetuning", "sequential-lora"):
        learned = learner(config=SHARED[name], max_steps=6)
        seen: list[int] = []
        learned.backbone.encoders["audio"].register_forward_hook(
            lambda _, args, out, seen=seen: seen.append(len(args[0]))
        )
        learned.learn(task("audio"))
        calls[name] = len(seen)
    assert calls["full-finetuning"] == calls["sequential-lora"] <= 4


def test_what_is_kept_of_an_encoder_is_not_what_other_weights_make() -> None:
    """Were the vision encoder replaced, nothing known of it would count."""
    backbone = qformer()
    with backbone.with_weights({"qformer.layernorm.weight": torch.ones(32)}):
        assert backbone.stays(["seen audio"]) and not backbone.stays(["seen audio", "embedding"])
    with backbone.with_weights({"vision_model.post_layernorm.weight": torch.ones(24)}):
        assert not backbone.stays(["seen video"])
