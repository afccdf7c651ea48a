"""Trains the projection between the frozen encoder and the frozen language model."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from copy import copy

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import InternVLForConditionalGeneration

from clip_pretraining.loop import Loop
from evolora.backbones.dialogue import padded_right
from evolora.errors import DataError
from evolora.randomness import generator
from smol_assembly.model import Speech, load_parts
from smol_assembly.pairs import NAME, Pairs, load_features

LOG = logging.getLogger("assemble_smol_vlm")
SHARPNESS = 20.0  # of the softmax over words
WORDS, BRIDGE = "words-{}.pt", "bridge-{}.pt"
NOTHING = -100
AT_ONCE = 16  # pictures that are asked about without gradient
HALVED = 0.65  # root mean square of GELU's output, of a standard normal input


class Names:
    """The words of the pictures' names, as embeddings of the language model.

    Args:
        embeddings: of all tokens [c, d].
        told: tokens of each name.
    """

    def __init__(self, embeddings: Tensor, told: Sequence[Tensor]) -> None:
        tokens = torch.unique(torch.cat(list(told)))
        self.size = embeddings[tokens].norm(dim=1).mean()
        self._centre = embeddings.mean(dim=0)
        self._words = F.normalize(embeddings[tokens] - self._centre, dim=1)
        self._of = torch.zeros(len(told), len(tokens))  # shares of the words in each name
        for row, one in enumerate(told):
            self._of[row, torch.searchsorted(tokens, one)] = 1.0 / len(one.unique())

    def scores(self, projected: Tensor) -> Tensor:
        """Returns log-probabilities [b, words] of the words that images' tokens point at."""
        pointed = F.normalize(projected.mean(dim=1) - self._centre, dim=1)
        return F.log_softmax(SHARPNESS * pointed @ self._words.T, dim=1)

    def loss(self, projected: Tensor, names: Tensor) -> Tensor:
        """Returns what is missed of the names' words, and of the size of embeddings."""
        missed = -(self.scores(projected) * self._of[names]).sum(dim=1).mean()
        return missed + (projected.norm(dim=2) / self.size - 1).square().mean()

    def hits(self, projected: Tensor, names: Tensor) -> float:
        """Returns the share of pictures whose best name is theirs."""
        best = (self.scores(projected) @ self._of.T).argmax(dim=1)
        return float((best == names).float().mean())


class Reader:
    """The frozen language model, asked what an answer costs after an image's tokens.

    Args:
        model: of which the language model is used.
        speech: tokens of questions and answers.
        bf16: run it in half precision.
    """

    def __init__(
        self, model: InternVLForConditionalGeneration, speech: Speech, bf16: bool = False
    ) -> None:
        self._llm, self._head, self._speech = model.model.language_model, model.lm_head, speech
        self._bf16 = bf16

    def losses(self, projected: Tensor, asked: Sequence[str], told: Sequence[str]) -> Tensor:
        """Returns the mean loss [b] over each answer's tokens.

        Args:
            projected: tokens [b, n, d] of the images.
            asked: questions [b].
            told: answers [b].
        """
        prompts = [self._speech.question(text) for text in asked]
        answers = [self._speech.answer(text) for text in told]
        both = [torch.cat(pair) for pair in zip(prompts, answers, strict=True)]
        ids = padded_right(both, 0)  # no mask: what is on the right is seen by nobody that counts
        wanted = torch.full_like(ids, NOTHING)
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            wanted[row, len(prompt) : len(prompt) + len(answer)] = answer
        wanted = wanted[:, 1:]
        given = wanted != NOTHING
        embedded = self._llm.get_input_embeddings()(ids)
        places = (ids == self._speech.image_token).unsqueeze(2)
        embedded = embedded.masked_scatter(places, projected.to(embedded.dtype))
        with torch.autocast("cpu", torch.bfloat16, enabled=self._bf16):
            states = self._llm(inputs_embeds=embedded, use_cache=False).last_hidden_state
            logits = self._head(states[:, :-1][given])
        losses = F.cross_entropy(logits.float(), wanted[given], reduction="none")
        rows = given.nonzero()[:, 0]
        sums = torch.zeros(len(ids)).index_add(0, rows, losses)
        return sums / given.sum(dim=1)


def stage_words(args: argparse.Namespace) -> None:
    """Trains the projection without the language model."""
    pairs, features = load_features(args)
    model, processor = load_parts(args.work)
    speech = Speech(processor)
    told = [speech.answer(texts[0])[:-1] for texts in pairs.texts]
    names = Names(model.get_input_embeddings().weight, told)
    projection = fresh(model, args.seed)
    plan = copy(args)
    plan.steps, plan.batch, plan.log_every = args.word_steps, args.word_batch, 500
    train, test = (np.flatnonzero(pairs.held_out == side) for side in (False, True))
    loop = Loop(projection, plan, args.work / WORDS.format(args.name))
    for step in loop.steps():
        rows = some(train, args.word_batch, generator(args.seed, "words", step))
        loop.update(names.loss(projection(features[rows].float()), wanted(pairs, rows)))
    with torch.no_grad():
        hits = names.hits(projection(features[test].float()), wanted(pairs, test))
    LOG.info("%.1f %% of held-out pictures point at their own name of %d", 100 * hits, len(told))


def stage_bridge(args: argparse.Namespace) -> None:
    """Trains the projection through the language model, from where the stage `words` left it."""
    pairs, features = load_features(args)
    model, processor = load_parts(args.work)
    projection = fresh(model, args.seed)
    load_projection(projection, args, WORDS)
    reader = Reader(model, Speech(processor), args.bf16)
    train, test = np.flatnonzero(~pairs.held_out), pairs.tested(args.tested)
    loop = Loop(projection, args, args.work / BRIDGE.format(args.name))
    LOG.info("%s", carried(projection, reader, pairs, features, test))
    for step in loop.steps():
        draw = generator(args.seed, "bridge", step)
        rows = some(train, args.batch, draw)
        projected = projection(features[rows].float())
        loop.update(reader.losses(projected, *pairs.drawn(rows, draw)).mean())
    LOG.info("%s", carried(projection, reader, pairs, features, test))


@torch.no_grad()
def carried(
    projection: nn.Module, reader: Reader, pairs: Pairs, features: Tensor, rows: NDArray[np.int64]
) -> str:
    """Returns in words what held-out pictures' names cost, under them and under others."""
    found: dict[str, list[Tensor]] = {"their own": [], "another": []}
    others = np.roll(rows, len(rows) // 2)
    for start in range(0, len(rows), AT_ONCE):
        part, other = rows[start : start + AT_ONCE], others[start : start + AT_ONCE]
        names = [pairs.texts[name][0] for name in pairs.names[part]]
        for which, seen in (("their own", part), ("another", other)):
            projected = projection(features[seen].float())
            found[which].append(reader.losses(projected, [NAME[0]] * len(names), names))
    own, another = (torch.cat(losses) for losses in found.values())
    return (
        f"names of {len(rows)} held-out pictures cost {float(own.mean()):.2f} under their own "
        f"picture, {float(another.mean()):.2f} under another; their own is better for "
        f"{100 * float((own < another).float().mean()):.0f} %"
    )


def fresh(model: InternVLForConditionalGeneration, seed: int) -> nn.Module:
    """Returns the model's projection, drawn anew, to be trained; the seed alone decides it.

    What it makes of an image is about as large as the embeddings of words.
    """
    projection = model.model.multi_modal_projector
    size = model.get_input_embeddings().weight.square().mean().sqrt()
    draw = generator(seed, "projection")
    with torch.no_grad():
        for linear in (part for part in projection.modules() if isinstance(part, nn.Linear)):
            drawn = torch.randn(linear.weight.shape, generator=draw)
            linear.weight.copy_(drawn / linear.in_features**0.5)
            linear.bias.zero_()
        projection.linear_2.weight.mul_(size / HALVED)
    return projection.requires_grad_(True)


def load_projection(projection: nn.Module, args: argparse.Namespace, file: str) -> None:
    """Loads what a stage has trained.

    Raises:
        DataError: it has not run.
    """
    path = args.work / file.format(args.name)
    if not path.is_file():
        stage = file.split("-")[0]
        raise DataError(f"{path} is missing: run the stage {stage!r} first")
    projection.load_state_dict(torch.load(path, weights_only=True)["module"])


def wanted(pairs: Pairs, rows: NDArray[np.int64]) -> Tensor:
    """Returns the names [b] of pictures."""
    return torch.from_numpy(pairs.names[rows])


def some(rows: NDArray[np.int64], count: int, draw: torch.Generator) -> NDArray[np.int64]:
    """Returns ``count`` of the rows, drawn with replacement."""
    places: NDArray[np.int64] = torch.randint(len(rows), (count,), generator=draw).numpy()
    return rows[places]
