"""The feature "max-pooled": of the last image and the user's words alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.backbones.writers import FAMILIES, picture, samples, writer
from torch.nn import functional as F

from evolora.backbones.image_text import ImageText
from evolora.streams.task import Example


@pytest.fixture(params=FAMILIES)
def backbone(request: pytest.FixtureRequest) -> ImageText:
    return writer(request.param)


def features(backbone: ImageText, examples: list[Example]) -> torch.Tensor:
    return backbone.base_results(backbone.collate(examples), ("max-pooled",))["max-pooled"]


def test_what_a_sample_lacks_is_zero_and_the_rest_a_unit_vector(backbone: ImageText) -> None:
    found = features(backbone, samples())
    image = found[:, : -backbone.width]
    assert found.shape == (4, backbone.feature_widths()["max-pooled"]) and image.shape[1] == 32
    torch.testing.assert_close(found.norm(dim=1), torch.ones(4))
    assert (image != 0).any(dim=1).tolist() == [True, False, True, True]
    words = found[:, -backbone.width :]
    assert (words != 0).any(dim=1).tolist() == [True, True, True, False]


def test_only_the_last_image_and_the_last_turn_count(backbone: ImageText) -> None:
    pair = Example(
        inputs={
            "image": (picture(1), picture(2)),
            "text": ("is it ?", "no", "what <image><image>"),
        },
        label="yes",
        key="k",
    )
    last = replace(pair, inputs={"image": picture(2), "text": "what"})
    other = replace(pair, inputs={**pair.inputs, "image": (picture(1), picture(3))})
    found = features(backbone, [pair, last, other])
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-4)
    assert (found[0] - found[2]).abs().max() > 1e-3


def test_it_is_the_maximum_of_the_stock_models_last_states() -> None:
    backbone = writer("internvl")
    model: Any = backbone.model.model  # type: ignore[assignment]
    example = samples()[0]
    batch = backbone.collate([example])
    tile = batch.inputs["pixel_values"][0, -1:]
    ids = backbone.processor.tokenizer(["what is it ?"], add_special_tokens=False)  # type: ignore[union-attr]
    words = torch.tensor([[1, *ids["input_ids"][0]]])
    with torch.no_grad():
        image = model.vision_tower(pixel_values=tile).last_hidden_state.amax(dim=1)
        text = model.language_model(input_ids=words).last_hidden_state[:, 1:].amax(dim=1)
    expected = F.normalize(torch.cat([image, text], dim=1), dim=1)
    torch.testing.assert_close(features(backbone, [example]), expected)


def test_masked_patches_have_no_part_in_it() -> None:
    backbone = writer("idefics3")
    batch = backbone.collate([samples()[0]])
    mask = batch.inputs["pixel_attention_mask"].clone()
    mask[..., 8:] = 0
    cut = replace(batch, inputs={**batch.inputs, "pixel_attention_mask": mask})
    pixels = batch.inputs["pixel_values"].clone()
    pixels[..., 8:] = 5.0
    changed = replace(cut, inputs={**cut.inputs, "pixel_values": pixels})
    found = [backbone.base_results(one, ("max-pooled",))["max-pooled"] for one in (cut, changed)]
    torch.testing.assert_close(found[0], found[1])
    assert not torch.allclose(found[0], features(backbone, [samples()[0]]))
