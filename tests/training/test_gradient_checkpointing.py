"""Gradient checkpointing: the same gradients from blocks that run twice."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from tests.backbones.test_prefix import deep_backbone
from tests.conftest import toy_task
from tests.training.caching import METHODS, MOE, TOP, learner_of

from evolora.errors import ConfigError
from evolora.methods.full_finetuning import FullFinetuningConfig
from evolora.storage.state import export_state


@pytest.mark.parametrize("method", [MOE, METHODS["sequential"]], ids=["moe", "lora"])
@pytest.mark.parametrize("layers", [TOP, None], ids=["top", "all"])
def test_gradient_checkpointing_learns_the_same(method: Any, layers: Any) -> None:
    config = dataclasses.replace(method, layers_to_transform=layers)
    plain, again = learner_of(config), learner_of(config, gradient_checkpointing=True)
    for learner in (plain, again):
        learner.learn(toy_task(0, 20))
    for key, value in export_state(plain.method).items():
        torch.testing.assert_close(export_state(again.method)[key], value, rtol=1e-4, atol=1e-6)
    untouched = deep_backbone("clip").model
    for name, module in again.backbone.model.named_modules():
        assert not module.training
        assert set(vars(module)) == set(vars(untouched.get_submodule(name)))


def test_gradient_checkpointing_runs_blocks_again() -> None:
    learner = learner_of(METHODS["sequential"], gradient_checkpointing=True, max_steps=2)
    attention = learner.backbone.blocks("vision")[3].self_attn
    calls: list[bool] = []
    attention.register_forward_hook(lambda *_: calls.append(attention.training))
    learner.learn(toy_task(0, 20))
    assert len(calls) == 4 and not any(calls), "twice per step, without dropout"


def test_checkpointing_of_other_weights_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"gradient_checkpointing: .* weights of full-finetuning"):
        learner_of(FullFinetuningConfig(), gradient_checkpointing=True)
