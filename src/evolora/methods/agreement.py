"""Losses that draw a sample's modalities together, so that one can stand in for another (DeLo).

align       = mean(1 - cos(q_image, q_text))                        over complete samples
consistency = KL(answer with both || answer without one of them)    over complete samples
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from evolora.backbones.batch import Batch

if TYPE_CHECKING:
    from evolora.methods.base import Method

Direction = Literal["distil", "released"]


def complete_rows(batch: Batch, device: torch.device) -> Tensor:
    """Return the indices of the samples that have every modality."""
    complete = torch.ones(len(batch), dtype=torch.bool, device=device)
    for present in batch.present.values():
        complete = complete & present
    return complete.nonzero()[:, 0]


def alignment(queries: Tensor) -> Tensor:
    """Return the mean of 1 - cos between the two queries of each row (b, 2, q)."""
    return (1.0 - F.cosine_similarity(queries[:, 0], queries[:, 1], dim=1)).mean()


def consistency(
    method: Method, batch: Batch, embedding: Tensor, rows: Tensor, direction: Direction
) -> Tensor:
    """Return how far answers without a modality are from answers with both.

    Args:
        method: that answers, by heads.
        batch: of its current task, in training.
        embedding: (b, p) of the batch.
        rows: the complete ones.
        direction: "distil": the answer with a modality dropped (either one, drawn per sample)
            learns from the complete one. "released": the complete one, with gradient, learns from
            the one without text.
    """
    assert batch.task is not None and batch.random is not None and method.heads is not None
    released = direction == "released"
    no_text = batch.random.normal("dropped modality", (len(batch),), embedding)[rows] > 0
    lost = {"text": no_text | released, "image": ~(no_text | released)}
    with torch.set_grad_enabled(not released):
        embedded = _embed_without(method, batch, embedding, rows, lost)
        poorer = method.heads.of_task(embedded, batch.task)
    whole = method.heads.of_task(embedding[rows], batch.task)
    learner, teacher = (whole, poorer) if released else (poorer, whole.detach())
    return divergence(teacher, learner, method.labels[batch.task].multi_label)


def divergence(teacher: Tensor, learner: Tensor, multi_label: bool = False) -> Tensor:
    """Return the mean KL(teacher || learner) of logits (b, c); of each label if there are several.

    The released code takes a softmax of several labels too.
    """
    if not multi_label:
        log_chances = F.log_softmax(learner, dim=1)
        return F.kl_div(log_chances, teacher.softmax(dim=1), reduction="batchmean")
    there = teacher.sigmoid()
    of_labels = there * (F.logsigmoid(teacher) - F.logsigmoid(learner)) + (1.0 - there) * (
        F.logsigmoid(-teacher) - F.logsigmoid(-learner)
    )
    return of_labels.sum(dim=1).mean()


def _embed_without(
    method: Method, batch: Batch, embedding: Tensor, rows: Tensor, lost: Mapping[str, Tensor]
) -> Tensor:
    """Return the embedding of rows as if they lacked a modality: modality -> (rows,) bool."""
    backbone = method.backbone
    if set(backbone.parts) == set(backbone.modalities):
        # Towers that never meet: what is left of a sample is as it was, and need not run again.
        gone = [lost[name].unsqueeze(1).expand(-1, width) for name, width in backbone.parts.items()]
        return embedding[rows].masked_fill(torch.cat(gone, dim=1), 0.0)
    assert batch.task is not None
    part = backbone.without(batch.take(rows), lost)
    _, chosen = method.told(part, batch.task)
    return backbone.encode(part, method.make_route(chosen, part))
