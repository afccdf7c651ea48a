"""SmolLM2 behind the encoder and the Q-Former of another model, as one stock InstructBLIP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import (
    AutoProcessor,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    PreTrainedTokenizerFast,
)

from evolora.backbones.loading import wrap_model
from evolora.backbones.qformer import QFormer
from evolora.randomness import generator
from smol_assembly.language import load_llm

IMAGE = {"image_token": "<image>"}
BEFORE, BEHIND = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
"""What SmolLM2's format has around a question; soft tokens stand before all of it."""


def framed(tokenizer: Any) -> PreTrainedTokenizerFast:
    """Returns the tokenizer with each text as the user's turn, which an answer follows."""
    backend, marks = tokenizer.backend_tokenizer, []
    for name, text in (("before", BEFORE), ("behind", BEHIND)):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        tokens = tokenizer.convert_ids_to_tokens(ids)
        marks.append({"id": name, "ids": ids, "tokens": tokens})
    backend.post_processor = TemplateProcessing(single="before $A behind", special_tokens=marks)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        pad_token=tokenizer.pad_token,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        extra_special_tokens=IMAGE,
    )


def load_parts(work: Path, eyes: Path, seed: int) -> QFormer:
    """Returns the whole model as a backbone, its projection drawn anew.

    Args:
        work: folder of the stage `llm`.
        eyes: folder of a stock InstructBLIP, whose encoder and Q-Former are taken.
        seed: of the projection, whose outputs are about as large as the embeddings of words.
    """
    language, tokenizer = load_llm(work, IMAGE)
    seeing = InstructBlipForConditionalGeneration.from_pretrained(eyes, dtype=torch.float32)
    old = AutoProcessor.from_pretrained(eyes)
    tokenizer = framed(tokenizer)
    config = InstructBlipConfig(
        vision_config=seeing.config.vision_config.to_dict(),
        qformer_config=seeing.config.qformer_config.to_dict(),
        text_config=language.config.to_dict(),
        num_query_tokens=seeing.config.num_query_tokens,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE["image_token"]),
        tie_word_embeddings=language.config.tie_word_embeddings,
    )
    with torch.device("meta"):  # every part is put in; nothing is drawn
        model: Any = InstructBlipForConditionalGeneration(config)
    model.vision_model, model.qformer = seeing.vision_model, seeing.qformer
    model.query_tokens, model.language_model = seeing.query_tokens, language
    model.generation_config = language.generation_config
    reads, writes = seeing.config.qformer_config.hidden_size, language.config.hidden_size
    projection = nn.Linear(reads, writes)
    size = language.get_input_embeddings().weight.square().mean().sqrt()
    with torch.no_grad():
        drawn = torch.randn(projection.weight.shape, generator=generator(seed, "projection"))
        projection.weight.copy_(size * drawn / reads**0.5)
        projection.bias.zero_()
    model.language_projection = projection
    processor = InstructBlipProcessor(
        old.image_processor,
        tokenizer,
        old.qformer_tokenizer,
        num_query_tokens=config.num_query_tokens,
    )
    backbone = wrap_model(model, processor, name="smol-qformer")
    assert isinstance(backbone, QFormer)
    return backbone
