"""Models of which no stock class has the shape, built from a table, to count what they would cost.

InternVL2 brings code of its own, since its language model, InternLM2, has one Linear for queries,
keys and values. Nobody's code is run here: a table (``assets/shapes``) names the Linears of a block
and their widths, and blocks of that shape compute

    h + out(attention(in(norm1(h)))), then h + mlp_out(act(mlp_in(norm2(h))))

which is enough to place experts and to count parameters and FLOPs on the meta device. Positions,
and what goes on between the towers, are left out: such a model cannot see or write.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evolora.backbones.families import Family

FAMILY = Family(vision="vision_model", projection="mlp1", language="language_model")


@dataclass(frozen=True, kw_only=True)
class TowerShape:
    """The shape of a tower.

    Args:
        blocks: number of blocks.
        width: of the hidden states.
        heads, key_heads: of queries, and of keys and values.
        bias: whether Linears and norms have one (then norms are LayerNorms, else RMS norms).
        layer_scale: whether what a block adds is scaled per channel.
        attention, mlp: names of the two parts of a block.
        attention_in, attention_out: names of the Linears of attention.
        mlp_width: hidden width of the MLP.
        mlp_in: names of its first Linears; the first is activated and, of two, multiplied.
        mlp_out: name of its last.
    """

    blocks: int
    width: int
    heads: int
    key_heads: int
    bias: bool
    layer_scale: bool
    attention: str
    attention_in: str
    attention_out: str
    mlp: str
    mlp_width: int
    mlp_in: list[str]
    mlp_out: str


class Attention(nn.Module):
    """Attention with one Linear for queries, keys and values: (b, n, d) -> (b, n, d)."""

    def __init__(self, shape: TowerShape) -> None:
        super().__init__()
        self.shape = shape
        head = shape.width // shape.heads
        self.widths = [head * count for count in (shape.heads, shape.key_heads, shape.key_heads)]
        fused, whole = sum(self.widths), shape.width
        self.add_module(shape.attention_in, nn.Linear(whole, fused, bias=shape.bias))
        self.add_module(shape.attention_out, nn.Linear(whole, whole, bias=shape.bias))

    def forward(self, hidden: Tensor) -> Tensor:
        """Return what is added to the states (b, n, d)."""
        fused = self.get_submodule(self.shape.attention_in)(hidden)
        head = self.shape.width // self.shape.heads
        query, key, value = (
            part.unflatten(2, (-1, head)).transpose(1, 2) for part in fused.split(self.widths, 2)
        )
        seen = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
        mixed: Tensor = self.get_submodule(self.shape.attention_out)(
            seen.transpose(1, 2).flatten(2)
        )
        return mixed


class MLP(nn.Module):
    """An MLP, gated if two Linears lead in: (b, n, d) -> (b, n, d)."""

    def __init__(self, shape: TowerShape) -> None:
        super().__init__()
        self.shape = shape
        for name in shape.mlp_in:
            self.add_module(name, nn.Linear(shape.width, shape.mlp_width, bias=shape.bias))
        self.add_module(shape.mlp_out, nn.Linear(shape.mlp_width, shape.width, bias=shape.bias))

    def forward(self, hidden: Tensor) -> Tensor:
        """Return what is added to the states (b, n, d)."""
        first, *gates = (self.get_submodule(name)(hidden) for name in self.shape.mlp_in)
        inner = F.silu(first) if gates else F.gelu(first)
        for gate in gates:
            inner = inner * gate
        outer: Tensor = self.get_submodule(self.shape.mlp_out)(inner)
        return outer


class Block(nn.Module):
    """A transformer block of the shape: (b, n, d) -> (b, n, d)."""

    def __init__(self, shape: TowerShape) -> None:
        super().__init__()
        self.shape = shape
        norm = nn.LayerNorm if shape.bias else nn.RMSNorm
        self.norm1, self.norm2 = norm(shape.width), norm(shape.width)
        self.add_module(shape.attention, Attention(shape))
        self.add_module(shape.mlp, MLP(shape))
        if shape.layer_scale:
            self.ls1 = nn.Parameter(torch.ones(shape.width))
            self.ls2 = nn.Parameter(torch.ones(shape.width))

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the states after the block."""
        scales = (self.ls1, self.ls2) if self.shape.layer_scale else (1.0, 1.0)
        for name, norm, scale in zip(
            (self.shape.attention, self.shape.mlp), (self.norm1, self.norm2), scales, strict=True
        ):
            hidden = hidden + scale * self.get_submodule(name)(norm(hidden))
        return hidden


class Tower(nn.Module):
    """Blocks one after another."""

    def __init__(self, shape: TowerShape) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.blocks))

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        """Return the last states (b, n, d) of the given first ones."""
        hidden = inputs_embeds
        for block in self.layers:
            hidden = block(hidden)
        return hidden


class ShapeModel(nn.Module):
    """An image-text-to-text model of a table's shape; it has towers and their weights, no more.

    Args:
        table: a file of ``assets/shapes`` with ``table: image-text``.
    """

    family = FAMILY

    def __init__(self, table: Mapping[str, Any]) -> None:
        super().__init__()
        vision, language = (TowerShape(**table[name]) for name in ("vision", "language"))
        patch, patches = table["patch_size"], (table["image_size"] // table["patch_size"]) ** 2
        self.patch_embedding = nn.Conv2d(3, vision.width, patch, stride=patch)
        self.class_embedding = nn.Parameter(torch.zeros(1, 1, vision.width))
        self.position_embedding = nn.Parameter(torch.zeros(1, patches + 1, vision.width))
        self.vision_model = Tower(vision)
        merged = vision.width * table["merged_patches"]
        self.mlp1 = nn.Sequential(
            nn.LayerNorm(merged),
            nn.Linear(merged, language.width),
            nn.GELU(),
            nn.Linear(language.width, language.width),
        )
        self.tok_embeddings = nn.Embedding(table["vocab_size"], language.width)
        self.language_model = Tower(language)
        self.norm = nn.RMSNorm(language.width)
        self.lm_head = nn.Linear(language.width, table["vocab_size"], bias=False)
        self.config = SimpleNamespace(
            model_type="shape",
            image_token_id=table["image_token_id"],
            vision_config=SimpleNamespace(
                hidden_size=vision.width, image_size=table["image_size"], patch_size=patch
            ),
            text_config=SimpleNamespace(
                hidden_size=language.width,
                max_position_embeddings=table["max_position_embeddings"],
            ),
        )

    def generate(self, **_: Any) -> Tensor:
        """Refuse: there is a shape and nothing else."""
        raise TypeError("a model of a shape table cannot write; it serves counting")
