"""The feature "max-pooled" of models that write: what D-MoLE recognises a task by.

    z = unit([max over the positions of the last image's last states ; max over the text's])

The image's states are the encoder's for the sample's last image or tile (where images are tiled,
the whole image comes last), its class token included; the text's are the language model's for the
last turn of the user alone: no image, no template, no answer. Padding has no part in either. What a
sample lacks, image or text, is zeros.

Source: D-MoLE (ICML 2025, arXiv 2506.11672). Its authors' code takes the text with its role marker,
and lets padding win the maximum. Here a beginning token, which is the same for every text, is run
and not counted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from evolora.backbones.batch import Batch
from evolora.backbones.blocks import entry_of
from evolora.backbones.families import LANGUAGE, VISION

if TYPE_CHECKING:
    from evolora.backbones.image_text import ImageText

MAX_POOLED = "max-pooled"
NOTHING = -1
"""Fills token rows of the input "words"."""


def max_pooled(backbone: ImageText, batch: Batch) -> Tensor:
    """Return the unit vectors (b, v + d) of a batch; experts must be disabled."""
    both = torch.cat([_of_images(backbone, batch), _of_words(backbone, batch)], dim=1)
    return F.normalize(both, dim=1)


def width(backbone: ImageText) -> int:
    """Return v + d: widths of the encoder and of the language model."""
    return sum(_width(backbone, tower) for tower in (VISION, LANGUAGE))


def _width(backbone: ImageText, tower: str) -> int:
    norm: Any = entry_of(backbone.blocks(tower)[0])
    return int(norm.weight.shape[0])


def _of_images(backbone: ImageText, batch: Batch) -> Tensor:
    """Return (b, v): the maximum over the last image of each row; zeros without one."""
    images = _last_images(backbone, batch)
    rows = images.pop("rows")
    result = torch.zeros(len(batch), _width(backbone, VISION), device=backbone.device)
    if len(rows) == 0:
        return result
    model: Any = backbone.model
    output = backbone.call(lambda **inputs: model.model.get_image_features(**inputs), **images)
    states: Tensor = output.last_hidden_state.float()
    if backbone.family.packed:  # patches of all images in one sequence
        lengths = images["image_grid_thw"].prod(dim=1).tolist()
        parts = torch.split(states, lengths)
        found = torch.stack([part.amax(dim=0) for part in parts])
    elif "pixel_attention_mask" in images:
        found = _masked_max(states, _patches(backbone, images["pixel_attention_mask"][:, 0]))
    else:
        found = states.amax(dim=1)
    result[rows] = found
    return result


def _last_images(backbone: ImageText, batch: Batch) -> dict[str, Tensor]:
    """Return what the encoder takes of each row's last image, and the "rows" that have one."""
    inputs, family = batch.inputs, backbone.family
    number = inputs[f"{family.pixels[-1]} number"]
    rows = torch.nonzero(number)[:, 0]
    if len(rows) == 0:
        return {"rows": rows}
    if family.packed:
        ends = inputs["pixel_values number"][rows].tolist()
        grids = inputs["image_grid_thw"][rows, number[rows] - 1]
        lengths = grids.prod(dim=1).tolist()
        parts = [
            inputs["pixel_values"][row, end - length : end]
            for row, end, length in zip(rows.tolist(), ends, lengths, strict=True)
        ]
        return {"rows": rows, "pixel_values": torch.cat(parts), "image_grid_thw": grids}
    last = {name: inputs[name][rows, number[rows] - 1] for name in family.pixels}
    if family.nested:
        last = {name: value.unsqueeze(1) for name, value in last.items()}
    return {"rows": rows, **last}


def _patches(backbone: ImageText, pixels: Tensor) -> Tensor:
    """Return which patches (b, n) hold any of the real pixels (b, h, w) of an image."""
    size = backbone.config.vision_config.patch_size
    whole = pixels.unfold(1, size, size).unfold(2, size, size)
    return whole.sum(dim=(-1, -2)).flatten(1) > 0


def _of_words(backbone: ImageText, batch: Batch) -> Tensor:
    """Return (b, d): the maximum over the user's words of each row; zeros without any."""
    words = batch.inputs["words"]
    result = torch.zeros(len(batch), backbone.width, device=backbone.device)
    rows = torch.nonzero((words != NOTHING).any(dim=1))[:, 0]
    if len(rows) == 0:
        return result
    given = words[rows] != NOTHING
    language: Any = backbone.model.get_submodule(backbone.family.language)
    states: Tensor = backbone.call(
        lambda **inputs: language(use_cache=False, **inputs),
        input_ids=words[rows].clamp_min(0),
        attention_mask=given.long(),
    ).last_hidden_state
    counted = given.clone()
    if backbone.dialogues.first_token is not None:
        counted[:, 0] = False
    result[rows] = _masked_max(states.float(), counted)
    return result


def _masked_max(states: Tensor, mask: Tensor) -> Tensor:
    """Return the maximum (b, d) of states (b, n, d) where the mask (b, n) is set."""
    return states.masked_fill(~mask.unsqueeze(2), -torch.inf).amax(dim=1)
