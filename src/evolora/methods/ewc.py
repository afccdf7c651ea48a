"""EWC: one LoRA trained on each task in turn, held back where earlier tasks depend on it.

    L = L_task + strength * 1/2 sum_i F_i (theta_i - theta*_i)^2

theta are the LoRA's factors; F and theta* are in regularizers/elastic.py. Heads of finished tasks,
where there are any, are frozen as always and need no penalty.

Source: Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", PNAS 2017,
arXiv 1612.00796. Departures: it holds a LoRA, not all weights; importances of tasks are added up
and the newest values are the anchor, as in online EWC (arXiv 1805.06370).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from evolora.backbones.answer_tokens import answer_means
from evolora.backbones.base import Backbone, Batch, TextBackbone
from evolora.errors import ConfigError
from evolora.methods.lora import LoRAConfig, SequentialLoRA
from evolora.randomness import StepRandom, derive_seed, generator
from evolora.registry import METHODS
from evolora.regularizers.elastic import (
    ElasticMemory,
    diagonal_fisher,
    surprise,
    token_surprise,
)

GROUP = 8
"""Samples in one pass of measuring with drawn labels, see :func:`diagonal_fisher`."""


@dataclass(frozen=True, kw_only=True)
class EWCConfig(LoRAConfig):
    """Settings of EWC; see :class:`LoRAConfig` for those of its LoRA.

    Args:
        type: "ewc".
        strength: weight of the penalty (lambda); 0 is sequential LoRA.
        fisher: labels that the importance is measured with: "sampled" from the model's own answer,
            or the true ones ("empirical"; one sample at a time, which takes longer). Of a model
            that writes, each token is drawn after the true ones before it.
        fisher_samples: training samples of a task that it is measured on, at the task's end.
        decay: of earlier tasks' importance at the end of a task, in [0, 1]; 1 forgets none.
    """

    type: Literal["ewc"] = "ewc"
    strength: float = 1000.0
    fisher: Literal["sampled", "empirical"] = "sampled"
    fisher_samples: int = 256
    decay: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.strength >= 0.0:
            raise ConfigError(f"strength must be at least 0; got {self.strength}")
        if self.fisher_samples < 1:
            raise ConfigError(f"fisher_samples must be at least 1; got {self.fisher_samples}")
        if not 0.0 <= self.decay <= 1.0:
            raise ConfigError(f"decay must be in [0, 1]; got {self.decay}")


@METHODS.register("ewc", summary="one LoRA on each task in turn, elastic weight consolidation")
class EWC(SequentialLoRA):
    """One expert, whose values move the less the more earlier tasks depend on them."""

    config_class: ClassVar[Any] = EWCConfig
    config: EWCConfig

    def __init__(self, config: EWCConfig, backbone: Backbone, *, seed: int = 0) -> None:
        super().__init__(config, backbone, seed=seed)
        self.elastic = ElasticMemory()

    def allocate(self, task: int) -> None:
        """Make the expert at the first task, and room to remember it."""
        super().allocate(task)
        self.elastic.make_room(self.held())

    def held(self) -> list[nn.Parameter]:
        """Return the parameters that all tasks share."""
        return [parameter for parameter in self.layers.parameters() if parameter.requires_grad]

    def extra_losses(self, batch: Batch, embedding: Tensor) -> dict[str, Tensor]:
        """Return the penalty, from the second task on."""
        if len(self.labels) < 2 or self.config.strength == 0:
            return {}
        return {"elastic": self.config.strength * self.elastic.penalty(self.held())}

    def review(
        self, task: int, rows: int, read: Callable[[Sequence[int]], Iterable[Batch]]
    ) -> None:
        """Measure what the task depends on, over training samples spread evenly."""
        count = min(rows, self.config.fisher_samples)
        chosen = [index * rows // count for index in range(count)]
        fisher = diagonal_fisher(self._surprises(task, read(chosen)), self.held())
        self.elastic.remember(self.held(), fisher, decay=self.config.decay)

    def _surprises(self, task: int, batches: Iterable[Batch]) -> Iterator[Tensor]:
        """Yield -log p(y | x) of a few samples after others, run as in a training step."""
        labels, expert = self.labels[task], self.expert_task(task)
        sampled = self.config.fisher == "sampled"
        draw = generator(self.seed, "fisher", task) if sampled else None
        passes = 0
        for batch in batches:
            for rows in torch.split(torch.arange(len(batch)), GROUP if sampled else 1):
                random = StepRandom(derive_seed(self.seed, "fisher", task, passes))
                # what is kept of samples would be filled up to many rows
                part = replace(batch.take(rows), known=None, random=random)
                if isinstance(self.backbone, TextBackbone):
                    route = self.make_route(expert, part)
                    logits, answers = self.backbone.answer_logits(
                        part, route, limit=labels.max_new_tokens
                    )
                    yield answer_means(token_surprise(logits, answers, draw=draw), answers)
                    continue
                embedding = self.backbone.encode(part, self.make_route(expert, part))
                logits, targets = self.training_logits(embedding, part, labels, expert)
                yield surprise(logits, targets, several=labels.multi_label, draw=draw)
                passes += 1
