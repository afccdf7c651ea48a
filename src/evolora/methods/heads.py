"""Linear heads, one per task: how a method answers where the backbone has no class-name prompts.

    z_t = W_t f + c_t

f is the backbone's embedding, made of parts (one per tower), each brought to unit root mean square.
A part is zero where the sample lacks its modality; each task has a learned null embedding for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evolora.errors import ConfigError
from evolora.experts.bank import GrowingStack
from evolora.streams.task import LabelSpace

if TYPE_CHECKING:
    from evolora.backbones.base import Backbone


class TaskHeads(nn.Module):
    """The heads of all tasks; those of finished tasks are frozen.

    Args:
        parts: name -> width of each part of the embedding, in order.
        spaces: the tasks' classes; the method's own list, which grows with its tasks.
        device: where they are.
    """

    def __init__(
        self,
        parts: Mapping[str, int],
        spaces: Sequence[LabelSpace],
        *,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.widths, width = tuple(parts.values()), sum(parts.values())
        self.weight = GrowingStack(width, device=device)
        self.spaces, self.width = spaces, width
        self.bias = GrowingStack(device=device)
        # One part is there in every sample, whatever it is made of.
        self.null = GrowingStack(width, device=device) if len(parts) > 1 else None

    def add(self, labels: LabelSpace, draw: torch.Generator, *, freeze: bool = True) -> None:
        """Add a trainable head for a task's classes, drawn as ``nn.Linear`` draws its own.

        Args:
            labels: the task's classes.
            draw: randomness.
            freeze: the heads that are there no longer train.
        """
        if freeze:
            self.freeze()
        rows, bound = len(labels.classes), self.width**-0.5

        def uniform(*shape: int) -> Tensor:
            return torch.empty(shape).uniform_(-bound, bound, generator=draw)

        self.weight.grow(uniform(rows, self.width))
        self.bias.grow(uniform(rows))
        if self.null is not None:
            self.null.grow(torch.zeros(1, self.width))

    def freeze(self) -> None:
        """Freeze every head there is."""
        for stack in (self.weight, self.bias, self.null):
            if stack is not None:
                stack.freeze(range(len(stack)))

    def of_task(self, embedding: Tensor, task: int) -> Tensor:
        """Return the logits (b, C_t) of one task's head on embeddings (b, p)."""
        sizes = [len(space.classes) for space in self.spaces[: task + 1]]
        rows = torch.arange(sum(sizes[:-1]), sum(sizes), device=embedding.device)
        filled = self._filled(embedding, task)
        weight = self.weight.take(rows).to(embedding.dtype)
        return F.linear(filled, weight, self.bias.take(rows).to(embedding.dtype))

    def _filled(self, embedding: Tensor, task: int) -> Tensor:
        """Return the parts at one scale, with the task's null embedding in missing ones."""
        if self.null is None:
            return F.rms_norm(embedding, (self.width,))
        null = self.null.take(torch.tensor([task], device=embedding.device)).to(embedding.dtype)
        parts, start = [], 0
        for width in self.widths:
            part, own = (side[:, start : start + width] for side in (embedding, null))
            there = part.any(dim=1, keepdim=True)
            parts.append(torch.where(there, F.rms_norm(part, (width,)), own))
            start += width
        return torch.cat(parts, dim=1)

    def among(self, embedding: Tensor, labels: LabelSpace, tasks: Sequence[int]) -> Tensor:
        """Return logits (b, c) over ``labels`` by the heads of some tasks; -inf for other classes.

        A class that several of the heads have gets the largest of their logits.

        Raises:
            ConfigError: none of the heads has any of the classes.
        """
        columns = {name: column for column, name in enumerate(labels.classes)}
        result = embedding.new_full((len(embedding), len(columns)), -torch.inf)
        found = False
        for task in tasks:
            known = [
                (columns[name], row)
                for row, name in enumerate(self.spaces[task].classes)
                if name in columns
            ]
            if not known:
                continue
            found = True
            into, rows = (list(side) for side in zip(*known, strict=True))
            logits = self.of_task(embedding, task)[:, rows]
            result[:, into] = torch.maximum(result[:, into], logits)
        if not found:
            have = [name for task in tasks for name in self.spaces[task].classes]
            raise ConfigError(
                f"no head for any of the classes {', '.join(labels.classes[:5])}; this model has "
                f"learned heads for {', '.join(have[:10])}{' ...' if len(have) > 10 else ''}"
            )
        return result


def heads_of(backbone: Backbone, spaces: Sequence[LabelSpace]) -> TaskHeads | None:
    """Return heads without a task for a backbone that answers by them, else None."""
    if backbone.answers != "heads":
        return None
    return TaskHeads(backbone.parts, spaces, device=backbone.device)
