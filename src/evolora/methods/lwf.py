"""LwF: one LoRA for all tasks, which answers a new task's inputs for earlier tasks as before.

    L = L_task + strength * sum_{j<t} KL(q_j || p_j),  q_j, p_j at temperature T

p_j are the chances of the classes of an earlier task j on the inputs of the task that is learned,
q_j what they were when that began. Where the model writes, the sum is one term: the mean over a
row's answer tokens of the divergence of their distributions, each after the true tokens before it.
The teacher is a frozen copy of the LoRA, another expert of the bank until the task ends: a step
runs the model once more, without gradient, under a route to it. No earlier data is kept.

Source: Li & Hoiem, "Learning without Forgetting", ECCV 2016, arXiv 1606.09282; T = 2 and strength 1
(lambda_o) as there. The term is in regularizers/distillation.py. Departures: it trains a LoRA, not
all weights; heads of earlier tasks stay frozen; the teacher answers at each step, under the step's
augmentation, not once before the task; there is no warm-up of the new head alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from evolora.backbones.answer_tokens import answer_means, token_losses
from evolora.backbones.base import Backbone, Batch, TextBackbone, prompts_of
from evolora.errors import ConfigError
from evolora.experts.bank import ExpertBank
from evolora.methods.answers import all_prompts, answer_limit
from evolora.methods.lora import LoRAConfig, LoRALayer, SequentialLoRA
from evolora.registry import METHODS
from evolora.regularizers.distillation import distillation
from evolora.routing.route import Route
from evolora.streams.task import LabelSpace

STUDENT, TEACHER = 0, 1


@dataclass(frozen=True, kw_only=True)
class LwFConfig(LoRAConfig):
    """Settings of LwF; see :class:`LoRAConfig` for those of its LoRA.

    Args:
        type: "lwf".
        strength: weight of the divergence from the teacher (lambda_o); 0 is sequential LoRA.
        temperature: of both answers (T), above 0.
    """

    type: Literal["lwf"] = "lwf"
    strength: float = 1.0
    temperature: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.strength >= 0.0:
            raise ConfigError(f"strength must be at least 0; got {self.strength}")
        if not self.temperature > 0.0:
            raise ConfigError(f"temperature must be above 0; got {self.temperature}")


@METHODS.register("lwf", summary="one LoRA on each task in turn, learning without forgetting")
class LwF(SequentialLoRA):
    """One expert that learns, and while it learns a copy of what it was."""

    config_class: ClassVar[Any] = LwFConfig
    config: LwFConfig

    def __init__(self, config: LwFConfig, backbone: Backbone, *, seed: int = 0) -> None:
        super().__init__(config, backbone, seed=seed)
        self._teacher_state = 0

    def allocate(self, task: int) -> None:
        """Make the expert at the first task; before every other one, copy it."""
        super().allocate(task)
        if task > 0 and self.config.strength > 0:
            for bank in self._banks():
                bank.add_copy(STUDENT)
            self._teacher_state = self.backbone.new_state()

    def finish_task(self) -> None:
        """Let the copy go."""
        for bank in self._banks():
            bank.drop(range(TEACHER, len(bank)))

    def loss_under(
        self, route: Route, batch: Batch, labels: LabelSpace, task: int
    ) -> tuple[Tensor, Tensor]:
        """Return the task's loss and the embedding; of a model that writes, logits (b, a, c)."""
        if not isinstance(self.backbone, TextBackbone):
            return super().loss_under(route, batch, labels, task)
        limit = answer_limit(batch, labels, self.labels)
        logits, answers = self.backbone.answer_logits(batch, route, limit=limit)
        losses = token_losses(logits, answers, self.objective.label_smoothing)
        return answer_means(losses, answers).mean(), logits

    def extra_losses(self, batch: Batch, embedding: Tensor) -> dict[str, Tensor]:
        """Return the divergence from the teacher's answers, from the second task on."""
        if len(self.labels) < 2 or self.config.strength == 0:
            return {}
        plain = replace(batch, random=None)  # the teacher drops nothing out
        route = self.make_route(TEACHER, plain)
        if isinstance(self.backbone, TextBackbone):
            limit = answer_limit(batch, self.labels[-1], self.labels)
            with torch.no_grad():
                wanted, answers = self.backbone.answer_logits(plain, route, limit=limit)
            each = distillation(embedding, wanted, temperature=self.config.temperature)
            return {"distillation": self.config.strength * answer_means(each, answers).mean()}
        with torch.no_grad():
            told = list(self._earlier_logits(self.backbone.encode(plain, route), plain, TEACHER))
        own = self._earlier_logits(embedding, batch, STUDENT)
        total = embedding.new_zeros(())
        for space, logits, wanted in zip(self.labels[:-1], own, told, strict=True):
            each = distillation(
                logits, wanted, temperature=self.config.temperature, several=space.multi_label
            )
            total = total + each.mean()
        return {"distillation": self.config.strength * total}

    def _earlier_logits(self, embedding: Tensor, batch: Batch, expert: int) -> Iterator[Tensor]:
        """Yield logits (b, c) of the classes of each earlier task, by its head or its prompts.

        All prompts run in one forward; those of the teacher once in a task.
        """
        spaces = self.labels[:-1]
        if self.heads is not None:
            for task in range(len(spaces)):
                yield self.heads.of_task(embedding, task)
            return
        backbone, together = prompts_of(self.backbone), all_prompts(spaces)
        state = self._teacher_state
        if expert == STUDENT and not torch.is_grad_enabled():
            state = self._state_version()  # whoever only looks at the loss: it may be kept as well
        place = {prompt: index for index, prompt in enumerate(together.classes)}
        embedded = backbone.class_embeddings(
            together,
            expert,
            random=batch.random.whole() if batch.random else None,
            ensemble=False,
            version=state,
            reuse=self.reuse,
        )
        for own in spaces:
            rows = embedded[[place[prompt] for prompt in own.prompts()]]
            yield backbone.logits(embedding, rows)

    def _banks(self) -> list[ExpertBank]:
        return [layer.bank for layer in self.layers.values() if isinstance(layer, LoRALayer)]
