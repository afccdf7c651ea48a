"""The model, how a batch of dialogues is drawn, and the loss of their answers."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from clip_pretraining.corpus import Corpus, augment
from clip_pretraining.loop import Loop
from clip_pretraining.prompts import load_prompts
from evolora.randomness import derive_seed, generator
from llava_pretraining.asking import turns
from llava_pretraining.forms import Turn
from llava_pretraining.scenes import draw_scene, picture
from llava_pretraining.start import start_model
from llava_pretraining.subjects import Subjects
from llava_pretraining.words import ANSWER, BEGIN, END, IMAGE, PAD, POSITIONS, load_words

LOG = logging.getLogger("pretrain_llava")
THINGS, SCENES = 0.42, 0.33  # shares of a batch; the rest are texts alone
HELD = 40  # every so many-th picture is kept for the scores
PARTS = 2  # of a batch, by length
NO_ANSWER = -100


@dataclass(frozen=True)
class Dialogues:
    """A batch of dialogues; those with a picture come first.

    Args:
        pixels: [p, 3, 64, 64] normalized.
        ids: [b, n], padded on the right.
        labels: [b, n], tokens of answers, elsewhere -100.
        weights: [b, n], of the tokens: one over the root of the answer's length.
    """

    pixels: Tensor
    ids: Tensor
    labels: Tensor
    weights: Tensor


class Source:
    """Draws dialogues about the pictures that are not held out, about scenes and about texts."""

    def __init__(
        self, corpus: Corpus, subjects: Subjects, tokenizer: PreTrainedTokenizerFast, patches: int
    ) -> None:
        self.corpus, self.subjects = corpus, subjects
        self.tokenizer, self.patches = tokenizer, patches
        corpus.weights[held_out(corpus)] = 0

    def batch(self, size: int, count: int, draw: torch.Generator, words: Random) -> Dialogues:
        """Returns a batch of ``size`` dialogues of up to ``count`` turns each."""
        things, pictures = round(THINGS * size), round((THINGS + SCENES) * size)
        rows = self.corpus.rows(things, draw)
        scenes = [draw_scene(words) for _ in range(things, pictures)]
        about = [
            *(self.subjects.thing(row, words) for row in rows.tolist()),
            *scenes,
            *(self.subjects.words(words) for _ in range(pictures, size)),
        ]
        drawn = augment(self.corpus.pictures(rows), self.corpus.grey[rows], draw)
        flat = torch.stack([picture(scene, words) for scene in scenes])
        dialogues = [turns(one, count, words) for one in about]
        images = [self.patches] * pictures + [0] * (size - pictures)
        ids, labels, weights = tokens_of(self.tokenizer, dialogues, images)
        return Dialogues(torch.cat([drawn, normalized(flat)]), ids, labels, weights)


def tokens_of(
    tokenizer: PreTrainedTokenizerFast, dialogues: Sequence[Sequence[Turn]], images: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns ids, labels and weights [b, n] of dialogues, as the chat template writes them.

    Args:
        tokenizer: that of `words`.
        dialogues: turns of each.
        images: tokens that the picture of each takes.
    """
    texts = [text for dialogue in dialogues for turn in dialogue for text in turn]
    encoded = iter(tokenizer(texts, add_special_tokens=False)["input_ids"])
    shape = len(dialogues), POSITIONS
    ids, labels = torch.full(shape, PAD), torch.full(shape, NO_ANSWER)
    weights, longest = torch.zeros(shape), 0
    for row, (dialogue, count) in enumerate(zip(dialogues, images, strict=True)):
        line, spans = [BEGIN, *[IMAGE] * count], []
        for _ in dialogue:
            line += [*next(encoded), ANSWER]
            answer = [*next(encoded), END]
            spans.append((len(line), len(line) + len(answer)))
            line += answer
        line = line[:POSITIONS]
        ids[row, : len(line)] = torch.tensor(line)
        for first, end in spans:
            labels[row, first:end] = ids[row, first:end]
            weights[row, first:end] = (end - first) ** -0.5
        longest = max(longest, len(line))
    return ids[:, :longest], labels[:, :longest], weights[:, :longest]


def normalized(pictures: Tensor) -> Tensor:
    """Returns uint8 [b, 64, 64, 3] as the model takes them, [b, 3, 64, 64]."""
    return (pictures.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5


def held_out(corpus: Corpus) -> Tensor:
    """Returns the rows that are kept for the scores."""
    return torch.arange(HELD - 1, len(corpus.names), HELD)


def answer_loss(model: LlavaForConditionalGeneration, batch: Dialogues, bf16: bool) -> Tensor:
    """Returns the weighted mean of -log p over the tokens of answers.

    Dialogues of like length go through the language model together, to spare padding.
    """
    inner: Any = model.model
    lengths = (batch.ids != PAD).sum(1)
    losses = []
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        images = inner.get_image_features(batch.pixels).pooler_output
        states = inner.get_input_embeddings()(batch.ids)
        seen = torch.cat(list(images)).to(states.dtype)
        states = states.masked_scatter((batch.ids == IMAGE).unsqueeze(2), seen)
        for rows in lengths.argsort(stable=True).tensor_split(PARTS):
            longest = int(lengths[rows].max())
            hidden = inner.language_model(
                inputs_embeds=states[rows, :longest],
                attention_mask=(batch.ids[rows, :longest] != PAD).long(),
                use_cache=False,
            ).last_hidden_state
            labels = batch.labels[rows, 1:longest]
            asked = labels != NO_ANSWER
            logits = model.lm_head(hidden[:, :-1][asked]).float()
            each = F.cross_entropy(logits, labels[asked], reduction="none")
            losses.append((each * batch.weights[rows, 1:longest][asked]).sum())
    return torch.stack(losses).sum() / batch.weights[:, 1:].sum()


def stage_train(args: argparse.Namespace) -> None:
    """Trains the model."""
    prompts = load_prompts(args.work, args.domains, args.corpus)
    tokenizer, common = load_words(args.work)
    corpus = Corpus(args.corpus, prompts)
    model = start_model(args, len(tokenizer)).train()
    tower = "model.vision_tower."
    if args.vision_share == 0:
        model.model.vision_tower.requires_grad_(False)
    patches = model.config.image_seq_length
    source = Source(corpus, Subjects(corpus, prompts, common), tokenizer, patches)
    path = args.work / f"llava-{args.name}.pt"
    loop = Loop(model, args, path, {tower: args.vision_share})
    for step in loop.steps():
        parts = (args.seed, "llava", args.rank, step)
        words = Random(derive_seed(*parts))
        batch = source.batch(args.batch, 1 + step % args.turns, generator(*parts), words)
        loop.update(answer_loss(model, batch, args.bf16))
