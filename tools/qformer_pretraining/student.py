"""How a batch of questions is drawn, the loss of their answers, and the stage that learns them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import InstructBlipForConditionalGeneration, PreTrainedTokenizerFast

from clip_pretraining.corpus import Corpus, augment
from clip_pretraining.loop import Loop
from clip_pretraining.prompts import load_prompts
from evolora.randomness import derive_seed, generator
from evolora.streams.mosaic.modality_words import MODALITIES
from llava_pretraining.scenes import draw_scene, picture
from llava_pretraining.student import NO_ANSWER, held_out, normalized
from llava_pretraining.subjects import Subjects
from llava_pretraining.words import END, IMAGE, PAD
from qformer_pretraining.asking import Asked, about_fact, about_picture, about_text
from qformer_pretraining.drawn import LEFT_OUT, Drawn, without
from qformer_pretraining.objects import Objects, load_objects
from qformer_pretraining.start import ASKED, POSITIONS, QUERIES, start_model
from qformer_pretraining.words import load_words

THINGS, SCENES, OBJECTS = 0.15, 0.12, 0.5  # shares of the pictures; the rest are named drawings
ASKS = 2  # questions about each picture
TEXTS = 0.5  # questions about texts alone, per picture
FACTS = 0.7  # of those are about a description that stands where soft tokens do
CUED = 0.25  # share of soft tokens behind the name of a modality
COPIES = (1, 1, 1, 1, 1, 2, 4)  # how often soft tokens are repeated, as frames of a film will be
NOISE = 0.3  # of a description's embeddings, in parts of their deviation
HINT = 0.5  # weight of `hint_loss`
PARTS = 3  # of a batch, by length


@dataclass(frozen=True)
class Questions:
    """A batch of questions; those about pictures come first, ``ASKS`` to each.

    Args:
        pixels: [p, 3, 64, 64] normalized.
        asked: [ASKS * p, m], questions as the Q-Former reads them, padded on the right.
        shown: [ASKS * p, s], what the soft tokens are to tell, padded on the right.
        copies: [ASKS * p], how often the soft tokens stand in the prompt.
        ids: [b, n], soft tokens or a description, question and answer, padded on the right.
        told: [b, n] bool, tokens of descriptions.
        labels: [b, n], tokens of answers, elsewhere -100.
        weights: [b, n], of the tokens: one over the root of the answer's length.
    """

    pixels: Tensor
    asked: Tensor
    shown: Tensor
    copies: Tensor
    ids: Tensor
    told: Tensor
    labels: Tensor
    weights: Tensor


class Source:
    """Draws questions about pictures that are not held out, drawn scenes, objects and texts.

    Args:
        corpus: of the pictures, in ``folder``.
        folder: of the corpus.
        subjects: what there is to ask about its pictures.
        objects: renders of objects, or None without any.
        tokenizer: that of the stage ``words``.
    """

    def __init__(
        self,
        corpus: Corpus,
        folder: Path,
        subjects: Subjects,
        objects: Objects | None,
        tokenizer: PreTrainedTokenizerFast,
    ) -> None:
        self.corpus, self.subjects, self.objects = corpus, subjects, objects
        self.drawn, self.tokenizer = Drawn(corpus, folder), tokenizer
        corpus.weights[held_out(corpus)] = 0
        corpus.weights[without(folder, LEFT_OUT)] = 0

    def batch(self, size: int, draw: torch.Generator, words: Random) -> Questions:
        """Returns a batch of questions about ``size`` pictures, and of texts alone."""
        things, scenes = round(THINGS * size), round(SCENES * size)
        objects = 0 if self.objects is None else round(OBJECTS * size)
        rows = self.corpus.rows(things, draw)
        shapes = [draw_scene(words) for _ in range(scenes)]
        drawn, views = self.drawn.batch(size - things - scenes - objects, draw, words)
        parts = [
            augment(self.corpus.pictures(rows), self.corpus.grey[rows], draw),
            normalized(torch.stack([picture(scene, words) for scene in shapes])),
            drawn,
        ]
        about: list[Any] = [self.subjects.thing(row, words) for row in rows.tolist()]
        about += [*shapes, *views]
        if self.objects is not None:
            rendered, seen = self.objects.batch(objects, draw, words)
            parts.append(rendered)
            about += seen
        asked = [one for subject in about for one in about_picture(subject, ASKS, words)]
        asked = [replace(one, told=_cue(words)) for one in asked]
        copies = [words.choice(COPIES) for _ in asked]
        for _ in range(round(TEXTS * size)):
            fact = words.random() < FACTS
            asked.append(about_fact(words) if fact else about_text(self.subjects, words))
        return Questions(torch.cat(parts), *tokens_of(self.tokenizer, asked, copies))


def _cue(draw: Random) -> str:
    """Returns what may stand before soft tokens: most often nothing."""
    return f" {draw.choice(MODALITIES)}: " if draw.random() < CUED else ""


def tokens_of(
    tokenizer: PreTrainedTokenizerFast, asked: Sequence[Asked], copies: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns what :class:`Questions` has but pixels.

    Args:
        tokenizer: that of the stage ``words``.
        asked: the questions, with descriptions, or cues before soft tokens, where they have some.
        copies: of the soft tokens, for each of the first questions: those about pictures.
    """
    pictures = len(copies)
    questions = tokenizer([one.question for one in asked])["input_ids"]
    shown = [one.shown or one.answer for one in asked[:pictures]]
    bare = [one.answer for one in asked] + [one.told for one in asked] + shown
    plain = tokenizer(bare, add_special_tokens=False)["input_ids"]
    lines = []
    for row, question in enumerate(questions):
        before = plain[len(asked) + row]
        if row < pictures:
            before = [*before, *[IMAGE] * (QUERIES * copies[row])]
        lines.append((before, question, [*plain[row], END]))
    shape = len(asked), min(POSITIONS, max(sum(map(len, line)) for line in lines))
    ids, labels = torch.full(shape, PAD), torch.full(shape, NO_ANSWER)
    told, weights = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape)
    for row, (before, question, answer) in enumerate(lines):
        whole = torch.tensor([*before, *question, *answer])[: shape[1]]
        first = len(before) + len(question)
        ids[row, : len(whole)] = whole
        labels[row, first : len(whole)] = whole[first:]
        weights[row, first : len(whole)] = len(answer) ** -0.5
        told[row, : len(before)] = row >= pictures
    reads = [torch.tensor(question[:ASKED]) for question in questions[:pictures]]
    tells = [torch.tensor(tokens) for tokens in plain[2 * len(asked) :]]
    read, tell = (
        torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
        for rows in (reads, tells)
    )
    return read, tell, torch.tensor(copies), ids, told, labels, weights


def answer_loss(
    model: InstructBlipForConditionalGeneration,
    batch: Questions,
    bf16: bool,
    draw: torch.Generator,
) -> Tensor:
    """Returns the weighted mean of -log p over the tokens of answers, and a share of the hint's.

    Descriptions are blurred by noise, as what the Q-Former gathers will never be words exactly.
    Questions of like length go through the language model together, to spare padding.
    """
    inner: Any = model
    lengths = (batch.ids != PAD).sum(1)
    losses = []
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        tokens = inner.vision_model(pixel_values=batch.pixels).last_hidden_state
        soft = gathered(model, tokens.repeat_interleave(ASKS, dim=0), batch.asked)
        hint = hint_loss(model, soft, batch.shown)
        soft = soft.repeat_interleave(batch.copies, dim=0)
        states = inner.get_input_embeddings()(batch.ids)
        noise = torch.randn(states.shape, generator=draw) * NOISE * states.detach().std()
        states = states + noise * batch.told.unsqueeze(2)
        states = states.masked_scatter((batch.ids == IMAGE).unsqueeze(2), soft.to(states.dtype))
        for rows in lengths.argsort(stable=True).tensor_split(PARTS):
            longest = int(lengths[rows].max())
            hidden = inner.language_model.model(
                inputs_embeds=states[rows, :longest],
                attention_mask=(batch.ids[rows, :longest] != PAD).long(),
                use_cache=False,
            ).last_hidden_state
            labels = batch.labels[rows, 1:longest]
            asked = labels != NO_ANSWER
            logits = inner.language_model.lm_head(hidden[:, :-1][asked]).float()
            each = F.cross_entropy(logits, labels[asked], reduction="none")
            losses.append((each * batch.weights[rows, 1:longest][asked]).sum())
    return torch.stack(losses).sum() / batch.weights[:, 1:].sum() + HINT * hint


def hint_loss(model: Any, soft: Tensor, shown: Tensor) -> Tensor:
    """Returns the mean of -log p over tokens of what is shown, by the mean of the soft tokens.

    Soft tokens [b, q, d] so come to be like words. Without this loss the Q-Former told the
    language model little but colors after 85,000 pictures.
    """
    language = model.language_model
    guess = language.lm_head(language.model.norm(soft.mean(1))).float().log_softmax(-1)
    said = shown != PAD
    each = -guess.gather(1, shown) * said
    mean: Tensor = (each.sum(1) / said.sum(1).clamp_min(1)).mean()
    return mean


def gathered(model: Any, tokens: Tensor, asked: Tensor) -> Tensor:
    """Returns soft tokens [b, q, d] of an encoder's tokens [b, n, e] and questions [b, m]."""
    queries = model.query_tokens.expand(len(tokens), -1, -1)
    mask = torch.cat([torch.ones_like(queries[..., 0]), (asked != PAD).float()], dim=1)
    found = model.qformer(
        input_ids=asked,
        attention_mask=mask.long(),
        query_embeds=queries,
        encoder_hidden_states=tokens,
    ).last_hidden_state
    soft: Tensor = model.language_projection(found[:, : queries.shape[1]])
    return soft


def stage_train(args: argparse.Namespace) -> None:
    """Trains the model."""
    prompts = load_prompts(args.work, args.domains, args.corpus)
    tokenizer, common = load_words(args.work)
    corpus = Corpus(args.corpus, prompts)
    encoder = args.work / f"qformer-vision-{args.vision}.pt"
    model = start_model(args, len(tokenizer), encoder).train()
    subjects = Subjects(corpus, prompts, common)
    source = Source(corpus, args.corpus, subjects, load_objects(args.work), tokenizer)
    path = args.work / f"qformer-{args.name}.pt"
    loop = Loop(model, args, path, {"vision_model.": args.vision_share})
    for step in loop.steps():
        parts = (args.seed, "qformer", args.rank, step)
        draw, words = generator(*parts), Random(derive_seed(*parts))
        batch = source.batch(args.batch, draw, words)
        loop.update(answer_loss(model, batch, args.bf16, draw))
