"""The text tower: a small transformer that learns to reproduce MiniLM's sentence embeddings."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from clip_pretraining.config import POSITIONS, TEACHER_WIDTH, clip_config
from clip_pretraining.loop import Loop
from clip_pretraining.prompts import load_prompts
from evolora.randomness import generator

POOL = 16  # batches drawn together and sorted by length


class TextStudent(nn.Module):
    """CLIP's text tower with a linear head P into MiniLM's space."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.tower = CLIPModel(config).text_model
        self.head = nn.Linear(config.text_config.hidden_size, TEACHER_WIDTH, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Returns sentence embeddings [b, 384], not normalized."""
        return self.head(self.tower(input_ids=ids).pooler_output)  # type: ignore[no-any-return]


def tokenized(folder: Path, sentences: list[str]) -> list[list[int]]:
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    ids = tokenizer(sentences, truncation=True, max_length=POSITIONS)["input_ids"]
    return [list(row) for row in ids]


def padded(rows: list[list[int]], pad: int) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [pad] * (longest - len(row)) for row in rows])


def similar_lengths(
    weights: Tensor, lengths: Tensor, args: argparse.Namespace, step: int
) -> Tensor:
    """Returns the sentence indices of one step's batch, which are about equally long."""
    number, place = divmod(step, POOL)
    draw = generator(args.seed, "text", args.rank, number)
    pool = torch.multinomial(weights, POOL * args.batch, replacement=True, generator=draw)
    pool = pool[lengths[pool].argsort(stable=True)]
    return pool.view(POOL, args.batch)[torch.randperm(POOL, generator=draw)[place]]


def stage_text(args: argparse.Namespace) -> None:
    """Distils MiniLM into the small text tower."""
    prompts = load_prompts(args.work, args.domains)
    targets = prompts.vectors.float()
    ids = tokenized(args.work / "tokenizer", prompts.sentences)
    lengths = torch.tensor([len(row) for row in ids])
    vocabulary = len(CLIPTokenizer.from_pretrained(args.work / "tokenizer"))
    # the corpus's and the suite's prompts come more often than the additional names
    weights = torch.ones(len(ids))
    weights[: prompts.named] = 5.0
    space = torch.eye(targets.shape[1])
    if args.align:  # only what the image tower's W keeps of the teacher counts
        weights[prompts.named :] = 0.0
        saved = torch.load(args.work / f"image-{args.align}.pt", weights_only=True)
        space = saved["module"]["text_map.weight"]
    torch.manual_seed(args.seed)
    student = TextStudent(clip_config(args, vocabulary))
    path = args.work / "text.pt"
    if args.align:
        student.load_state_dict(torch.load(path, weights_only=True)["module"])
        path = args.work / f"text-{args.align}.pt"
    loop = Loop(student, args, path)
    for step in loop.steps():
        rows = similar_lengths(weights, lengths, args, step)
        batch = padded([ids[i] for i in rows.tolist()], vocabulary - 1)
        wanted = targets[rows]
        got = loop.module(batch) @ space.T
        loop.update(text_loss(F.normalize(got, dim=-1), F.normalize(wanted @ space.T, dim=-1)))


def text_loss(got: Tensor, wanted: Tensor) -> Tensor:
    """Returns how far unit-length student embeddings are from the teacher's.

    Sum of the distance itself, of the error in pairwise cosines, and of a softmax that asks which
    of the batch's sentences it was; near duplicates are no wrong answers there.
    """
    cosines = wanted @ wanted.T
    distance = (1 - (got * wanted).sum(-1)).mean()
    pairs = (got @ got.T - cosines).square().mean()
    same = (cosines > 0.97) & ~torch.eye(len(got), dtype=torch.bool)
    logits = (got @ wanted.T / 0.05).masked_fill(same, -1e4)
    return distance + 5 * pairs + 0.5 * F.cross_entropy(logits, torch.arange(len(got)))
