"""Tiny random Q-Formers with a language model, and modalities with small frozen encoders."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tests.backbones.writers import DECODER, picture, tokenizer
from torch import Tensor, nn

from evolora.backbones.modalities import ModalitySpec, make_modality
from evolora.backbones.qformer import QFormer
from evolora.streams.task import Example

KINDS = ("instructblip", "blip2-opt", "blip2-t5")
HIDDEN, READS, QUERIES, SIDE = 32, 24, 3, 8
VISION = {
    "hidden_size": READS, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "image_size": SIDE, "patch_size": 4, "initializer_range": 0.02,
}  # fmt: skip
QFORMER = {
    "vocab_size": DECODER["vocab_size"], "hidden_size": HIDDEN, "intermediate_size": 48,
    "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0,
    "encoder_hidden_size": READS,
}  # fmt: skip


class Mel(nn.Module):
    """(b, 2, 12) -> (b, 2, 3, 20): two windows of three tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 20)

    def forward(self, windows: Tensor) -> Tensor:
        return self.linear(windows.float().unflatten(-1, (3, 4)))


class Points(nn.Module):
    """(b, 16, 3) -> (b, 1, 1, 12): one token for the whole cloud."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 12)

    def forward(self, points: Tensor) -> Tensor:
        return torch.relu(self.linear(points)).amax(dim=1)[:, None, None]


def audio() -> ModalitySpec:
    torch.manual_seed(1)
    return ModalitySpec(
        name="audio", encoder=Mel(), width=20, frames=2, cue="what is",
        read=lambda value: torch.as_tensor(value),
    )  # fmt: skip


def cloud() -> ModalitySpec:
    torch.manual_seed(2)
    return ModalitySpec(
        name="pc", encoder=Points(), width=12, read=lambda value: torch.as_tensor(value)
    )


def qformer(
    kind: str = "instructblip", seed: int = 0, *, layers: int = 2, plugged: bool = True
) -> QFormer:
    """Return a backbone whose answers depend on all of its input."""
    torch.manual_seed(seed)
    model = _model(kind, layers)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.2)
    words = tokenizer()
    processor = SimpleNamespace(tokenizer=words)
    if kind == "instructblip":
        processor.qformer_tokenizer = words
    backbone = QFormer(model.eval(), processor, name="toy", modalities=[])
    if plugged:
        video = {"encoder": "vision", "frames": 3, "cue": "this is"}
        backbone.add_modality(make_modality("video", video, backbone.model, processor))
        backbone.add_modality(audio())
        backbone.add_modality(cloud())
    return backbone


def saved_qformer(folder: Path) -> Path:
    """Write the InstructBLIP as a folder with a stock processor; return the folder."""
    from transformers import BlipImageProcessorPil, InstructBlipProcessor

    model: Any = qformer(plugged=False).model
    model.save_pretrained(folder)
    images = BlipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    words = (tokenizer(), tokenizer())
    InstructBlipProcessor(images, *words, num_query_tokens=QUERIES).save_pretrained(folder)
    return folder


def _model(kind: str, layers: int) -> Any:
    from transformers import (
        Blip2Config,
        Blip2ForConditionalGeneration,
        InstructBlipConfig,
        InstructBlipForConditionalGeneration,
        LlamaConfig,
        OPTConfig,
        T5Config,
    )

    qformer = {**QFORMER, "num_hidden_layers": layers}
    common = {"vision_config": VISION, "qformer_config": qformer, "num_query_tokens": QUERIES}
    if kind == "instructblip":
        text = LlamaConfig(**DECODER).to_dict()
        config: Any = InstructBlipConfig(**common, text_config=text, image_token_index=4)
        return InstructBlipForConditionalGeneration(config)
    if kind == "blip2-opt":
        text = OPTConfig(
            vocab_size=DECODER["vocab_size"], hidden_size=32, ffn_dim=48, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=128, word_embed_proj_dim=32,
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
        ).to_dict()  # fmt: skip
    else:
        text = T5Config(
            vocab_size=DECODER["vocab_size"], d_model=32, d_kv=8, d_ff=48, num_layers=2,
            num_heads=4, pad_token_id=0, eos_token_id=2, decoder_start_token_id=0,
        ).to_dict()  # fmt: skip
    config = Blip2Config(**common, text_config=text, image_token_index=4)
    return Blip2ForConditionalGeneration(config)


def sound(seed: int) -> Tensor:
    return torch.randint(0, 9, (2, 12), generator=torch.Generator().manual_seed(seed)).to(
        torch.int8
    )


def points(seed: int) -> Tensor:
    return torch.randn(16, 3, generator=torch.Generator().manual_seed(seed))


def clip(seed: int) -> tuple[Tensor, ...]:
    return tuple(picture(10 * seed + place, 8, 8) for place in range(3))


VALUES = {"image": lambda seed: picture(seed, 8, 8), "video": clip, "audio": sound, "pc": points}


def sample(
    modalities: str, text: str = "what is it ?", seed: int = 0, label: str = "red dot"
) -> Example:
    """Return a sample of modalities, given as words."""
    names = modalities.split()
    inputs = {name: VALUES[name](seed) for name in names}
    if text:
        inputs["text"] = text
    return Example(inputs=inputs, label=label, key=f"{modalities} {text} {seed}")


def samples() -> list[Example]:
    """One of each modality, two at once, none; texts of different length."""
    return [
        sample("image", "what is it ?", 0, "red dot"),
        sample("video", "is it red or is it this ?", 1, "yes"),
        sample("audio", "where ?", 2, "green bar ."),
        sample("pc", "", 3, "blue"),
        sample("image audio", "what is this ?", 4, "no"),
        sample("", "is it this ?", 5, "cross ."),
    ]
