"""Shared fixtures: a toy CLIP of the real class with real tokenizer code, and toy image tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from evolora.backbones.clip import DualEncoder
from evolora.streams.task import Example, LabelSpace, Stream, Task

torch.set_num_threads(1)
WORDS = [
    "a",
    "photo",
    "of",
    "bad",
    "red",
    "green",
    "blue",
    "dot",
    "bar",
    "cross",
    "ring",
    ".",
    "the",
]
END = len(WORDS) + 3


class WordTokenizer:
    """A real word-level tokenizer in ``transformers`` form, small enough for a toy text tower."""

    def __new__(cls) -> Any:
        from tokenizers import Tokenizer, models, pre_tokenizers, processors
        from transformers import PreTrainedTokenizerFast

        vocabulary = {
            word: index for index, word in enumerate(["<pad>", "<s>", "?", *WORDS, "</s>"])
        }
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", END)]
        )
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
        )


class ToyProcessor:
    """Tokenizer and image statistics, as a CLIPProcessor holds them."""

    def __init__(self) -> None:
        self.tokenizer = WordTokenizer()
        self.image_processor = type(
            "Images", (), {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        )()


def toy_model(kind: str = "clip", seed: int = 0) -> Any:
    """Return a random ``CLIPModel`` or ``SiglipModel`` of fewer than 50k parameters."""
    from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

    torch.manual_seed(seed)
    size: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 64,
        "num_attention_heads": 2, "num_hidden_layers": 2,
    }  # fmt: skip
    text = {**size, "vocab_size": 20, "max_position_embeddings": 12, "bos_token_id": 1,
            "eos_token_id": END, "pad_token_id": 0, "projection_size": 32}  # fmt: skip
    vision = {**size, "image_size": 16, "patch_size": 8}
    if kind == "siglip":
        config = SiglipConfig(text_config=text, vision_config=vision)
        model: Any = SiglipModel(config)
    else:
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=32))
        with torch.no_grad():  # a fresh CLIP hardly depends on its input; make it do so
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(3.0)
    return model.eval()


def toy_vilt(seed: int = 0, layers: int = 3) -> Any:
    """Return a random ``ViltModel`` of about 30k parameters that depends on all of its input."""
    from transformers import ViltConfig, ViltModel

    torch.manual_seed(seed)
    model = ViltModel(ViltConfig(
        hidden_size=32, intermediate_size=64, num_attention_heads=2, num_hidden_layers=layers,
        vocab_size=20, max_position_embeddings=12, image_size=16, patch_size=8, pad_token_id=0,
    ))  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn_like(parameter) * 0.15)
    return model.eval()


@pytest.fixture
def make_backbone() -> Callable[..., DualEncoder]:
    """Return a maker of toy backbones; every call gives the same weights for the same seed."""

    def make(kind: str = "clip", seed: int = 0) -> DualEncoder:
        model = toy_model(kind, seed)
        backbone = DualEncoder(model, ToyProcessor(), name="toy")
        return backbone

    return make


@pytest.fixture
def backbone(make_backbone: Callable[..., DualEncoder]) -> DualEncoder:
    """A toy CLIP backbone."""
    return make_backbone()


class ToyImages:
    """Noisy drawings of three shapes in a task's own colour; every pixel is seeded."""

    def __init__(self, task: int, rows: int, seed: int) -> None:
        self.task, self.rows, self.seed = task, rows, seed

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> Example:
        draw = torch.Generator().manual_seed(self.seed * 1000 + self.task * 100_003 + index)
        label = index % 3
        image = torch.zeros(3, 16, 16)
        if label == 0:
            image[:, 4:12, 4:12] = 1
        elif label == 1:
            image[:, :, 6:10] = 1
        else:
            image[:, 6:10, :] = 1
        tint = torch.tensor([[1.0, 0.2, 0.2], [0.2, 1.0, 0.2], [0.2, 0.2, 1.0], [1.0, 1.0, 0.1]])
        image = image * tint[self.task % 4].view(3, 1, 1)
        background = 0.15 * (self.task % 4)
        noisy = (image + background + 0.15 * torch.rand(3, 16, 16, generator=draw)).clamp(0, 1)
        pixels = (noisy * 255).to(torch.uint8)
        return Example(
            inputs={"image": pixels}, label=label, key=f"{self.task}/{self.seed}/{index}"
        )


COLOURS = ("red", "green", "blue", "bad")


def toy_task(index: int, rows: int = 24) -> Task:
    """Return one toy task of three classes."""
    colour = COLOURS[index % 4]
    return Task(
        name=f"{colour} shapes",
        train=ToyImages(index, rows, 1),
        val=ToyImages(index, 12, 2),
        test=ToyImages(index, 12, 3),
        labels=LabelSpace(
            classes=(f"{colour} dot", f"{colour} bar", f"{colour} cross"),
            templates=("a photo of a {} .", "the {} ."),
        ),
    )


@pytest.fixture
def toy_stream() -> Stream:
    """Three toy tasks."""
    return Stream(name="toy", tasks=tuple(toy_task(index) for index in range(3)))
