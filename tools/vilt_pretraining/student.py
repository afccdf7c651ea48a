"""The model, its three objectives, and how a batch of named pictures becomes pairs."""

from __future__ import annotations

import argparse
import logging
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ViltConfig, ViltModel

from clip_pretraining.config import IMAGE_SIZE, TEACHER_WIDTH
from clip_pretraining.corpus import Corpus, augment
from clip_pretraining.image import name_loss, report_teacher
from clip_pretraining.loop import Loop
from clip_pretraining.prompts import load_prompts
from evolora.backbones.vilt import run_in_order
from evolora.randomness import generator
from vilt_pretraining.words import POSITIONS, load_words, tokenized

LOG = logging.getLogger("pretrain_vilt")
WHOLE, IMAGE_ONLY, TEXT_ONLY = range(3)
SHARES = (0.5, 0.35, 0.15)  # of pairs, of pictures without text, of texts with a white picture
MISMATCHED = 0.4  # of the whole pairs have the text of another
FEW_WORDS = 0.15  # share of words hidden in half of the texts; in the other half it is drawn


def vilt_config(args: argparse.Namespace, vocabulary: int) -> ViltConfig:
    return ViltConfig(
        vocab_size=vocabulary,
        hidden_size=args.width,
        intermediate_size=4 * args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=args.width // 64,
        max_position_embeddings=POSITIONS,
        image_size=IMAGE_SIZE,
        patch_size=args.patch,
        pad_token_id=0,
    )


class Student(nn.Module):
    """A stock ViLT with what it is trained by: a word head, a match head, and a map of its pooled
    state into the space of MiniLM's embeddings of names.
    """

    def __init__(self, config: ViltConfig, start: dict[str, Tensor], projection: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.vilt = ViltModel(config)
        text = self.vilt.embeddings.text_embeddings
        with torch.no_grad():
            text.word_embeddings.weight.copy_(start["words"])
            text.position_embeddings.weight.copy_(start["positions"])
            text.token_type_embeddings.weight.copy_(start["kinds"])
        self.word_state = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width))
        self.word_bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.match = nn.Linear(width, 1)
        self.projection = nn.Linear(width, projection, bias=False)
        self.text_map = nn.Linear(TEACHER_WIDTH, projection, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(20.0)))
        self.register_buffer("empty", torch.tensor([[2, 3]]))  # [CLS] [SEP]

    def run(self, ids: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Returns hidden states [b, n, d] and the pooled state [b, d]."""
        out = run_in_order(self.vilt, ids, (ids != 0).long(), pixels)
        return out.last_hidden_state, out.pooler_output

    def place(self, state: Tensor) -> Tensor:
        """Returns unit-length embeddings [b, p] of pooled states."""
        return F.normalize(self.projection(state).float(), dim=-1)

    def images(self, pixels: Tensor) -> Tensor:
        """Returns unit-length embeddings [b, p] of pictures without text."""
        return self.place(self.run(self.empty.expand(len(pixels), -1), pixels)[1])

    def texts(self, embeddings: Tensor) -> Tensor:
        """Returns unit-length name embeddings [n, p] for MiniLM embeddings [n, 384]."""
        return F.normalize(self.text_map(embeddings), dim=-1)

    def words(self, states: Tensor) -> Tensor:
        """Returns logits [m, v] of the words at hidden states [m, d]."""
        table = self.vilt.embeddings.text_embeddings.word_embeddings.weight
        return self.word_state(states) @ table.T + self.word_bias


@dataclass(frozen=True)
class Pairs:
    """A batch.

    Args:
        pixels: [b, 3, 64, 64] normalized, white where the picture is missing.
        ids: [b, n] with words hidden.
        original: [b, n] without.
        case: [b] whole, picture only, text only.
        matched: bool [b], the text is the picture's.
        names: [b] of the picture; of the text where there is no picture.
    """

    pixels: Tensor
    ids: Tensor
    original: Tensor
    case: Tensor
    matched: Tensor
    names: Tensor


def draw_pairs(
    corpus: Corpus, sentences: Tensor, mask: int, size: int, draw: torch.Generator
) -> Pairs:
    """Returns a batch; ``sentences`` are the corpus's token ids [names, templates, n]."""
    pictures, grey, names = corpus.batch(size, draw)
    order = torch.randperm(size, generator=draw)  # drawn pictures come in the corpus's order
    pictures, grey, names = pictures[order], grey[order], names[order]
    case = torch.multinomial(torch.tensor(SHARES), size, replacement=True, generator=draw)
    pixels = augment(pictures, grey, draw)
    pixels[case == TEXT_ONLY] = 1.0
    told = names.roll(1)
    other = (told != names) & ~corpus.synonyms[told, names] & (case == WHOLE)
    swapped = other & (torch.rand(size, generator=draw) < MISMATCHED)
    told = torch.where(swapped, told, names)
    template = torch.randint(sentences.shape[1], (size,), generator=draw)
    original = sentences[told, template]
    empty = torch.zeros_like(original[0])
    empty[:2] = torch.tensor([2, 3])
    original = torch.where((case == IMAGE_ONLY)[:, None], empty, original)
    original = original[:, : int((original != 0).any(0).nonzero().max()) + 1]
    share = torch.where(
        torch.rand(size, 1, generator=draw) < 0.5, FEW_WORDS, torch.rand(size, 1, generator=draw)
    )
    hidden = (torch.rand(original.shape, generator=draw) < share) & (original > mask)
    return Pairs(pixels, original.masked_fill(hidden, mask), original, case, ~swapped, names)


def pair_loss(
    model: Student,
    corpus: Corpus,
    sentences: Tensor,
    args: argparse.Namespace,
    draw: torch.Generator,
) -> Tensor:
    """Returns the sum of three losses.

    Hidden words of matched texts (with all of them hidden, words are told by the picture); whether
    text and picture match; and the softmax of the pooled state over all names of the corpus.
    """
    pairs = draw_pairs(corpus, sentences, args.mask, args.batch, draw)
    with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
        hidden, state = model.run(pairs.ids, pairs.pixels)
        asked = (pairs.ids != pairs.original) & pairs.matched[:, None]
        text = hidden[:, : pairs.ids.shape[1]]
        words = model.words(text[asked])
        answers = model.match(state)[:, 0]
        placed = model.place(state)
    whole = pairs.case == WHOLE
    loss = 0.0 * words.sum()
    if asked.any():
        loss = F.cross_entropy(words.float(), pairs.original[asked])
    if whole.any():
        wanted = pairs.matched[whole].float()
        loss = loss + F.binary_cross_entropy_with_logits(answers[whole].float(), wanted)
    count, templates = corpus.embeddings.shape[:2]
    prompt = torch.randint(templates, (count,), generator=draw)
    texts = model.texts(corpus.embeddings[torch.arange(count), prompt])
    scale = model.log_scale.exp().clamp(max=100)
    right = pairs.matched
    return loss + name_loss(scale * placed[right] @ texts.T, pairs.names[right], corpus.synonyms)


def stage_train(args: argparse.Namespace) -> None:
    """Trains the model; logs how well pictures without text find their class's prompt."""
    prompts = load_prompts(args.work, args.domains, args.corpus)
    corpus = Corpus(args.corpus, prompts)
    tokenizer, start = load_words(args.work)
    args.mask = tokenizer.mask_token_id
    named = prompts.sentences[: prompts.names * prompts.templates]
    sentences = tokenized(tokenizer, named).view(prompts.names, prompts.templates, -1)
    torch.manual_seed(args.seed)
    model = Student(vilt_config(args, len(tokenizer)), start, args.projection)
    loop = Loop(model, args, args.work / f"vilt-{args.name}.pt")
    due = loop.spent + args.eval_every
    for step in loop.steps():
        draw = generator(args.seed, "vilt", args.rank, step)
        loop.update(pair_loss(model, corpus, sentences, args, draw))
        if loop.spent > due:
            due += args.eval_every
            if args.rank == 0:
                report_teacher(model, prompts, args, "val")
    if args.rank == 0:
        report_teacher(model, prompts, args, "val")
