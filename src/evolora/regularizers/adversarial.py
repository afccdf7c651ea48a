"""Adversarial task discrimination: features are learned that do not tell their task.

    L = L_task + CE(D(R(z)), task) ;  R(z) = z, dR/dz = -strength

The discriminator D lowers its cross-entropy, what makes the features z raises it (gradient
reversal, Ganin and Lempitsky, arXiv 1409.7495).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from evolora.experts.accumulate import apply

DiscriminatorInput = Literal["logits", "probabilities"]


def reverse_gradient(features: Tensor, strength: float = 1.0) -> Tensor:
    """Return the features as they are, whose gradient comes back times -strength."""
    return apply(_Reverse, features, strength)


def discriminator_losses(
    logits: Tensor, tasks: Tensor, given: DiscriminatorInput = "logits"
) -> Tensor:
    """Return the cross-entropy (b,) of a discriminator's logits (b, t).

    Args:
        logits: (b, t).
        tasks: (b,) of the rows.
        given: what the cross-entropy takes for logits. MoE-CL's authors give it "probabilities",
            so that a softmax is taken twice: of 4 tasks, it stays between 0.7437 and 1.7437.
    """
    scores = logits if given == "logits" else logits.softmax(dim=-1)
    return F.cross_entropy(scores, tasks, reduction="none")


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return features.view_as(features)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return -ctx.strength * grad, None
