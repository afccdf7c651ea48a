"""Tokens of answers: cut to a limit, their losses, and means over each row's own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

NO_ANSWER = -100
"""Stands where a row has no more tokens of an answer."""
Limit = int | Sequence[int] | None
"""Tokens of an answer that count, at most: of all rows, of each row, or no limit."""


def cut(answers: Tensor, limit: Limit) -> Tensor:
    """Return the tokens of answers (b, a) up to the limit."""
    if limit is None or isinstance(limit, int):
        return answers[:, :limit]
    own = torch.tensor(list(limit), device=answers.device).unsqueeze(1)
    places = torch.arange(answers.shape[1], device=answers.device)
    return answers.masked_fill(places >= own, NO_ANSWER)


def token_losses(logits: Tensor, answers: Tensor, smoothing: float = 0.0) -> Tensor:
    """Return -log p (b, a) of the tokens of answers under logits (b, a, c); 0 where there is none.

    Args:
        logits: at the tokens.
        answers: the tokens (b, a).
        smoothing: of labels, in [0, 1).
    """
    return F.cross_entropy(
        logits.flatten(0, 1).float(),
        answers.flatten(),
        ignore_index=NO_ANSWER,
        reduction="none",
        label_smoothing=smoothing,
    ).view(answers.shape)


def answer_means(values: Tensor, answers: Tensor) -> Tensor:
    """Return the mean (b,) of values (b, a) over the tokens that each row's answer has."""
    given = answers != NO_ANSWER
    return (values * given).sum(dim=1) / given.sum(dim=1)
