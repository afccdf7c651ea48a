"""Families of image-text-to-text models: where their towers are, and how their images come in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from evolora.backbones.blocks import activation_of
from evolora.errors import ConfigError, suggest
from evolora.experts.feed_forward import FeedForward

VISION, PROJECTION, LANGUAGE = "vision", "projection", "language"


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family of models; paths are those of ``...ForConditionalGeneration``.

    Args:
        vision: the encoder. Its blocks are found by their class: its first list of modules.
        projection: what takes its output to the width of the language model.
        language: the decoder.
        pixels: inputs of the encoder, the images first.
        nested: images come as (b, k, ...), filled up with zeros; else one after another.
        packed: the encoder sees the patches of all images as one sequence (n, d).
    """

    vision: str
    projection: str
    language: str
    pixels: tuple[str, ...] = ("pixel_values",)
    nested: bool = False
    packed: bool = False


_LLAVA = Family(
    vision="model.vision_tower",
    projection="model.multi_modal_projector",
    language="model.language_model",
)
_IDEFICS = Family(
    vision="model.vision_model",
    projection="model.connector",
    language="model.text_model",
    pixels=("pixel_values", "pixel_attention_mask"),
    nested=True,
)
_QWEN = Family(
    vision="model.visual",
    projection="model.visual.merger",
    language="model.language_model",
    pixels=("pixel_values", "image_grid_thw"),
    packed=True,
)
FAMILIES: Mapping[str, Family] = {
    "llava": _LLAVA,
    "internvl": _LLAVA,
    "idefics3": _IDEFICS,
    "smolvlm": _IDEFICS,
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
}
"""``model_type`` of a configuration -> its family."""


def family_of(model: nn.Module) -> Family:
    """Return a model's family.

    Raises:
        ConfigError: it is of none, or has no head that writes.
    """
    own = getattr(model, "family", None)
    if isinstance(own, Family):  # a model of a shape table
        return own
    kind = str(getattr(getattr(model, "config", None), "model_type", ""))
    if kind not in FAMILIES:
        raise ConfigError(
            f"{type(model).__name__} (model_type {kind!r}) is no image-text-to-text model of a "
            f"known family{suggest(kind, FAMILIES)} (known: {', '.join(sorted(FAMILIES))})"
        )
    if not hasattr(model, "generate") or getattr(model, "lm_head", None) is None:
        raise ConfigError(
            f"{type(model).__name__} has no head that writes; load the model by "
            "AutoModelForImageTextToText"
        )
    return FAMILIES[kind]


def blocks_of(tower: nn.Module) -> list[nn.Module]:
    """Return the transformer blocks of a tower: the first list of modules in it."""
    found = next(part for part in tower.modules() if isinstance(part, nn.ModuleList))
    return list(found)


def read_blocks(blocks: Sequence[nn.Module], config: Any) -> list[nn.Module]:
    """Return the blocks of an encoder whose output is read: LLaVA takes that of the last but one.

    Args:
        blocks: all of them.
        config: of the whole model.
    """
    layers = getattr(config, "vision_feature_layer", -1)
    depth = len(blocks) + 1  # of hidden states, the embeddings first
    read = [layer % depth for layer in ([layers] if isinstance(layers, int) else layers)]
    return list(blocks[: max(read)])


def linears_of(block: nn.Module) -> dict[str, nn.Linear]:
    """Return name -> Linear of a block, in its order.

    The name is the last word of its path ("q_proj"), and of a numbered one the word before too.
    """
    found: dict[str, nn.Linear] = {}
    for path, module in block.named_modules():
        if isinstance(module, nn.Linear):
            words = path.split(".")
            found[".".join(words[-2:]) if words[-1].isdigit() else words[-1]] = module
    return found


def gated_mlp_of(block: nn.Module) -> FeedForward:
    """Return the gated MLP of a decoder's block: down(act(gate x) * up x).

    Raises:
        ConfigError: it has none.
    """
    for module in block.modules():
        parts: dict[str, Any] = dict(module.named_children())
        if {"gate_proj", "up_proj", "down_proj"} <= parts.keys():
            return FeedForward(
                up=parts["up_proj"],
                down=parts["down_proj"],
                gate=parts["gate_proj"],
                activation=activation_of(module),
            )
    raise ConfigError(
        f"{type(block).__name__} has no MLP of gate_proj, up_proj and down_proj, which experts "
        "that are whole MLPs need"
    )
