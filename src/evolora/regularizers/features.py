"""What low-rank updates make of tokens, kept as the few numbers that measures need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from evolora.experts.accumulate import apply


@dataclass(frozen=True, eq=False)
class Features:
    """Bottleneck activations z of tokens, as their moments.

    Args:
        count: (...) number of tokens.
        mean: (..., r).
        covariance: (..., r, r).
        tokens: (..., n, r) the activations themselves, where a measure reads them; else None.
        real: (..., n) which of these tokens count; None: all do.
    """

    count: Tensor
    mean: Tensor
    covariance: Tensor
    tokens: Tensor | None = None
    real: Tensor | None = None

    @classmethod
    def of(cls, z: Tensor, real: Tensor | None = None, *, tokens: bool = False) -> Features:
        """Return the moments of activations (..., n, r), in float32 at least.

        Args:
            z: activations.
            real: (..., n) bool: tokens that count; None: all do.
            tokens: keep the activations.
        """
        with torch.autocast(z.device.type, enabled=False):
            z = exact(z)
            if real is None:
                count = z.new_full(z.shape[:-2], z.shape[-2])
                mean = z.mean(dim=-2)
                centred = z - mean.unsqueeze(-2)
            else:
                weight = real.to(z.dtype).unsqueeze(-1)
                count = weight.sum(dim=(-2, -1))
                z = z.masked_fill(~real.unsqueeze(-1), 0.0)  # padding may hold anything
                mean = z.sum(dim=-2) / count.clamp_min(1.0).unsqueeze(-1)
                centred = (z - mean.unsqueeze(-2)) * weight
            second = centred.mT @ centred / count.clamp_min(1.0)[..., None, None]
            return cls(count, mean, second, *((z, real) if tokens else (None, None)))

    @classmethod
    def by_group(cls, z: Tensor, group: Tensor, groups: int, real: Tensor) -> Features:
        """Return the moments (groups, ...) of rows that belong to one group each.

        Args:
            z: (m, n, r) activations of n tokens of each row.
            group: (m) index of each row's group.
            groups: how many there are.
            real: (m, n) bool: tokens that count.
        """
        with torch.autocast(z.device.type, enabled=False):
            z = exact(z).masked_fill(~real.unsqueeze(-1), 0.0)
            r = z.shape[2]
            weight = real.to(z.dtype)
            count = z.new_zeros(groups).index_add(0, group, weight.sum(dim=1))
            least = count.clamp_min(1.0)
            mean = z.new_zeros(groups, r).index_add(0, group, z.sum(dim=1)) / least.unsqueeze(1)
            centred = (z - mean[group].unsqueeze(1)) * weight.unsqueeze(-1)
            if z.shape[1] > 1 or r <= groups:
                of_rows = (centred.mT @ centred).flatten(1)
                second = z.new_zeros(groups, r * r).index_add(0, group, of_rows).view(-1, r, r)
            else:  # a square per row would be larger than the rows of each group in turn
                flat = centred.flatten(0, 1)
                owned = [flat * (group == index).unsqueeze(1) for index in range(groups)]
                second = torch.stack([rows.T @ flat for rows in owned])
            return cls(count, mean, second / least[:, None, None])

    @classmethod
    def none(cls, updates: int, rank: int, like: Tensor) -> Features:
        """Return the features of updates that saw no token."""
        count = torch.zeros(updates, device=like.device)
        covariance = torch.zeros(updates, rank, rank, device=like.device)
        return cls(count, torch.zeros(updates, rank, device=like.device), covariance)

    @classmethod
    def joined(cls, parts: Sequence[Features]) -> Features:
        """Return the features (e, ...) of several layers as of one; equally many tokens, if any."""
        tokens = [part.tokens for part in parts if part.tokens is not None]
        real = None
        if tokens and any(part.real is not None for part in parts):
            real = torch.cat([
                torch.ones_like(z[..., 0], dtype=torch.bool) if part.real is None else part.real
                for part, z in zip(parts, tokens, strict=True)
            ])  # fmt: skip
        return cls(
            torch.cat([part.count for part in parts]),
            torch.cat([part.mean for part in parts]),
            torch.cat([part.covariance for part in parts]),
            torch.cat(tokens) if tokens else None,
            real,
        )

    def split(self, sizes: Sequence[int]) -> list[Features]:
        """Return the features of several layers (e, ...) apart, with so many updates each."""
        columns = [
            (None,) * len(sizes) if part is None else torch.split(part, list(sizes))
            for part in (self.count, self.mean, self.covariance, self.tokens, self.real)
        ]
        return [Features(*parts) for parts in zip(*columns, strict=True)]


def of_all_processes(parts: Sequence[Features]) -> list[Features]:
    """Return features whose moments are those of all processes' tokens; their gradients too.

    All processes must have the same updates. The gradient of a loss that each process computes from
    the result is that of one process, once it is averaged over processes as data parallelism does.
    """
    if not _several():
        return list(parts)

    def summed(tensors: Sequence[Tensor]) -> list[Tensor]:
        flat = apply(_Summed, torch.cat([tensor.flatten() for tensor in tensors]))
        pieces = torch.split(flat, [tensor.numel() for tensor in tensors])
        return [piece.view_as(tensor) for piece, tensor in zip(pieces, tensors, strict=True)]

    own = [part.count.unsqueeze(-1) * part.mean for part in parts]
    flat = summed([*(part.count for part in parts), *own])
    counts, sums = flat[: len(parts)], flat[len(parts) :]
    means = [
        total / count.clamp_min(1.0).unsqueeze(-1)
        for total, count in zip(sums, counts, strict=True)
    ]
    spreads = []
    for part, mean in zip(parts, means, strict=True):
        apart = part.mean - mean
        spread = part.covariance + apart.unsqueeze(-1) * apart.unsqueeze(-2)
        spreads.append(part.count[..., None, None] * spread)
    return [
        replace(
            part, count=count, mean=mean, covariance=total / count.clamp_min(1.0)[..., None, None]
        )
        for part, count, mean, total in zip(parts, counts, means, summed(spreads), strict=True)
    ]


def mean_of_processes(value: Tensor) -> Tensor:
    """Return the mean of a detached number over processes."""
    if not _several():
        return value
    return _sum(value) / torch.distributed.get_world_size()


def exact(values: Tensor) -> Tensor:
    """Return values in float32, or float64 if they are that."""
    return values if values.dtype == torch.float64 else values.float()


class _Summed(torch.autograd.Function):
    """The sum over processes, of values and of their gradients."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return _sum(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _sum(grad)


def _sum(values: Tensor) -> Tensor:
    total = values.detach().clone()
    torch.distributed.all_reduce(total)
    return total


def _several() -> bool:
    available = torch.distributed.is_available() and torch.distributed.is_initialized()
    return available and torch.distributed.get_world_size() > 1
