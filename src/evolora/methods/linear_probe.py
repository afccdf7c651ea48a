"""Linear probe: one linear classifier per task on the frozen image embedding.

    logits = W_t f(x) ;  W_t starts at the class-prompt embeddings (so it starts as zero-shot)

What a frozen feature alone can do: every expert method has to beat it. A class that no task taught
is answered by its prompt embedding, i.e. zero-shot. Starting at the prompt embeddings is WiSE-FT's
probe (arXiv 2109.01903, section 3), stronger than a random start when samples are few.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from evolora.backbones.base import Backbone, Batch, Encoded, prompts_of
from evolora.experts.bank import GrowingStack
from evolora.methods.base import Method
from evolora.registry import METHODS
from evolora.routing.route import BASE
from evolora.routing.selection import Chosen
from evolora.streams.task import LabelSpace


@dataclass(frozen=True, kw_only=True)
class LinearProbeConfig:
    """Settings of the linear probe.

    Args:
        type: "linear-probe".
    """

    type: Literal["linear-probe"] = "linear-probe"


@METHODS.register("linear-probe", summary="one linear classifier per task on frozen features")
class LinearProbe(Method):
    """Class vectors trained on frozen embeddings; the towers never change."""

    config_class = LinearProbeConfig

    def __init__(self, config: Any, backbone: Backbone, *, seed: int = 0) -> None:
        super().__init__(config, backbone, seed=seed)
        self.vectors = GrowingStack(backbone.width, device=backbone.device)

    def allocate(self, task: int) -> None:
        """Start the task's class vectors at its prompt embeddings; freeze all older ones."""
        if self.heads is not None:  # they are the probe
            return
        self.vectors.freeze(range(len(self.vectors)))
        labels = self.labels[task]
        if self.backbone.device.type == "meta":
            self.vectors.grow(torch.empty(len(labels.classes), self.backbone.width, device="meta"))
            return
        with torch.no_grad():
            self.vectors.grow(super().classifier(labels, BASE))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the cross-entropy of the current task's class vectors."""
        assert batch.task is not None
        embedding = self.backbone.encode_base(batch, features=False).embedding
        loss = self.task_loss(embedding, batch, self.labels[batch.task], BASE)
        return {"loss": loss, "task": loss.detach()}

    def training_logits(
        self, embedding: Tensor, batch: Batch, labels: LabelSpace, task: int
    ) -> tuple[Tensor, Tensor]:
        """Return logits of the current task's class vectors (or of its head), and the labels."""
        if self.heads is not None:
            return super().training_logits(embedding, batch, labels, task)
        return prompts_of(self.backbone).logits(embedding, self.vectors.active), batch.labels

    def embed(self, batch: Batch, encoded: Encoded | None, tasks: Chosen) -> Tensor:
        """Return the base's embedding: the label space alone says which vectors are used."""
        return (encoded or self.backbone.encode_base(batch, features=False)).embedding

    def classifier(self, labels: LabelSpace, task: int) -> Tensor:
        """Return (c, p): learned vectors where a task taught the class, else prompt embeddings."""
        classes = super().classifier(labels, BASE).clone()
        learned = self._learned_rows(labels)
        if learned:
            rows = torch.tensor(list(learned.values()), device=classes.device)
            classes[torch.tensor(list(learned), device=classes.device)] = self.vectors.take(rows)
        return classes

    def _learned_rows(self, labels: LabelSpace) -> dict[int, int]:
        """Map class index -> vector row: of the task with the same classes, else of the newest."""
        known: dict[str, int] = {}
        first = 0
        for own in self.labels:
            rows = {name: first + index for index, name in enumerate(own.classes)}
            if own.classes == labels.classes:
                return {index: rows[name] for index, name in enumerate(labels.classes)}
            known.update(rows)
            first += len(own.classes)
        return {index: known[name] for index, name in enumerate(labels.classes) if name in known}
