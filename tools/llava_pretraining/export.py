"""The trained model as a stock `transformers` LLaVA folder."""

from __future__ import annotations

import argparse
import logging

import torch
from transformers import LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from clip_pretraining.config import IMAGE_SIZE
from clip_pretraining.corpus import Corpus
from clip_pretraining.export import staged
from clip_pretraining.prompts import load_prompts
from llava_pretraining.score import of_suite, questions, scores
from llava_pretraining.student import start_model
from llava_pretraining.subjects import Subjects
from llava_pretraining.words import TEMPLATE, load_words

LOG = logging.getLogger("pretrain_llava")


def processor_of(tokenizer: PreTrainedTokenizerFast, patch: int) -> LlavaProcessor:
    """Returns the processor of the model: pictures as the encoder's CLIP takes them."""
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    images = CLIPImageProcessorPil(
        size=size, crop_size=size, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def stage_export(args: argparse.Namespace) -> None:
    """Writes the folder in half precision by temp + rename, and prints its scores."""
    tokenizer, common = load_words(args.work)
    model = start_model(args, len(tokenizer))
    saved = torch.load(args.work / f"llava-{args.name}.pt", weights_only=True)
    model.load_state_dict(saved["module"])
    processor = processor_of(tokenizer, model.config.vision_config.patch_size)
    prompts = load_prompts(args.work, args.domains, args.corpus)
    corpus = Corpus(args.corpus, prompts)
    asked = questions(corpus, Subjects(corpus, prompts, common), args.questions, args.seed)
    asked |= of_suite(args.domains, args.questions, args.seed)
    with staged(args.out, model.half(), processor) as folder:
        rows, seen = scores(folder, asked)
    LOG.info("%.2f M parameters", sum(p.numel() for p in model.parameters()) / 1e6)
    for row in rows:
        LOG.info("%s", row)
        for question, answer, said in seen[row["format"]]:
            LOG.info("    %r: %r, said %r", question, answer, said)
