"""ReSoRA-style regulariser: the ranks of a low-rank update shall not do the same thing twice.

    L = L_task + lambda(t) * mean over updates of [ w_down R_down + w_up R_up ]

symbol -> code: lambda -> ``weight`` and its schedule ; R -> a measure of
:mod:`evolora.regularizers.redundancy`, of what an update reads (A, z) or writes (B, u).

Source: "Regularizing Subspace Redundancy of Low-Rank Adaptation" (ReSoRA), Zhu et al., ACM MM 2025,
arXiv 2507.20745. Only its outline is known to us: low-rank matrices are split into equivalent
subspaces, and redundancy among the feature distributions of their projections is penalised in
training, adaptively, at no cost in inference. Its formula, its weights and its results are not, so
this is "ReSoRA-style", and every choice below is ours. GOR (2306.10001) and O-LoRA (2310.14152) are
settings of it, see docs/resora.md.

Nothing is added to the model: no parameter, buffer or key of its state dict. Records of updates
come from wherever they stand: :mod:`evolora.regularizers.peft_records` (any PEFT model) or
:mod:`evolora.regularizers.bank_records` (a method's experts).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from evolora.errors import ConfigError
from evolora.randomness import generator
from evolora.registry import REGULARIZERS
from evolora.regularizers import between
from evolora.regularizers.features import Features, exact, mean_of_processes, of_all_processes
from evolora.regularizers.redundancy import OF_FEATURES, OF_PAIRS, Side, Update, redundancy
from evolora.regularizers.settings import SIDES, ResoraConfig

LEAST_REDUNDANCY = 1e-3
"""Below it, adaptivity "ratio" does not grow its weight any more."""


@dataclass(frozen=True, eq=False)
class Record:
    """The updates that train at one layer, and the frozen ones beside them.

    Args:
        name: of the layer.
        a: (e, r, d_in).
        b: (e, r, d_out): the columns of each update's B.
        features: what each made of the tokens that it saw, batched by e; or None.
        older: (a, b) of frozen updates (f, r', d) at the same layer.
    """

    name: str
    a: Tensor
    b: Tensor
    features: Features | None = None
    older: tuple[tuple[Tensor, Tensor], ...] = ()


@REGULARIZERS.register(
    "resora", summary="ReSoRA-style: the ranks of a low-rank update shall not repeat one another"
)
class Resora:
    """The loss of one configuration; keeps no state but the scalars of adaptivity "learned".

    Args:
        config: the settings.
        seed: from which tokens are drawn, where not all are taken.
    """

    config_class: ClassVar[Any] = ResoraConfig

    def __init__(self, config: ResoraConfig, *, seed: int = 0) -> None:
        self.config, self.seed = config, seed
        learned = config.active and config.adaptivity == "learned"
        self.scales: dict[Side, nn.Parameter] = {
            side: nn.Parameter(torch.zeros(()))
            for side in SIDES
            if learned and config.share(side) > 0
        }

    def features_of(self, seen: Sequence[tuple[Tensor, Tensor | None]]) -> list[Features]:
        """Return the features of activations, those of one shape at once.

        Args:
            seen: of each layer z (e, n, r), what e updates made of n tokens, and which of the
                tokens (n,) are real; None: all are.
        """
        alike: dict[tuple[object, ...], list[int]] = {}
        for index, (z, real) in enumerate(seen):
            key = (z.shape[1:], z.dtype, z.device, None if real is None else id(real))
            alike.setdefault(key, []).append(index)
        found: dict[int, Features] = {}
        for indices in alike.values():
            z, real = torch.cat([seen[index][0] for index in indices]), seen[indices[0]][1]
            z, real = self._drawn(z, real)
            real = None if real is None else real.expand(z.shape[:-1])
            joined = Features.of(z, real, tokens=self.config.reads_tokens)
            sizes = [len(seen[index][0]) for index in indices]
            found.update(zip(indices, joined.split(sizes), strict=True))
        return [found[index] for index in range(len(seen))]

    def _drawn(self, z: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return as many of the tokens of z (e, n, r) as are wanted, and which (n,) are real."""
        most, tokens = self.config.max_tokens, z.shape[-2]
        if most is None or tokens <= most:
            return z, real
        draw = generator(self.seed, "resora tokens", tokens)
        rows = torch.randperm(tokens, generator=draw)[:most].sort().values.to(z.device)
        return z.index_select(-2, rows), None if real is None else real[rows]

    def total(
        self,
        records: Sequence[Record],
        *,
        step: int,
        total_steps: int,
        task_loss: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted term of an optimizer step, and detached numbers to log.

        Args:
            records: of the forward that just ran.
            step: optimizer steps done before this one.
            total_steps: of the whole training, from which schedules are counted.
            task_loss: of the same forward; "ratio" reads its value.

        Raises:
            ConfigError: there is nothing to regularise, or no task loss where one is read.
        """
        config = self.config
        if not records:
            raise ConfigError("resora: no low-rank update trains now, so none can be regularised")
        if config.adaptivity == "ratio" and task_loss is None:
            raise ConfigError("resora: adaptivity 'ratio' needs task_loss")
        device = records[0].a.device
        loss, metrics = torch.zeros((), device=device), {}
        sides = {side: config.strength(side, step, total_steps) for side in SIDES}
        with torch.autocast(device.type, enabled=False):
            batches = self._batched(records) if config.across == "none" else []
            for side, strength in sides.items():
                if strength == 0.0:
                    continue
                if config.across == "none":
                    found = self._within(batches, side)
                else:
                    found = self._between(records, side)
                metrics[f"redundancy_{side}"] = found.detach()
                loss = loss + strength * self._adapted(found, side)
            if task_loss is not None and config.adaptivity == "ratio":
                scale = torch.zeros_like(loss)
                for side, strength in sides.items():
                    if strength > 0.0:
                        scale = scale + config.share(side) * metrics[f"redundancy_{side}"]
                loss = loss * (task_loss.detach().to(loss) / scale.clamp_min(LEAST_REDUNDANCY))
        metrics["resora"] = loss.detach()
        return loss, metrics

    def _adapted(self, found: Tensor, side: Side) -> Tensor:
        """Return exp(-s) R + s where s is learned; its gradient is that of all processes' mean."""
        if side not in self.scales:
            return found
        scale = self.scales[side].to(found.device)
        own = torch.exp(-scale) * mean_of_processes(found.detach()) + scale
        shown = torch.exp(-scale.detach()) * found
        return shown + scale.detach() + (own - own.detach())

    def _batched(self, records: Sequence[Record]) -> list[Update]:
        """Return the records' updates, those of one shape together."""
        config = self.config
        shapes: dict[tuple[object, ...], list[Record]] = {}
        for record in records:
            tokens = record.features.tokens if record.features is not None else None
            n = None if tokens is None else tokens.shape[-2]
            shape = (record.a.shape[1:], record.b.shape[1:], record.a.device)
            key = (*shape, record.features is None, n)
            shapes.setdefault(key, []).append(record)
        updates = []
        for group in shapes.values():
            known = [record.features for record in group if record.features is not None]
            a = torch.cat([exact(record.a) for record in group])
            b = torch.cat([exact(record.b) for record in group])
            updates.append(Update(a, b, Features.joined(known) if known else None))
        features = [update.features for update in updates if update.features is not None]
        if not config.whole_batch or len(features) < len(updates):
            return updates
        gathered = of_all_processes(features)
        return [replace(u, features=f) for u, f in zip(updates, gathered, strict=True)]

    def _within(self, batches: Sequence[Update], side: Side) -> Tensor:
        """Return the mean (or sum) over updates of the redundancy among an update's ranks."""
        config, measure = self.config, self.config.measures[side]
        values, counted = [], []
        for update in batches:
            found = redundancy(
                measure, side, update, config.groups, pairwise=self._weighs_pairs(measure)
            )
            enough = torch.ones_like(found)
            if measure in OF_FEATURES and update.features is not None:
                least = config.min_tokens or 4 * update.a.shape[-2]
                enough = (update.features.count >= least).to(found.dtype)
            values.append((found * enough).sum())
            counted.append(enough.sum())
        device = values[0].device  # layers of a large model may be on several
        total = torch.stack([value.float().to(device) for value in values]).sum()
        if config.reduction == "sum":
            return total
        return total / torch.stack([count.to(device) for count in counted]).sum().clamp_min(1.0)

    def _weighs_pairs(self, measure: str) -> bool:
        return self.config.adaptivity == "pairwise" and measure in OF_PAIRS

    def _between(self, records: Sequence[Record], side: Side) -> Tensor:
        """Return the mean (or sum) over layers of what updates at a layer have in common."""
        measure, terms = self.config.measures[side], []
        for record in records:
            own = exact(record.a if side == "down" else record.b)
            if self.config.across == "experts":
                if len(own) > 1:
                    terms.append(between.among(measure, own))
                continue
            older = [exact(a if side == "down" else b) for a, b in record.older]
            older = [part for part in older if len(part)]
            if older:
                terms.append(between.with_older(measure, own, older))
        if not terms:
            return records[0].a.sum().float() * 0.0
        total = torch.stack(terms).sum().float()
        return total if self.config.reduction == "sum" else total / len(terms)
