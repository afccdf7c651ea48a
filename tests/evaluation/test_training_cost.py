"""What a training step costs: counted on shapes, against hand-counted blocks."""

from __future__ import annotations

from typing import Any

import pytest

from evolora.config import parse_config
from evolora.evaluation.inspection import Inspection, inspect_config

VIT_B = "openai/clip-vit-base-patch16"
BLOCK = 2 * 12 * 768**2 * 197
"""FLOPs of a block's Linears; attention itself adds 2 * 2 * 197^2 * 768."""
SCORES = 2 * 2 * 197**2 * 768


def inspected(**method: Any) -> Inspection:
    return inspect_config(
        parse_config(
            {"method": method, "backbone": VIT_B, "stream": {"name": "mtil", "root": "nowhere"}}
        ),
        tasks=2,
    )


def test_a_vilt_is_counted_on_its_published_shape() -> None:
    method = {"type": "lora-per-task", "r": 4, "towers": ["multimodal"]}
    method["target_modules"] = ["query", "key", "value"]
    result = inspect_config(
        parse_config(
            {
                "method": method,
                "backbone": "dandelin/vilt-b32-mlm",
                "stream": {"name": "mtil", "root": "nowhere"},
            }
        ),
        tasks=2,
    )
    assert result.backbone_parameters == 111_595_008
    assert result.parameters["experts"] == 2 * 221_184  # specification of DeLo, section 2.4
    tokens = 40 + 145
    linears = 12 * 2 * 12 * 768**2 * tokens
    scores = 12 * 2 * 2 * tokens**2 * 768
    patches = 2 * 144 * 3 * 32**2 * 768
    pooler = 2 * 768**2
    assert result.flops["multimodal"]["base"] == linears + scores + patches + pooler
    assert result.training["multimodal"].depth == 12
    long = inspect_config(
        parse_config(
            {
                "method": method,
                "backbone": {"name_or_path": "dandelin/vilt-b32-mlm", "text_length": 512},
                "stream": {"name": "mtil", "root": "nowhere"},
            }
        ),
        tasks=1,
    )
    assert long.backbone_parameters == 111_595_008 + (512 - 40) * 768


def lora(layers: Any = None, **settings: Any) -> Inspection:
    return inspected(type="sequential-lora", r=16, layers_to_transform=layers, **settings)


def test_blocks_are_counted_from_the_lowest_expert_on() -> None:
    every, top = lora(), lora([6, 7, 8, 9, 10, 11])
    vision = top.training["vision"]
    assert (vision.depth, vision.lowest) == (12, 6)
    experts = 3 * top.flops["vision"]["experts"]
    # forward once, backward once through the Linears and at most three times through attention
    onward = vision.flops_cached - experts
    assert 6 * 2 * (BLOCK + SCORES) <= onward <= 6 * (2 * BLOCK + 4 * SCORES)
    below = vision.flops - vision.flops_cached
    assert below == pytest.approx(6 * (BLOCK + SCORES), rel=0.02)  # and the patch embedding
    assert every.training["vision"].lowest == 0
    assert every.training["vision"].flops_cached == every.training["vision"].flops
    assert every.training["vision"].flops / vision.flops_cached == pytest.approx(2, rel=0.02)


def test_spread_experts_cost_nearly_what_all_do() -> None:
    every, spread, top = (
        lora(layers).training["vision"] for layers in (None, range(0, 12, 2), range(6, 12))
    )
    assert spread.flops > 0.95 * every.flops
    assert top.flops < 0.8 * every.flops
    assert top.allocation_cost < 0.55 * spread.allocation_cost


def test_towers_without_experts_run_forward_once() -> None:
    text = lora(towers=["vision"]).training["text"]
    assert text.lowest is None and text.flops_cached == 0 and text.allocation_cost == 0
    assert text.flops == lora().flops["text"]["base"]


def test_other_methods() -> None:
    tuned = inspected(type="full-finetuning")
    assert tuned.training["vision"].flops == 3 * tuned.flops["vision"]["base"]
    probe = inspected(type="linear-probe").training["vision"]
    assert probe.lowest is None and probe.flops > 0
    moe = inspected(type="moe-adapters", layers_to_transform=[-1])
    assert moe.training["vision"].lowest == moe.training["text"].lowest == 11
