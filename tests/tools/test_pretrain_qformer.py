"""The Q-Former pretraining script on a toy corpus: repeatable, resumable, loadable at its end."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tests.tools.test_pretrain_clip import embedded, run, state
from tests.tools.test_pretrain_vilt import toy_clip, write_minilm
from torch import Tensor
from transformers import InstructBlipForConditionalGeneration, PreTrainedTokenizerFast

from clip_pretraining.corpus import Corpus
from clip_pretraining.prompts import load_prompts
from evolora.backbones.loading import load_backbone
from evolora.backbones.qformer import QFormer
from evolora.errors import DataError
from evolora.routing.route import BASE, Route
from evolora.streams.mosaic.modality_words import ANSWERS, COLORS, MODALITIES
from evolora.streams.task import Example
from llava_pretraining.student import NO_ANSWER, normalized
from llava_pretraining.subjects import Subjects
from llava_pretraining.words import ANSWER, BEGIN, END, IMAGE, PAD, learnt_tokenizer
from pretrain_qformer import main
from qformer_pretraining import drawn, objects, student, words
from qformer_pretraining.about_views import View
from qformer_pretraining.asking import Asked, about_fact, about_picture
from qformer_pretraining.facts import all_answers
from qformer_pretraining.probe import said_by_soft_tokens
from qformer_pretraining.start import QUERIES, start_model
from qformer_pretraining.vision import VisionStudent, vision_loss
from qformer_pretraining.words import framed, load_words

__all__ = ["embedded", "run"]  # fixtures: the toy corpus with its embedded prompts
TINY = (
    "--batch 10 --vocabulary 500 --warmup 2 --width 32 --vision-layers 1 --qformer-layers 1 "
    "--layers 1 --questions 2 --probe-steps 1"
).split()
SHAPE = SimpleNamespace(width=32, vision_layers=1, qformer_layers=1, layers=1, seed=0)


def toy_objects() -> objects.Objects:
    """Two renders: a tall white bar is a lamp, a wide one a table."""
    planes = torch.zeros(2, 2, 64, 64, dtype=torch.uint8)
    planes[0, :, 8:56, 24:40] = 255
    planes[1, :, 24:40, 8:56] = 255
    return objects.Objects(planes, [("lamp", "tall"), ("table", "")])


@pytest.fixture
def train(
    run: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., None]:
    """Run a stage as the command line would, after prompts, words and encoder."""
    minilm = write_minilm(tmp_path / "minilm")
    toy_clip().save_pretrained(tmp_path / "clip")
    monkeypatch.setattr(words, "SAMPLES", 100)
    monkeypatch.setattr("llava_pretraining.student.HELD", 8)
    shown = {"what": {"chair": ("red square",), "bed": ("grey square",)}}
    monkeypatch.setattr(drawn, "SHOWN", shown)
    monkeypatch.setattr(student, "load_objects", lambda _: toy_objects())

    def stage(name: str, *more: Any, work: str = "work") -> None:
        main([
            name, "--work", str(tmp_path / work), "--domains", str(tmp_path / "suite"),
            "--corpus", str(tmp_path / "corpus"), "--minilm", str(minilm),
            "--clip", str(tmp_path / "clip"), *TINY, *map(str, more),
        ])  # fmt: skip

    stage("words")
    stage("vision", "--steps", 2)
    return stage


@pytest.fixture
def source(train: Callable[..., None], tmp_path: Path) -> student.Source:
    """What the toy corpus's questions are drawn from."""
    prompts = load_prompts(tmp_path / "work", tmp_path / "suite", tmp_path / "corpus")
    corpus = Corpus(tmp_path / "corpus", prompts)
    tokenizer, common = load_words(tmp_path / "work")
    subjects = Subjects(corpus, prompts, common)
    return student.Source(corpus, tmp_path / "corpus", subjects, toy_objects(), tokenizer)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return framed(learnt_tokenizer(iter(["what is it? a red square, yes"] * 3), 300))


def batch_of(source: student.Source, size: int = 20) -> student.Questions:
    return source.batch(size, torch.Generator().manual_seed(0), Random(0))


def test_a_run_is_repeatable_resumed_and_exported(
    train: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for copy in ("again", "killed"):
        shutil.copytree(tmp_path / "work", tmp_path / copy)
    plan = ("--steps", 4, "--save-every", 0, "--seed", 3)
    train("train", *plan)
    train("train", *plan, work="again")
    original, calls = student.answer_loss, []

    def killed(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(student, "answer_loss", killed)
        with pytest.raises(KeyboardInterrupt):
            train("train", *plan, work="killed")
    file = "qformer-main.pt"
    assert int(state(tmp_path / "killed" / file)["step"]) == 2
    train("train", *plan, work="killed")
    whole = state(tmp_path / "work" / file)
    for other in ("again", "killed"):
        values = state(tmp_path / other / file)
        assert values.keys() == whole.keys()
        assert all(torch.equal(values[key], whole[key]) for key in whole), other
    out = tmp_path / "out"
    train("export", "--out", out)
    train("export", "--out", out)  # over itself
    model = InstructBlipForConditionalGeneration.from_pretrained(out)
    trained = whole["language_projection.weight"]
    torch.testing.assert_close(model.language_projection.weight, trained.half().float())
    assert model.language_model.lm_head.weight is model.get_input_embeddings().weight
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".out")] == []


def test_the_stock_processor_and_the_backbone_ask_what_training_asked(
    train: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(student, "HINT", 0)
    train("train", "--steps", 1)
    train("export", "--out", tmp_path / "out")
    backbone = load_backbone(str(tmp_path / "out"))
    assert isinstance(backbone, QFormer) and backbone.asks and backbone.decodes
    tokenizer = backbone.processor.tokenizer
    picture = torch.randint(256, (3, 64, 64), dtype=torch.uint8)
    read, shown, _, ids, _, labels, _ = student.tokens_of(
        tokenizer, [Asked("What is it?", "a bed")], [1]
    )
    example = Example(inputs={"image": picture, "text": "What is it?"}, label="a bed", key="x")
    batch = backbone.collate([example])
    told = int((labels[0] == NO_ANSWER).sum())
    assert batch.inputs["input_ids"][0].tolist() == ids[0, QUERIES:told].tolist()
    assert batch.inputs["answer_ids"][0].tolist() == ids[0, told:].tolist()
    assert torch.equal(batch.inputs["asked_ids"], read)
    stock = backbone.processor(images=[picture], text="What is it?", return_tensors="pt")
    assert torch.equal(stock["input_ids"], ids[:, :told])
    assert torch.equal(stock["qformer_input_ids"], read)
    pixels = normalized(picture.permute(1, 2, 0)[None])
    torch.testing.assert_close(stock["pixel_values"], pixels)
    # four times the same sample: the loss that training computes is the backbone's
    model: Any = backbone.model
    four = student.Questions(
        pixels.repeat(2, 1, 1, 1), read.repeat(4, 1), shown.repeat(4, 1),
        torch.ones(4, dtype=torch.long), ids.repeat(4, 1),
        torch.zeros_like(ids).bool().repeat(4, 1), labels.repeat(4, 1),
        (labels != NO_ANSWER).float().repeat(4, 1),
    )  # fmt: skip
    loss = student.answer_loss(model, four, False, torch.Generator())
    with torch.no_grad():
        wanted = backbone.answer_losses(batch, Route.of(BASE, 1))
    torch.testing.assert_close(loss.detach(), wanted[0], rtol=1e-4, atol=1e-5)


def test_training_lowers_the_loss_and_moves_every_part(
    train: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, losses = student.answer_loss, []

    def kept(*arguments: Any) -> Any:
        loss = original(*arguments)
        losses.append(float(loss.detach()))
        return loss

    monkeypatch.setattr(student, "answer_loss", kept)
    train("train", "--steps", 1, "--name", "one", "--seed", 1)
    train("train", "--steps", 30, "--seed", 1, "--lr", 5e-3)
    before, after = (sum(part) for part in (losses[1:6], losses[-5:]))
    assert after < 0.8 * before
    first, last = (state(tmp_path / "work" / f"qformer-{name}.pt") for name in ("one", "main"))
    still = [key for key in first if "weight" in key and torch.equal(first[key], last[key])]
    # what the last block makes of the instruction is read by nobody
    unread = "qformer.encoder.layer.0."
    unread_parts = (f"{unread}intermediate.", f"{unread}output.")
    assert [key for key in still if not key.startswith(unread_parts)] == []


def test_the_encoder_learns_from_the_teacher_and_is_where_training_starts(
    train: Callable[..., None], tmp_path: Path
) -> None:
    train("vision", "--steps", 3, "--name", "other")
    saved = torch.load(tmp_path / "work" / "qformer-vision-other.pt", weights_only=True)["module"]
    train("train", "--steps", 1, "--vision", "other", "--vision-share", 0, "--decay", 0)
    found = torch.load(tmp_path / "work" / "qformer-main.pt", weights_only=True)["module"]
    tower = {k.removeprefix("tower."): v for k, v in saved.items() if k.startswith("tower.")}
    assert tower and all(torch.equal(v, found[f"vision_model.{k}"]) for k, v in tower.items())


def test_the_model_s_loss_falls_by_the_teacher(train: Callable[..., None], tmp_path: Path) -> None:
    from transformers import CLIPVisionModelWithProjection

    teacher = CLIPVisionModelWithProjection.from_pretrained(tmp_path / "clip").eval()
    torch.manual_seed(0)
    one = VisionStudent(SHAPE, 64, 16)
    optimizer = torch.optim.Adam(one.parameters(), lr=3e-3)
    pixels, losses = torch.randn(8, 3, 64, 64), []
    for _ in range(15):
        loss = vision_loss(one, teacher, pixels, False)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


def test_the_hint_is_about_what_is_shown(source: student.Source) -> None:
    model: Any = start_model(SHAPE, len(source.tokenizer))
    shown = torch.tensor([[20, 21], [22, PAD]])
    table = model.get_input_embeddings().weight
    soft = torch.stack([table[20] + table[21], table[22]]).detach()[:, None].expand(-1, 8, -1)
    right = student.hint_loss(model, 100 * soft, shown)
    wrong = student.hint_loss(model, 100 * soft.flip(0), shown)
    assert bool(right < wrong - 0.3)
    shown[1, 1] = 30
    assert bool(student.hint_loss(model, 100 * soft, shown) > right)
    batch = batch_of(source)
    for row, shown in enumerate(batch.shown.tolist()):
        told = [token for token in batch.labels[row].tolist() if token not in (NO_ANSWER, END)]
        words = [token for token in shown if token != PAD]
        if source.tokenizer.decode(told).strip() not in ("yes", "no"):
            assert words == told


def test_labels_are_the_answers_and_nothing_else(source: student.Source) -> None:
    batch = batch_of(source)
    pictures = 20
    assert batch.pixels.shape == (pictures, 3, 64, 64)
    assert len(batch.asked) == len(batch.copies) == student.ASKS * pictures
    images = (batch.ids == IMAGE).sum(1)
    about = len(batch.copies)
    assert images[:about].tolist() == (QUERIES * batch.copies).tolist()
    assert images[about:].tolist() == [0] * (len(images) - about) and len(images) > about
    assert not batch.told[:about].any() and batch.told[about:].any()
    for ids, labels, weights in zip(batch.ids, batch.labels, batch.weights, strict=True):
        told = labels != NO_ANSWER
        assert torch.equal(labels[told], ids[told]) and torch.equal(weights > 0, told)
        place = ids.tolist().index(ANSWER)
        end = ids.tolist().index(END)
        assert told.nonzero()[:, 0].tolist() == list(range(place + 1, end + 1))
        assert (ids[end + 1 :] == PAD).all() and BEGIN in ids[:place]


def test_pictures_that_are_held_out_or_of_the_stream_are_never_drawn(
    source: student.Source, tmp_path: Path
) -> None:
    never = {7, 15, 23, 31} | {4, 5, 6, 7}  # held out; of the family that the stream animates
    rows = source.corpus.rows(2000, torch.Generator().manual_seed(0)).tolist()
    assert set(rows) == set(range(32)) - never
    named = {row for row in range(32) if row % 4 in (0, 3)}  # red and gray squares
    assert set(source.drawn.of_corpus.tolist()) == named - never


def test_a_family_is_left_out_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "corpus.json").write_text('{"families": ["a", "fluent"]}')
    np.savez(tmp_path / "labels.npz", family=np.array([0, 1, 0, 1]))
    assert drawn.without(tmp_path, "fluent").tolist() == [1, 3]
    assert drawn.without(tmp_path, "other").tolist() == []


def ink_of(picture: Tensor) -> tuple[int, ...]:
    """Return the color of the pixel that is farthest from the corner's."""
    shown = 127.5 * (picture + 1)
    away = (shown - shown[:, :1, :1]).abs().sum(0).flatten()
    return tuple(shown.flatten(1)[:, away.argmax()].round().int().tolist())


def test_drawings_have_the_color_that_is_told(
    source: student.Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawn, "augment", lambda x, *_: normalized(x))
    monkeypatch.setattr(drawn, "JITTER", 0)
    pictures, views = source.drawn.batch(24, torch.Generator().manual_seed(0), Random(0))
    assert {view.noun for view in views} == {"chair", "bed"}
    for picture, view in zip(pictures, views, strict=True):
        ink = ink_of(picture)
        if view.noun == "chair":  # a colored drawing stays as it is
            assert view.color is None and ink == (220, 30, 30)
        else:  # of gray 120 on white: half paper
            assert view.color is not None
            mixed = [135 / 255 * part + 120 for part in COLORS[view.color]]
            assert np.abs(np.subtract(ink, mixed)).max() <= 1.5


def test_renders_have_the_color_and_shape_that_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("JITTER", "LIGHT"):
        monkeypatch.setattr(objects, name, 0)
    monkeypatch.setattr(objects, "WHITE", 1.0)
    pictures, views = toy_objects().batch(40, torch.Generator().manual_seed(0), Random(0))
    assert {(view.noun, view.shape) for view in views} == {("lamp", "tall"), ("table", None)}
    for picture, view in zip(pictures, views, strict=True):
        assert view.color is not None
        assert np.abs(np.subtract(ink_of(picture), COLORS[view.color])).max() <= 1
        covered = (picture < 0.99).any(0).float()
        rows, columns = covered.sum(0).max(), covered.sum(1).max()
        assert (rows > 2 * columns) == (view.noun == "lamp")
        assert 130 < covered.sum() < 1100, "shrunk, and not pushed out"


def test_views_are_asked_about_in_the_stream_s_words() -> None:
    view, draw = View("animal", "what", "red", "even"), Random(0)
    asked = {(one.question, one.answer) for _ in range(300) for one in about_picture(view, 2, draw)}
    assert {("What is it?", "animal"), ("What color is it?", "red")} <= asked
    assert ("Is it tall, wide or even?", "even") in asked
    assert ("Describe it.", "a red animal.") in asked
    assert ("Is it an animal?", "yes") in asked and ("Is it an animal?", "no") not in asked
    assert ("Is it a chair?", "no") in asked and ("Is it a chair?", "yes") not in asked
    arrow = {
        one.question for _ in range(50) for one in about_picture(View("up", "motion"), 2, draw)
    }
    assert arrow == {"How does it move?", "Which way does it go?"}


def test_descriptions_tell_what_is_asked_and_say_every_answer() -> None:
    draw, said, cues = Random(0), set(), set()
    for _ in range(6000):
        fact = about_fact(draw)
        cue, told = fact.told.split(": ") if ": " in fact.told else ("", fact.told)
        cues.add(cue)
        said.add(fact.answer)
        if fact.answer in ("yes", "no"):
            noun = fact.question.rstrip("?").split()[-1]
            assert (noun in told.split()) == (fact.answer == "yes")
        elif fact.answer.endswith("."):
            assert len(fact.answer.split()) > 2
        else:
            assert fact.answer in told
    assert cues == {"", *MODALITIES}
    assert {answer for _, answer in all_answers()} <= said
    assert {word for words in ANSWERS.values() for word in words} <= said


def test_a_probe_tells_what_cannot_be_said(tokenizer: PreTrainedTokenizerFast) -> None:
    shape = SimpleNamespace(**{**vars(SHAPE), "width": 64})
    model = start_model(shape, len(tokenizer))
    missed = said_by_soft_tokens(model, tokenizer, 0, 0)
    assert len(missed) > 0.8 * len(all_answers())
    with torch.no_grad():  # a language model that can say nothing but the end
        model.language_model.model.norm.weight.zero_()
    assert len(said_by_soft_tokens(model, tokenizer, 3, 0)) == len(all_answers())


def test_words_are_needed_first(run: Callable[..., None], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="run the stage 'words' first"):
        main([
            "train", "--work", str(tmp_path / "work"), "--domains", str(tmp_path / "suite"),
            "--corpus", str(tmp_path / "corpus"),
        ])  # fmt: skip
