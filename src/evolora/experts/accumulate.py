"""Accumulation: add a thin product onto the base output, in place where nobody can notice.

    out + hidden @ b (+ row)

A Linear on a (b, n, d) input returns a view, and autograd answers an in-place change of a view with
two copies of the gradient. Writing into the same memory behind a node of our own costs none: the
gradient of ``out`` is the gradient of the result. The version counter is shared, so a producer that
had kept ``out`` for its own backward raises instead of using what is no longer there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def may_overwrite(out: Tensor) -> bool:
    """Return whether the memory of ``out`` may be written: no leaf that trains, no shared memory.

    A compiler does its own planning and wants functions without side effects.
    """
    if torch.compiler.is_compiling() or (out.is_leaf and out.requires_grad):
        return False
    return out.is_contiguous()


def apply(function: Any, *arguments: Any) -> Tensor:
    """Return ``function.apply(...)`` of an autograd function with one result."""
    result: Tensor = function.apply(*arguments)
    return result


def accumulate(
    out: Tensor, hidden: Tensor, b: Tensor, row: Tensor | None = None, *, inplace: bool = False
) -> Tensor:
    """Return out + hidden @ b, plus ``row`` at every token.

    Args:
        out: (b, n, d_out).
        hidden: (b, n, R).
        b: (R, d_out), or (b, R, d_out) where each sample has its own.
        row: (b, d_out) or (1, d_out), or None.
        inplace: write into the memory of ``out``; the caller has asked :func:`may_overwrite`.
    """
    if inplace:
        if torch.is_grad_enabled():
            return apply(_Accumulate, out, hidden, b, row)
        return _add_(out, hidden, b, row)
    if b.dim() == 3:
        result = torch.baddbmm(out, hidden, b)
    else:
        result = torch.addmm(out.flatten(0, 1), hidden.flatten(0, 1), b).view_as(out)
    return result if row is None else result + row.unsqueeze(1)


def _add_(out: Tensor, hidden: Tensor, b: Tensor, row: Tensor | None) -> Tensor:
    if b.dim() == 3:
        out.baddbmm_(hidden, b)
    else:
        out.view(-1, out.shape[-1]).addmm_(hidden.flatten(0, 1), b)
    return out if row is None else out.add_(row.unsqueeze(1))


class _Accumulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, hidden: Tensor, b: Tensor, row: Tensor | None) -> Tensor:
        ctx.save_for_backward(hidden, b)
        ctx.rows = None if row is None else row.shape[0]
        return _add_(out.detach(), hidden, b, row)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, b = ctx.saved_tensors
        _, wants_hidden, wants_b, wants_row = ctx.needs_input_grad
        d_hidden = grad @ b.mT if wants_hidden else None
        d_b = d_row = None
        if wants_b and b.dim() == 3:
            d_b = hidden.mT @ grad
        elif wants_b:
            d_b = hidden.flatten(0, 1).mT @ grad.flatten(0, 1)
        if wants_row:
            d_row = grad.sum(1) if ctx.rows == grad.shape[0] else grad.sum((0, 1)).unsqueeze(0)
        return grad, d_hidden, d_b, d_row
