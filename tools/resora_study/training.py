"""One cell of the study: adapters that are trained once, and what they are worth."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from evolora.randomness import generator
from evolora.regularizers.redundancy import Update, redundancy
from evolora.regularizers.resora import Resora
from resora_study.conditions import CONDITIONS, DROP, NONE
from resora_study.data import Data, Split, training_rows
from resora_study.hosts import Host, host_of
from resora_study.model import Tops

BATCH, STEPS = 32, 40


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training.

    Args:
        stage: "rate", "strength" (judged on the validation split) or "test".
        task, host, condition: what is trained.
        rate: learning rate.
        strength: of the regulariser; of "none" the weight decay, of DropLoRA the share of silent
            ranks.
        seed: of the adapters, the batches, and the shots of a class.
    """

    stage: str
    task: str
    host: str
    condition: str
    rate: float
    strength: float
    seed: int


def run(cell: Cell, data: Data, tops: Tops) -> dict[str, Any]:
    """Returns the cell with its scores, its redundancies and the seconds it took."""
    start = time.process_time()
    host = host_of(cell.host, tops.new(cell.task), cell.seed, STEPS)
    train(cell, host, data)
    split = data.splits["test" if cell.stage == "test" else "val"]
    scores = evaluate(host, split, data)
    seconds = round(time.process_time() - start, 2)
    return {**asdict(cell), **scores, **redundancies(host), "seconds": seconds}


def train(cell: Cell, host: Host, data: Data) -> None:
    """Trains the adapters for as many steps as every cell has; the rate falls to zero."""
    samples = data.splits["train"]
    samples = samples.take(training_rows(samples, cell.seed))
    condition = CONDITIONS[cell.condition]
    resora = Resora(condition.config(cell.strength), seed=cell.seed)
    decay = cell.strength if cell.condition == NONE else 0.0
    optimizer = torch.optim.AdamW(host.parameters(), lr=cell.rate, weight_decay=decay)
    silent = generator(cell.seed, "study drop")
    with host.records(resora) as records:
        for step in range(STEPS):
            order = generator(cell.seed, "study batch", step)
            batch = samples.take(torch.randperm(len(samples), generator=order)[:BATCH])
            for group in optimizer.param_groups:
                group["lr"] = cell.rate * (1.0 - step / STEPS)
            if cell.condition == DROP:
                loss = _loss(
                    host, data, batch, host.embed_without_some_ranks(batch, cell.strength, silent)
                )
            elif not resora.config.active:
                loss = _loss(host, data, batch, host.embed(batch))
            else:
                with records.watching(host.mask_of(batch)):
                    loss = _loss(host, data, batch, host.embed(batch))
                term, _ = resora.total(
                    records.collect(), step=step, total_steps=STEPS, task_loss=loss
                )
                loss = loss + term
            loss.backward()
            optimizer.step()
            host.stepped(step)
            optimizer.zero_grad()


def _loss(host: Host, data: Data, batch: Split, embedded: tuple[Tensor, ...]) -> Tensor:
    """Cross-entropy against the classes, or of the pairs of a batch in both directions."""
    scale = host.scale
    if batch.labels is not None:
        assert data.classes is not None
        return F.cross_entropy(scale * embedded[0] @ data.classes.T, batch.labels)
    assert batch.captions is not None
    own = torch.arange(len(batch))
    same = batch.captions == batch.captions.unsqueeze(1)
    others = same & ~torch.eye(len(batch), dtype=torch.bool)  # equal captions are no negatives
    logits = (scale * embedded[0] @ embedded[1].T).masked_fill(others, -math.inf)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


@torch.no_grad()
def evaluate(host: Host, split: Split, data: Data) -> dict[str, float]:
    """Returns the score (percent) that conditions are judged by, and what it is made of."""
    host.model.eval()
    parts = [host.embed(split.take(rows)) for rows in torch.arange(len(split)).split(100)]
    embedded = [torch.cat(side) for side in zip(*parts, strict=True)]
    host.model.train()
    if split.labels is not None:
        assert data.classes is not None
        right = (embedded[0] @ data.classes.T).argmax(dim=1) == split.labels
        return {"score": _percent(right)}
    assert split.captions is not None
    return _recall(embedded[0], embedded[1], split.captions)


def _recall(images: Tensor, texts: Tensor, captions: Tensor) -> dict[str, float]:
    """Returns recall at k both ways, among distinct captions and among all images."""
    count = int(captions.max()) + 1
    first = torch.stack([(captions == number).nonzero()[0, 0] for number in range(count)])
    likeness = images @ texts[first].T
    own = F.one_hot(captions, count).bool()
    right = likeness.masked_fill(~own, -math.inf)
    ranks = {
        "image to text": (likeness > right.amax(dim=1, keepdim=True)).sum(dim=1),
        "text to image": (likeness > right.amax(dim=0, keepdim=True)).sum(dim=0),
    }
    found = {f"R@{k} {way}": _percent(rank < k) for way, rank in ranks.items() for k in (1, 5, 10)}
    return {"score": round(sum(found.values()) / len(found), 3), **found}


def _percent(hits: Tensor) -> float:
    return round(100.0 * float(hits.float().mean()), 3)


@torch.no_grad()
def redundancies(host: Host) -> dict[str, float]:
    """Returns the mean squared cosine of ranks of what was learned."""
    found: dict[str, list[float]] = {"w_cos A": [], "w_cos B": []}
    for a, b in host.factors():
        update = Update(a, b)
        found["w_cos A"].append(float(redundancy("w_cos", "down", update)))
        found["w_cos B"].append(float(redundancy("w_cos", "up", update)))
    return {name: round(sum(values) / len(values), 4) for name, values in found.items()}
