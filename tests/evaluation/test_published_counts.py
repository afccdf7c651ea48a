"""Counts that papers of continual instruction tuning print, on shapes of the models they tune."""

from __future__ import annotations

from typing import Any

import pytest

from evolora.backbones.base import Backbone
from evolora.backbones.image_text import ImageText
from evolora.config import BackboneConfig, build_method, parse_config
from evolora.errors import ConfigError
from evolora.evaluation.inspection import Inspection, inspect_config, meta_backbone
from evolora.methods.lora import SequentialLoRAConfig
from evolora.routing.autoencoders import AutoEncoderBank

INTERNVL2 = "OpenGVLab/InternVL2-2B"
LLAVA = "llava-hf/llava-1.5-7b-hf"
DECODER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def shape(name: str) -> Backbone:
    return meta_backbone(BackboneConfig(name_or_path=name))


def lora(name: str, **method: Any) -> Inspection:
    value = {
        "backbone": name,
        "stream": "cmit",
        "method": {"type": "sequential-lora", "target_modules": ["all-linear"], **method},
    }
    return inspect_config(parse_config(value), tasks=1)


def test_internvl2_has_the_published_towers_and_linears() -> None:
    backbone = shape(INTERNVL2)
    assert isinstance(backbone, ImageText)
    assert sum(weight.numel() for weight in backbone.model.parameters()) == 2_205_754_368
    assert all(weight.is_meta for weight in backbone.model.parameters())
    sites = backbone.sites("linear", target_modules=("all-linear",))
    widths = {site.name: (site.d_in, site.d_out) for site in sites}
    for depth in (0, 23):
        own = {name: size for name, size in widths.items() if name.split(".")[1] == str(depth)}
        assert (
            own.items()
            >= {
                f"vision.{depth}.qkv": (1024, 3072),
                f"vision.{depth}.proj": (1024, 1024),
                f"vision.{depth}.fc1": (1024, 4096),
                f"vision.{depth}.fc2": (4096, 1024),
                f"language.{depth}.wqkv": (2048, 4096),
                f"language.{depth}.wo": (2048, 2048),
                f"language.{depth}.w1": (2048, 8192),
                f"language.{depth}.w3": (2048, 8192),
                f"language.{depth}.w2": (8192, 2048),
            }.items()
        )
    assert len(sites) == 24 * 4 + 2 + 24 * 5
    assert widths["projection.0.1"] == (4096, 2048) and widths["projection.0.3"] == (2048, 2048)
    assert backbone.tokens("vision") == 1024 and backbone.tokens("language") == 2048


def test_rank_4_at_all_linears_of_internvl2_is_the_baseline_of_d_mole() -> None:
    found = lora(INTERNVL2, r=4, towers=["vision", "language"])
    assert found.trainable == [5_505_024] == [found.parameters["experts"]]
    own = {site.name: site.parameters for site in lora(INTERNVL2, r=8).sites}
    vision = {"qkv": 32_768, "proj": 16_384, "fc1": 40_960, "fc2": 40_960}
    language = {"wqkv": 49_152, "wo": 32_768, "w1": 81_920, "w2": 81_920, "w3": 81_920}
    for tower, sizes in (("vision", vision), ("language", language)):
        for name, size in sizes.items():
            assert own[f"{tower}.23.{name}"] == size


def test_attention_alone_gives_the_candidates_of_d_moles_code() -> None:
    names = {"r": 8, "target_modules": ["qkv", "proj", "wqkv", "wo"]}
    sites = lora(INTERNVL2, **names).sites
    assert len(sites) == 96
    by_size = sorted((site.parameters for site in sites), reverse=True)
    assert sum(site.parameters for site in sites if site.tower == "vision") == 1_179_648
    assert sum(by_size[:48]) == 1_966_080  # 24 wqkv, then what has 32,768: wo and qkv


def test_what_d_mole_routes_by_is_as_wide_as_both_towers() -> None:
    width = shape(INTERNVL2).feature_widths()["max-pooled"]
    assert width == 3072
    bank = AutoEncoderBank(width, 128, "unit", device="meta")
    assert bank.parameters_per_task() == 789_632


def test_a_shape_counts_flops_as_multiplying_its_linears_and_attention() -> None:
    found = lora(INTERNVL2, r=4)
    tokens, width = 2048, 2048
    linears = sum(
        2 * site.d_in * site.d_out
        for site in shape(INTERNVL2).sites(
            "linear", towers=("language",), target_modules=("all-linear",)
        )
    )
    attention = 24 * 4 * tokens * tokens * width
    assert found.flops["language"]["base"] == tokens * linears + attention


def test_a_shape_is_for_counting_only() -> None:
    backbone = shape(INTERNVL2)
    with pytest.raises(ConfigError, match="expected a ViltModel"):
        meta_backbone(BackboneConfig(name_or_path=INTERNVL2, type="vilt"))
    with pytest.raises(TypeError, match="serves counting"):
        backbone.model.generate()  # type: ignore[operator]
    build_method(SequentialLoRAConfig(target_modules=("wqkv",)), backbone)


@pytest.mark.parametrize(
    ("what", "rank", "names", "total"),
    [
        # CoIN: eight experts of rank 16 take what one of rank 128 does
        ("MoELoRA and BranchLoRA's baseline", 128, DECODER, 319_815_680),
        # MoE-CL: 362,496 per layer and expert, 11.6 M in all
        ("MoE-CL", 8, DECODER[4:], 32 * 362_496),
    ],
)
def test_vicuna_7b_has_the_shape_that_papers_count_on(
    what: str, rank: int, names: tuple[str, ...], total: int
) -> None:
    found = lora(LLAVA, r=rank, target_modules=list(names), towers=["language"])
    assert found.trainable == [total]
    assert {site.layer for site in found.sites} == set(range(32))


def test_routers_and_projector_of_llava_are_the_published_ones() -> None:
    backbone = shape(LLAVA)
    sites = backbone.sites("linear", towers=("language",), target_modules=DECODER)
    routers = sum(8 * site.d_in for site in sites)
    assert routers == 9_109_504  # 9.11 M
    (projector,) = backbone.blocks("projection")
    weights = sum(weight.numel() for weight in projector.parameters())
    assert weights == 20_979_712  # 20.98 M
    assert 319_815_680 + routers + weights == 349_904_896  # the 350 M of MoELoRA
    branches = sum(16 * site.d_in + 8 * 16 * site.d_out for site in sites)
    assert branches + routers + weights == 222_371_840  # the 222 M of BranchLoRA
