"""Elastic weight consolidation: values that earlier tasks depend on are held where they were.

    penalty = 1/2 * sum_i F_i (theta_i - theta*_i)^2
    F <- decay * F + F_t ,  theta* <- theta      when task t ends
    F_t = mean over samples x of task t of (d log p(y | x) / d theta)^2

y is drawn from the model's own answer, which makes F_t the diagonal of the Fisher information, or
is the sample's true label ("empirical"; it vanishes where the training loss does).

Source: Kirkpatrick et al., PNAS 2017, arXiv 1612.00796. One memory for all tasks instead of one
per task: Schwarz et al. (online EWC), ICML 2018, arXiv 1805.06370; with ``decay`` 1 every task
counts alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evolora.backbones.answer_tokens import NO_ANSWER, token_losses
from evolora.errors import ConfigError


class ElasticMemory(nn.Module):
    """How much each value matters to the tasks so far, and what it was when the last one ended.

    Values are those of a list of parameters, one after another; the list must stay the same.
    """

    importance: Tensor
    anchor: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("importance", torch.empty(0))
        self.register_buffer("anchor", torch.empty(0))

    def make_room(self, parameters: Sequence[Tensor]) -> None:
        """Take up the parameters, as not important yet; what is remembered stays."""
        if len(self.importance) == 0:
            self.anchor = _flat(parameters).detach().clone()
            self.importance = torch.zeros_like(self.anchor)

    def remember(self, parameters: Sequence[Tensor], fisher: Tensor, *, decay: float = 1.0) -> None:
        """Add a task's importance (v) and hold the parameters where they are now."""
        self._check(parameters)
        self.importance = decay * self.importance + fisher.to(self.importance)
        self.anchor = _flat(parameters).detach().clone()

    def penalty(self, parameters: Sequence[Tensor]) -> Tensor:
        """Return 1/2 sum F (theta - theta*)^2."""
        self._check(parameters)
        moved = _flat(parameters) - self.anchor
        return 0.5 * (self.importance * moved * moved).sum()

    def _check(self, parameters: Sequence[Tensor]) -> None:
        count = sum(parameter.numel() for parameter in parameters)
        if count != len(self.importance):
            raise ConfigError(
                f"{len(self.importance)} values are remembered; the parameters given have {count}"
            )


def diagonal_fisher(terms: Iterable[Tensor], parameters: Sequence[Tensor]) -> Tensor:
    """Return the mean over samples of squared gradients (v) of -log p(y | x).

    The gradients within a term are summed before they are squared. Where y is drawn from the model
    that is right on average, however many there are: such gradients are independent, and zero on
    average, so products of two cancel. Where y is given, a term must be one sample.

    Args:
        terms: (b,) -log p(y | x) of some samples; one term's graph is kept at a time.
        parameters: of which the v values are; one that a term does not depend on has no gradient.
    """
    total, count = torch.zeros_like(_flat(parameters)), 0
    for term in terms:
        gradients = torch.autograd.grad(
            term.sum(), list(parameters), allow_unused=True, materialize_grads=True
        )
        total += _flat(gradients).square()
        count += len(term)
    return total / max(1, count)


def surprise(
    logits: Tensor, labels: Tensor, *, several: bool = False, draw: torch.Generator | None = None
) -> Tensor:
    """Return -log p(y | x) of each row (b).

    Args:
        logits: (b, c).
        labels: (b,) class indices; with several labels per sample (b, c) of 0 and 1.
        several: a sample may have several labels; each is a coin of its own.
        draw: draws y from p(y | x) itself, and ``labels`` are not read; None takes ``labels``.
    """
    if several:
        chances = logits.detach().sigmoid().cpu()
        y = labels if draw is None else torch.bernoulli(chances, generator=draw)
        each = F.binary_cross_entropy_with_logits(logits, y.to(logits), reduction="none")
        return each.sum(dim=1)
    if draw is not None:
        chances = logits.detach().softmax(dim=1).cpu()
        labels = torch.multinomial(chances, 1, generator=draw).squeeze(1).to(logits.device)
    return F.cross_entropy(logits, labels, reduction="none")


def token_surprise(
    logits: Tensor, answers: Tensor, *, draw: torch.Generator | None = None
) -> Tensor:
    """Return -log p (b, a) of each token of answers (b, a); 0 where a row has none.

    Args:
        logits: (b, a, c) at the tokens.
        answers: NO_ANSWER where a row has no more.
        draw: draws every token from p(token | the true ones before it); None takes the true ones.
    """
    if draw is None:
        return token_losses(logits, answers)
    drawn = surprise(logits.flatten(0, 1), answers.flatten(), draw=draw).view(answers.shape)
    return drawn.masked_fill(answers == NO_ANSWER, 0.0)


def _flat(parameters: Sequence[Tensor]) -> Tensor:
    return torch.cat([parameter.flatten() for parameter in parameters])
