"""Trainable parameters of the published runs on LLaVA-1.5-7B, counted on shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from evolora.backbones.image_text import ImageText
from evolora.methods.branch_lora import BranchLoRA, BranchLoRAConfig
from evolora.methods.moe_lora import MoELoRA, MoELoRAConfig
from evolora.streams.task import LabelSpace

WHERE: dict[str, Any] = {"towers": ("language",), "target_modules": ("all-linear",)}


@pytest.fixture(scope="module")
def llava_7b() -> ImageText:
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
        image_size=336, patch_size=14, projection_dim=768,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=32064, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
        num_attention_heads=32, max_position_embeddings=4096,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text))
    return ImageText(model)


def projector(backbone: ImageText) -> int:
    """Both methods tune the projector in full beside the experts, which the papers count."""
    (block,) = backbone.blocks("projection")
    return sum(parameter.numel() for parameter in block.parameters())


def counted(method: Any, part: str) -> int:
    return sum(p.numel() for name, p in method.trainable().items() if part in name)


def test_350_million_of_moe_lora(llava_7b: ImageText) -> None:
    method = MoELoRA(MoELoRAConfig(**WHERE), llava_7b)
    method.begin_task("a", LabelSpace.of_texts(8))
    assert len(method.layers) == 7 * 32
    assert counted(method, ".bank.") == 319_815_680
    assert counted(method, ".router.") == 9_109_504
    total = counted(method, "") + projector(llava_7b)
    assert total == 349_904_896  # 350 M
    method.remove()


def test_222_million_of_branch_lora(llava_7b: ImageText) -> None:
    method = BranchLoRA(BranchLoRAConfig(**WHERE), llava_7b)
    method.begin_task("a", LabelSpace.of_texts(8))
    assert counted(method, ".trunk.") == 18_219_008
    assert counted(method, ".bank.") == 174_063_616
    assert counted(method, ".router.") == 9_109_504
    assert counted(method, "") + projector(llava_7b) == 222_371_840  # 222 M
    method.finish_task()
    method.begin_task("b", LabelSpace.of_texts(8))
    routers = {name: t for name, t in method.stored().items() if ".router.gate" in name}
    assert sum(t.numel() for t in routers.values() if t.is_floating_point()) == 2 * 9_109_504
    method.remove()
