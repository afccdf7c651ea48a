"""What experts cost a training step: themselves, and how deep the backward pass must go for them.

    cost = parameters + price * (depth - lowest)

A parameter of an expert costs three multiply-adds per token (forward, gradient of its input and of
itself), a parameter of a frozen block that gradients pass through costs one, or two where a prefix
cache would have spared its forward as well. So the price of a block, in parameters of experts, is a
third (or two thirds) of its own parameters. Half the layers spread out cost nearly as much as all
of them; the same number on top does not.
"""

from __future__ import annotations


def depth_price(block_parameters: int, *, cached: bool = False) -> float:
    """Return what a block that gradients pass through costs, in parameters of experts.

    Args:
        block_parameters: parameters of a frozen block.
        cached: whether activations below the lowest expert are kept.
    """
    return block_parameters * (2 if cached else 1) / 3


def allocation_cost(parameters: int, lowest: int | None, depth: int, price: float) -> float:
    """Return the cost of a tower's experts, in parameters.

    Args:
        parameters: of all experts that train in the tower.
        lowest: lowest block with an expert; None if there is none.
        depth: blocks of the tower.
        price: of each block from the lowest on, see :func:`depth_price`.
    """
    return parameters + price * (0 if lowest is None else depth - lowest)
