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
"""Folded weights kept per site; each is as large as the weight itself."""
MAX_WAITING = 16
"""Routes whose tokens are counted until a folded weight pays."""


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
    trains: bool


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
    """Folded weights of one Linear: at most :data:`MAX_ROUTES`, the least recently used go first.

    Args:
        module: the Linear.
        bank: the experts at it; linear ones.
    """

    def __init__(self, module: nn.Module, bank: ExpertBank) -> None:
        self.module, self.bank = module, bank
        self._folded: OrderedDict[tuple[AlwaysOn, torch.dtype, torch.device], _Folded]
        self._folded = OrderedDict()
        self._waiting: OrderedDict[AlwaysOn, int] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """Bytes of the weights kept."""
        return sum(entry.weight.nbytes for entry in self._folded.values())

    def clear(self) -> None:
        """Forget every folded weight."""
        self._folded.clear()
        self._waiting.clear()

    def foldable(self, wanted: AlwaysOn) -> AlwaysOn:
        """Return those of the wanted experts that need no gradient now."""
        if not torch.is_grad_enabled():
            return wanted
        places, count = self.bank.A.places(), self.bank.A.frozen.shape[0]
        trains = frozenset(expert for expert in wanted.ids if places[expert] >= count)
        return wanted.without(trains)

    def weight(self, experts: AlwaysOn, x: Tensor, min_tokens: int) -> Tensor | None:
        """Return the folded weight, or None where there is none or it would not pay.

        In training the same experts meet every step, so they are folded at once, and a backward
        that recomputes decides as the forward did. At inference a route is folded when it has
        served ``min_tokens``: a small or mixed stream of routes never merges more than it gains.

        Args:
            experts: what to fold; see :meth:`foldable`.
            x: input of the Linear.
            min_tokens: tokens from which a fold pays.
        """
        base = self.module._parameters.get("weight")
        if base is None or not self._fits(base, x):
            return None
        training = torch.is_grad_enabled()
        if training:
            self._drop_training()
        key = (experts, base.dtype, base.device)
        known = self._folded.get(key)
        if known is not None and all(source.unchanged() for source in known.sources):
            self._folded.move_to_end(key)
            return known.weight
        self._folded.pop(key, None)
        if not training and not self._pays(experts, x.shape[:-1].numel(), min_tokens):
            return None
        entry = self._fold(experts, base)
        self._folded[key] = entry
        while len(self._folded) > MAX_ROUTES:
            self._folded.popitem(last=False)
        return entry.weight

    def _fits(self, base: Tensor, x: Tensor) -> bool:
        """Only a plain weight on the input's device: not packed, offloaded, training or traced."""
        if base.shape != (self.bank.d_out, self.bank.d_in) or not base.is_floating_point():
            return False
        if base.device != x.device or (torch.is_grad_enabled() and base.requires_grad):
            return False
        return not any(tensor.is_inference() for tensor in (base, *self._tensors(True, True)))

    def _pays(self, experts: AlwaysOn, tokens: int, min_tokens: int) -> bool:
        served = self._waiting.pop(experts, 0) + tokens
        if served >= min_tokens:
            return True
        self._waiting[experts] = served
        if len(self._waiting) > MAX_WAITING:
            self._waiting.popitem(last=False)
        return False

    def _drop_training(self) -> None:
        """A step is about to change what trains, perhaps where no version counter sees it."""
        for key in [key for key, entry in self._folded.items() if entry.trains]:
            del self._folded[key]

    def _fold(self, experts: AlwaysOn, base: Tensor) -> _Folded:
        with torch.inference_mode(False), torch.no_grad():
            weight = merged(base, self.bank, experts.ids, experts.gates)
        count, places = self.bank.A.frozen.shape[0], self.bank.A.places()
        old = any(places[expert] < count for expert in experts.ids)
        new = any(places[expert] >= count for expert in experts.ids)
        sources = [_Source.of(tensor) for tensor in (base, *self._tensors(old, new))]
        return _Folded(weight, sources, trains=new)

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
