"""The embedded LLaVA: there, small, what its card says, and of use."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from random import Random

import pytest
import torch
from PIL import Image, ImageDraw

from evolora.assets import embedded_backbone
from evolora.backbones.image_text import ImageText
from evolora.backbones.loading import load_backbone
from evolora.config import load_stream
from evolora.routing.route import BASE, Route
from evolora.streams.task import Example

COLORS = {
    "red": (220, 30, 30),
    "blue": (40, 70, 210),
    "green": (40, 160, 60),
    "black": (10, 10, 10),
}


@pytest.fixture(scope="module")
def backbone() -> ImageText:
    found = load_backbone("llava-tiny")
    assert isinstance(found, ImageText)
    return found


def written(backbone: ImageText, examples: Sequence[Example], limit: int = 16) -> list[str]:
    batch = backbone.collate(examples)
    return backbone.write(batch, Route.of(BASE, len(examples)), limit)


def painted(color: str, row: int) -> Image.Image:
    picture = Image.new("RGB", (64, 64), "white")
    left, top = 4 + 3 * (row % 8), 26 - 3 * (row % 7)
    ImageDraw.Draw(picture).rectangle((left, top, left + 28, top + 28), fill=COLORS[color])
    return picture


def about_colors(count: int = 24) -> list[Example]:
    """Squares of four colors in turn."""
    colors = [list(COLORS)[row % len(COLORS)] for row in range(count)]
    return [
        Example(
            inputs={"image": painted(color, row), "text": "What color is the square?"},
            label=color,
            key=str(row),
        )
        for row, color in enumerate(colors)
    ]


def test_the_file_is_the_card_s_and_small() -> None:
    folder = embedded_backbone("llava-tiny")
    assert folder is not None
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert f"`{digest[:12]}`" in (folder / "README.md").read_text()
    assert sum(file.stat().st_size for file in folder.iterdir()) < 9e6


def test_it_is_a_llava_in_single_precision(backbone: ImageText) -> None:
    assert backbone.name == "llava-tiny" and backbone.text_length == 256
    assert {parameter.dtype for parameter in backbone.model.parameters()} == {torch.float32}
    assert [len(backbone.blocks(tower)) for tower in backbone.towers] == [5, 1, 4]
    prompt = backbone.dialogues.prompt(about_colors(1)[0])["input_ids"]
    assert int((prompt == backbone.image_token).sum()) == 17


def test_it_answers_what_it_sees(backbone: ImageText) -> None:
    examples = about_colors()
    said = written(backbone, examples)
    assert sum(s == e.label for s, e in zip(said, examples, strict=True)) > 18
    shown = [e.inputs["image"] for e in examples]
    moved = [
        Example(inputs={**e.inputs, "image": picture}, label=e.label, key=e.key)
        for e, picture in zip(examples, [*shown[1:], shown[0]], strict=True)
    ]
    said = written(backbone, moved)
    assert sum(s == e.label for s, e in zip(said, examples, strict=True)) < 8


def test_it_tells_names_of_pictures_that_it_never_saw(backbone: ImageText) -> None:
    """Of four names, the one that the picture makes likelier most; chance is a quarter."""
    white = torch.full((3, 64, 64), 255, dtype=torch.uint8)
    draw, hits, count = Random(0), 0, 0
    for task in load_stream(
        "mosaic/domains", order=["emoji", "flags", "icons"], test_limit=60
    ).tasks:
        classes = task.labels.classes
        for row in range(len(task.test)):
            example = task.test[row]
            name = classes[example.label]
            offered = [name, *draw.sample([other for other in classes if other != name], 3)]
            asked = [
                Example(inputs={"image": shown, "text": "What is this?"}, label=one, key=one)
                for shown in (example.inputs["image"], white)
                for one in offered
            ]
            with torch.no_grad():
                losses = backbone.answer_losses(backbone.collate(asked), Route.of(BASE, 8))
            hits, count = hits + int((losses[:4] - losses[4:]).argmin() == 0), count + 1
    assert count == 180 and hits / count > 0.36  # three standard errors above chance


def test_an_answer_does_not_depend_on_its_batch_mates(backbone: ImageText) -> None:
    examples = [
        *about_colors(3),
        Example(inputs={"text": "Repeat: owl, tea"}, label="owl, tea", key="text"),
        Example(inputs={"image": painted("red", 1), "text": "Describe it."}, label="x", key="long"),
    ]
    together = written(backbone, examples)
    assert together == [written(backbone, [example])[0] for example in examples]
    route = Route.of(BASE, len(examples))
    losses = backbone.answer_losses(backbone.collate(examples), route)
    for example, loss in zip(examples, losses, strict=True):
        alone = backbone.answer_losses(backbone.collate([example]), Route.of(BASE, 1))
        torch.testing.assert_close(alone[0], loss, rtol=1e-4, atol=1e-5)
        assert math.isfinite(float(loss))


def test_any_text_can_be_an_answer(backbone: ImageText) -> None:
    text = "Čeština, 漢字 & [12, 340] 🦉"
    tokens = backbone.dialogues.answer(Example(inputs={"text": "x"}, label=text, key="x"))
    assert tokens is not None and backbone.dialogues.read(tokens[:-1].tolist()) == text
