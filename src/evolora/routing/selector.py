"""Selectors: recognise, per sample, which learned task an input belongs to, or that none does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from evolora.errors import ConfigError
from evolora.experts.bank import GrowingStack
from evolora.routing.autoencoders import (
    AutoEncoderBank,
    AutoEncoderTraining,
    UnitAutoEncoderTraining,
)
from evolora.routing.route import BASE
from evolora.routing.selection import Selection
from evolora.routing.voting import ballots, elected, elected_helper


class Selector(nn.Module):
    """Contract of a selector. The only thing it may look at is features of the frozen base."""

    feature: str | None = None
    """Name of the base features it reads (see ``Encoded.features``), or None for none."""

    @property
    def wants_reference(self) -> str | None:
        """Folder of images that :meth:`learn_reference` must see before any task, or None."""
        return None

    def learn_reference(self, features: Tensor, seed: int) -> None:
        """Learn from reference features (n, f) what belongs to no task."""

    def learn(self, task: int, train: Tensor, held_out: Tensor, seed: int) -> None:
        """Learn to recognise ``task`` from features (n, f); thresholds come from ``held_out``."""

    def select(self, features: Mapping[str, Tensor], rows: int, oracle: int | None) -> Selection:
        """Return the task of each row. ``oracle`` is the true task, None if it is not learned."""
        raise TypeError(f"{type(self).__name__} must define select")

    @property
    def helps(self) -> bool:
        """Whether a row may have a second task that helps its own."""
        return False

    def helpers(self, features: Mapping[str, Tensor], tasks: Tensor) -> Tensor | None:
        """Return who helps rows whose tasks (b,) are known: a task or BASE; None if nobody does."""
        return None


class AlwaysSelector(Selector):
    """No recognition: every row goes to one set of experts, or to the base (-1)."""

    def __init__(self, task: int = 0) -> None:
        super().__init__()
        self.task = task

    def select(self, features: Mapping[str, Tensor], rows: int, oracle: int | None) -> Selection:
        """Return the same task for every row."""
        return Selection(tasks=torch.full((rows,), self.task, dtype=torch.long))


class OracleSelector(Selector):
    """The true task is told; an unlearned task goes to the base. An upper bound, not a method."""

    def select(self, features: Mapping[str, Tensor], rows: int, oracle: int | None) -> Selection:
        """Return the true task for every row."""
        task = BASE if oracle is None else oracle
        return Selection(tasks=torch.full((rows,), task, dtype=torch.long))


@dataclass(frozen=True, kw_only=True)
class NoSelectorConfig:
    """Every input is answered alike: by the one set of experts that all tasks share.

    Args:
        type: "none".
    """

    type: Literal["none"] = "none"


@dataclass(frozen=True, kw_only=True)
class OracleSelectorConfig:
    """The true task is told (upper bound).

    Args:
        type: "oracle".
    """

    type: Literal["oracle"] = "oracle"


@dataclass(frozen=True, kw_only=True)
class AutoEncoderSelectorConfig:
    """DDAS: distribution discriminative auto-selector (arXiv 2403.11549, section 3.3).

    Args:
        type: "auto-encoder".
        feature: "layers" (token statistics of four depths of the frozen tower, ours), "pooled" (its
            output), "alexnet" (the authors': conv5 before its activation, needs a weights file),
            "max-pooled" (D-MoLE's, of models that write), or "auto": "max-pooled" or else "layers".
        feature_path: weights file of the "alexnet" features.
        threshold: "quantile" calibrates each task on held-out errors; a number is used as it is
            for all tasks (the authors': 0.0655 with "alexnet" features).
        quantile: share of held-out samples of the task that must be accepted, in (0, 1].
        margin: factor on the calibrated threshold; test inputs drift further than held-out ones.
        group_size: rows decided together by their mean error; 1 decides each row alone. The authors
            use the evaluation batch (128); kept to reproduce them only.
        strict: whether an error must be below the threshold, or may be equal to it.
        choose: "nearest" asks the task of the least error alone whether it takes the row;
            "nearest-passing" gives the row to the nearest of those that take it (D-MoLE).
        reference: folder of images for a reference auto-encoder that competes with the tasks' and
            means "base" when it wins (the authors': TinyImageNet); None uses the threshold alone.
        training: how each auto-encoder is fitted.
    """

    type: Literal["auto-encoder"] = "auto-encoder"
    feature: Literal["layers", "pooled", "alexnet", "max-pooled", "auto"] = "layers"
    feature_path: str | None = None
    threshold: Literal["quantile"] | float = "quantile"
    quantile: float = 0.98
    margin: float = 1.0
    group_size: int = 1
    strict: bool = False
    choose: Literal["nearest", "nearest-passing"] = "nearest"
    reference: str | None = None
    training: AutoEncoderTraining = field(default_factory=AutoEncoderTraining)

    def __post_init__(self) -> None:
        if not 0.0 < self.quantile <= 1.0:
            raise ConfigError(f"quantile must be in (0, 1]; got {self.quantile}")
        if self.threshold != "quantile" and not (
            isinstance(self.threshold, int | float) and self.threshold >= 0
        ):
            raise ConfigError(
                f"threshold must be 'quantile' or a number of at least 0; got {self.threshold!r}"
            )
        if not self.margin > 0:
            raise ConfigError(f"margin must be positive; got {self.margin}")
        if self.group_size < 1:
            raise ConfigError(f"group_size must be at least 1; got {self.group_size}")
        if self.feature == "alexnet" and not self.feature_path:
            raise ConfigError("feature 'alexnet' needs feature_path, the file of its weights")


@dataclass(frozen=True, kw_only=True)
class RecogniserConfig(AutoEncoderSelectorConfig):
    """The same with D-MoLE's defaults; see :class:`AutoEncoderSelectorConfig`."""

    feature: Literal["layers", "pooled", "alexnet", "max-pooled", "auto"] = "auto"
    quantile: float = 0.95
    strict: bool = True
    choose: Literal["nearest", "nearest-passing"] = "nearest-passing"
    training: UnitAutoEncoderTraining = field(default_factory=UnitAutoEncoderTraining)


Router = Literal["per-sample", "batch-vote", "oracle"]
Helper = Literal["threshold", "nearest", "none"]


class AutoEncoderSelector(Selector):
    """One auto-encoder per task on frozen features; the nearest task within its threshold answers.

    The row goes to the task of the smallest reconstruction error if that is at most the task's
    threshold (equal stays in), else to the base. Its score for a task is the error over the
    threshold. Ranking by scores instead would favour tasks of loose thresholds (measured on
    mosaic/domains: 93.9 instead of 97.9 % of seen inputs recognised).

    A helper of a row of task k is one of the tasks before k, whose auto-encoders never change: the
    same row has the same helper while k is learned and ever after.

    Args:
        config: see :class:`AutoEncoderSelectorConfig`.
        features: width of the routing features.
        router: "per-sample"; "batch-vote": the rows of a batch elect its tasks; "oracle": the true
            task is told.
        helper: the nearest earlier task that takes the row ("threshold"), the "nearest" one whether
            it does or not, or "none".
    """

    def __init__(
        self,
        config: AutoEncoderSelectorConfig,
        features: int,
        *,
        device: torch.device | str | None = None,
        router: Router = "per-sample",
        helper: Helper = "none",
    ) -> None:
        super().__init__()
        self.config, self.feature = config, config.feature
        self.router, self.helper = router, helper
        squash, hidden = config.training.squash, config.training.hidden
        self.bank = AutoEncoderBank(features, hidden, squash, device=device)
        self.thresholds = GrowingStack(device=device)
        self.reference = AutoEncoderBank(features, hidden, squash, device=device)

    def learn(self, task: int, train: Tensor, held_out: Tensor, seed: int) -> None:
        """Fit the task's auto-encoder and calibrate its threshold."""
        if task != len(self.bank):
            raise ConfigError(f"tasks are learned in order: expected {len(self.bank)}, got {task}")
        self.bank.fit(train, self.config.training, seed)
        self._add_threshold(self.calibrate(held_out))

    @property
    def wants_reference(self) -> str | None:
        """The configured folder, until it is learned."""
        return None if len(self.reference) else self.config.reference

    def learn_reference(self, features: Tensor, seed: int) -> None:
        """Fit the reference auto-encoder (n, f); whatever it reconstructs best goes to the base."""
        self.reference.fit(features, self.config.training, seed)

    def calibrate(self, held_out: Tensor) -> float:
        """Return the newest task's threshold from held-out features (n, f)."""
        if self.config.threshold != "quantile":
            return float(self.config.threshold)
        errors = self.bank.errors(held_out)[:, -1]
        return float(torch.quantile(errors, self.config.quantile)) * self.config.margin

    def _add_threshold(self, threshold: float) -> None:
        self.thresholds.grow(torch.tensor([threshold]))
        self.thresholds.freeze(range(len(self.thresholds)))

    def select(self, features: Mapping[str, Tensor], rows: int, oracle: int | None) -> Selection:
        """Return each row's nearest task, or BASE where it is outside every task."""
        if len(self.bank) == 0:
            return Selection(tasks=torch.full((rows,), BASE, dtype=torch.long))
        values = features[self.feature or ""]
        errors = self._grouped(self.bank.errors(values))
        scores = errors / self.thresholds.all().to(errors)
        if self.router == "batch-vote":
            first, second = (*elected(self._votes(errors)), BASE, BASE)[:2]
            helpers = None if self.helper == "none" else errors.new_full((rows,), second).long()
            return Selection(
                tasks=errors.new_full((rows,), first).long(), scores=scores, helpers=helpers
            )
        if self.router == "oracle":
            tasks = errors.new_full((rows,), BASE if oracle is None else oracle).long()
        else:
            tasks = self._nearest(errors, values)
        return Selection(tasks=tasks, scores=scores, helpers=self._helpers(errors, tasks))

    @property
    def helps(self) -> bool:
        """Whether there are earlier tasks, and they may help."""
        return self.helper != "none" and len(self.bank) > 0

    def helpers(self, features: Mapping[str, Tensor], tasks: Tensor) -> Tensor | None:
        """Return the earlier task that helps each row of known tasks (b,), or BASE."""
        if not self.helps:
            return None
        return self._helpers(self._grouped(self.bank.errors(features[self.feature or ""])), tasks)

    def _nearest(self, errors: Tensor, values: Tensor) -> Tensor:
        """Return the task (b,) that each row goes to by its errors (b, t), or BASE."""
        taken = self._taken(errors)
        if self.config.choose == "nearest-passing":
            tasks = ballots(errors, taken)
        else:
            near = errors.argmin(dim=1)
            own = taken.gather(1, near.unsqueeze(1)).squeeze(1)
            tasks = near.masked_fill(~own, BASE)
        if len(self.reference):
            own = errors.gather(1, tasks.clamp_min(0).unsqueeze(1)).squeeze(1)
            tasks = tasks.masked_fill(
                self._grouped(self.reference.errors(values))[:, 0] <= own, BASE
            )
        return tasks

    def _taken(self, errors: Tensor) -> Tensor:
        """Return which tasks take which rows (b, t); what is not a number is no task's."""
        thresholds = self.thresholds.all().to(errors)
        return errors < thresholds if self.config.strict else errors <= thresholds

    def _votes(self, errors: Tensor, before: Tensor | None = None) -> Tensor:
        """Return the vote (b,) of each row, for a task before its own (b,) if that is given."""
        taken = self._taken(errors)
        if before is not None:
            if self.helper == "nearest":
                taken = errors.isfinite()
            taken = taken & (torch.arange(errors.shape[1], device=errors.device) < before[:, None])
        return ballots(errors, taken)

    def _helpers(self, errors: Tensor, tasks: Tensor) -> Tensor | None:
        """Return who helps rows of tasks (b,), by their errors (b, t)."""
        if self.helper == "none":
            return None
        votes = self._votes(errors, tasks.to(errors.device))
        if self.router == "batch-vote":
            helper = elected_helper(votes)
            return torch.full_like(votes, helper).masked_fill(tasks.to(votes) <= helper, BASE)
        return votes

    def _grouped(self, values: Tensor) -> Tensor:
        """Average (b, t) over consecutive groups of ``group_size`` rows (the last may be short)."""
        if self.config.group_size == 1:
            return values
        parts = torch.split(values, self.config.group_size)
        return torch.cat([part.mean(dim=0, keepdim=True).expand_as(part) for part in parts])
