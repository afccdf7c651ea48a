"""The top of clip-tiny: the blocks that adapters stand in, and what follows them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evolora.backbones.loading import load_backbone
from resora_study.data import BLOCKS, Side, Split


class Tower(nn.Module):
    """The last blocks of one tower, its norm and projection."""

    def __init__(self, blocks: Any, norm: nn.Module, projection: nn.Module, causal: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(blocks[-BLOCKS:])
        self.norm, self.projection, self.causal = norm, projection, causal

    def forward(self, side: Side) -> Tensor:
        """Returns unit embeddings (n, p)."""
        hidden = side.hidden
        for layer in self.layers:
            hidden = layer(hidden, None, is_causal=self.causal)
        pooled = hidden[torch.arange(len(side)), side.summary]
        return F.normalize(self.projection(self.norm(pooled)), dim=-1)


class Top(nn.Module):
    """Both towers, or the one of images alone, before any adapter."""

    def __init__(self, model: Any, texts: bool) -> None:
        super().__init__()
        vision, text = model.vision_model, model.text_model
        self.image = Tower(
            vision.encoder.layers, vision.post_layernorm, model.visual_projection, False
        )
        if texts:
            self.text = Tower(
                text.encoder.layers, text.final_layer_norm, model.text_projection, True
            )
        self.scale = float(model.logit_scale.detach().exp())

    def forward(self, batch: Split) -> tuple[Tensor, ...]:
        """Returns embeddings of the images and, where there are any, of the texts."""
        sides = [self.image(batch.image)]
        if batch.text is not None:
            sides.append(self.text(batch.text))
        return tuple(sides)


class Tops:
    """Makes fresh copies of the untouched model's top."""

    def __init__(self) -> None:
        self._model: Any = load_backbone("clip-tiny").model

    def new(self, task: str) -> Top:
        """Returns a copy for a task, frozen."""
        return copy.deepcopy(Top(self._model, task == "retrieval")).requires_grad_(False).train()
