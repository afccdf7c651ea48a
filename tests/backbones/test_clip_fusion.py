"""ClipFusion: both sides beside each other, and no side is run that a sample lacks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.backbones.pairs import TEXTS, Pairs, fusion, memory
from tests.conftest import toy_model
from torch import Tensor
from torch.nn import functional as F

from evolora.backbones.base import PromptBackbone
from evolora.backbones.clip_fusion import ClipFusion
from evolora.experts.sites import ExpertLayer
from evolora.routing.route import BASE, Route
from evolora.training.samples import Samples

KINDS = pytest.mark.parametrize("kind", ["clip", "siglip"])
CODES = (0, 1, 2, 0)


class Scaled(ExpertLayer):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[int]] = []
        self.factor = torch.nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor, out: Tensor, route: Route) -> Tensor:
        self.rows.append(route.tasks.tolist())
        return out + self.factor * x


def insert(backbone: ClipFusion, tower: str, layer: int = -1) -> Scaled:
    (site,) = backbone.sites("linear", towers=[tower], layers=[layer], target_modules=["out_proj"])
    expert = Scaled()
    backbone.host.insert(site, expert)
    return expert


def rows_run(backbone: ClipFusion) -> dict[str, list[int]]:
    """Count the rows that enter each tower's lowest block."""
    counts: dict[str, list[int]] = {"vision": [], "text": []}
    for tower, seen in counts.items():
        backbone.blocks(tower)[0].register_forward_pre_hook(
            lambda _, args, seen=seen: seen.append(len(args[0]))
        )
    return counts


def encode(backbone: ClipFusion, batch: Any, task: int = 0) -> Tensor:
    return backbone.encode(batch, Route.of(task, len(batch)))


def by_hand(kind: str, batch: Any) -> tuple[Tensor, Tensor]:
    """Return unit embeddings of every image and text, from the stock model's own functions."""
    model = toy_model(kind)
    names = ("input_ids",) if kind == "siglip" else ("input_ids", "attention_mask")
    tokens = {name: batch.inputs[name] for name in names}
    with torch.no_grad():
        image = model.get_image_features(pixel_values=batch.inputs["pixel_values"])
        text = model.get_text_features(**tokens)
    return F.normalize(image.pooler_output, dim=1), F.normalize(text.pooler_output, dim=1)


@KINDS
def test_both_sides_stand_beside_each_other_and_zeros_for_what_is_missing(kind: str) -> None:
    backbone = fusion(kind)
    batch = backbone.collate(Pairs(CODES).all())
    image, text = by_hand(kind, batch)
    has_image = torch.tensor([[1.0], [1.0], [0.0], [1.0]])
    has_text = torch.tensor([[1.0], [0.0], [1.0], [1.0]])
    expected = torch.cat([image * has_image, text * has_text], dim=1)
    with torch.no_grad():
        torch.testing.assert_close(encode(backbone, batch, BASE), expected)
    encoded = backbone.encode_base(batch)
    torch.testing.assert_close(encoded.embedding, expected)
    assert list(backbone.parts.values()) == [32, 32] == [backbone.width // 2] * 2
    widths = {name: value.shape[-1] for name, value in encoded.features.items()}
    assert widths == backbone.feature_widths()
    modalities = encoded.features["modalities"]
    assert modalities.isnan().all(dim=2).tolist() == [
        [False, False], [False, True], [True, False], [False, False],
    ]  # fmt: skip
    torch.testing.assert_close(modalities[0], torch.stack([image[0], text[0]]))
    torch.testing.assert_close(encoded.features["pooled"].norm(dim=1), torch.ones(4))
    vision = backbone.feature_widths()["layers"] // 2
    layers = encoded.features["layers"]
    assert layers[1, vision:].eq(0).all() and layers[2, :vision].eq(0).all()
    assert layers[0].ne(0).any() and layers.isfinite().all()


def test_the_side_a_sample_lacks_is_not_run() -> None:
    backbone = fusion()
    vision, text = insert(backbone, "vision"), insert(backbone, "text")
    batch = backbone.collate(Pairs(CODES).all())
    counts = rows_run(backbone)
    tasks = torch.tensor([3, 4, 5, 6])
    with torch.no_grad():
        backbone.encode(batch, Route(tasks))
        assert counts == {"vision": [3], "text": [3]}
        assert vision.rows == [[3, 4, 6]] and text.rows == [[3, 5, 6]]
        backbone.encode_base(batch)
        assert counts == {"vision": [3, 3], "text": [3, 3]}
        only_text = batch.take(torch.tensor([2]))
        encode(backbone, only_text)
        backbone.encode_base(only_text)
        assert counts == {"vision": [3, 3], "text": [3, 3, 1, 1]}
        only_image = batch.take(torch.tensor([1]))
        encode(backbone, only_image)
        backbone.encode_base(only_image)
    assert counts == {"vision": [3, 3, 1, 1], "text": [3, 3, 1, 1]}


@KINDS
def test_batch_mates_do_not_matter(kind: str) -> None:
    backbone = fusion(kind)
    insert(backbone, "vision")
    insert(backbone, "text", 0)
    examples = Pairs(CODES).all()
    with torch.no_grad():
        together = encode(backbone, backbone.collate(examples))
        features = backbone.encode_base(backbone.collate(examples)).features
        for row, example in enumerate(examples):
            alone = backbone.collate([example])
            torch.testing.assert_close(encode(backbone, alone)[0], together[row])
            for name, value in backbone.encode_base(alone).features.items():
                torch.testing.assert_close(value[0], features[name][row], equal_nan=True)


def test_experts_of_a_tower_change_its_side_alone_and_get_gradient() -> None:
    backbone = fusion()
    batch = backbone.collate(Pairs(CODES).all())
    with torch.no_grad():
        plain = encode(backbone, batch, BASE)
    expert = insert(backbone, "text")
    changed = encode(backbone, batch)
    assert torch.equal(changed[:, :32], plain[:, :32])
    assert not torch.allclose(changed[[0, 2, 3], 32:], plain[[0, 2, 3], 32:])
    changed.square()[:, 32].sum().backward()
    assert expert.factor.grad is not None and expert.factor.grad.abs() > 0
    with torch.no_grad(), backbone.host.disabled():
        assert torch.equal(encode(backbone, batch), plain)
    backbone.host.remove_all()
    with torch.no_grad():
        assert torch.equal(encode(backbone, batch), plain)


def test_the_text_of_a_sample_is_read_at_its_own_end() -> None:
    backbone = fusion()
    insert(backbone, "text")
    batch = backbone.collate(Pairs((0, 0, 0, 0)).all())
    seen: list[Any] = []
    original = backbone.host.set_route
    backbone.host.set_route = lambda tower, route: (  # type: ignore[method-assign]
        seen.append(route.summary) if tower == "text" else None,
        original(tower, route),
    )[1]
    with torch.no_grad():
        encode(backbone, batch)
    lengths = [len(backbone.encoder.processor.tokenizer(text)["input_ids"]) for text in TEXTS]
    assert seen[0].tolist() == [length - 1 for length in lengths]


@pytest.mark.parametrize("tower", ["vision", "text", None])
def test_known_samples_are_computed_once(tower: str | None) -> None:
    backbone = fusion()
    if tower:
        insert(backbone, tower)
    data, samples = Pairs(CODES), Samples(backbone, memory())
    with torch.no_grad():
        plain = encode(backbone, backbone.collate(data.all()))
        base = backbone.encode_base(backbone.collate(data.all()))
        first = encode(backbone, samples.batch(data, [0, 1, 2, 3]))
        counts = rows_run(backbone)
        again = encode(backbone, samples.batch(data, [3, 2, 1]))
    assert counts["vision"] == [], "an expert in its last block leaves the lowest to the cache"
    assert counts["text"] == ([2] if tower == "text" else [])
    torch.testing.assert_close(first, plain)
    torch.testing.assert_close(again, plain[[3, 2, 1]])
    known = backbone.encode_base(samples.batch(data, [0, 1, 2, 3]))
    torch.testing.assert_close(known.embedding, base.embedding)
    for name, value in base.features.items():
        torch.testing.assert_close(known.features[name], value, equal_nan=True)


def test_results_of_the_dual_encoder_inside_are_not_mistaken_for_the_whole() -> None:
    backbone = fusion()
    data, samples = Pairs((0, 0)), Samples(backbone, memory())
    batch = samples.batch(data, [0, 1])
    inner = backbone.encoder.encode_base(batch, features=False).embedding
    assert inner.shape == (2, 32)
    assert backbone.encode_base(batch, features=False).embedding.shape == (2, 64)


def test_a_vision_prefix_goes_on() -> None:
    backbone = fusion()
    insert(backbone, "vision")
    batch = backbone.collate(Pairs(CODES).all())
    with torch.no_grad():
        whole = encode(backbone, batch)
        part = replace(batch, prefix=backbone.prefix_of(batch, 1))
        counts = rows_run(backbone)
        torch.testing.assert_close(encode(backbone, part), whole)
    assert counts["vision"] == []


def test_other_weights_reach_both_towers() -> None:
    backbone = fusion()
    batch = backbone.collate(Pairs((0, 0)).all())
    other = ClipFusion(toy_model(seed=4), backbone.encoder.processor)
    weights = dict(other.model.named_parameters())
    with torch.no_grad(), backbone.with_weights(weights):
        got = encode(backbone, batch, BASE)
    with torch.no_grad():
        torch.testing.assert_close(got, encode(other, batch, BASE))


def test_it_answers_by_heads() -> None:
    assert not isinstance(fusion(), PromptBackbone)
    assert (fusion().answers, fusion().encoder.answers) == ("heads", "prompts")
    assert fusion().describe()["type"] == "clip-fusion"
