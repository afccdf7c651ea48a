"""How often stock PEFT runs `lora_A` in a forward: what the hooks of `PeftRecords` rest on."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("peft")

from peft import AdaLoraConfig, DeloraConfig, HiraConfig, LoraConfig
from peft.tuners.lora.config import VeloraConfig
from tests.regularizers.peft_models import adapted, tokens

from evolora.regularizers.peft_factors import prefix_of
from evolora.regularizers.peft_records import _base_layer_class

FIRST: dict[str, Any] = {"target_modules": ["first"], "r": 4}
NO_MODULE = None
TABLE: dict[str, tuple[Any, int | None]] = {
    "linear": (LoraConfig(**FIRST), 1),
    "dora": (LoraConfig(use_dora=True, **FIRST), 2),
    "rslora": (LoraConfig(use_rslora=True, **FIRST), 1),
    "convolution": (LoraConfig(target_modules=["conv"], r=4), 1),
    "attention": (LoraConfig(target_modules=["attention"], r=4), 0),
    "target_parameters": (
        LoraConfig(target_modules=[], target_parameters=["experts.weight"], r=4), 0,
    ),
    "velora": (LoraConfig(velora_config=VeloraConfig(num_groups=4), **FIRST), 0),
    "embedding": (LoraConfig(target_modules=["embed"], r=4), NO_MODULE),
    "adalora": (AdaLoraConfig(target_modules=["first"], init_r=4, total_step=10), NO_MODULE),
    "hira": (HiraConfig(**FIRST), NO_MODULE),
    "delora": (DeloraConfig(**FIRST), NO_MODULE),
}  # fmt: skip


def inputs_of_lora_a(model: nn.Module, context: Any = None) -> list[torch.Tensor] | None:
    """What every ``lora_A`` was given in one training forward; None if no factor is a module."""
    layers = [
        module
        for module in model.modules()
        if isinstance(module, _base_layer_class()) and prefix_of(module) is not None
    ]
    assert layers
    seen: list[torch.Tensor] = []
    handles = []
    for layer in layers:
        factors = getattr(layer, f"{prefix_of(layer)}_A")
        for factor in factors.values():
            if isinstance(factor, nn.Module):
                handles.append(factor.register_forward_hook(lambda _, x, out: seen.append(x[0])))
    with context or nullcontext():
        model(tokens())
    for handle in handles:
        handle.remove()
    return seen if handles else None


@pytest.mark.parametrize("kind", TABLE)
def test_how_often_a_training_forward_runs_lora_a(kind: str) -> None:
    config, expected = TABLE[kind]
    seen = inputs_of_lora_a(adapted(config))
    assert (None if seen is None else len(seen)) == expected


def test_the_later_of_dora_s_two_calls_is_on_tokens() -> None:
    seen = inputs_of_lora_a(adapted(TABLE["dora"][0]))
    assert seen is not None
    assert torch.equal(seen[0], torch.eye(12)) and seen[1].shape == (4, 9, 12)


def test_disabled_and_merged_adapters_run_nothing() -> None:
    model = adapted(TABLE["linear"][0])
    assert inputs_of_lora_a(model, model.disable_adapter()) == []
    model.merge_adapter()
    assert inputs_of_lora_a(model) == []
    model.unmerge_adapter()
    assert len(inputs_of_lora_a(model) or []) == 1
