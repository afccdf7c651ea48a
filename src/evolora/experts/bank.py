"""Banks of low-rank experts: stacked factors of one site, frozen part and trainable part apart.

Layout (specs: one storage, no copies for any formulation): A is (e, r, d_in) and B is
(e, r, d_out), both contiguous, so gather, stack and sorted forms all read the same buffers.
A bank knows nothing of tasks: rows are experts, identified by 0..e-1 in order of creation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evolora.errors import ConfigError
from evolora.experts.recording import Recorder


class Listed:
    """Python's copy of an index tensor, read again only when the tensor has changed.

    Reading a tensor makes the host wait for a GPU, so a forward pass must not do it every time.
    """

    def __init__(self) -> None:
        self._values: list[int] = []
        self._seen: tuple[Tensor | None, int] = (None, 0)

    def __call__(self, tensor: Tensor) -> list[int]:
        known, version = self._seen
        if known is not tensor or version != tensor._version:
            self._values = tensor.tolist()
            self._seen = (tensor, tensor._version)
        return self._values


class GrowingStack(nn.Module):
    """Rows of equal shape, of which some are frozen for good and the others are trainable.

    Frozen rows live in a buffer and never see an optimizer; trainable rows live in one Parameter.
    A row keeps its identifier (order of creation) when it moves from one to the other.

    Args:
        shape: shape of one row.
    """

    frozen: Tensor
    slot: Tensor

    def __init__(self, *shape: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.shape = shape
        self.active = _parameter(torch.empty(0, *shape, device=device))
        self.register_buffer("frozen", torch.empty(0, *shape, device=device))
        # An index, not a value: it is read by Python, so it is real even where weights are shapes.
        self.register_buffer("slot", torch.empty(0, dtype=torch.long, device="cpu"))
        self._listed = Listed()

    def __len__(self) -> int:
        return int(self.slot.shape[0])

    def places(self) -> list[int]:
        """Return the place of every row, by identifier: first the frozen ones, then the others."""
        return self._listed(self.slot)

    def grow(self, rows: Tensor) -> None:
        """Append trainable rows (n, *shape)."""
        start = self.frozen.shape[0] + self.active.shape[0]
        new = torch.arange(start, start + rows.shape[0], device="cpu")
        rows = rows.to(self.active.device, self.active.dtype)
        self.active = _parameter(torch.cat([self.active.detach(), rows]))
        self.slot = torch.cat([self.slot, new.to(self.slot.device)])

    def freeze(self, ids: Iterable[int]) -> None:
        """Move rows to the frozen part, bit for bit; rows frozen before stay as they are.

        Raises:
            ConfigError: there is no row of such an identifier.
        """
        slot = self.slot.tolist()
        ids = set(ids)
        wrong = [row for row in sorted(ids) if not 0 <= row < len(slot)]
        if wrong:
            raise ConfigError(f"cannot freeze row {wrong[0]}: there are {len(slot)}, from 0")
        count = self.frozen.shape[0]
        leaving = [row for row in sorted(ids) if slot[row] >= count]
        staying = [row for row, place in enumerate(slot) if place >= count and row not in ids]
        before = [row for row, place in enumerate(slot) if place < count]
        before.sort(key=lambda row: slot[row])
        every = self.all().detach()
        self.frozen = every[before + leaving].clone()
        self.active = _parameter(every[staying].clone())
        order = before + leaving + staying
        new_slot = torch.empty(len(slot), dtype=torch.long, device="cpu")
        places = torch.arange(len(slot), device="cpu")
        new_slot[torch.tensor(order, dtype=torch.long, device="cpu")] = places
        self.slot = new_slot.to(self.slot.device)

    def drop(self, ids: Iterable[int]) -> None:
        """Take rows out; identifiers of those behind them move up."""
        gone, every, old = set(ids), self.all().detach(), set(self.frozen_ids())
        kept = [row for row in range(len(self)) if row not in gone]
        frozen = [place for place, row in enumerate(kept) if row in old]
        count = len(kept)
        self.frozen = self.frozen[:0]
        self.active = _parameter(every[kept].clone())
        self.slot = torch.arange(count, device="cpu").to(self.slot.device)
        self.freeze(frozen)

    def widen(self, size: int) -> None:
        """Pad the last axis of every row with zeros to ``size``; what was there stays as it is."""
        extra = size - self.shape[-1]
        if extra < 0:
            raise ConfigError(f"rows are {self.shape[-1]} wide and only grow; got size {size}")
        self.shape = (*self.shape[:-1], size)
        self.frozen = torch.nn.functional.pad(self.frozen, (0, extra))
        self.active = _parameter(torch.nn.functional.pad(self.active.detach(), (0, extra)))

    def frozen_ids(self) -> list[int]:
        """Return the identifiers of frozen rows, ascending."""
        count = self.frozen.shape[0]
        return [row for row, place in enumerate(self.slot.tolist()) if place < count]

    def take(self, ids: Tensor) -> Tensor:
        """Return rows ``ids`` (shape s) as (*s, *shape); gradients reach trainable rows only.

        The cost is that of the rows taken, however many there are in the stack.
        """
        place, count = self.slot[ids], self.frozen.shape[0]
        if self.active.shape[0] == 0:
            return _gather(self.frozen, place)
        if count == 0:
            return _gather(self.active, place)
        old = _gather(self.frozen, place.clamp(max=count - 1))
        new = _gather(self.active, (place - count).clamp(min=0))
        is_new = (place >= count).view(*place.shape, *[1] * len(self.shape))
        return torch.where(is_new, new, old)

    def part(self, places: Sequence[int]) -> Tensor:
        """Return rows by ascending places, all of them frozen or all trainable: a view if possible.

        Places are known to Python, so nothing is looked up on the device.
        """
        count = self.frozen.shape[0]
        rows, start = (self.frozen, 0) if places[-1] < count else (self.active, count)
        first, last = places[0] - start, places[-1] - start + 1
        if last - first == len(places):
            return rows if len(places) == len(rows) else rows[first:last]
        return torch.cat([rows[place - start : place - start + 1] for place in places])

    def all(self) -> Tensor:
        """Return every row in the order of the identifiers, (e, *shape)."""
        if self.frozen.shape[0] == 0:
            return self.active
        return torch.cat([self.frozen, self.active])[self.slot]


@dataclass(frozen=True, eq=False)
class Factors:
    """Several experts as one pair of matrices, of all samples or (with an axis b) of each sample.

    Args:
        a: (R, d_in) or (b, R, d_in), the experts' A below one another, R = k r.
        b: (R, d_out) or (b, R, d_out).
        down_bias: (R) or (b, R), or None.
        up_bias: (k, d_out) or (b, k, d_out), or None.
    """

    a: Tensor
    b: Tensor
    down_bias: Tensor | None = None
    up_bias: Tensor | None = None

    def to(self, dtype: torch.dtype) -> Factors:
        """Return the same factors in the type the site computes in."""
        down = None if self.down_bias is None else self.down_bias.to(dtype)
        up = None if self.up_bias is None else self.up_bias.to(dtype)
        return Factors(self.a.to(dtype), self.b.to(dtype), down, up)


class ExpertBank(nn.Module):
    """Low-rank experts of one site: E_i(x) = scale * (act(x A_i^T + a_i) B_i + b_i).

    Args:
        d_in, d_out: widths of the site's input and output.
        r: rank (bottleneck width).
        bias: whether experts have the biases a_i (r) and b_i (d_out), as MoE-Adapters' do.
        activation: "relu" for bottleneck experts, None for LoRA (a linear expert).
        scale: constant factor of the output (lora_alpha / r for a LoRA).

    Attributes:
        recorder: who is told what the experts make of their inputs; None: nobody asks.
    """

    recorder: Recorder | None = None

    def __init__(
        self,
        d_in: int,
        d_out: int,
        r: int,
        *,
        bias: bool = False,
        activation: str | None = None,
        scale: float = 1.0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.d_in, self.d_out, self.r = d_in, d_out, r
        self.activation, self.scale = activation, scale
        self.A = GrowingStack(r, d_in, device=device)
        self.B = GrowingStack(r, d_out, device=device)
        self.down_bias = GrowingStack(r, device=device) if bias else None
        self.up_bias = GrowingStack(d_out, device=device) if bias else None

    def __len__(self) -> int:
        return len(self.A)

    def stacks(self) -> list[GrowingStack]:
        """Return the growing tensors, which always hold the same experts."""
        return [s for s in (self.A, self.B, self.down_bias, self.up_bias) if s is not None]

    def grow(
        self, count: int, generator: torch.Generator | None = None, *, std: float | None = None
    ) -> list[int]:
        """Append ``count`` experts that output exactly zero; return their identifiers.

        A is Kaiming-uniform with a = sqrt(5): uniform in +-1/sqrt(d_in); with ``std`` it is normal
        of that deviation. B and biases are zero.
        """
        first = len(self)
        self.A.grow(fresh_rows(count, self.A, generator, std=std))
        for stack in self.stacks()[1:]:
            stack.grow(torch.zeros(count, *stack.shape, device=stack.active.device))
        return list(range(first, first + count))

    def add_copy(self, expert: int) -> int:
        """Append a frozen copy of an expert as it is now; return its identifier."""
        for stack in self.stacks():
            stack.grow(stack.all().detach()[expert : expert + 1])
        self.freeze([len(self) - 1])
        return len(self) - 1

    def drop(self, ids: Iterable[int]) -> None:
        """Take experts out; identifiers of those behind them move up."""
        chosen = list(ids)
        for stack in self.stacks():
            stack.drop(chosen)

    def freeze(self, ids: Iterable[int]) -> None:
        """Freeze experts for good: bit for bit what they are now."""
        chosen = list(ids)
        for stack in self.stacks():
            stack.freeze(chosen)

    def frozen_ids(self) -> list[int]:
        """Return the identifiers of frozen experts, ascending."""
        return self.A.frozen_ids()

    def pairs(self, *, frozen: bool = False) -> tuple[Tensor, Tensor]:
        """Return A (e, r, d_in) and B (e, r, d_out) of the experts that train, or of the others."""
        a, b = (self.A.frozen, self.B.frozen) if frozen else (self.A.active, self.B.active)
        return a, b

    def taken(self, ids: Tensor) -> Factors:
        """Return the factors of experts ``ids`` (k) or, for each sample its own, (b, k)."""
        return self._factors(lambda stack: stack.take(ids), start=ids.dim() - 1)

    def split(self, ids: Sequence[int]) -> list[tuple[list[int], Factors]]:
        """Return the frozen and the trainable ones of ``ids``: (positions in ids, factors) of each.

        Raises:
            ConfigError: the bank has no such expert.
        """
        places, count = self.A.places(), self.A.frozen.shape[0]
        wrong = [expert for expert in ids if not 0 <= expert < len(places)]
        if wrong:
            raise ConfigError(f"no expert {wrong[0]}: the bank has {len(places)}, from 0")
        order = sorted(range(len(ids)), key=lambda position: places[ids[position]])
        old = [position for position in order if places[ids[position]] < count]
        new = order[len(old) :]
        return [(part, self._part([places[ids[p]] for p in part])) for part in (old, new) if part]

    def whole(self) -> list[tuple[slice, Factors]]:
        """Return (places, factors) of all frozen and of all trainable experts, without a copy."""
        count, total = self.A.frozen.shape[0], len(self)
        spans = [slice(0, count), slice(count, total)]
        return [
            (span, self._part(range(span.start, span.stop)))
            for span in spans
            if span.stop > span.start
        ]

    def _part(self, places: Sequence[int]) -> Factors:
        return self._factors(lambda stack: stack.part(places), start=0)

    def _factors(self, rows: Callable[[GrowingStack], Tensor], start: int) -> Factors:
        """Lay the experts' matrices, found by ``rows``, below one another from axis ``start``."""
        return Factors(
            a=rows(self.A).flatten(start, start + 1),
            b=rows(self.B).flatten(start, start + 1),
            down_bias=rows(self.down_bias).flatten(start, start + 1) if self.down_bias else None,
            up_bias=rows(self.up_bias) if self.up_bias else None,
        )

    def flops(self, tokens: int, active: int) -> int:
        """Return the FLOPs that ``active`` experts add to a row of ``tokens`` tokens."""
        return 2 * tokens * active * self.r * (self.d_in + self.d_out)

    def parameters_per_expert(self) -> int:
        """Return the number of values one expert stores."""
        return sum(math.prod(stack.shape) for stack in self.stacks())


def fresh_rows(
    count: int,
    stack: GrowingStack,
    generator: torch.Generator | None = None,
    *,
    std: float | None = None,
) -> Tensor:
    """Return new rows (count, *shape) for a stack of Linears' weights (..., d_in).

    They are drawn as a Linear's are, uniform in +-1/sqrt(d_in), or normal of deviation ``std``. On
    the meta device nothing is drawn.
    """
    shape, device = (count, *stack.shape), stack.active.device
    if device.type == "meta":
        return torch.empty(shape, device=device)
    if std is not None:
        return (torch.randn(shape, generator=generator) * std).to(device)
    bound = 1.0 / math.sqrt(shape[-1])
    return (torch.rand(shape, generator=generator) * 2 * bound - bound).to(device)


def _gather(rows: Tensor, places: Tensor) -> Tensor:
    """Return rows[places]; as an embedding its gradient is summed in a fixed order."""
    return F.embedding(places, rows.unsqueeze(-1).flatten(1)).view(*places.shape, *rows.shape[1:])


def _parameter(rows: Tensor) -> nn.Parameter:
    """An empty Parameter asks for no gradient, so it never enters an optimizer or a reducer."""
    return nn.Parameter(rows, requires_grad=rows.numel() > 0)
