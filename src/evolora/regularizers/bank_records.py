"""Records of a method's experts, for regularisers that compare low-rank updates.

A source is whatever has ``pairs``: a bank, a pool of factors, a trunk with its branches. Weights
are read from it; what experts make of tokens is noted while a training forward runs
(:mod:`evolora.experts.recording`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from evolora.errors import ConfigError
from evolora.experts.bank import ExpertBank, GrowingStack
from evolora.experts.branches import BranchBank
from evolora.experts.recording import Both, BottleneckRecorder, Call, Recorder
from evolora.experts.sites import SiteHost
from evolora.regularizers.features import Features
from evolora.regularizers.resora import Record, Resora


@dataclass(frozen=True, eq=False)
class _Source:
    """What a site has: ``owner`` has the pairs, ``bank`` (None: nobody) tells what it reads."""

    name: str
    tower: str
    owner: Any
    bank: ExpertBank | BranchBank | None

    def stack(self) -> GrowingStack:
        """Return the stack whose rows are the experts."""
        assert self.bank is not None
        return self.bank.A if isinstance(self.bank, ExpertBank) else self.bank.B


class BankRecords:
    """Reads the updates of a method's experts that a regulariser is about.

    Args:
        layers: the method's layers by key ("tower/block/name").
        host: whose routes its sites have.
        resora: the regulariser.
        method: name of the method, for messages.

    Raises:
        ConfigError: there are no low-rank experts, none that ``layers`` selects, or some that do
            not tell their bottlenecks where these are read.
    """

    def __init__(
        self,
        layers: nn.ModuleDict,
        host: SiteHost,
        resora: Resora,
        *,
        method: str = "this method",
    ) -> None:
        self.resora, self.config = resora, resora.config
        every = list(_sources(layers))
        if not every:
            raise ConfigError(
                f"resora compares low-rank experts, and {method} has none at any site"
            )
        self.sources = [source for source in every if self.config.selects(source.name)]
        if not self.sources:
            raise ConfigError(
                f"resora: layers {self.config.layers!r} selects none of "
                f"{', '.join(source.name for source in every[:4])} ..."
            )
        towers: dict[nn.Module, str] = {}
        for source in self.sources if self.config.reads_features else ():
            if source.bank is None:
                raise ConfigError(
                    f"resora: experts at {source.name} are composed anew for each input, so that "
                    "no activations of a fixed update are there; use w_cos, w_orth or gor"
                )
            towers[source.bank] = source.tower
        self.recorder = BottleneckRecorder(host, towers)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note what experts make of the tokens of the forward that runs inside."""
        self.recorder.take()
        before: list[tuple[Any, Recorder | None]] = []
        for bank in self.recorder.towers:
            known = cast("Recorder | None", bank.recorder)
            before.append((bank, known))
            cast(Any, bank).recorder = Both(known, self.recorder) if known else self.recorder
        try:
            yield
        finally:
            for bank, known in before:
                bank.recorder = known

    def collect(self) -> list[Record]:
        """Return a record of every source with experts that train, the same in every process."""
        sources = [source for source in self.sources if len(source.owner.pairs()[0]) > 0]
        features: list[Features | None] = [None] * len(sources)
        if self.config.reads_features:
            calls = self.recorder.take()
            if not any(source.bank in calls for source in sources):
                raise ConfigError(
                    "resora: no expert told its activations in this forward; use w_cos"
                )
            features = list(self._features(sources, calls))
        records = []
        for source, known in zip(sources, features, strict=True):
            a, b = source.owner.pairs()
            older = (source.owner.pairs(frozen=True),) if self.config.across == "tasks" else ()
            records.append(Record(source.name, a, b, known, older))
        return records

    def _features(
        self, sources: Sequence[_Source], calls: dict[nn.Module, list[Call]]
    ) -> Iterator[Features]:
        """Yield the features of the experts of each source that train, in their order."""
        masks = _Masks()
        shared: list[tuple[Tensor, Tensor | None]] = []
        places: list[dict[int, int]] = []  # of each source: expert -> index in shared
        for source in sources:
            own: dict[int, int] = {}
            for call in calls.get(source.bank, ()) if source.bank else ():
                for expert, z, real in self._of_all_rows(source, call, masks):
                    own[expert] = len(shared)
                    shared.append((z, real))
            places.append(own)
        known = self.resora.features_of(shared)
        for source, own in zip(sources, places, strict=True):
            a, _ = source.owner.pairs()
            if own:
                none = Features.none(1, a.shape[1], a)
                yield Features.joined(
                    [known[own[index]] if index in own else none for index in range(len(a))]
                )
                continue
            called = calls.get(source.bank, ()) if source.bank else ()
            if called:
                yield self._of_each_row(source, called[0], masks)
            else:
                yield Features.none(len(a), a.shape[1], a)

    def _of_all_rows(
        self, source: _Source, call: Call, masks: _Masks
    ) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """Yield (expert, z (1, n, r), which tokens are real) of experts that all rows share."""
        if isinstance(call.experts, Tensor):
            return
        stack = source.stack()
        count, ids = len(stack.frozen), call.experts
        if isinstance(ids, slice):
            chosen: list[int] = list(range(ids.start, ids.stop))
        else:
            chosen = [stack.places()[expert] for expert in ids]
        if all(place < count for place in chosen):
            return
        z = self._z(call, stack.shape[0])
        for position, place in enumerate(chosen):
            if place < count:
                continue
            real = masks.of(call)
            if call.gates is not None and call.gates.shape[0] > 1:
                on = (call.gates[:, position] != 0).repeat_interleave(z.shape[1])
                real = on if real is None else on & real
            yield place - count, z[:, :, position].flatten(0, 1).unsqueeze(0), real

    def _of_each_row(self, source: _Source, call: Call, masks: _Masks) -> Features:
        """Return the features of every expert that trains, where rows have their own experts."""
        if self.config.reads_tokens:
            raise ConfigError(
                f"resora: f_dist compares tokens, and at {source.name} not all tokens have the "
                "same experts; use f_corr"
            )
        assert isinstance(call.experts, Tensor)
        stack = source.stack()
        z, real = self._z(call, stack.shape[0]), masks.of(call)
        p, n, k, r = z.shape
        place = stack.slot.to(z.device)[call.experts.expand(p, k)] - len(stack.frozen)
        on = place >= 0
        if call.gates is not None:
            on = on & (call.gates != 0)
        tokens = on.unsqueeze(2).expand(p, k, n)
        if real is not None:
            tokens = tokens & real.view(p, 1, n)
        rows = z.transpose(1, 2).reshape(p * k, n, r)
        group = place.clamp_min(0).flatten()
        return Features.by_group(rows, group, len(stack.active), tokens.reshape(p * k, n))

    def _z(self, call: Call, rank: int) -> Tensor:
        """Return the bottlenecks (p, n, k, r) of a call."""
        z = call.z
        if self.config.detach_input:
            if call.again is None:
                raise ConfigError("resora: detach_input: branches of a trunk cannot be read again")
            z = call.again()
        return z.view(*z.shape[:2], -1, rank)


class _Masks:
    """Which tokens of calls are real; one tensor for all calls that are alike in it."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, ...], Tensor | None] = {}

    def of(self, call: Call) -> Tensor | None:
        """Return (tokens,) bool in the order of the call's z, or None: all are."""
        route, (b, n) = call.route, call.shape
        key = (id(route), b, n)
        if key not in self._known:
            like = torch.empty(route.rows, b * n // max(1, route.rows), 0, device=call.z.device)
            real = route.real(like, answers=True)
            self._known[key] = None if real is None else real.flatten()
        real = self._known[key]
        if real is None or call.rows is None:
            return real
        return real.view(b, n)[call.rows].flatten()


def _sources(layers: nn.ModuleDict) -> Iterator[_Source]:
    for key, layer in layers.items():
        tower = key.split("/")[0]
        for inner, module in layer.named_modules():
            if not callable(getattr(module, "pairs", None)):
                continue
            name = ".".join(part for part in (key.replace("/", "."), inner) if part)
            name = name.removesuffix(".bank")
            bank: Any = module if isinstance(module, ExpertBank) else getattr(module, "bank", None)
            known = bank if isinstance(bank, ExpertBank | BranchBank) else None
            yield _Source(name, tower, module, known)
