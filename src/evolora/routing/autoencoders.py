"""Auto-encoders that recognise the distribution a sample came from, all tasks' in stacked tensors.

    z = squash_t(f) ;  error_t(f) = mean((W2_t^T relu(W1_t^T z + b1_t) + b2_t - z)^2)

MoE-Adapters' DDAS (arXiv 2403.11549, section 3.3) squashes AlexNet features by a sigmoid and ends
in a sigmoid. On tower features, which have no bounds, we subtract the task's mean instead (ours).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evolora.experts.bank import GrowingStack
from evolora.randomness import generator

Squash = Literal["center", "sigmoid"]
TASKS_PER_CHUNK = 16
"""Reconstructions are (tasks, rows, features): scored so many tasks at a time."""


@dataclass(frozen=True, kw_only=True)
class AutoEncoderTraining:
    """How one task's auto-encoder is fitted; the defaults suit tower features.

    The authors' values for theirs are in ``configs/moe_adapters/mtil.yaml``.

    Args:
        hidden: code width.
        steps, batch_size, learning_rate, weight_decay: Adam; ``learning_rate`` per step.
        squash: how features become targets, see the module docstring.
    """

    hidden: int = 64
    steps: int = 400
    batch_size: int = 64
    learning_rate: float = 3e-3
    weight_decay: float = 1e-4
    squash: Squash = "center"


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
        optimizer = torch.optim.Adam(
            weights, lr=training.learning_rate, weight_decay=training.weight_decay, fused=True
        )
        for step in range(training.steps):
            for group in optimizer.param_groups:
                group["lr"] = training.learning_rate * (0.1 if step > 0.8 * training.steps else 1.0)
            rows = torch.randint(len(targets), (training.batch_size,), generator=draw)
            with torch.enable_grad():
                z = targets[rows]
                code = torch.relu(z @ weights[0] + weights[1])
                loss = F.mse_loss(self._output(code @ weights[2] + weights[3]), z)
                optimizer.zero_grad()
                torch.autograd.backward(loss)
            optimizer.step()
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
        return torch.sigmoid(logits) if self.squash == "sigmoid" else logits


def _squash(features: Tensor, squash: Squash, center: Tensor) -> Tensor:
    return torch.sigmoid(features) if squash == "sigmoid" else features - center
