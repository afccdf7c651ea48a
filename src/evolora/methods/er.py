"""ER: one LoRA for all tasks; a share of every batch are remembered samples of earlier tasks.

    L = mean of the loss over a batch whose rows are new and replayed samples in turn

Remembered are raw samples, each without the modality that it lacked when it was learned; which ones
is drawn evenly among all samples seen (methods/reservoir.py). A batch is as large as any other
method's, so a step costs the same and sees that many fewer new samples. Heads of finished tasks,
where there are any, go on learning from their replayed samples.

Source: Chaudhry et al., "On Tiny Episodic Memories in Continual Learning", 2019, arXiv 1902.10486.
Departures: it trains a LoRA, not all weights; a sample enters the reservoir once, when its task
ends, not at every epoch, so replay begins with the second task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from evolora.backbones.base import Backbone, Batch, prompts_of
from evolora.errors import ConfigError
from evolora.methods.answers import all_prompts
from evolora.methods.lora import LoRAConfig, SequentialLoRA
from evolora.methods.reservoir import Reservoir, check_reservoir
from evolora.randomness import StepRandom
from evolora.registry import METHODS
from evolora.streams.task import LabelSpace

Parts = Mapping[int, tuple[Tensor, Batch]]
"""Task -> which rows of a batch are its, and these rows."""
Told = tuple[int, Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class ERConfig(LoRAConfig):
    """Settings of experience replay; see :class:`LoRAConfig` for those of its LoRA.

    Args:
        type: "er".
        capacity: samples remembered, of all tasks together.
        share: of every batch that is replayed, in (0, 1).
        logit_scope: classes of a sample's loss: those of its own "task", or all "seen" so far; None
            takes "seen" where heads answer, and "task" where class prompts do.
    """

    type: Literal["er"] = "er"
    capacity: int = 500
    share: float = 0.5
    logit_scope: Literal["task", "seen"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_reservoir(self.capacity, self.share)


@METHODS.register("er", summary="one LoRA on each task in turn, replaying samples of earlier ones")
class ER(SequentialLoRA):
    """One expert that keeps meeting what it has learned."""

    config_class: ClassVar[Any] = ERConfig
    config: ERConfig

    def __init__(self, config: ERConfig, backbone: Backbone, *, seed: int = 0) -> None:
        super().__init__(config, backbone, seed=seed)
        self.reservoir = Reservoir(config.capacity, config.share)
        if config.logit_scope and backbone.answers == "text":
            raise ConfigError(
                f"logit_scope: {config.logit_scope} is about classes, and this model writes its "
                "answers; leave it out"
            )
        scope = config.logit_scope or ("seen" if backbone.answers == "heads" else "task")
        self.all_seen = scope == "seen"

    def review(
        self, task: int, rows: int, read: Callable[[Sequence[int]], Iterable[Batch]]
    ) -> None:
        """Let the task's samples into the reservoir."""
        assert self.reservoir is not None
        self.reservoir.take_in(
            task, rows, lambda chosen: [k for part in read(chosen) for k in part.keys], self.seed
        )

    def task_loss(self, embedding: Tensor, batch: Batch, labels: LabelSpace, task: int) -> Tensor:
        """Return the mean loss of rows of several tasks, each among the classes of its scope."""
        if self.all_seen:
            seen, among = self._among_seen(batch)
            return super().task_loss(embedding, among, seen, task)
        if not batch.tasks:
            return super().task_loss(embedding, batch, labels, task)
        parts = {own: batch.of_task(own) for own in sorted(set(batch.step_tasks))}
        told = self._told_by_heads if self.heads is not None else self._told_by_prompts
        total = embedding.new_zeros(())
        for own, logits, targets in told(embedding, parts, batch.random):
            if len(logits):
                loss = self.objective.loss(logits, targets, self.labels[own])
                total = total + loss * (len(logits) / len(batch))
        return total

    def training_logits(
        self, embedding: Tensor, batch: Batch, labels: LabelSpace, task: int
    ) -> tuple[Tensor, Tensor]:
        """Return logits of the classes of ``labels``, by all heads where they compete."""
        if self.heads is None or not self.all_seen:
            return super().training_logits(embedding, batch, labels, task)
        return self.heads.among(embedding, labels, range(len(self.labels))), batch.labels

    def _told_by_heads(
        self, embedding: Tensor, parts: Parts, _: StepRandom | None
    ) -> Iterator[Told]:
        """Yield (task, logits, targets) of the rows of each task, by its own head."""
        assert self.heads is not None
        for own, (rows, part) in parts.items():
            logits = self.heads.of_task(embedding[rows], own)
            several = self.labels[own].multi_label  # filled up to the most classes of the batch
            yield own, logits, part.labels[:, : logits.shape[1]] if several else part.labels

    def _told_by_prompts(
        self, embedding: Tensor, parts: Parts, random: StepRandom | None
    ) -> Iterator[Told]:
        """Yield (task, logits, targets) of the rows of each task, by its own prompts.

        All prompts of the step run in one forward, alike in all processes.
        """
        backbone = prompts_of(self.backbone)
        together = all_prompts(self.labels)
        place = {prompt: index for index, prompt in enumerate(together.classes)}
        wanted: list[int] = []
        columns: dict[int, slice] = {}
        targets: dict[int, Tensor] = {}
        for own, (_, part) in parts.items():
            space = self.labels[own]
            classes, targets[own] = self.objective.step_classes(part, space)
            names = space.prompts()
            chosen = range(len(names)) if classes is None else classes
            columns[own] = slice(len(wanted), len(wanted) + len(chosen))
            wanted += [place[names[index]] for index in chosen]
        embedded = backbone.class_embeddings(
            together,
            self.expert_task(0),
            random=random.whole() if random else None,
            classes=wanted,
            ensemble=False,
            reuse=self.reuse,
        )
        for own, (rows, _) in parts.items():
            yield own, backbone.logits(embedding[rows], embedded[columns[own]]), targets[own]

    def _among_seen(self, batch: Batch) -> tuple[LabelSpace, Batch]:
        """Return all classes seen so far, and the batch labelled among them.

        A class that several tasks have is one class.
        """
        names = tuple(dict.fromkeys(name for own in self.labels for name in own.classes))
        place = {name: index for index, name in enumerate(names)}
        most = max(len(own.classes) for own in self.labels)
        places = torch.full((len(self.labels), most), len(names))
        for task, own in enumerate(self.labels):
            places[task, : len(own.classes)] = torch.tensor([place[name] for name in own.classes])
        assert batch.task is not None
        tasks = batch.tasks or (batch.task,) * len(batch)
        step, step_tasks = batch.step_labels, batch.step_tasks
        if step is not None:
            step = _placed(step, places[list(step_tasks or (batch.task,) * len(step))], len(names))
        among = replace(
            batch,
            labels=_placed(batch.labels, places[list(tasks)], len(names)),
            tasks=(),
            step_labels=step,
            step_tasks=(),
        )
        return replace(self.labels[0], classes=names), among


def _placed(labels: Tensor, places: Tensor, count: int) -> Tensor:
    """Return labels among ``count`` classes, given where each row's own classes (b, c) stand.

    Args:
        labels: (b,) indices of own classes, or (b, c) of 0 and 1.
        places: (b, c); ``count`` for what is no class of the row's task.
        count: of all classes.
    """
    places = places.to(labels.device)
    if labels.dim() == 1:
        return places.gather(1, labels.unsqueeze(1)).squeeze(1)
    found = labels.new_zeros(len(labels), count + 1)
    return found.scatter_(1, places[:, : labels.shape[1]], labels)[:, :count]
