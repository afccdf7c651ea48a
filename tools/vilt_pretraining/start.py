"""A ViLT that starts as an image tower of CLIP: both run pre-norm blocks of one shape."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import CLIPModel, ViltConfig, ViltModel

from vilt_pretraining.words import CLS, POSITIONS

POOLED = 0.7  # what the pooler multiplies states of unit size with, so that its tanh is not full


def vilt_config(clip: CLIPModel, vocabulary: int) -> ViltConfig:
    """Returns the configuration of a ViLT whose blocks and patches are those of the image tower."""
    vision = clip.config.vision_config
    return ViltConfig(
        vocab_size=vocabulary,
        hidden_size=vision.hidden_size,
        intermediate_size=vision.intermediate_size,
        num_hidden_layers=vision.num_hidden_layers,
        num_attention_heads=vision.num_attention_heads,
        hidden_act=vision.hidden_act,
        layer_norm_eps=vision.layer_norm_eps,
        max_position_embeddings=POSITIONS,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        pad_token_id=0,
    )


@torch.no_grad()
def start_from(
    model: ViltModel, clip: CLIPModel, tables: dict[str, Tensor], pixels: Tensor
) -> None:
    """Copies the image tower and the tables of text embeddings into a ViLT.

    The class token of the text starts as that of the image, so that the pooled state speaks of the
    picture from the first step on.

    Args:
        model: filled in place.
        clip: whose image tower it becomes.
        tables: "words", "positions" and "kinds" of MiniLM, see `stage_words`.
        pixels: some pictures [b, 3, s, s], to tell how large the embeddings of patches are.
    """
    vision: Any = clip.vision_model
    first = _start_image(model, vision, pixels)
    text = model.embeddings.text_embeddings
    text.word_embeddings.weight.copy_(tables["words"])
    text.position_embeddings.weight.copy_(tables["positions"])
    text.token_type_embeddings.weight.copy_(tables["kinds"])
    size = tables["words"].norm(dim=1).mean()  # what follows is a layer norm: sizes are free
    row = (first - first.mean()) / first.norm() * size
    text.word_embeddings.weight[CLS] = row - tables["positions"][0] - tables["kinds"][0]
    for new, old in zip(model.encoder.layer, vision.encoder.layers, strict=True):
        for target, source in _alike(new, old):
            target.load_state_dict(source.state_dict())
    model.layernorm.load_state_dict(vision.post_layernorm.state_dict())
    model.pooler.dense.weight.copy_(POOLED * torch.eye(len(first)))
    model.pooler.dense.bias.zero_()


def _start_image(model: ViltModel, vision: Any, pixels: Tensor) -> Tensor:
    """Folds CLIP's norm behind the embeddings into them; returns the class token [d].

    Exact but for the patches' size, which is one constant here: its least squares over ``pixels``.
    """
    ours, norm = model.embeddings, vision.pre_layrnorm
    spread = vision.embeddings(pixels)[:, 1:].std(dim=2, correction=0)
    scale = norm.weight * spread.sum() / spread.square().sum()
    patches = vision.embeddings.patch_embedding.weight
    positions = vision.embeddings.position_embedding.weight
    projection = ours.patch_embeddings.projection
    projection.weight.copy_(scale.view(-1, 1, 1, 1) * (patches - patches.mean(dim=0)))
    projection.bias.copy_(norm.bias)
    ours.position_embeddings.copy_(scale * (positions - positions.mean(dim=1, keepdim=True)))
    first = norm(vision.embeddings.class_embedding + positions[0])
    ours.cls_token.copy_(first - ours.position_embeddings[:, 0])
    ours.token_type_embeddings.weight.zero_()
    return first


def _alike(new: Any, old: Any) -> list[tuple[Any, Any]]:
    """Returns the parts of a block of ViLT beside those of a block of CLIP."""
    ours, theirs = new.attention.attention, old.self_attn
    return [
        (new.layernorm_before, old.layer_norm1),
        (ours.query, theirs.q_proj),
        (ours.key, theirs.k_proj),
        (ours.value, theirs.v_proj),
        (new.attention.output.dense, theirs.out_proj),
        (new.layernorm_after, old.layer_norm2),
        (new.intermediate.dense, old.mlp.fc1),
        (new.output.dense, old.mlp.fc2),
    ]
