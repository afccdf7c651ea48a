"""The trained model as a stock `transformers` ViLT folder."""

from __future__ import annotations

import argparse
import logging

import torch
from transformers import CLIPModel, ViltImageProcessorPil, ViltModel

from clip_pretraining.config import IMAGE_SIZE
from clip_pretraining.export import staged
from evolora.backbones.loading import load_backbone
from evolora.streams.task import Example
from vilt_pretraining.start import vilt_config
from vilt_pretraining.student import Student
from vilt_pretraining.words import load_words

LOG = logging.getLogger("pretrain_vilt")


def stage_export(args: argparse.Namespace) -> None:
    """Writes the folder in half precision by temp + rename, once the library can load it."""
    tokenizer, _ = load_words(args.work)
    clip = CLIPModel.from_pretrained(args.clip)
    student = Student(ViltModel(vilt_config(clip, len(tokenizer))), clip)
    saved = torch.load(args.work / f"vilt-{args.name}.pt", weights_only=True)
    student.load_state_dict(saved["module"])
    model = student.vilt.half()
    processor = ViltImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    with staged(args.out, model, tokenizer, processor) as folder:
        backbone = load_backbone(str(folder), type="vilt")
        text = Example(inputs={"text": "a red square"}, label=0, key="text")
        backbone.encode_base(backbone.collate([text]))
    LOG.info("%.2f M parameters", sum(p.numel() for p in model.parameters()) / 1e6)
