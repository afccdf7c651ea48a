"""What the study learns from: activations of the untouched model, read once and kept in a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evolora.backbones.loading import load_backbone
from evolora.randomness import generator
from evolora.routing.route import BASE
from evolora.storage.files import read_tensors, write_tensors
from evolora.streams.mosaic import domains, missing
from evolora.streams.task import LabelSpace

BLOCKS = 1
"""Blocks of each tower, from the top, that adapters stand in."""
TASKS = ("classification", "retrieval")
SPLITS = ("train", "val", "test")
DOMAINS = ("fashion", "shapes", "icons", "furniture")
"""Learned together: 186 classes, which the untouched model hardly knows."""
SHOTS = 8
"""Training images of a class, at most; drawn anew for each seed."""
MOST = {"val": 400, "test": 800}
"""Samples that are evaluated, at most."""
ROWS = 64
"""Samples that are encoded at once."""


@dataclass(frozen=True)
class Side:
    """Images or texts, as they enter the lowest adapted block.

    Args:
        hidden: (n, tokens, d).
        summary: (n) the token that speaks for each.
    """

    hidden: Tensor
    summary: Tensor

    def __len__(self) -> int:
        return len(self.hidden)

    def take(self, rows: Tensor) -> Side:
        """Returns some rows."""
        return Side(self.hidden[rows], self.summary[rows])


@dataclass(frozen=True)
class Split:
    """Samples: images with classes (``labels``), or with texts, equal ones of one number."""

    image: Side
    text: Side | None = None
    labels: Tensor | None = None
    captions: Tensor | None = None

    def __len__(self) -> int:
        return len(self.image)

    def take(self, rows: Tensor) -> Split:
        """Returns some samples."""
        return Split(
            self.image.take(rows),
            None if self.text is None else self.text.take(rows),
            None if self.labels is None else self.labels[rows],
            None if self.captions is None else self.captions[rows],
        )


@dataclass(frozen=True)
class Data:
    """A task's samples by split, and its classes (c, p), where it has any."""

    splits: Mapping[str, Split]
    classes: Tensor | None = None


def training_rows(split: Split, seed: int) -> Tensor:
    """Returns the training samples of a seed: so many shots of each class, or all pairs."""
    order = torch.randperm(len(split), generator=generator(seed, "study rows"))
    if split.labels is None:
        return order
    seen: dict[int, int] = {}
    chosen = []
    for row in order.tolist():
        label = int(split.labels[row])
        seen[label] = seen.get(label, 0) + 1
        if seen[label] <= SHOTS:
            chosen.append(row)
    return torch.tensor(chosen)


def data_of(task: str, cache: Path) -> Data:
    """Returns a task's data, made at the first call and read from a file after that."""
    path = cache / f"{task}.safetensors"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        made = _classification() if task == "classification" else _retrieval()
        write_tensors(path, made, {})
    found = read_tensors(path)
    splits = {}
    for name in SPLITS:
        sides = {
            side: Side(found[f"{name}.{side}"], found[f"{name}.{side}.summary"])
            for side in ("image", "text")
            if f"{name}.{side}" in found
        }
        more = {part: found.get(f"{name}.{part}") for part in ("labels", "captions")}
        splits[name] = Split(**sides, **more)
    return Data(splits, found.get("classes"))


def _classification() -> dict[str, Tensor]:
    backbone: Any = load_backbone("clip-tiny")
    tasks = {task.name: task for task in domains.load().tasks}
    chosen = [tasks[name] for name in DOMAINS]
    found: dict[str, Tensor] = {}
    with torch.no_grad():
        classes = [backbone.class_embeddings(task.labels, BASE) for task in chosen]
    found["classes"] = torch.cat(classes)
    for name in SPLITS:
        images, labels, first = [], [], 0
        for task in chosen:
            samples = getattr(task, name)
            images += [example.inputs["image"] for example in _each(samples)]
            labels += [first + label for label in samples.labels]
            first += len(task.labels.classes)
        rows = _some(name, len(images))
        found |= _images(backbone, f"{name}.image", [images[row] for row in rows])
        found[f"{name}.labels"] = torch.tensor([labels[row] for row in rows])
    return found


def _retrieval() -> dict[str, Tensor]:
    """Rendered furniture and captions: what is known of a model, and its class.

    Splits are the stream's: no model is on two sides. Views of one model share their caption.
    """
    backbone: Any = load_backbone("clip-tiny")
    (task,) = missing.load(order=["furniture"]).tasks
    found: dict[str, Tensor] = {}
    for name in SPLITS:
        pairs = list(_each(getattr(task, name)))
        captions = [_caption(pair, task.labels) for pair in pairs]
        numbers = {caption: number for number, caption in enumerate(dict.fromkeys(captions))}
        found |= _images(backbone, f"{name}.image", [pair.inputs["image"] for pair in pairs])
        found |= _texts(backbone, f"{name}.text", captions)
        found[f"{name}.captions"] = torch.tensor([numbers[caption] for caption in captions])
    return found


def _caption(example: Any, labels: LabelSpace) -> str:
    return f"{labels.classes[example.label]}, {example.inputs['text']}"


def _each(samples: Any) -> Iterator[Any]:
    return (samples[index] for index in range(len(samples)))


def _some(split: str, count: int) -> list[int]:
    order = torch.randperm(count, generator=generator("study", split))
    rows: list[int] = order[: MOST.get(split, count)].tolist()
    return rows


def _images(backbone: Any, name: str, images: Sequence[Any]) -> dict[str, Tensor]:
    cut = len(backbone.blocks("vision")) - BLOCKS
    parts = []
    for start in range(0, len(images), ROWS):
        pixels = backbone.normalize(torch.stack(list(images[start : start + ROWS])))
        inputs = {"pixel_values": pixels}
        with torch.no_grad():
            parts.append(backbone.entering_block("vision", cut, "get_image_features", inputs)[0])
    hidden = torch.cat(parts)
    return {name: hidden, f"{name}.summary": torch.zeros(len(hidden), dtype=torch.long)}


def _texts(backbone: Any, name: str, texts: Sequence[str]) -> dict[str, Tensor]:
    """Returns texts padded on the right, where causal attention never looks."""
    cut = len(backbone.blocks("text")) - BLOCKS
    tokens = backbone.processor.tokenizer(
        list(texts), padding=True, truncation=True, max_length=12, return_tensors="pt"
    )
    ends = (tokens["input_ids"] == backbone.config.text_config.eos_token_id).int().argmax(dim=1)
    parts = []
    for start in range(0, len(texts), ROWS):
        inputs = {
            name: tokens[name][start : start + ROWS] for name in ("input_ids", "attention_mask")
        }
        with torch.no_grad():
            parts.append(backbone.entering_block("text", cut, "get_text_features", inputs)[0])
    return {name: torch.cat(parts), f"{name}.summary": ends}
