"""What a training step costs per tower, counted on shapes: how deep gradients go, what is kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from evolora.backbones.base import Backbone
from evolora.backbones.blocks import run_block
from evolora.backbones.frozen import ModelFunction
from evolora.experts.budget import allocation_cost, depth_price
from evolora.methods.base import Method


@dataclass(frozen=True, kw_only=True)
class TowerTraining:
    """Training of one tower, per row (an image, or a prompt of full length).

    Args:
        depth: number of blocks.
        lowest: lowest block with an expert; None if there is none.
        flops: forward, and backward down to that block; experts three times (they have weight
            gradients too). A tower without experts only runs forward.
        flops_cached: the same where what lies below is kept (training.prefix_cache).
        allocation_cost: parameters of the experts plus the price of backward depth, see
            :mod:`evolora.experts.budget`.
    """

    depth: int
    lowest: int | None
    flops: int
    flops_cached: int
    allocation_cost: int


def training_cost(
    method: Method, backbone: Backbone, experts: Mapping[str, int]
) -> dict[str, TowerTraining]:
    """Return tower -> cost of a training step on shapes (meta device).

    Args:
        method: begun on its last task.
        backbone: on the meta device.
        experts: tower -> FLOPs of the experts that answer one row.
    """
    costs = {}
    for tower, (function, inputs) in backbone.tower_inputs().items():
        blocks = backbone.blocks(tower)
        last = method.expert_task(len(method.labels) - 1)
        lowest = 0 if method.replaces_weights else backbone.host.lowest(tower, last)
        if method.replaces_weights:  # weight gradients cost what gradients of inputs do
            below, above = 0, 3 * _forward(backbone, function, inputs)
        else:
            below, above = _flops(backbone, tower, lowest, function, inputs)
        trained = 3 * experts[tower]
        parameters = sum(
            parameter.numel()
            for key, layer in method.layers.items()
            for parameter in layer.parameters()
            if key.startswith(f"{tower}/")
        )
        price = depth_price(sum(p.numel() for p in blocks[0].parameters()))
        costs[tower] = TowerTraining(
            depth=len(blocks),
            lowest=lowest,
            flops=below + above + trained,
            flops_cached=(0 if lowest != 0 else below) + above + trained,
            allocation_cost=round(allocation_cost(parameters, lowest, len(blocks), price)),
        )
    return costs


def base_flops(backbone: Backbone) -> dict[str, int]:
    """Return the FLOPs of the untouched towers for one row of full length."""
    calls = backbone.tower_inputs()
    return {tower: _forward(backbone, *call) for tower, call in calls.items()}


def _forward(backbone: Backbone, function: ModelFunction, inputs: Mapping[str, Tensor]) -> int:
    with torch.no_grad(), backbone.host.disabled(), FlopCounterMode(display=False) as counter:
        backbone.call(function, **inputs)
    return int(counter.get_total_flops())


def _flops(
    backbone: Backbone,
    tower: str,
    lowest: int | None,
    function: ModelFunction,
    inputs: dict[str, Tensor],
) -> tuple[int, int]:
    """Return FLOPs (below the lowest expert: forward; from it on: forward and backward)."""
    if lowest is None:
        return _forward(backbone, function, inputs), 0
    with FlopCounterMode(display=False) as counter:
        entering, args, kwargs = backbone.entering_block(tower, lowest, function, inputs)
    below = int(counter.get_total_flops())
    start = entering.detach().requires_grad_()
    with backbone.host.disabled(), FlopCounterMode(display=False) as counter:
        hidden: Any = start
        for block in backbone.blocks(tower)[lowest:]:
            hidden = run_block(block, hidden, *args, **kwargs)
        hidden.sum().backward()
    return below, int(counter.get_total_flops())
