"""Transformer blocks of CLIP-like towers: where experts stand in them, what selectors read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from evolora.errors import ConfigError
from evolora.experts.sites import Site

LINEARS = {
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "out_proj": "self_attn.out_proj",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}
"""Name of a Linear as users write it -> where it is in a block."""


def block_indices(layers: Sequence[int] | None, depth: int, tower: str) -> list[int]:
    """Return ``layers_to_transform`` as ascending indices of a tower's blocks (None: of all).

    Raises:
        ConfigError: the list is empty, or an index is outside the tower.
    """
    if layers is None:
        return list(range(depth))
    if not layers:
        raise ConfigError("layers_to_transform must name at least one block; got none")
    wrong = [layer for layer in layers if not -depth <= layer < depth]
    if wrong:
        raise ConfigError(
            f"layers_to_transform: the {tower} tower has {depth} blocks; got {wrong[0]} "
            f"(allowed: {-depth} to {depth - 1}, negative from the top)"
        )
    return sorted({layer % depth for layer in layers})


def mlp_site(block: Any, tower: str, index: int) -> Site:
    """Return the site beside a block's MLP."""
    width = block.layer_norm2.normalized_shape[0]
    return Site(
        tower=tower,
        layer=index,
        name=f"{tower}.{index}.mlp",
        kind="mlp",
        module=block.mlp,
        norm=block.layer_norm2,
        d_in=width,
        d_out=width,
    )


def linear_site(block: Any, tower: str, index: int, target: str) -> Site:
    """Return the site at one of a block's Linears, see :data:`LINEARS`."""
    module = block.get_submodule(LINEARS[target])
    return Site(
        tower=tower,
        layer=index,
        name=f"{tower}.{index}.{target}",
        kind="linear",
        module=module,
        d_in=module.in_features,
        d_out=module.out_features,
    )


def layer_statistics(hidden: Sequence[Tensor]) -> Tensor:
    """Return (b, f): mean and standard deviation over tokens at each given depth of a tower.

    Low layers tell the style of an image, high layers its content; a selector needs both. Each
    statistic is normalised over its width, so that no layer outweighs another.
    """
    parts = []
    for tokens in (states.float() for states in hidden):
        mean = tokens.mean(dim=1)
        # Tensor.std takes six times as long over an axis that is not the last one.
        squares = (tokens - mean.unsqueeze(1)).square_().sum(dim=1)
        deviation = (squares / (tokens.shape[1] - 1)).sqrt()
        parts += [F.layer_norm(values, tokens.shape[2:]) for values in (mean, deviation)]
    return torch.cat(parts, dim=1)


def statistic_layers(depth: int) -> list[int]:
    """Return four of ``depth`` tensors, the embeddings first and the last block last."""
    return sorted({round((depth - 1) * share / 3) for share in range(4)})
