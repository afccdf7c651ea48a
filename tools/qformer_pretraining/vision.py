"""The encoder: a small ViT that learns what the image tower of `clip-tiny` makes of a picture.

It reproduces the tower's last states, token by token, and its embedding of the whole picture, on
the pictures of the corpus and on drawn scenes.
"""

from __future__ import annotations

import argparse
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPModel, InstructBlipVisionModel

from clip_pretraining.corpus import Corpus, augment
from clip_pretraining.loop import Loop
from clip_pretraining.prompts import load_prompts
from evolora.randomness import derive_seed, generator
from llava_pretraining.scenes import draw_scene, picture
from llava_pretraining.student import held_out, normalized
from qformer_pretraining.start import qformer_config

SCENES = 0.15  # share of a batch


class VisionStudent(nn.Module):
    """The encoder with Linears to the teacher's states and embeddings."""

    def __init__(self, args: argparse.Namespace, width: int, embedding: int) -> None:
        super().__init__()
        config = qformer_config(args, 8).vision_config
        # as in `start_model`
        self.tower = InstructBlipVisionModel._from_config(config, attn_implementation="eager")
        self.states = nn.Linear(config.hidden_size, width)
        self.whole = nn.Linear(config.hidden_size, embedding)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Returns states [b, n, w] and embeddings [b, p] like the teacher's."""
        seen = self.tower(pixel_values=pixels).last_hidden_state
        return self.states(seen), self.whole(seen[:, 0])


def vision_loss(student: VisionStudent, teacher: CLIPModel, pixels: Tensor, bf16: bool) -> Tensor:
    """Returns how far states and embeddings are from the teacher's, whose scales do not count."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        with torch.no_grad():
            taught = teacher.vision_model(pixel_values=pixels)
            embeddings = teacher.visual_projection(taught.pooler_output)
        states, whole = student(pixels)
    wanted = F.layer_norm(taught.last_hidden_state.float(), states.shape[-1:])
    apart = (states.float() - wanted).square().mean()
    return apart + 1 - F.cosine_similarity(whole.float(), embeddings.float()).mean()


def stage_vision(args: argparse.Namespace) -> None:
    """Trains the encoder."""
    corpus = Corpus(args.corpus, load_prompts(args.work, args.domains, args.corpus))
    corpus.weights[held_out(corpus)] = 0
    teacher = CLIPModel.from_pretrained(args.clip, attn_implementation="eager")
    teacher.eval().requires_grad_(False)
    torch.manual_seed(args.seed)
    width, embedding = teacher.config.vision_config.hidden_size, teacher.config.projection_dim
    student = VisionStudent(args, width, embedding).train()
    loop = Loop(student, args, args.work / f"qformer-vision-{args.name}.pt")
    scenes = round(SCENES * args.batch)
    for step in loop.steps():
        parts = (args.seed, "qformer-vision", args.rank, step)
        draw, words = generator(*parts), Random(derive_seed(*parts))
        shown, grey, _ = corpus.batch(args.batch - scenes, draw)
        drawn = [picture(draw_scene(words), words) for _ in range(scenes)]
        pixels = torch.cat([augment(shown, grey, draw), normalized(torch.stack(drawn))])
        loop.update(vision_loss(student, teacher, pixels, args.bf16))
