"""The ViLT pretraining script on a toy corpus: repeatable, resumable, and loadable at its end."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.tools.test_pretrain_clip import embedded, run, state
from torch.nn import functional as F
from transformers import BertConfig, BertModel, BertTokenizer, CLIPModel, ViltModel

from clip_pretraining.config import clip_config
from clip_pretraining.corpus import Corpus
from clip_pretraining.prompts import load_prompts
from evolora.backbones.loading import load_backbone
from evolora.backbones.vilt import Vilt, run_in_order
from evolora.errors import DataError
from evolora.streams.task import Example
from pretrain_vilt import main
from vilt_pretraining import student
from vilt_pretraining.start import start_from, vilt_config
from vilt_pretraining.texts import LISTS, Texts, load_texts, word_lists
from vilt_pretraining.words import CLS, SEP, chosen_tokens, load_words, projected

__all__ = ["embedded", "run"]  # fixtures: the toy corpus with its embedded prompts
TINY = "--batch 12 --vocabulary 120 --warmup 2".split()
WORDS = ("red", "blue", "green", "grey", "square", "icon", "##s", "emoji", "drawing", "black")


def write_minilm(folder: Path) -> Path:
    """Write a random BERT of MiniLM's width with a word-piece vocabulary."""
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [*special, *WORDS, *letters, *(f"##{letter}" for letter in letters), ":", "unused"]
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokens), hidden_size=384, num_hidden_layers=1, num_attention_heads=2
    )
    BertModel(config).save_pretrained(folder)
    BertTokenizer(vocab={t: row for row, t in enumerate(tokens)}).save_pretrained(folder)
    return folder


def toy_clip() -> CLIPModel:
    """A random CLIP of two blocks whose norm behind the embeddings does something."""
    torch.manual_seed(0)
    shape = {"width": 64, "layers": 2, "patch": 16, "projection": 16}
    clip = CLIPModel(clip_config(SimpleNamespace(**shape, text_width=64, text_layers=1), 20))
    with torch.no_grad():
        norm = clip.vision_model.pre_layrnorm
        norm.weight.add_(0.2 * torch.randn(64))
        norm.bias.add_(0.2 * torch.randn(64))
    return clip.eval()


@pytest.fixture
def train(run: Callable[..., None], tmp_path: Path) -> Callable[..., None]:
    """Run a stage as the command line would, after the prompts and the words."""
    minilm = write_minilm(tmp_path / "minilm")
    toy_clip().save_pretrained(tmp_path / "clip")

    def stage(name: str, *options: Any, work: str = "work") -> None:
        main([
            name, "--work", str(tmp_path / work), "--domains", str(tmp_path / "suite"),
            "--corpus", str(tmp_path / "corpus"), "--minilm", str(minilm),
            "--clip", str(tmp_path / "clip"), *TINY, *map(str, options),
        ])  # fmt: skip

    stage("words")
    return stage


@pytest.fixture
def drawn(train: Callable[..., None], tmp_path: Path) -> tuple[Corpus, Texts, student.Pairs]:
    """The toy corpus, its texts, and 400 pairs of them."""
    prompts = load_prompts(tmp_path / "work", tmp_path / "suite", tmp_path / "corpus")
    corpus = Corpus(tmp_path / "corpus", prompts)
    texts = load_texts(prompts, load_words(tmp_path / "work")[0], seed=0)
    draw = torch.Generator().manual_seed(0)
    return corpus, texts, student.draw_pairs(corpus, texts, 400, draw)


def test_a_run_is_repeatable_resumed_and_exported(
    train: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for copy in ("again", "killed"):
        shutil.copytree(tmp_path / "work", tmp_path / copy)
    plan = ("--steps", 4, "--save-every", 0, "--seed", 3)
    train("train", *plan)
    train("train", *plan, work="again")
    original, calls = student.pair_losses, []

    def killed(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(student, "pair_losses", killed)
        with pytest.raises(KeyboardInterrupt):
            train("train", *plan, work="killed")
    file = "vilt-main.pt"
    assert int(state(tmp_path / "killed" / file)["step"]) == 2
    train("train", *plan, work="killed")
    whole = state(tmp_path / "work" / file)
    for other in ("again", "killed"):
        values = state(tmp_path / other / file)
        assert values.keys() == whole.keys()
        assert all(torch.equal(values[key], whole[key]) for key in whole), other
    out = tmp_path / "out"
    train("export", "--out", out)
    model = ViltModel.from_pretrained(out)
    trained = whole["vilt.pooler.dense.weight"]
    torch.testing.assert_close(model.pooler.dense.weight, trained.half().float())
    backbone = load_backbone(str(out))
    assert isinstance(backbone, Vilt) and backbone.text_length == 40
    batch = backbone.collate([Example(inputs={"text": "red square"}, label=0, key="x")])
    assert torch.equal(batch.inputs["pixel_values"], torch.ones(1, 3, 64, 64))
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".out")] == []


def test_training_lowers_every_loss_and_moves_every_part(
    train: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, losses = student.pair_losses, []

    def kept(*arguments: Any) -> Any:
        found = original(*arguments)
        losses.append({name: float(value.detach()) for name, value in found.items()})
        return found

    monkeypatch.setattr(student, "pair_losses", kept)
    train("train", "--steps", 1, "--name", "one", "--seed", 1)
    train("train", "--steps", 60, "--seed", 1, "--lr", 3e-3)
    for name in ("text", "words", "image", "patches"):
        before, after = (sum(loss[name] for loss in part) for part in (losses[1:6], losses[-5:]))
        assert after < 0.9 * before, name
    first, last = (state(tmp_path / "work" / f"vilt-{name}.pt") for name in ("one", "main"))
    still = [key for key in first if "weight" in key and torch.equal(first[key], last[key])]
    assert still == []


def test_it_starts_as_the_image_tower() -> None:
    clip, draw = toy_clip(), torch.Generator().manual_seed(0)
    tables = {
        "words": torch.randn(30, 64, generator=draw),
        "positions": 0.1 * torch.randn(40, 64, generator=draw),
        "kinds": 0.1 * torch.randn(2, 64, generator=draw),
    }
    # patches of plain colors, of one brightness: what a patch of CLIP is scaled by hardly differs
    pixels = torch.randn(8, 3, 4, 4, generator=draw).sign().repeat_interleave(16, 2)
    pixels = pixels.repeat_interleave(16, 3)
    torch.manual_seed(0)
    model = ViltModel(vilt_config(clip, 30)).eval()
    start_from(model, clip, tables, pixels)
    with torch.no_grad():
        wanted = clip.vision_model(pixel_values=pixels)
        states = clip.vision_model.post_layernorm(wanted.last_hidden_state)
        ids = torch.tensor([[CLS, SEP]]).expand(8, -1)
        output = run_in_order(model, ids, torch.ones_like(ids), pixels)
        close = F.cosine_similarity(output.last_hidden_state[:, 2:], states, dim=-1)
        pooled = F.cosine_similarity(output.pooler_output, wanted.pooler_output, dim=-1)
    assert close.mean() > 0.97 and pooled.mean() > 0.9


def test_pairs_are_what_they_say(drawn: tuple[Corpus, Texts, student.Pairs]) -> None:
    _, texts, pairs = drawn
    assert pairs.pictures == 300 and pairs.texts.tolist() == [*range(200), *range(300, 400)]
    white = pairs.pixels.eq(1).flatten(1).all(1)
    assert white[300:].all() and not white[:300].any()
    empty = torch.zeros_like(pairs.ids[0])
    empty[:2] = torch.tensor([CLS, SEP])
    assert pairs.ids[200:300].eq(empty).all() and pairs.ids[:, -1].any()
    rows = {tuple(ids.tolist()): row for row, ids in enumerate(texts.ids[:, : len(empty)])}
    for ids, meant in zip(pairs.ids[pairs.texts], pairs.meant, strict=True):
        torch.testing.assert_close(texts.vectors[rows[tuple(ids.tolist())]], meant)


def test_about_half_of_the_pairs_have_their_own_text(
    drawn: tuple[Corpus, Texts, student.Pairs], monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus, texts, _ = drawn
    marked = Texts(texts.ids, torch.arange(float(len(texts.ids)))[:, None], texts.per_name)
    names: list[torch.Tensor] = []
    own = Texts.of_names

    def watched(self: Texts, asked: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
        names.append(asked)
        return own(self, asked, draw)

    monkeypatch.setattr(Texts, "of_names", watched)
    monkeypatch.setattr(student, "OTHER", 0.0)
    pairs = student.draw_pairs(corpus, marked, 400, torch.Generator().manual_seed(1))
    told = pairs.meant[:200, 0].long() // texts.per_name
    assert torch.equal(told, names[0])
    monkeypatch.setattr(student, "OTHER", 1.0)
    pairs = student.draw_pairs(corpus, marked, 400, torch.Generator().manual_seed(1))
    told = pairs.meant[:200, 0].long() // texts.per_name
    assert 0.1 < float((told == names[1]).float().mean()) < 0.5  # four names: a quarter by chance


def test_lists_of_words_mean_what_stands_in_them() -> None:
    vectors = F.normalize(torch.randn(6, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    bare = ["owl", "wolf", "moon", "tea", "cup", "jar"]
    lists, meant = word_lists(bare, vectors, 2, torch.Generator().manual_seed(0))
    assert len(lists) == 2 * LISTS and meant.shape == (2 * LISTS, 8)
    for text, vector in zip(lists, meant, strict=True):
        rows = [bare.index(word) for word in text.split()]
        assert len(set(rows)) == len(rows)
        torch.testing.assert_close(vector, F.normalize(vectors[rows].mean(0), dim=0))
    assert any("owl" in text for text in lists[:LISTS])
    assert any("wolf" in text for text in lists[LISTS:])


def test_tokens_that_are_used_come_before_others() -> None:
    vocabulary = {t: row for row, t in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]",
                  "the", "of", "a", "##a", "rare", "zebra"])}  # fmt: skip
    used = Counter({"zebra": 9, "rare": 1})
    assert chosen_tokens(vocabulary, used, 8)[5:] == ["a", "##a", "zebra"]
    assert chosen_tokens(vocabulary, used, 10)[5:] == ["the", "a", "##a", "rare", "zebra"]
    assert chosen_tokens(vocabulary, used, 99)[:5] == list(vocabulary)[:5]


def test_projected_tables_keep_the_main_directions() -> None:
    torch.manual_seed(0)
    flat = torch.randn(50, 2) @ torch.randn(2, 6)
    found = projected({"words": flat, "positions": flat[:3]}, 2)
    between = found["words"] @ found["words"].T
    torch.testing.assert_close(between, flat @ flat.T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["positions"], found["words"][:3])


def test_words_must_come_first(train: Callable[..., None], tmp_path: Path) -> None:
    (tmp_path / "work" / "start.safetensors").unlink()
    with pytest.raises(DataError, match="run the stage 'words' first"):
        train("train", "--steps", 1)


@pytest.mark.parametrize("words", [["words"], ["train"], ["walk"]])
def test_wrong_command_lines_are_refused(words: list[str], capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main([*words, "--work", "w"])
    assert "error:" in capsys.readouterr().err
