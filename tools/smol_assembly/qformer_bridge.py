"""Trains the projection between the frozen Q-Former and the frozen language model, on pictures."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from copy import copy
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from clip_pretraining.loop import Loop
from evolora.backbones.qformer import QFormer
from evolora.backbones.soft_tokens import soft_tokens
from evolora.config import load_stream
from evolora.randomness import generator
from evolora.routing.route import BASE, Route
from evolora.streams.task import Example, Task
from smol_assembly.bridge import BRIDGE, WORDS, Names, load_projection, some
from smol_assembly.qformer import load_parts

LOG = logging.getLogger("assemble_smol_qformer")
AT_ONCE = 16  # pictures that are looked at without gradient


def pictures(tested: int | None = None) -> Task:
    """Returns the image task of `mosaic/modalities`, with so many questions of its test split."""
    return load_stream("mosaic/modalities", order=["image"], test_limit=tested).tasks[0]


def parts_of(args: argparse.Namespace) -> tuple[QFormer, nn.Module]:
    """Returns the model and its projection, which alone is trained."""
    backbone = load_parts(args.work, args.eyes, args.seed)
    return backbone, backbone.model.get_submodule("language_projection").requires_grad_(True)


@torch.no_grad()
def gathered(backbone: QFormer, examples: Sequence[Example]) -> Tensor:
    """Returns what the projection takes [n, q, h] of pictures and what is asked about them."""
    found: list[Tensor] = []
    projection = backbone.model.get_submodule("language_projection")
    handle = projection.register_forward_pre_hook(lambda _, taken: found.append(taken[0]))
    try:
        for start in range(0, len(examples), AT_ONCE):
            batch = backbone.collate(examples[start : start + AT_ONCE])
            rows = torch.arange(len(batch))
            soft_tokens(backbone, batch, "image", rows, Route.of(BASE, len(batch)))
    finally:
        handle.remove()
    return torch.cat(found)


def stage_words(args: argparse.Namespace) -> None:
    """Trains the projection without the language model."""
    backbone, projection = parts_of(args)
    train = list(pictures().train)
    said = sorted({answer_of(example) for example in train})
    places = torch.tensor([said.index(answer_of(example)) for example in train])
    told = [torch.tensor(backbone.instructions.plain(f" {answer}")) for answer in said]
    names = Names(backbone.model.get_submodule("language_model.model.embed_tokens").weight, told)
    features = gathered(backbone, train)
    plan = copy(args)
    plan.steps, plan.batch, plan.lr, plan.log_every = args.word_steps, 64, args.word_lr, 500
    loop = Loop(projection, plan, args.work / WORDS.format(args.name))
    for step in loop.steps():
        rows = some(np.arange(len(train)), plan.batch, generator(args.seed, "words", step))
        loop.update(names.loss(projection(features[rows]), places[rows]))


def stage_bridge(args: argparse.Namespace) -> None:
    """Trains the projection through the language model, from where the stage `words` left it."""
    backbone, projection = parts_of(args)
    load_projection(projection, args, WORDS)
    task = pictures(args.tested)
    train, test = list(task.train), list(task.test)
    loop = Loop(projection, args, args.work / BRIDGE.format(args.name))
    LOG.info("%s", carried(backbone, test))
    for step in loop.steps():
        rows = some(np.arange(len(train)), args.batch, generator(args.seed, "bridge", step))
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            losses = losses_of(backbone, [train[row] for row in rows])
        loop.update(losses.float().mean())
    LOG.info("%s", carried(backbone, test))


def answer_of(example: Example) -> str:
    """Returns the answer that a sample is taught with."""
    assert isinstance(example.label, tuple)
    return str(example.label[0])


def losses_of(backbone: QFormer, examples: Sequence[Example]) -> Tensor:
    """Returns the loss [b] of answers, as the library has it."""
    batch = backbone.collate(examples)
    return backbone.answer_losses(batch, Route.of(BASE, len(batch)))


@torch.no_grad()
def carried(backbone: QFormer, examples: Sequence[Example]) -> str:
    """Returns in words what answers cost, under their own pictures and under others."""
    turned = [*examples[len(examples) // 2 :], *examples[: len(examples) // 2]]
    others = [
        replace(one, inputs={**one.inputs, "image": other.inputs["image"]})
        for one, other in zip(examples, turned, strict=True)
    ]
    own, another = (
        torch.cat(
            [losses_of(backbone, side[at : at + AT_ONCE]) for at in range(0, len(side), AT_ONCE)]
        )
        for side in (examples, others)
    )
    return (
        f"answers to {len(examples)} questions about other pictures cost {float(own.mean()):.2f} "
        f"under their own picture, {float(another.mean()):.2f} under another; their own is better "
        f"for {100 * float((own < another).float().mean()):.0f} %"
    )
