"""What both encoders share: a short training by steps, and linear probes."""

from __future__ import annotations

import argparse
import logging
import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

LOG = logging.getLogger("pretrain_encoders")


def train(
    model: nn.Module, batch: Callable[[], tuple[Tensor, ...]], args: argparse.Namespace
) -> None:
    """Trains a model whose forward gives its loss: AdamW, warm-up, cosine to zero.

    With `--minutes` the rate follows the clock; with `--steps` a run is repeatable to the bit.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.rate, weight_decay=0.05)
    began, step, mean = time.monotonic(), 0, 0.0
    model.train()
    while True:
        minutes = (time.monotonic() - began) / 60
        share = step / args.steps if args.steps else minutes / args.minutes
        if share >= 1:
            break
        warm = min(1.0, (step + 1) / 50)
        for group in optimizer.param_groups:
            group["lr"] = args.rate * warm * 0.5 * (1 + math.cos(math.pi * share))
        loss = model(*batch())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        now = float(loss.detach())
        mean = now if step == 0 else 0.95 * mean + 0.05 * now
        step += 1
        if step % 100 == 0:
            LOG.info("step %d, %.1f minutes, loss %.3f", step, minutes, mean)
    LOG.info("%d steps in %.1f minutes, loss %.3f", step, minutes, mean)
    model.eval()


def probe(title: str, asked: str, sides: Sequence[tuple[Tensor, Tensor]], column: int) -> None:
    """Prints how often a linear probe, fitted on train objects, is right about test objects.

    Args:
        title: whose features.
        asked: what is told from them.
        sides: train and test: features (n, d), labels (n, questions), below 0 where unknown.
        column: question.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rows = [labels[:, column] >= 0 for _, labels in sides]
    (x, y), (tx, ty) = [
        (features[known].numpy(), labels[known, column].numpy())
        for (features, labels), known in zip(sides, rows, strict=True)
    ]
    fitted = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=500)).fit(x, y)
    right = float((fitted.predict(tx) == ty).mean())
    common = float(torch.tensor(ty).bincount().max() / len(ty))
    LOG.info("%s: %s %.1f %% (always the same: %.1f %%)", title, asked, 100 * right, 100 * common)
