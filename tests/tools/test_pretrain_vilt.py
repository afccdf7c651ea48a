"""The ViLT pretraining script on a toy corpus: repeatable, resumable, and loadable at its end."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tools.test_pretrain_clip import embedded, run, state
from transformers import BertConfig, BertModel, BertTokenizer, ViltModel

from clip_pretraining.corpus import Corpus
from clip_pretraining.prompts import load_prompts
from evolora.backbones.loading import load_backbone
from evolora.backbones.vilt import Vilt
from evolora.errors import DataError
from evolora.streams.task import Example
from pretrain_vilt import main
from vilt_pretraining import student
from vilt_pretraining.words import chosen_tokens, load_words, projected, tokenized

__all__ = ["embedded", "run"]  # fixtures: the toy corpus with its embedded prompts
TINY = "--width 64 --layers 1 --projection 16 --batch 12 --vocabulary 120 --warmup 2".split()
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


@pytest.fixture
def train(run: Callable[..., None], tmp_path: Path) -> Callable[..., None]:
    """Run a stage as the command line would, after the prompts and the words."""
    minilm = write_minilm(tmp_path / "minilm")

    def stage(name: str, *options: Any, work: str = "work") -> None:
        main([
            name, "--work", str(tmp_path / work), "--domains", str(tmp_path / "suite"),
            "--corpus", str(tmp_path / "corpus"), "--minilm", str(minilm),
            *TINY, *map(str, options),
        ])  # fmt: skip

    stage("words")
    return stage


def test_a_run_is_repeatable_resumed_and_exported(
    train: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for copy in ("again", "killed"):
        shutil.copytree(tmp_path / "work", tmp_path / copy)
    plan = ("--steps", 4, "--save-every", 0, "--seed", 3)
    train("train", *plan)
    train("train", *plan, work="again")
    original, calls = student.pair_loss, []

    def killed(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(student, "pair_loss", killed)
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


def test_training_lowers_the_loss_and_moves_every_part(
    train: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, losses = student.pair_loss, []

    def kept(*arguments: Any) -> Any:
        loss = original(*arguments)
        losses.append(float(loss.detach()))
        return loss

    monkeypatch.setattr(student, "pair_loss", kept)
    train("train", "--steps", 1, "--name", "one", "--seed", 1)
    train("train", "--steps", 60, "--seed", 1, "--lr", 3e-3)
    assert sum(losses[-10:]) < 0.7 * sum(losses[1:11])
    first, last = (state(tmp_path / "work" / f"vilt-{name}.pt") for name in ("one", "main"))
    still = [key for key in first if "weight" in key and torch.equal(first[key], last[key])]
    assert still == []


def test_pairs_are_what_they_say(train: Callable[..., None], tmp_path: Path) -> None:
    work, corpus_folder = tmp_path / "work", tmp_path / "corpus"
    prompts = load_prompts(work, tmp_path / "suite", corpus_folder)
    corpus = Corpus(corpus_folder, prompts)
    tokenizer, _ = load_words(work)
    named = prompts.sentences[: prompts.names * prompts.templates]
    sentences = tokenized(tokenizer, named).view(prompts.names, prompts.templates, -1)
    mask = tokenizer.mask_token_id
    draw = torch.Generator().manual_seed(0)
    pairs = student.draw_pairs(corpus, sentences, mask, 400, draw)
    white = pairs.pixels.eq(1).flatten(1).all(1)
    assert white[pairs.case == student.TEXT_ONLY].all()
    assert not white[pairs.case != student.TEXT_ONLY].any()
    lengths = (pairs.original != 0).sum(1)
    assert lengths[pairs.case == student.IMAGE_ONLY].eq(2).all()
    assert lengths[pairs.case != student.IMAGE_ONLY].gt(2).all()
    assert pairs.matched[pairs.case != student.WHOLE].all()
    share = (~pairs.matched).sum() / (pairs.case == student.WHOLE).sum()
    assert 0.1 < share < student.MISMATCHED
    for row in (pairs.case == student.WHOLE).nonzero()[:, 0].tolist():
        text = pairs.original[row]
        own = sentences[pairs.names[row], :, : len(text)]
        assert bool((own == text).all(1).any()) == bool(pairs.matched[row])
    changed = pairs.ids != pairs.original
    assert pairs.ids[changed].eq(mask).all() and pairs.original[changed].gt(mask).all()
    some = (
        changed.sum(1)[pairs.case == student.TEXT_ONLY].float()
        / (lengths - 2)[pairs.case == student.TEXT_ONLY]
    )
    assert some.max() == 1 and 0.1 < some.mean() < 0.6


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
