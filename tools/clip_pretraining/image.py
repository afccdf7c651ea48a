"""The image tower: a small ViT that learns to match its picture to W z(name)."""

from __future__ import annotations

import argparse
import logging
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from clip_pretraining.config import TEACHER_WIDTH, clip_config
from clip_pretraining.corpus import Corpus, augment
from clip_pretraining.loop import Loop
from clip_pretraining.prompts import Prompts, load_prompts
from clip_pretraining.zero_shot import pictures, top_k
from evolora.randomness import generator
from evolora.streams.mosaic.domains import load as load_domains

LOG = logging.getLogger("pretrain_clip")


class ImageStudent(nn.Module):
    """CLIP's image tower with both projections: V for pictures, W for MiniLM's embeddings."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        # with 17 tokens plain attention in bf16 trains 1.6 times faster on CPU than "sdpa"
        full = CLIPModel._from_config(config, attn_implementation="eager")
        self.tower, self.projection = full.vision_model, full.visual_projection
        self.text_map = nn.Linear(TEACHER_WIDTH, config.projection_dim, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(20.0)))

    def images(self, pixels: Tensor) -> Tensor:
        """Returns unit-length picture embeddings [b, p]."""
        pooled = self.tower(pixel_values=pixels).pooler_output
        return F.normalize(self.projection(pooled).float(), dim=-1)

    def texts(self, embeddings: Tensor) -> Tensor:
        """Returns unit-length name embeddings [n, p] for MiniLM embeddings [n, 384]."""
        return F.normalize(self.text_map(embeddings), dim=-1)


def image_loss(
    model: ImageStudent, corpus: Corpus, args: argparse.Namespace, draw: torch.Generator
) -> Tensor:
    """Returns the softmax loss of pictures over all names, plus names over the batch's pictures."""
    pictures, grey, names = corpus.batch(args.batch, draw)
    with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
        seen = model.images(augment(pictures, grey, draw))
    count, templates = corpus.embeddings.shape[:2]
    prompt = torch.randint(templates, (count,), generator=draw)
    texts = model.texts(corpus.embeddings[torch.arange(count), prompt])
    scale = model.log_scale.exp().clamp(max=100)
    return name_loss(scale * seen @ texts.T, names, corpus.synonyms)


def name_loss(logits: Tensor, names: Tensor, synonyms: Tensor) -> Tensor:
    """Returns the softmax loss over all names, plus that of the names over the batch.

    Args:
        logits: [b, n] of pictures against every name.
        names: [b] the right ones.
        synonyms: bool [n, n], names that are not each other's negatives.
    """
    logits = logits.masked_fill(synonyms[names], -1e4)
    to_names = F.cross_entropy(logits, names, label_smoothing=0.0)
    present, index = names.unique(return_inverse=True)
    backward = logits[:, present].T
    same = F.one_hot(index, len(present)).T.float()
    to_pictures = -(same / same.sum(1, keepdim=True) * backward.log_softmax(1)).sum(1).mean()
    return to_names + 0.25 * to_pictures


def stage_image(args: argparse.Namespace) -> None:
    """Trains the image tower and W."""
    prompts = load_prompts(args.work, args.domains, args.corpus)
    corpus = Corpus(args.corpus, prompts)
    vocabulary = len(CLIPTokenizer.from_pretrained(args.work / "tokenizer"))
    torch.manual_seed(args.seed)
    model = ImageStudent(clip_config(args, vocabulary))
    loop = Loop(model, args, args.work / f"image-{args.name}.pt")
    due = loop.spent + args.eval_every
    for step in loop.steps():
        draw = generator(args.seed, "image", args.rank, step)
        loop.update(image_loss(model, corpus, args, draw))
        if loop.spent > due:
            due += args.eval_every
            if args.rank == 0:
                report_teacher(model, prompts, args, "val")
    if args.rank > 0:
        return
    LOG.info("scale %.1f", float(model.log_scale.detach().exp()))
    report_teacher(model, prompts, args, "val")
    report_teacher(model, prompts, args, "test")


@torch.no_grad()
def report_teacher(
    model: ImageStudent, prompts: Prompts, args: argparse.Namespace, split: str
) -> None:
    """Logs zero-shot accuracy with the teacher's own embeddings of the class prompts."""
    model.eval()
    for task, vectors in zip(load_domains(root=args.domains), prompts.of_suite(), strict=True):
        texts = F.normalize(model.texts(vectors).mean(1), dim=-1)
        x, labels = pictures(getattr(task, split))
        seen = torch.cat([model.images(part) for part in x.split(256)])
        one, five = top_k(seen, texts, labels)
        line = "teacher %s %-9s top-1 %5.1f top-5 %5.1f chance %.1f"
        LOG.info(line, split, task.name, one, five, 100 / len(texts))
    model.train()
