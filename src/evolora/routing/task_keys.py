"""Task keys: a task is recognised by how near an input is to the mean of its training inputs.

    K_t^m = mean of u_m over the training samples of task t that have modality m
    S_t = mean over the modalities that the input has of cos(u_m, K_t^m) ;   t* = argmax S_t

or, with ``metric: mahalanobis``, S_t = -|W_m (u_m - K_t^m)|^2, where W_m^T W_m is the inverse of
the covariance that u_m has within tasks: what differs inside every task tells little between them.

u_m is a descriptor of the frozen base with no expert running, so keys neither drift nor depend on
the task they shall tell. Source: DeLo's task-key memory (arXiv 2603.01632); what is ours: exact
means, one decision per sample for the whole model, tasks that were not seen cannot win. The
released code keeps 72 keys per task as moving averages from zero, lets each vote for the whole
batch, and never updates them. The shared covariance is that of streaming discriminant analysis
(Hayes and Kanan, arXiv 1909.01520), of tasks in place of classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from evolora.errors import ConfigError
from evolora.experts.bank import GrowingStack
from evolora.routing.route import BASE
from evolora.routing.selection import Selection
from evolora.routing.selector import Selector

EMA_ROWS = 64
"""Training samples per update of a moving average."""


@dataclass(frozen=True, kw_only=True)
class TaskKeySelectorConfig:
    """Settings of the task keys.

    Args:
        type: "task-keys".
        keys: "mean" over all training samples, or "ema": a moving average from zero over batches,
            as the released code means to keep.
        decay: of the moving average (0.99).
        metric: "cosine" (DeLo's), or "mahalanobis": distances in units of the spread within tasks,
            summed over all tasks; keeps m * f * f values more, whatever the number of tasks.
        shrinkage: share of the covariance that is replaced by its mean variance, in (0, 1].
        per_case: a key for complete inputs and one for each set of modalities left, besides the
            task's own; an input is compared with the key of its case where the task has one.
        group_size: rows decided together by majority; 1 decides each alone. The released code takes
            the evaluation batch; kept to reproduce it only.
    """

    type: Literal["task-keys"] = "task-keys"
    keys: Literal["mean", "ema"] = "mean"
    decay: float = 0.99
    metric: Literal["cosine", "mahalanobis"] = "cosine"
    shrinkage: float = 0.1
    per_case: bool = False
    group_size: int = 1

    def __post_init__(self) -> None:
        if not 0.0 <= self.decay < 1.0:
            raise ConfigError(f"decay must be in [0, 1); got {self.decay}")
        if not 0.0 < self.shrinkage <= 1.0:
            raise ConfigError(f"shrinkage must be in (0, 1]; got {self.shrinkage}")
        if self.group_size < 1:
            raise ConfigError(f"group_size must be at least 1; got {self.group_size}")


@dataclass(frozen=True, kw_only=True)
class BoundedTaskKeySelectorConfig(TaskKeySelectorConfig):
    """Task keys that may leave an input to the base; see :class:`TaskKeySelectorConfig`.

    Args:
        quantile: share of held-out samples of a task that must be accepted, in (0, 1]; what is
            farther from its nearest key than these goes to the base. None: nothing does.
        margin: factor on that distance; test inputs drift further than held-out ones.
    """

    quantile: float | None = None
    margin: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quantile is not None and not 0.0 < self.quantile <= 1.0:
            raise ConfigError(f"quantile must be in (0, 1], or null; got {self.quantile}")
        if not self.margin > 0:
            raise ConfigError(f"margin must be positive; got {self.margin}")


class TaskKeySelector(Selector):
    """Keys of all tasks; reads the feature "modalities": (b, m, f), NaN where one is missing.

    Args:
        config: settings.
        modalities: m.
        width: f.
        device: where the keys are.
    """

    feature = "modalities"

    def __init__(
        self,
        config: TaskKeySelectorConfig,
        modalities: int,
        width: int,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        # Row: the key of all inputs, then one for each set of modalities that is there (bit mask).
        cases = 2**modalities if config.per_case else 1
        self.keys = GrowingStack(cases, modalities, width, device=device)
        self.scatter: Tensor | None
        self.whitening: Tensor | None
        self.counts: Tensor | None
        square = torch.zeros(modalities, width, width, device=device)
        used = config.metric == "mahalanobis"
        self.register_buffer("scatter", square if used else None)
        self.register_buffer("whitening", square.clone() if used else None)
        self.register_buffer("counts", torch.zeros(modalities, device=device) if used else None)

    def learn(self, task: int, train: Tensor, held_out: Tensor, seed: int) -> None:
        """Keep the mean descriptor of each modality, over the samples (n, m, f) that have it."""
        self._learn_spread(train)
        rows = [self._key(train)]
        for case in range(1, self.keys.shape[0]):
            rows.append(self._key(train[_cases(train) == case]))
        self.keys.grow(torch.stack(rows).unsqueeze(0))
        self.keys.freeze(range(len(self.keys)))

    def select(self, features: Mapping[str, Tensor], rows: int, oracle: int | None) -> Selection:
        """Return the nearest learned task of each row; scores are 1 - S, or distances."""
        if len(self.keys) == 0:
            return Selection(tasks=torch.full((rows,), BASE, dtype=torch.long))
        inputs = features["modalities"]
        nearness = self.nearness(inputs)
        tasks = nearness.argmax(dim=1)
        if self.config.group_size > 1:
            groups = torch.split(tasks, self.config.group_size)
            tasks = torch.cat([group.mode().values.expand(len(group)) for group in groups])
        nearest = 1.0 if self.whitening is None else 0.0
        return Selection(tasks=tasks, scores=nearest - nearness)

    def nearness(self, inputs: Tensor) -> Tensor:
        """Return S (b, t) of descriptors (b, m, f)."""
        keys = self.keys.all().to(inputs.device, inputs.dtype)  # (t, cases, m, f)
        wanted = keys[:, 0].expand(len(inputs), -1, -1, -1)
        if self.config.per_case:
            own = keys[:, _cases(inputs)].transpose(0, 1)
            wanted = torch.where(own.isnan(), wanted, own)
        if self.whitening is None:
            near = F.cosine_similarity(inputs.unsqueeze(1), wanted, dim=3)  # (b, t, m)
        else:
            away = (inputs.unsqueeze(1) - wanted).transpose(1, 2).transpose(0, 1)  # (m, b, t, f)
            whitening = self.whitening.to(inputs.device, inputs.dtype)
            away = away.flatten(1, 2) @ whitening.transpose(1, 2)
            near = -away.square().sum(dim=2).view(len(whitening), len(inputs), -1).permute(1, 2, 0)
        return near.nanmean(dim=2).nan_to_num(nan=-torch.inf)

    def _learn_spread(self, train: Tensor) -> None:
        """Add a task's (n, m, f) to the covariance within tasks and find what whitens it."""
        if self.scatter is None or self.counts is None or self.whitening is None:
            return
        for modality, rows in enumerate(train.unbind(1)):
            there = rows[~rows.isnan().any(1)].to(self.scatter)
            if len(there) == 0:
                continue
            spread = there - there.mean(dim=0)
            self.scatter[modality] += spread.T @ spread
            self.counts[modality] += len(there)
            covariance = (self.scatter[modality] / self.counts[modality]).double()
            variance = covariance.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
            share = self.config.shrinkage
            covariance = (1.0 - share) * covariance
            covariance.diagonal().add_(share * variance)
            lower = torch.linalg.cholesky(covariance)
            ones = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
            found = torch.linalg.solve_triangular(lower, ones, upper=False)
            self.whitening[modality] = found.to(self.whitening)

    def _key(self, train: Tensor) -> Tensor:
        """Return (m, f), NaN for a modality that no sample has."""
        if self.config.keys == "mean":
            return train.nanmean(dim=0)
        return torch.stack(
            [moving_average(one[~one.isnan().any(1)], self.config.decay) for one in train.unbind(1)]
        )


class BoundedTaskKeySelector(TaskKeySelector):
    """Task keys with a distance for each, beyond which an input is the base's.

    A distance is measured when its task ends. With ``metric: mahalanobis`` later tasks change the
    covariance, and so what a distance means, a little: an old one is not measured again.
    """

    def __init__(
        self,
        config: BoundedTaskKeySelectorConfig,
        modalities: int,
        width: int,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(config, modalities, width, device=device)
        self.bounds = GrowingStack(device=device)

    def learn(self, task: int, train: Tensor, held_out: Tensor, seed: int) -> None:
        """Keep the key, and how far held-out samples (n, m, f) of the task are from it."""
        super().learn(task, train, held_out, seed)
        assert isinstance(self.config, BoundedTaskKeySelectorConfig)
        bound = torch.inf
        if self.config.quantile is not None:
            away = -self.nearness(held_out.to(self.keys.active.device))[:, -1]
            least = 0.0 if self.whitening is not None else -1.0  # of the nearest input there can be
            away = torch.quantile(away[away.isfinite()].float() - least, self.config.quantile)
            bound = float(away) * self.config.margin + least
        self.bounds.grow(torch.tensor([bound]))
        self.bounds.freeze(range(len(self.bounds)))

    def select(self, features: Mapping[str, Tensor], rows: int, oracle: int | None) -> Selection:
        """Return the nearest learned task of each row, or BASE where none is near enough."""
        found = super().select(features, rows, oracle)
        if len(self.keys) == 0:
            return found
        away = -self.nearness(features["modalities"]).gather(1, found.tasks.unsqueeze(1))[:, 0]
        bounds = self.bounds.all().to(away)[found.tasks]
        return replace(found, tasks=found.tasks.masked_fill(~(away <= bounds), BASE))


def moving_average(rows: Tensor, decay: float, size: int = EMA_ROWS) -> Tensor:
    """Return k of k <- decay k + (1 - decay) mean(batch) over rows (n, f) in turn, from zero.

    Without any row there is nothing to remember: NaN.
    """
    if len(rows) == 0:
        return rows.new_full(rows.shape[1:], torch.nan)
    key = torch.zeros_like(rows[0])
    for batch in torch.split(rows, size):
        key = decay * key + (1.0 - decay) * batch.mean(dim=0)
    return key


def _cases(inputs: Tensor) -> Tensor:
    """Return which modalities (b, m, f) has, as a bit mask (b,)."""
    there = ~inputs.isnan().any(dim=2)
    weights = 2 ** torch.arange(there.shape[1], device=inputs.device)
    return (there * weights).sum(dim=1)
