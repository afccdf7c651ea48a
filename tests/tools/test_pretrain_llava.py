"""The LLaVA pretraining script on a toy corpus: repeatable, resumable, and loadable at its end."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.tools.test_pretrain_clip import COLORS as PAINTS
from tests.tools.test_pretrain_clip import NAMES, embedded, run, state
from tests.tools.test_pretrain_vilt import toy_clip, write_minilm
from transformers import CLIPModel, LlavaForConditionalGeneration, PreTrainedTokenizerFast

from clip_pretraining.corpus import Corpus
from clip_pretraining.prompts import load_prompts
from evolora.backbones.dialogue import Dialogues as Rendered
from evolora.backbones.image_text import ImageText
from evolora.backbones.loading import load_backbone
from evolora.errors import DataError
from evolora.streams.task import Example
from llava_pretraining import export, score, student, words
from llava_pretraining.about_things import Thing
from llava_pretraining.asking import FORMATS
from llava_pretraining.start import llava_config
from llava_pretraining.subjects import Subjects
from llava_pretraining.words import ANSWER, END, IMAGE, learnt_tokenizer, load_words
from pretrain_llava import main

__all__ = ["embedded", "run"]  # fixtures: the toy corpus with its embedded prompts
TINY = "--batch 10 --vocabulary 500 --warmup 2 --width 64 --layers 1 --questions 3".split()


@pytest.fixture
def train(
    run: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., None]:
    """Run a stage as the command line would, after the prompts and the words."""
    minilm = write_minilm(tmp_path / "minilm")
    toy_clip().save_pretrained(tmp_path / "clip")
    monkeypatch.setattr(words, "SAMPLES", 100)
    monkeypatch.setattr(student, "HELD", 8)

    def stage(name: str, *more: Any, work: str = "work") -> None:
        main([
            name, "--work", str(tmp_path / work), "--domains", str(tmp_path / "suite"),
            "--corpus", str(tmp_path / "corpus"), "--minilm", str(minilm),
            "--clip", str(tmp_path / "clip"), *TINY, *map(str, more),
        ])  # fmt: skip

    stage("words")
    return stage


@pytest.fixture
def source(train: Callable[..., None], tmp_path: Path) -> student.Source:
    """What the toy corpus's dialogues are drawn from."""
    prompts = load_prompts(tmp_path / "work", tmp_path / "suite", tmp_path / "corpus")
    corpus = Corpus(tmp_path / "corpus", prompts)
    tokenizer, common = load_words(tmp_path / "work")
    return student.Source(corpus, Subjects(corpus, prompts, common), tokenizer, 17)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return learnt_tokenizer(iter(["what is it? a red square, 12 of 340"] * 3), 320)


def batch_of(source: student.Source, size: int = 20, count: int = 2) -> student.Dialogues:
    return source.batch(size, count, torch.Generator().manual_seed(0), Random(0))


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
    file = "llava-main.pt"
    assert int(state(tmp_path / "killed" / file)["step"]) == 2
    train("train", *plan, work="killed")
    whole = state(tmp_path / "work" / file)
    for other in ("again", "killed"):
        values = state(tmp_path / other / file)
        assert values.keys() == whole.keys()
        assert all(torch.equal(values[key], whole[key]) for key in whole), other
    out = tmp_path / "out"
    train("export", "--out", out)
    model = LlavaForConditionalGeneration.from_pretrained(out)
    trained = whole["model.multi_modal_projector.linear_1.weight"]
    found = model.model.multi_modal_projector.linear_1.weight
    torch.testing.assert_close(found, trained.half().float())
    assert model.lm_head.weight is model.get_input_embeddings().weight
    backbone = load_backbone(str(out))
    assert isinstance(backbone, ImageText) and backbone.text_length == words.POSITIONS
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".out")] == []


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
    train("train", "--steps", 40, "--seed", 1, "--lr", 3e-3)
    before, after = (sum(part) for part in (losses[1:6], losses[-5:]))
    assert after < 0.8 * before
    first, last = (state(tmp_path / "work" / f"llava-{name}.pt") for name in ("one", "main"))
    still = [key for key in first if "weight" in key and torch.equal(first[key], last[key])]
    assert [key for key in still if "post_layernorm" not in key] == []  # no one reads that


def test_the_encoder_starts_as_the_clip_s_and_may_be_frozen(
    train: Callable[..., None], tmp_path: Path
) -> None:
    train("train", "--steps", 3, "--vision-share", 0)
    found = torch.load(tmp_path / "work" / "llava-main.pt", weights_only=True)["module"]
    start = "model.vision_tower."
    tower = {key.removeprefix(start): found[key] for key in found if key.startswith(start)}
    clip = CLIPModel.from_pretrained(tmp_path / "clip").vision_model.state_dict()
    assert tower and all(torch.equal(value, clip[key]) for key, value in tower.items())
    assert {key for key in clip if "layers.1." in key}.isdisjoint(tower), "the last block is out"


def test_the_encoder_has_its_share_of_the_rate(train: Callable[..., None], tmp_path: Path) -> None:
    moved = []
    for name, share in (("tenth", 0.1), ("full", 1.0)):
        train("train", "--steps", 1, "--vision-share", share, "--name", name, "--decay", 0)
        found = torch.load(tmp_path / "work" / f"llava-{name}.pt", weights_only=True)["module"]
        clip = CLIPModel.from_pretrained(tmp_path / "clip").vision_model.state_dict()
        key = "encoder.layers.0.mlp.fc1.weight"
        moved.append((found[f"model.vision_tower.{key}"] - clip[key]).abs().max())
    torch.testing.assert_close(moved[1], 10 * moved[0], rtol=0.05, atol=1e-5)


def test_labels_are_the_answers_and_nothing_else(source: student.Source) -> None:
    batch = batch_of(source)
    assert batch.pixels.shape == (15, 3, 64, 64)
    images = (batch.ids == IMAGE).sum(1)
    assert images.tolist() == [17] * 15 + [0] * 5
    for ids, labels, weights in zip(batch.ids, batch.labels, batch.weights, strict=True):
        told = labels != student.NO_ANSWER
        assert torch.equal(labels[told], ids[told]) and torch.equal(weights > 0, told)
        starts = (ids == ANSWER).nonzero()[:, 0].tolist()
        ends = (ids == END).nonzero()[:, 0].tolist()
        assert len(starts) == len(ends) == 2
        inside = [place for a, b in zip(starts, ends, strict=True) for place in range(a + 1, b + 1)]
        assert told.nonzero()[:, 0].tolist() == inside
        for start, end in zip(starts, ends, strict=True):
            sums = weights[start + 1 : end + 1].sum()
            torch.testing.assert_close(sums, torch.tensor(float(end - start)).sqrt())


def test_pictures_that_are_held_out_are_never_drawn(source: student.Source) -> None:
    rows = source.corpus.rows(2000, torch.Generator().manual_seed(0)).tolist()
    held = student.held_out(source.corpus).tolist()
    assert held == [7, 15, 23, 31]
    assert set(rows) == set(range(32)) - set(held)


def test_named_pictures_come_with_their_own_name(
    source: student.Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    only = {"name": FORMATS[Thing]["name"]}
    monkeypatch.setattr("llava_pretraining.asking.FORMATS", {**FORMATS, Thing: only})
    monkeypatch.setattr(student, "augment", lambda x, *_: student.normalized(x))
    batch = batch_of(source, count=1)
    for pixels, labels in zip(batch.pixels[:8], batch.labels[:8], strict=True):
        told = labels[(labels != student.NO_ANSWER) & (labels != END)]
        name = source.tokenizer.decode(told).strip()
        shown = 255 * (pixels / 2 + 0.5)
        ink = shown.flatten(1)[:, shown.sum(0).argmin()]
        assert tuple(ink.round().int().tolist()) == PAINTS[NAMES.index(name)]


def test_the_loss_does_not_depend_on_the_parts(
    source: student.Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = SimpleNamespace(width=64, layers=1)
    config = llava_config(shape, toy_clip(), len(source.tokenizer))
    torch.manual_seed(0)
    model, batch, found = LlavaForConditionalGeneration(config).eval(), batch_of(source), []
    for parts in (1, 4):
        monkeypatch.setattr(student, "PARTS", parts)
        found.append(student.answer_loss(model, batch, bf16=False))
    torch.testing.assert_close(found[0], found[1])
    labels = batch.labels.clone()
    labels[batch.labels == student.NO_ANSWER] = -100
    logits = model(
        input_ids=batch.ids, pixel_values=batch.pixels, attention_mask=(batch.ids != 0).long()
    ).logits[:, :-1]
    each = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="none"
    )
    weights = batch.weights[:, 1:].flatten()
    torch.testing.assert_close(found[0], (each * weights).sum() / weights.sum())


def test_dialogues_are_learnt_as_the_library_writes_them(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    processor = export.processor_of(tokenizer, patch=16)
    rendered = Rendered(processor, IMAGE, words.POSITIONS)
    talk = [("what is it?", "a red square"), ("Where?\nGive 12.", "[12, 340]"), ("red", "it")]
    shown = torch.zeros(3, 64, 64, dtype=torch.uint8)
    for count in (1, 2, 3):
        said = [text for turn in talk[:count] for text in turn][:-1]
        text = said[0] if count == 1 else tuple(said)
        example = Example(inputs={"image": shown, "text": text}, label=talk[count - 1][1], key="x")
        answer = rendered.answer(example)
        assert answer is not None
        ids, labels, _ = student.tokens_of(tokenizer, [talk[:count]], [17])
        whole = torch.cat([rendered.prompt(example)["input_ids"], answer])
        assert ids[0].tolist() == whole.tolist()
        assert labels[0, -len(answer) :].tolist() == answer.tolist()
        assert rendered.read(answer[:-1].tolist()) == talk[count - 1][1]


@pytest.mark.parametrize("text", ["Čeština 漢字 🦉", "a  b\nc", "x1=20.5%", "NASA's Web-Site"])
def test_any_text_can_be_written(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]).strip() == text


def test_digits_stand_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = tokenizer.tokenize("12 of 340")
    assert [token.lstrip("Ġ") for token in tokens if token[-1].isdigit()] == list("12340")


def test_scores_are_of_the_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = [torch.full((3, 64, 64), value, dtype=torch.uint8) for value in (0, 9)]
    asked = {
        "name": [score.Asked(("?", "owl"), shown[0]), score.Asked(("?", "cup"), shown[1])],
        "box": [score.Asked(("?", "[0, 0, 100, 100]"), None)],
    }
    backbone = object.__new__(ImageText)
    monkeypatch.setattr(score, "load_backbone", lambda *_, **__: backbone)

    def written(_: Any, asked: list[score.Asked]) -> list[str]:
        return [
            "[0, 0, 100, 50]" if one.picture is None else ("owl", "cup")[int(one.picture.max()) > 0]
            for one in asked
        ]

    monkeypatch.setattr(score, "answers", written)
    rows, seen = score.scores(Path("x"), asked)
    assert rows[0] == {"format": "name", "questions": 2, "score": 100.0, "swapped": 0.0}
    assert rows[1] == {"format": "box", "questions": 1, "score": 50.0}
    assert seen["name"][1] == ("?", "cup", "cup")


def test_words_must_come_first(train: Callable[..., None], tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "work" / "llava-words")
    with pytest.raises(DataError, match="run the stage 'words' first"):
        train("train", "--steps", 1)


@pytest.mark.parametrize("line", [["words"], ["train"], ["export"], ["walk"]])
def test_wrong_command_lines_are_refused(line: list[str], capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main([*line, "--work", "w"])
    assert "error:" in capsys.readouterr().err
