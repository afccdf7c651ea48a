"""The model, what two frozen teachers ask of it, and how a batch of pairs is drawn."""

from __future__ import annotations

import argparse
import logging
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPModel, ViltModel

from clip_pretraining.config import TEACHER_WIDTH
from clip_pretraining.corpus import Corpus, augment
from clip_pretraining.loop import Loop
from clip_pretraining.prompts import load_prompts
from clip_pretraining.text import text_loss
from evolora.backbones.vilt import run_in_order
from evolora.randomness import generator
from vilt_pretraining.start import start_from, vilt_config
from vilt_pretraining.texts import Texts, load_texts
from vilt_pretraining.words import CLS, SEP, load_words

LOG = logging.getLogger("pretrain_vilt")
WHOLE, IMAGE_ONLY = 0.5, 0.25  # shares of a batch; the rest are texts with a white picture
OTHER = 0.5  # of the whole pairs have the text of another
MEANS = 0.5  # weight of what the means over a modality's tokens tell, against the pooled state's


class Student(nn.Module):
    """A stock ViLT with linear heads into the spaces of the teachers.

    "image" and "text" read the pooled state, "patches" the mean over the patches, "words" the mean
    over the words.
    """

    def __init__(self, model: ViltModel, clip: CLIPModel) -> None:
        super().__init__()
        width, space = model.config.hidden_size, clip.config.projection_dim
        self.vilt = model
        self.heads = nn.ModuleDict(
            {
                "image": nn.Linear(width, space),
                "patches": nn.Linear(width, space),
                "text": nn.Linear(width, TEACHER_WIDTH),
                "words": nn.Linear(width, TEACHER_WIDTH),
            }
        )
        with torch.no_grad():
            for name in ("image", "patches"):
                self.heads[name].weight.copy_(clip.visual_projection.weight)

    def told(self, name: str, states: Tensor) -> Tensor:
        """Returns unit-length predictions [b, p] of a teacher's embeddings."""
        return F.normalize(self.heads[name](states).float(), dim=-1)


@dataclass(frozen=True)
class Pairs:
    """A batch: pairs first, then pictures with the empty text, then texts with a white picture.

    Args:
        pixels: [b, 3, 64, 64] normalized.
        ids: [b, n] padded.
        pictures: how many have a picture: the first ones.
        texts: rows [t] that have a text.
        meant: the teacher's embeddings [t, 384] of these texts.
    """

    pixels: Tensor
    ids: Tensor
    pictures: int
    texts: Tensor
    meant: Tensor


def draw_pairs(corpus: Corpus, texts: Texts, size: int, draw: torch.Generator) -> Pairs:
    """Returns a batch; half of its pairs have the text of another, for the state to hold both."""
    whole, pictures = round(WHOLE * size), round((WHOLE + IMAGE_ONLY) * size)
    drawn, grey, names = corpus.batch(pictures, draw)
    order = torch.randperm(pictures, generator=draw)  # they come in the corpus's order
    pixels = torch.ones(size, *drawn.shape[3:], *drawn.shape[1:3])
    pixels[:pictures] = augment(drawn[order], grey[order], draw)
    rows = texts.any(whole + size - pictures, draw)
    own = texts.of_names(names[order][:whole], draw)
    swapped = torch.rand(whole, generator=draw) < OTHER
    rows[:whole] = torch.where(swapped, rows[:whole], own)
    told = torch.cat([torch.arange(whole), torch.arange(pictures, size)])
    ids = torch.zeros(size, texts.ids.shape[1], dtype=torch.long)
    ids[:, 0], ids[:, 1] = CLS, SEP
    ids[told] = texts.ids[rows]
    ids = ids[:, : int((ids != 0).any(0).nonzero().max()) + 1]
    return Pairs(pixels, ids, pictures, told, texts.vectors[rows])


@torch.no_grad()
def seen_by(clip: CLIPModel, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the image teacher's embeddings [b, p], unit length, and token states [b, n, d]."""
    vision: Any = clip.vision_model
    output = vision(pixel_values=pixels)
    embedding = F.normalize(clip.visual_projection(output.pooler_output).float(), dim=-1)
    return embedding, vision.post_layernorm(output.last_hidden_state).float()


def pair_losses(model: Student, clip: CLIPModel, pairs: Pairs, bf16: bool) -> dict[str, Tensor]:
    """Returns what each head misses of its teacher, and "states": what the image's tokens do."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        wanted, states = seen_by(clip, pairs.pixels[: pairs.pictures])
        mask = pairs.ids != 0
        output = run_in_order(model.vilt, pairs.ids, mask.long(), pairs.pixels)
    hidden, pooled = output.last_hidden_state.float(), output.pooler_output.float()
    image = hidden[: pairs.pictures, mask.shape[1] :]
    text = hidden[pairs.texts, 1 : mask.shape[1]]
    words = mask[pairs.texts, 1:].float().unsqueeze(2)
    means = (text * words).sum(1) / words.sum(1)
    return {
        "image": text_loss(model.told("image", pooled[: pairs.pictures]), wanted),
        "text": text_loss(model.told("text", pooled[pairs.texts]), pairs.meant),
        "patches": MEANS * text_loss(model.told("patches", image[:, 1:].mean(1)), wanted),
        "words": MEANS * text_loss(model.told("words", means), pairs.meant),
        "states": (1 - F.cosine_similarity(image, states, dim=-1)).mean(),
    }


def stage_train(args: argparse.Namespace) -> None:
    """Trains the model; logs what each head misses."""
    prompts = load_prompts(args.work, args.domains, args.corpus)
    corpus = Corpus(args.corpus, prompts)
    tokenizer, tables = load_words(args.work)
    texts = load_texts(prompts, tokenizer, args.seed)
    # with few tokens plain attention in bf16 is faster on CPU than "sdpa"
    clip = CLIPModel.from_pretrained(args.clip, attn_implementation="eager").eval()
    torch.manual_seed(args.seed)
    vilt = ViltModel(vilt_config(clip, len(tokenizer)))
    first = draw_pairs(corpus, texts, args.batch, generator(args.seed, "vilt-start"))
    start_from(vilt, clip, tables, first.pixels[: first.pictures])
    model = Student(vilt, clip)
    loop = Loop(model, args, args.work / f"vilt-{args.name}.pt")
    for step in loop.steps():
        draw = generator(args.seed, "vilt", args.rank, step)
        losses = pair_losses(model, clip, draw_pairs(corpus, texts, args.batch, draw), args.bf16)
        loop.update(torch.stack(list(losses.values())).sum())
        if args.rank == 0 and (step + 1) % args.log_every == 0:
            parts = (f"{name} {float(loss.detach()):.3f}" for name, loss in losses.items())
            LOG.info("%s", ", ".join(parts))
