"""The trained model as a stock `transformers` InstructBLIP folder."""

from __future__ import annotations

import argparse
import logging

import torch
from transformers import InstructBlipProcessor, PreTrainedTokenizerFast
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from clip_pretraining.config import IMAGE_SIZE
from clip_pretraining.corpus import Corpus
from clip_pretraining.export import staged
from clip_pretraining.prompts import load_prompts
from llava_pretraining.score import scores
from llava_pretraining.subjects import Subjects
from qformer_pretraining.objects import SIDES, load_objects
from qformer_pretraining.probe import said_by_soft_tokens
from qformer_pretraining.score import questions
from qformer_pretraining.start import QUERIES, start_model
from qformer_pretraining.words import load_words

LOG = logging.getLogger("pretrain_qformer")


def processor_of(tokenizer: PreTrainedTokenizerFast) -> InstructBlipProcessor:
    """Returns the processor of the model; both parts that read text have the same tokenizer."""
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    images = BlipImageProcessorPil(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return InstructBlipProcessor(images, tokenizer, tokenizer, num_query_tokens=QUERIES)


def stage_export(args: argparse.Namespace) -> None:
    """Writes the folder in half precision by temp + rename, and prints its scores."""
    tokenizer, common = load_words(args.work)
    model = start_model(args, len(tokenizer))
    saved = torch.load(args.work / f"qformer-{args.name}.pt", weights_only=True)
    model.load_state_dict(saved["module"])
    missed = said_by_soft_tokens(model, tokenizer, args.probe_steps, args.seed)
    prompts = load_prompts(args.work, args.domains, args.corpus)
    corpus = Corpus(args.corpus, prompts)
    subjects = Subjects(corpus, prompts, common)
    others = load_objects(args.work, SIDES[1])
    asked = questions(corpus, subjects, others, args.questions, args.seed)
    with staged(args.out, model.half(), processor_of(tokenizer)) as folder:
        rows, seen = scores(folder, asked, type="qformer")
    LOG.info("%.2f M parameters", sum(p.numel() for p in model.parameters()) / 1e6)
    LOG.info("answers that no soft prompt made it say: %s", ", ".join(missed) or "none")
    for row in rows:
        LOG.info("%s", row)
        for question, answer, said in seen[row["format"]]:
            LOG.info("    %r: %r, said %r", question, answer, said)
