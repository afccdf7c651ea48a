"""Sorted forms: rows sorted by expert, so that each expert multiplies its own segment of rows.

Pairs (sample, chosen expert) are sorted by the place of the expert in its bank, frozen experts
first; every pair brings the n tokens of its sample. Two products per segment s of expert e,

    hidden[s] = x[token[s]] @ A_e^T        (r-dimensional: bias, ReLU, gates and dropout act here)
    out[token[s]] += hidden[s] @ B_e

are done as one product per expert ("segments": rows are read and added a segment at a time, nothing
of the size of x is copied or kept) or as one ``grouped_mm`` over all segments ("grouped": the host
need not know their lengths). Adding into ``out`` also sums a row's experts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from evolora.experts.accumulate import apply
from evolora.experts.bank import ExpertBank, GrowingStack

ALIGNMENT = 16
"""``grouped_mm`` wants rows of a multiple of so many bytes."""


def add_sorted(
    out: Tensor,
    x: Tensor,
    bank: ExpertBank,
    ids: Tensor,
    gates: Tensor | None,
    keep: Tensor | None,
    *,
    grouped: bool,
    inplace: bool = False,
) -> Tensor:
    """Return ``out`` plus the gated experts of each sample.

    Args:
        out: (b, n, d_out).
        x: (b, n, d_in), of the same type.
        bank: the experts.
        ids: (b, k) expert per sample.
        gates: (b, k), or None for ones.
        keep: (b, n, k, r) dropout mask, or None.
        grouped: one ``grouped_mm`` where it takes such tensors, else a product per expert.
        inplace: write into the memory of ``out``.
    """
    widths = (bank.d_in, bank.d_out)
    kind = _Grouped if grouped and _takes_grouped(x.device, x.dtype, widths) else _Segments
    plan = kind(bank, ids, x.shape[1])
    hidden = _bottleneck(x, bank, plan)
    if bank.recorder is not None and hidden.requires_grad:
        rows, n = plan.order // ids.shape[1], x.shape[1]
        weight = None if gates is None else gates.flatten()[plan.order].unsqueeze(1)
        bank.recorder.see(
            bank,
            hidden.view(-1, n, bank.r),
            plan.expert.unsqueeze(1),
            weight,
            x,
            lambda x: _bottleneck(x, bank, plan).view(-1, n, bank.r),
            rows,
        )
    if keep is not None:
        hidden = hidden * keep.transpose(1, 2).flatten(0, 1)[plan.order].flatten(0, 1)
    if gates is not None:
        weight = gates.flatten()[plan.order].unsqueeze(1) * bank.scale
        hidden = hidden * plan.per_token(weight)
    elif bank.scale != 1.0:
        hidden = hidden * bank.scale
    if bank.up_bias is not None:
        out = out + _up_bias(bank.up_bias.take(ids).to(x.dtype), gates, bank.scale)
    elif not inplace:
        out = out.clone()
    result = apply(_Up, out.flatten(0, 1), hidden, *_parts(bank.B, x.dtype), plan)
    return result.view(out.shape)


def _bottleneck(x: Tensor, bank: ExpertBank, plan: _Plan) -> Tensor:
    """Return what each pair's expert makes of its tokens of x (b, n, d_in): (p n, r)."""
    hidden = apply(_Down, x.flatten(0, 1), *_parts(bank.A, x.dtype), plan)
    if bank.down_bias is not None:
        hidden = hidden + plan.per_token(bank.down_bias.take(plan.expert).to(x.dtype))
    return torch.relu(hidden) if bank.activation == "relu" else hidden


def _up_bias(bias: Tensor, gates: Tensor | None, scale: float) -> Tensor:
    if gates is None:
        return scale * bias.sum(dim=1, keepdim=True)
    return torch.bmm((scale * gates).unsqueeze(1), bias)


def _parts(stack: GrowingStack, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return stack.frozen.to(dtype), stack.active.to(dtype)


class _Plan(ABC):
    """Pairs (sample, chosen expert) in the order of the experts' places, and the three products.

    Attributes:
        order: (p) sorted pairs, as indices of the flattened ids.
        expert: (p) expert of each sorted pair.
        token: (p n) row of x of each sorted pair's tokens.
    """

    def __init__(self, bank: ExpertBank, ids: Tensor, tokens: int) -> None:
        flat = ids.flatten()
        self.place, self.order = torch.sort(bank.A.slot[flat], stable=True)
        self.expert, self.tokens = flat[self.order], tokens
        self.frozen, self.total = bank.A.frozen.shape[0], len(bank)
        self.token = self.order // ids.shape[1]
        if tokens > 1:
            steps = torch.arange(tokens, device=ids.device)
            self.token = (self.token.unsqueeze(1) * tokens + steps).flatten()

    def per_token(self, values: Tensor) -> Tensor:
        """(p, c) -> (p n, c)."""
        if self.tokens == 1:
            return values
        return values.unsqueeze(1).expand(-1, self.tokens, -1).flatten(0, 1)

    def counts(self) -> Tensor:
        """Return how many rows each place has, (e)."""
        zeros = torch.zeros(self.total, dtype=torch.long, device=self.place.device)
        return zeros.index_add_(0, self.place, torch.ones_like(self.place)) * self.tokens

    @abstractmethod
    def gather(self, rows: Tensor, frozen: Tensor, active: Tensor) -> Tensor:
        """Return rows[token] @ W_e^T, (p n, r), with the factors (e, r, d) in two parts."""

    @abstractmethod
    def scatter(self, into: Tensor, hidden: Tensor, frozen: Tensor, active: Tensor) -> Tensor:
        """Add hidden @ W_e to into[token]; returns ``into``."""

    @abstractmethod
    def outer(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """Return hidden^T @ rows[token] of every trainable expert, (e, r, d)."""


class _Segments(_Plan):
    """A product per expert; the host reads the lengths of the segments."""

    def __init__(self, bank: ExpertBank, ids: Tensor, tokens: int) -> None:
        super().__init__(bank, ids, tokens)
        self.spans: list[tuple[int, slice, Tensor]] = []
        start = 0
        for place, count in enumerate(self.counts().tolist()):
            if count:
                span = slice(start, start + count)
                self.spans.append((place, span, self.token[span]))
                start += count

    def gather(self, rows: Tensor, frozen: Tensor, active: Tensor) -> Tensor:
        hidden = rows.new_empty(len(self.token), frozen.shape[1])
        for place, span, token in self.spans:
            weight = self._weight(place, frozen, active)
            torch.mm(rows.index_select(0, token), weight.T, out=hidden[span])
        return hidden

    def scatter(self, into: Tensor, hidden: Tensor, frozen: Tensor, active: Tensor) -> Tensor:
        for place, span, token in self.spans:
            into.index_add_(0, token, hidden[span] @ self._weight(place, frozen, active))
        return into

    def outer(self, hidden: Tensor, rows: Tensor) -> Tensor:
        trainable = self.total - self.frozen
        result = rows.new_zeros(trainable, hidden.shape[1], rows.shape[1])
        for place, span, token in self.spans:
            if place >= self.frozen:
                target = result[place - self.frozen]
                torch.mm(hidden[span].T, rows.index_select(0, token), out=target)
        return result

    def _weight(self, place: int, frozen: Tensor, active: Tensor) -> Tensor:
        return frozen[place] if place < self.frozen else active[place - self.frozen]


class _Grouped(_Plan):
    """One ``grouped_mm`` over all experts, ranks padded to what it needs."""

    def __init__(self, bank: ExpertBank, ids: Tensor, tokens: int) -> None:
        super().__init__(bank, ids, tokens)
        self.ends = self.counts().cumsum(0).to(torch.int32)
        mixed = 0 < self.frozen < self.total
        # Where the frozen part ends costs nothing to know on a CPU. A GPU would have to be asked,
        # so there the two parts of the bank are copied together instead: little beside the rows.
        self.border = int(self.ends[self.frozen - 1]) if mixed and not ids.is_cuda else None

    def gather(self, rows: Tensor, frozen: Tensor, active: Tensor) -> Tensor:
        rows = rows[self.token]
        parts = [
            F.grouped_mm(rows[span], _aligned(weight, 1).mT, offs=ends)
            for span, weight, ends in self._runs(frozen, active)
        ]
        return torch.cat(parts)[:, : frozen.shape[1]]

    def scatter(self, into: Tensor, hidden: Tensor, frozen: Tensor, active: Tensor) -> Tensor:
        hidden = _aligned(hidden, 1)
        for span, weight, ends in self._runs(frozen, active):
            added = F.grouped_mm(hidden[span], _aligned(weight, 1), offs=ends)
            into.index_add_(0, self.token[span], added)
        return into

    def outer(self, hidden: Tensor, rows: Tensor) -> Tensor:
        r, start, ends = hidden.shape[1], 0, self.ends
        if self.border is not None:
            start, ends = self.border, ends[self.frozen :] - self.border
        if start == len(self.token):
            return rows.new_zeros(self.total - self.frozen, r, rows.shape[1])
        hidden, rows = _aligned(hidden[start:], 1), rows[self.token[start:]]
        every = F.grouped_mm(hidden.T, rows, offs=ends)
        return every[-(self.total - self.frozen) :, :r]

    def _runs(self, frozen: Tensor, active: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield (rows, factors, ends of the segments within these rows)."""
        rows, border = len(self.token), self.border
        if border is None:
            parts = [part for part in (frozen, active) if len(part)]
            yield slice(0, rows), torch.cat(parts) if len(parts) > 1 else parts[0], self.ends
            return
        if border > 0:
            yield slice(0, border), frozen, self.ends[: self.frozen]
        if border < rows:
            yield slice(border, rows), active, self.ends[self.frozen :] - border


class _Down(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, frozen: Tensor, active: Tensor, plan: _Plan) -> Tensor:
        ctx.save_for_backward(x, frozen, active)
        ctx.plan = plan
        return plan.gather(x, frozen, active)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, frozen, active = ctx.saved_tensors
        grad, plan = grad.contiguous(), ctx.plan
        d_x = d_active = None
        if ctx.needs_input_grad[0]:
            d_x = plan.scatter(torch.zeros_like(x), grad, frozen, active)
        if ctx.needs_input_grad[2]:
            d_active = plan.outer(grad, x)
        return d_x, None, d_active, None


class _Up(torch.autograd.Function):
    """Writes into the memory of ``out``, see :mod:`evolora.experts.accumulate`."""

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, hidden: Tensor, frozen: Tensor, active: Tensor, plan: _Plan
    ) -> Tensor:
        ctx.save_for_backward(hidden, frozen, active)
        ctx.plan = plan
        return plan.scatter(out.detach(), hidden, frozen, active)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, frozen, active = ctx.saved_tensors
        rows, plan = grad.contiguous(), ctx.plan
        d_hidden = d_active = None
        if ctx.needs_input_grad[1]:
            d_hidden = plan.gather(rows, frozen, active)
        if ctx.needs_input_grad[3]:
            d_active = plan.outer(hidden, rows)
        return grad, d_hidden, None, d_active, None


def _aligned(values: Tensor, dim: int) -> Tensor:
    """Pad the axis of ranks with zeros to what ``grouped_mm`` can address."""
    step = max(ALIGNMENT // values.element_size(), 1)
    extra = -values.shape[dim] % step
    if extra == 0:
        return values.contiguous()
    padding = [0, 0] * (values.dim() - 1 - dim) + [0, extra]
    return F.pad(values, padding)


@lru_cache(maxsize=64)
def _takes_grouped(device: torch.device, dtype: torch.dtype, widths: tuple[int, int]) -> bool:
    """Return whether ``grouped_mm`` exists and takes such tensors: older cards refuse them."""
    step = ALIGNMENT // dtype.itemsize
    if not hasattr(F, "grouped_mm") or any(width % step for width in widths):
        return False
    rows = torch.zeros(step, step, device=device, dtype=dtype)
    ends = torch.full((1,), step, device=device, dtype=torch.int32)
    try:
        F.grouped_mm(rows, rows.unsqueeze(0), offs=ends)
    except (RuntimeError, NotImplementedError):
        return False
    return True
