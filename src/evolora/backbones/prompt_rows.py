"""Rows of prompts: where their images and texts stand, and what processes must agree on to draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch.nn import functional as F

from evolora.backbones.answer_tokens import NO_ANSWER
from evolora.backbones.batch import Batch
from evolora.randomness import StepRandom, derive_seed
from evolora.routing.spans import TokenSpans


def prompt_spans(
    batch: Batch, image_token: int, modalities: Sequence[str], more: int = 0
) -> TokenSpans:
    """Return where images and text stand in prompts; ``more`` answer tokens are of neither."""
    images = batch.inputs["input_ids"] == image_token
    real = batch.inputs["attention_mask"].bool()
    of = {"image": images & real, "text": ~images & real}
    everywhere = torch.ones(len(batch), dtype=torch.bool, device=real.device)
    present = [batch.present.get(modality, everywhere) for modality in modalities]
    given = batch.inputs["answer_ids"][:, :more] != NO_ANSWER
    return TokenSpans(
        {name: F.pad(where, (0, more)) for name, where in of.items()},
        torch.stack(present, dim=1),
        answer=F.pad(given, (real.shape[1], more - given.shape[1])) if more else None,
    )


def of_images(random: StepRandom | None, batch: Batch, merged: int = 1) -> StepRandom | None:
    """Return the randomness of the encoder's rows, which are images or parts of them.

    Args:
        random: of the samples.
        batch: the samples.
        merged: rows that the projection makes one of.
    """
    if random is None:
        return None
    seed, numbers = derive_seed(random.seed, "images"), batch.step_sizes
    if numbers is None:
        return StepRandom(seed)
    counts = numbers[:, 2].tolist()
    before, every = sum(counts[: random.first_row]), sum(counts)
    return StepRandom(seed, first_row=before // merged, global_rows=every // merged)


def as_long_as_others(batch: Batch, padding: int) -> Batch:
    """Return the batch as wide as the widest of all processes: noise is drawn per position."""
    if batch.step_sizes is None:
        return batch
    prompt, answer = batch.step_sizes[:, :2].amax(dim=0).tolist()
    left = prompt - batch.inputs["input_ids"].shape[1]
    right = answer - batch.inputs["answer_ids"].shape[1]
    wider = {
        "input_ids": F.pad(batch.inputs["input_ids"], (left, 0), value=padding),
        "attention_mask": F.pad(batch.inputs["attention_mask"], (left, 0)),
        "answer_ids": F.pad(batch.inputs["answer_ids"], (0, right), value=NO_ANSWER),
    }
    return replace(batch, inputs={**batch.inputs, **wider})
