"""The parts as one stock InternVL, and what its processor makes of questions and answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionModel

from evolora.backbones.dialogue import Dialogues
from evolora.streams.task import Example
from smol_assembly.language import load_llm, part, processor_of

LONGEST = 128  # tokens of a prompt
SHUFFLE = 0.5  # InternVL puts 2 x 2 patches into one token


def load_parts(work: Path) -> tuple[InternVLForConditionalGeneration, Any]:
    """Returns the whole model, its projection random, and its processor."""
    vision = InternVLVisionModel.from_pretrained(part(work, "vision"), dtype=torch.float32)
    llm, tokenizer = load_llm(work)
    side, patch = vision.config.image_size[0], vision.config.patch_size[0]
    tokens = round(side / patch * SHUFFLE) ** 2
    config = InternVLConfig(
        vision_config=vision.config,
        text_config=llm.config,
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=tokens,
        downsample_ratio=SHUFFLE,
        tie_word_embeddings=llm.config.tie_word_embeddings,
    )
    model = InternVLForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(vision.state_dict())
    model.model.language_model.load_state_dict(llm.model.state_dict())
    model.lm_head.load_state_dict(llm.lm_head.state_dict())
    model.tie_weights()
    model.generation_config = llm.generation_config
    return model.eval().requires_grad_(False), processor_of(tokenizer, side, tokens)


@torch.no_grad()
def encoded(model: InternVLForConditionalGeneration, pixels: Tensor) -> Tensor:
    """Returns what the projection takes [b, n, 4 d] of normalized pictures [b, 3, s, s]."""
    states = model.model.vision_tower(pixel_values=pixels).last_hidden_state[:, 1:]
    side = int(states.shape[1] ** 0.5)
    shuffled: Tensor = model.model.pixel_shuffle(states.unflatten(1, (side, side)), SHUFFLE)
    return shuffled.flatten(1, 2)


class Speech:
    """Tokens of questions about a picture and of answers, as the library makes them.

    Args:
        processor: of the model.
    """

    def __init__(self, processor: Any) -> None:
        self.image_token = processor.image_token_id
        self._dialogues = Dialogues(processor, self.image_token, LONGEST)

    def question(self, text: str) -> Tensor:
        """Returns the prompt's tokens [n], those of the image among them."""
        blank = torch.zeros(3, 8, 8, dtype=torch.uint8)
        found = self._dialogues.prompt(
            Example(inputs={"image": blank, "text": text}, label="", key=text)
        )
        return found["input_ids"].long()

    def answer(self, text: str) -> Tensor:
        """Returns the answer's tokens [a], the end token last."""
        found = self._dialogues.answer(Example(inputs={}, label=text, key=text))
        assert found is not None
        return found.long()
