"""MoE-Adapters against specs/moe_adapters.md section 9: numbers 9.2 and scripts 9.3."""

from __future__ import annotations

import pytest
import torch
from tests.conftest import toy_task
from tests.methods.toy_moe import (
    LABELS,
    learner_of,
    method_of,
)

from evolora.backbones.clip import DualEncoder
from evolora.methods.moe_adapters import MoEAdapters, MoEAdaptersConfig
from evolora.randomness import StepRandom
from evolora.routing.autoencoders import AutoEncoderBank
from evolora.routing.selector import NoSelectorConfig
from evolora.training.config import learning_rate


def test_9_2_learning_rates() -> None:
    expected = {0: 1e-5, 49: 5e-4, 99: 1e-3, 100: 1e-3, 550: 5e-4, 999: 3.04617e-9, 1000: 0.0}
    for step, rate in expected.items():
        got = learning_rate(step, base=1e-3, warmup=100, total=1000)
        assert got == pytest.approx(rate, rel=1e-6, abs=1e-18)


@pytest.mark.parametrize(("total", "highest"), [(16, 5.6667e-4), (20, 7.0e-4)])
def test_9_2_learning_rate_where_warm_up_never_ends(total: int, highest: float) -> None:
    """Finding 7. The authors' loop is inclusive: ``total`` iterations are total + 1 updates."""
    rates = [learning_rate(s, base=1e-3, warmup=30, total=total) for s in range(total + 1)]
    assert max(rates) == pytest.approx(highest, rel=1e-4)
    assert rates == sorted(rates)


def test_9_2_cross_entropy_with_smoothing(make_backbone, monkeypatch) -> None:
    """Through the method's own forward: logits [2, 1, 0], label 0, smoothing 0.2."""
    learner = learner_of(make_backbone)
    learner.begin(toy_task(0))
    batch = learner.backbone.collate([toy_task(0).train[0]], task=0, random=StepRandom(0))
    assert batch.labels.tolist() == [0]
    fixed = torch.tensor([[2.0, 1.0, 0.0]])
    monkeypatch.setattr(learner.backbone, "logits", lambda *_: fixed)
    assert learner.method.objective.label_smoothing == 0.2
    assert float(learner.method(batch)["loss"]) == pytest.approx(0.60760593, abs=1e-7)


def published_backbone() -> DualEncoder:
    """The shape of OpenAI's ViT-B/16, without storage."""
    from transformers import CLIPConfig, CLIPModel

    text = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8,
            "num_hidden_layers": 12, "projection_dim": 512}  # fmt: skip
    vision = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12,
              "num_hidden_layers": 12, "image_size": 224, "patch_size": 16}  # fmt: skip
    with torch.device("meta"):
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=512))
    return DualEncoder(model, None)


def test_9_2_parameters_of_mtil() -> None:
    backbone = published_backbone()
    assert sum(p.numel() for p in backbone.model.parameters()) == 149_620_737
    method = MoEAdapters(MoEAdaptersConfig(), backbone)
    per_expert = {layer.tower: layer.bank.parameters_per_expert() for layer in method.moe_layers()}
    assert per_expert == {"vision": 99_136, "text": 66_112}
    for task in range(11):
        method.begin_task(str(task), LABELS)
        assert sum(p.numel() for p in method.trainable().values()) < 51_059_712
    sizes = {"bank": 0, "routers": 0}
    for name, tensor in method.stored().items():
        part = next((part for part in sizes if f".{part}." in name), None)
        if part and tensor.is_floating_point():
            sizes[part] += tensor.numel()
    assert sizes == {"bank": 43_625_472, "routers": 7_434_240}
    assert sum(sizes.values()) == 51_059_712
    autoencoder = AutoEncoderBank(43_264, 100, device="meta").parameters_per_task()
    assert sum(sizes.values()) + autoencoder == 59_755_876


def test_9_2_parameters_of_the_class_incremental_setting() -> None:
    config = MoEAdaptersConfig(
        num_experts=2, routers="shared", freeze_top=0, min_free_experts=0,
        selector=NoSelectorConfig(),
    )  # fmt: skip
    method = MoEAdapters(config, published_backbone())
    for task in range(10):
        method.begin_task(str(task), LABELS)
        method.finish_task()
        stored = [t for t in method.stored().values() if t.is_floating_point()]
        assert sum(tensor.numel() for tensor in stored) == 4_027_392
        assert sum(p.numel() for p in method.trainable().values()) == 4_027_392


def test_9_3_d_scripted_counts_give_the_frozen_list(make_backbone) -> None:
    learner = learner_of(make_backbone, min_free_experts=0)
    first, second, *_ = method_of(learner).moe_layers()
    script = [
        # counts of two sites -> frozen after the task
        (([5, 9, 1, 7, 0], [0, 0, 4, 4, 9]), ([1, 3], [2, 4])),
        (([0, 9, 8, 9, 1], [6, 0, 5, 0, 0]), ([1, 3], [0, 2, 4])),  # top two are frozen already
        (([3, 0, 0, 0, 0], [0, 0, 0, 0, 0]), ([0, 1, 3], [0, 2, 4])),  # an unused one never is
        (([2, 2, 2, 2, 2], [1, 1, 0, 0, 0]), ([0, 1, 3], [0, 1, 2, 4])),  # ties: smaller index
    ]
    for task, (counts, frozen) in enumerate(script):
        learner.method.begin_task(str(task), LABELS)
        for layer, values in zip((first, second), counts, strict=True):
            layer.usage.counts += torch.tensor(values)
        learner.method.finish_task()
        assert (first.bank.frozen_ids(), second.bank.frozen_ids()) == frozen
