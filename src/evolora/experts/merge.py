"""Merging: linear experts that are on for every row cost nothing once folded into the weight.

    W x + scale * sum_i g_i B_i^T A_i x  =  (W + scale * sum_i g_i B_i^T A_i) x

Folded are the experts that need no gradient: all of a route at inference, the frozen ones in
training (the gradient of the input flows through the folded weight; what trains stays beside it).
The pristine weight is never touched, so nothing is ever subtracted: in bf16 a thousand merges and
unmerges would drift by 7 %. A folded weight is kept for the next forward until an expert, the
weight, its type or its device changes.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from evolora.experts.bank import ExpertBank

MAX_ROUTES = 2
"""Folded weights kept per site."""
MAX_WAITING = 16
"""Routes whose tokens are counted until a folded weight pays."""


_Key = tuple["AlwaysOn", torch.dtype, torch.device]


@dataclass(frozen=True)
class AlwaysOn:
    """Linear experts that a route gives to every row, with constant gates.

    Args:
        ids: identifiers of the experts, each once.
        gates: their weights; None for ones.
    """

    ids: tuple[int, ...]
    gates: tuple[float, ...] | None = None

    def without(self, folded: frozenset[int]) -> AlwaysOn:
        """Return the experts that are not among ``folded``."""
        if not folded:
            return self
        left = [position for position, expert in enumerate(self.ids) if expert not in folded]
        gates = None if self.gates is None else tuple(self.gates[position] for position in left)
        return AlwaysOn(tuple(self.ids[position] for position in left), gates)


@dataclass(frozen=True, eq=False)
class _Folded:
    weight: Tensor
    sources: list[_Source]


@dataclass(frozen=True, eq=False)
class _Source:
    """A tensor as it was. (A write through ``tensor.data`` is hidden from autograd, and from this.)

    Known by weak reference: an address is used again after a tensor is replaced.
    """

    tensor: weakref.ref[Tensor]
    version: int
    address: int

    @classmethod
    def of(cls, tensor: Tensor) -> _Source:
        return cls(weakref.ref(tensor), tensor._version, tensor.data_ptr())

    def unchanged(self) -> bool:
        tensor = self.tensor()
        return (
            tensor is not None
            and self.version == tensor._version
            and self.address == tensor.data_ptr()
        )


class FoldCache:
    """Folded weights of one Linear, the least recently used go first.

    Args:
        module: the Linear.
        bank: the experts at it; linear ones.
        max_routes: folded weights kept; each is as large as the weight itself.
    """

    def __init__(self, module: nn.Module, bank: ExpertBank, max_routes: int = MAX_ROUTES) -> None:
        self.module, self.bank, self.max_routes = module, bank, max_routes
        self._folded: OrderedDict[_Key, _Folded] = OrderedDict()
        self._waiting: OrderedDict[AlwaysOn, int] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """Bytes of the weights kept."""
        return sum(entry.weight.nbytes for entry in self._folded.values())

    def clear(self) -> None:
        """Forget every folded weight: a training step is about to change what they hold."""
        self._folded.clear()

    def lookup(
        self, wanted: AlwaysOn, x: Tensor, min_tokens: int
    ) -> tuple[Tensor, AlwaysOn] | None:
        """Return the folded weight for an input and the experts in it, or None where none pays.

        In training the same experts meet every step, so they are folded at once, and a backward
        that recomputes decides as the forward did. At inference a route is folded when it has
        served ``min_tokens``: a mixed stream of routes never merges more than it gains.

        Args:
            wanted: experts of all rows.
            x: input of the Linear.
            min_tokens: tokens from which a fold pays.
        """
        base = self.module._parameters.get("weight")
        if base is None or not self._fits(base, x):
            return None
        experts = self._without_gradient(wanted)
        key = (experts, base.dtype, base.device)
        if torch.is_grad_enabled():
            self._make_room(key)
        if not experts.ids:
            return None
        entry = self._folded.get(key)
        if entry is None or not all(source.unchanged() for source in entry.sources):
            self._folded.pop(key, None)
            if not self._pays(experts, x.shape[:-1].numel(), min_tokens):
                return None
            entry = self._fold(experts, base)
            self._folded[key] = entry
        self._folded.move_to_end(key)
        while len(self._folded) > self.max_routes:
            self._folded.popitem(last=False)
        return entry.weight, experts

    def _without_gradient(self, wanted: AlwaysOn) -> AlwaysOn:
        if not torch.is_grad_enabled():
            return wanted
        return wanted.without(frozenset(wanted.ids) - frozenset(self.bank.frozen_ids()))

    def _make_room(self, key: _Key) -> None:
        """Forget other routes: training needs the memory, and a step may change what they hold."""
        for other in [other for other in self._folded if other != key]:
            del self._folded[other]

    def _fits(self, base: Tensor, x: Tensor) -> bool:
        """Only a plain weight on the input's device: not packed, offloaded, training or traced."""
        if base.shape != (self.bank.d_out, self.bank.d_in) or not base.is_floating_point():
            return False
        if base.device != x.device or (torch.is_grad_enabled() and base.requires_grad):
            return False
        return not any(tensor.is_inference() for tensor in (base, *self._tensors(True, True)))

    def _pays(self, experts: AlwaysOn, tokens: int, min_tokens: int) -> bool:
        if torch.is_grad_enabled():
            return True
        served = self._waiting.pop(experts, 0) + tokens
        if served >= min_tokens:
            return True
        self._waiting[experts] = served
        if len(self._waiting) > MAX_WAITING:
            self._waiting.popitem(last=False)
        return False

    def _fold(self, experts: AlwaysOn, base: Tensor) -> _Folded:
        with torch.inference_mode(False), torch.no_grad():
            weight = merged(base, self.bank, experts.ids, experts.gates)
        count, places = self.bank.A.frozen.shape[0], self.bank.A.places()
        old = any(places[expert] < count for expert in experts.ids)
        new = any(places[expert] >= count for expert in experts.ids)
        sources = [_Source.of(tensor) for tensor in (base, *self._tensors(old, new))]
        return _Folded(weight, sources)

    def _tensors(self, frozen: bool, trainable: bool) -> list[Tensor]:
        found = [self.bank.A.slot]
        for stack in (self.bank.A, self.bank.B):
            found += [stack.frozen] * frozen + [stack.active] * trainable
        return found


def merged(
    base: Tensor, bank: ExpertBank, ids: Sequence[int], gates: Sequence[float] | None = None
) -> Tensor:
    """Return base + scale * sum_i g_i B_i^T A_i, (d_out, d_in), rounded once to base's type."""
    wide = torch.promote_types(base.dtype, torch.float32)
    weight = base.detach().to(wide)
    for positions, factors in bank.split(ids):
        a, b = factors.a.detach().to(wide), factors.b.detach().to(wide)
        if gates is not None:
            own = [gates[position] for position in positions]
            b = (b.view(len(own), bank.r, -1) * _column(own, b)).flatten(0, 1)
        weight = torch.addmm(weight, b.T, a, alpha=bank.scale)
    return weight.to(base.dtype)


def _column(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype).to(like.device).view(-1, 1, 1)
