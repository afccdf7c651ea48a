"""The embedded Q-Former: there, small, what its card says, and of use."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from transformers import AutoProcessor, InstructBlipForConditionalGeneration

from evolora.assets import embedded_backbone
from evolora.backbones.loading import load_backbone
from evolora.backbones.qformer import QFormer
from evolora.config import read_config
from evolora.evaluation.inspection import inspect_config
from evolora.routing.route import BASE, Route
from evolora.streams.mosaic.modality_words import ANSWERS, COLORS
from evolora.streams.task import Example

PAINTED = {name: COLORS[name] for name in ("red", "yellow", "green", "blue")}


@pytest.fixture(scope="module")
def backbone() -> QFormer:
    found = load_backbone("qformer-tiny")
    assert isinstance(found, QFormer)
    return found


def written(backbone: QFormer, examples: Sequence[Example], limit: int = 12) -> list[str]:
    batch = backbone.collate(examples)
    return backbone.write(batch, Route.of(BASE, len(examples)), limit)


def painted(color: str, row: int, sides: tuple[int, int] = (28, 28)) -> Image.Image:
    """Return a box of a size (width, height), in a color, on white."""
    picture = Image.new("RGB", (64, 64), "white")
    left, top = 6 + row % 5, 6 + row % 4
    box = (left, top, left + sides[0], top + sides[1])
    ImageDraw.Draw(picture).rectangle(box, fill=PAINTED[color])
    return picture


def about_colors(count: int = 24) -> list[Example]:
    """Boxes of four colors in turn."""
    colors = [list(PAINTED)[row % len(PAINTED)] for row in range(count)]
    return [
        Example(
            inputs={"image": painted(color, row), "text": "What color is it?"},
            label=color,
            key=str(row),
        )
        for row, color in enumerate(colors)
    ]


def test_the_file_is_the_card_s_and_small() -> None:
    folder = embedded_backbone("qformer-tiny")
    assert folder is not None
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert f"`{digest[:12]}`" in (folder / "README.md").read_text()
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 6e6


def test_it_is_an_instructblip_in_single_precision(backbone: QFormer) -> None:
    assert backbone.name == "qformer-tiny" and backbone.text_length == 160
    assert backbone.asks and backbone.decodes and backbone.reads == 128
    assert {parameter.dtype for parameter in backbone.model.parameters()} == {torch.float32}
    assert [len(backbone.blocks(tower)) for tower in backbone.towers] == [3, 1, 3]
    assert backbone.tokens("vision") == 17 and backbone.queries.shape == (8, 128)


def test_the_stock_model_and_processor_answer_the_same(backbone: QFormer) -> None:
    folder = embedded_backbone("qformer-tiny")
    model = InstructBlipForConditionalGeneration.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    examples = about_colors(4)
    for example, said in zip(examples, written(backbone, examples), strict=True):
        given = {"images": example.inputs["image"], "text": example.inputs["text"]}
        inputs = processor(**given, return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=12)[:, inputs["input_ids"].shape[1] :]
        assert processor.batch_decode(tokens, skip_special_tokens=True)[0].strip() == said


def test_it_answers_what_it_sees(backbone: QFormer) -> None:
    examples = about_colors()
    said = written(backbone, examples)
    assert sum(s == e.label for s, e in zip(said, examples, strict=True)) > 18
    shown = [e.inputs["image"] for e in examples]
    moved = [
        Example(inputs={**e.inputs, "image": picture}, label=e.label, key=e.key)
        for e, picture in zip(examples, [*shown[1:], shown[0]], strict=True)
    ]
    said = written(backbone, moved)
    assert sum(s == e.label for s, e in zip(said, examples, strict=True)) < 6


def test_it_follows_the_question(backbone: QFormer) -> None:
    examples = [
        Example(inputs={"image": painted("red", 1), "text": question}, label="", key=question)
        for question in ("What color is it?", "Is it tall, wide or even?", "Is it a cup?")
    ]
    said = written(backbone, examples)
    assert said[0] in ANSWERS["color"]
    assert said[1] in ANSWERS["shape"]
    assert said[2] in ANSWERS["is-it"]


def test_it_reads_descriptions_of_what_it_never_sensed(backbone: QFormer) -> None:
    """In words, before the question: as soft tokens of other modalities will stand."""
    told = {
        "violin": "Which instrument is it?",
        "rises": "How does the tone go on?",
        "away": "Which way does it go?",
        "inverted": "How is it placed?",
        "far": "How far is it?",
    }
    tokenizer, right = backbone.instructions.tokenizer, 0
    for answer, question in told.items():
        before = tokenizer(answer, add_special_tokens=False)["input_ids"]
        ids = torch.tensor([[*before, *tokenizer(question)["input_ids"]]])
        with torch.no_grad():
            logits = backbone.model.get_submodule("language_model")(input_ids=ids).logits
        right += tokenizer.decode(logits[0, -1].argmax()).strip() == answer
    assert right >= 4


def test_every_answer_of_the_stream_is_one_token(backbone: QFormer) -> None:
    for answer in {word for words in ANSWERS.values() for word in words}:
        tokens = backbone.instructions.answer(Example(inputs={"text": "x"}, label=answer, key="x"))
        assert tokens is not None and len(tokens) == 2, answer
        assert int(tokens[1]) == backbone.instructions.end_token


def test_any_text_can_be_an_answer(backbone: QFormer) -> None:
    text = "Čeština, 漢字 & [12, 340] 🦉"
    tokens = backbone.instructions.answer(Example(inputs={"text": "x"}, label=text, key="x"))
    assert tokens is not None and backbone.instructions.read(tokens[:-1].tolist()) == text


def test_an_answer_does_not_depend_on_its_batch_mates(backbone: QFormer) -> None:
    examples = [
        *about_colors(2),
        Example(inputs={"text": "Repeat: owl, tea"}, label="owl, tea", key="text"),
        Example(inputs={"image": painted("red", 1), "text": "Describe it."}, label="x", key="long"),
    ]
    together = written(backbone, examples)
    assert together == [written(backbone, [example])[0] for example in examples]


def test_the_fourth_path_of_rank_four_is_below_two_percent_of_it(tmp_path: Path) -> None:
    features = {"encoder": "features", "width": 128, "tokens": 2}
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps({
        "backbone": {
            "name_or_path": "qformer-tiny",
            "modalities": dict.fromkeys(("video", "audio", "depth", "pc"), features),
        },
        "method": {"type": "pathweave", "r": 4},
        "stream": {"name": "mcl"},
    }))  # fmt: skip
    trained = inspect_config(read_config(file)).trainable
    backbone = load_backbone("qformer-tiny")
    assert trained[0] == 0 and trained[-1] == max(trained) == 47_257
    assert trained[-1] <= 0.02 * sum(p.numel() for p in backbone.model.parameters())
