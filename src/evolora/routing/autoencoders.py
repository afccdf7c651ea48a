"""Auto-encoders that recognise the distribution a sample came from, all tasks' in stacked tensors.

    z = squash_t(f) ;  error_t(f) = mean((W2_t^T relu(W1_t^T z + b1_t) + b2_t - z)^2)

MoE-Adapters' DDAS (arXiv 2403.11549, section 3.3) squashes AlexNet features by a sigmoid and ends
in a sigmoid. On tower features, which have no bounds, we subtract the task's mean instead (ours).
D-MoLE (arXiv 2506.11672) takes unit vectors and ends in a sigmoid. A unit vector of width f has a
mean square of 1 / f, so an output of nearly zero is already that near; a fresh network's is 0.25
away. So small numbers are below what Adam divides by: the sum of squares is what is trained on,
which changes nothing else, and ``start: mean`` begins where the task's mean is (ours).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evolora.experts.bank import GrowingStack
from evolora.randomness import generator

Squash = Literal["center", "sigmoid", "unit"]
SMALLEST = 1e-4
"""Output of a sigmoid that stands for nothing."""
TASKS_PER_CHUNK = 16
"""Reconstructions are (tasks, rows, features): scored so many tasks at a time."""


@dataclass(frozen=True, kw_only=True)
class AutoEncoderTraining:
    """How one task's auto-encoder is fitted; the defaults suit tower features.

    The authors' values for theirs are in ``configs/moe_adapters/mtil.yaml``.

    Args:
        hidden: code width.
        steps, batch_size, learning_rate, weight_decay: Adam; ``learning_rate`` per step, a tenth of
            it in the last fifth of the steps.
        squash: how features become targets, see the module docstring.
        epochs: passes over the samples, in place of ``steps``; the rate then falls from
            ``learning_rate`` to ``final_learning_rate`` along a cosine, epoch by epoch.
        final_learning_rate: see ``epochs``.
        start: what the network gives at first: something "random", or the "mean" of the targets.
        patience: stop after so many epochs in which the training loss did not fall; None never
            stops. The last weights are kept, not the best.
    """

    hidden: int = 64
    steps: int = 400
    batch_size: int = 64
    learning_rate: float = 3e-3
    weight_decay: float = 1e-4
    squash: Squash = "center"
    epochs: int | None = None
    final_learning_rate: float = 1e-3
    patience: int | None = None
    start: Literal["random", "mean"] = "random"


@dataclass(frozen=True, kw_only=True)
class UnitAutoEncoderTraining(AutoEncoderTraining):
    """D-MoLE's network, with a training that does on a few hundred samples, in a few seconds.

    Its authors' recipe, made for ten thousand samples, is ``start: random, epochs: 1000, patience:
    10, batch_size: 1024, learning_rate: 5e-3``.
    """

    hidden: int = 128
    steps: int = 200
    weight_decay: float = 0.0
    squash: Squash = "unit"
    start: Literal["random", "mean"] = "mean"


class AutoEncoderBank(nn.Module):
    """One auto-encoder per task; a fitted one never changes again.

    Args:
        features: width f of the routing features.
        hidden: code width.
        squash: see the module docstring.
    """

    def __init__(
        self,
        features: int,
        hidden: int,
        squash: Squash = "center",
        *,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.features, self.hidden, self.squash = features, hidden, squash
        self.encoder = GrowingStack(features, hidden, device=device)
        self.encoder_bias = GrowingStack(hidden, device=device)
        self.decoder = GrowingStack(hidden, features, device=device)
        self.decoder_bias = GrowingStack(features, device=device)
        self.center = GrowingStack(features, device=device)

    def __len__(self) -> int:
        return len(self.encoder)

    def networks(self) -> list[GrowingStack]:
        """Return the learned tensors (not the centre)."""
        return [self.encoder, self.encoder_bias, self.decoder, self.decoder_bias]

    def parameters_per_task(self) -> int:
        """Return the number of learned values of one auto-encoder."""
        return sum(math.prod(stack.shape) for stack in self.networks())

    def add(self, rows: list[Tensor]) -> None:
        """Append a fitted auto-encoder, frozen: its four tensors and its centre."""
        for stack, row in zip([*self.networks(), self.center], rows, strict=True):
            stack.grow(row.unsqueeze(0))
            stack.freeze(range(len(stack)))

    def fit(self, features: Tensor, training: AutoEncoderTraining, seed: int) -> None:
        """Fit a new auto-encoder to features (n, f) of one task and append it."""
        features = features.float().cpu()
        center = features.mean(dim=0)
        targets = _squash(features, self.squash, center)
        draw = generator(seed, "autoencoder")
        weights = [
            nn.Parameter((torch.rand(shape, generator=draw) * 2 - 1) / math.sqrt(fan_in))
            for shape, fan_in in (
                ((self.features, self.hidden), self.features),
                ((self.hidden,), self.features),
                ((self.hidden, self.features), self.hidden),
                ((self.features,), self.hidden),
            )
        ]
        if training.start == "mean":
            weights[3].data.copy_(self._inverse(targets.mean(dim=0)))
        scale = float(self.features) if self.squash == "unit" else 1.0
        optimizer = torch.optim.Adam(
            weights, lr=training.learning_rate, weight_decay=training.weight_decay, fused=True
        )

        def learn(rows: Tensor, rate: float) -> float:
            for group in optimizer.param_groups:
                group["lr"] = rate
            with torch.enable_grad():
                z = targets[rows]
                code = torch.relu(z @ weights[0] + weights[1])
                loss = F.mse_loss(self._output(code @ weights[2] + weights[3]), z) * scale
                optimizer.zero_grad()
                torch.autograd.backward(loss)
            optimizer.step()
            return float(loss.detach()) * len(rows)

        if training.epochs is not None:
            _by_epochs(training, len(targets), draw, learn)
        else:
            for step in range(training.steps):
                rows = torch.randint(len(targets), (training.batch_size,), generator=draw)
                late = step > 0.8 * training.steps
                learn(rows, training.learning_rate * (0.1 if late else 1.0))
        self.add([*(weight.detach() for weight in weights), center])

    def errors(self, features: Tensor) -> Tensor:
        """Return the mean squared reconstruction error (b, t) of every task's auto-encoder."""
        features = features.float()
        chunks = [features.new_empty(len(features), 0)]
        for start in range(0, len(self), TASKS_PER_CHUNK):
            part = slice(start, min(start + TASKS_PER_CHUNK, len(self)))
            # Fitted rows are frozen in order, so parts of the buffers are views of them.
            w1, b1, w2, b2 = (stack.frozen[part] for stack in self.networks())
            z = _squash(features.unsqueeze(0), self.squash, self.center.frozen[part, None])
            code = torch.relu(torch.bmm(z.expand(len(w1), -1, -1), w1) + b1.unsqueeze(1))
            out = self._output(torch.bmm(code, w2) + b2.unsqueeze(1))
            chunks.append((out - z).square().mean(dim=2).T)
        return torch.cat(chunks, dim=1)

    def _output(self, logits: Tensor) -> Tensor:
        return logits if self.squash == "center" else torch.sigmoid(logits)

    def _inverse(self, outputs: Tensor) -> Tensor:
        """Return what :meth:`_output` makes outputs of, as near as it can."""
        return outputs if self.squash == "center" else torch.logit(outputs, eps=SMALLEST)


def _squash(features: Tensor, squash: Squash, center: Tensor) -> Tensor:
    if squash == "unit":
        return F.normalize(features, dim=-1)
    return torch.sigmoid(features) if squash == "sigmoid" else features - center


def _by_epochs(
    training: AutoEncoderTraining,
    count: int,
    draw: torch.Generator,
    learn: Callable[[Tensor, float], float],
) -> None:
    """Pass over ``count`` samples in drawn orders until the epochs, or the patience, are over.

    Args:
        training: its epochs, rates and patience.
        count: samples.
        draw: of their orders.
        learn: from rows and a rate to the sum of their losses.
    """
    assert training.epochs is not None
    best, waited = math.inf, 0
    span = training.learning_rate - training.final_learning_rate
    for epoch in range(training.epochs):
        share = (1.0 + math.cos(math.pi * epoch / training.epochs)) / 2.0
        rate = training.final_learning_rate + span * share
        parts = torch.split(torch.randperm(count, generator=draw), training.batch_size)
        total = sum(learn(rows, rate) for rows in parts)
        best, waited = (total, 0) if total < best else (best, waited + 1)
        if training.patience is not None and waited >= training.patience:
            return
