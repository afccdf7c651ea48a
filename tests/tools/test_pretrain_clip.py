"""The pretraining script on a toy corpus: repeatable, resumable, and never on stale prompts."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file
from transformers import CLIPModel

from clip_pretraining import image, prompts, text
from evolora.errors import DataError
from evolora.streams.mosaic.build_domains import encode
from pretrain_clip import main

NAMES = ("red square", "blue square", "green square", "grey square")
COLORS = ((220, 30, 30), (30, 30, 220), (30, 200, 30), (120, 120, 120))
TINY = "--width 64 --layers 1 --text-width 64 --text-layers 1 --projection 16 --batch 6".split()


def square(color: Sequence[int], place: int) -> Image.Image:
    picture = Image.new("RGB", (64, 64), "white")
    picture.paste(Image.new("RGB", (24, 24), tuple(color)), (place, 30 - place))
    return picture


def write_suite(folder: Path, classes: Sequence[str]) -> Path:
    """Write a suite of one domain: per class two pictures to train, one for val, one to test."""
    folder.mkdir()
    rows = [(label, split, place) for label in range(len(classes)) for place, split in
            ((2, 0), (9, 0), (15, 1), (22, 2))]  # fmt: skip
    files = [encode(square(COLORS[label], place)) for label, _, place in rows]
    tensors = {
        "bytes": np.frombuffer(b"".join(files), dtype=np.uint8),
        "offsets": np.cumsum([0, *map(len, files)], dtype=np.int64),
        "domain": np.zeros(len(rows), dtype=np.uint8),
        "label": np.array([row[0] for row in rows], dtype=np.int16),
        "split": np.array([row[1] for row in rows], dtype=np.uint8),
    }
    save_file(tensors, folder / "domains.safetensors")
    domain = {"name": "squares", "classes": list(classes), "templates": ["a {}", "one {}"]}
    manifest = {"format_version": 1, "size": "toy", "domains": [domain]}
    (folder / "domains.json").write_text(json.dumps(manifest))
    return folder


def write_corpus(folder: Path, names: Sequence[str]) -> Path:
    folder.mkdir()
    label = np.arange(32, dtype=np.int32) % len(names)
    pictures = [np.asarray(square(COLORS[name], row)) for row, name in enumerate(label)]
    np.save(folder / "images.npy", np.stack(pictures))
    group, family = (label % 2).astype(np.uint8), (np.arange(32) // 4).astype(np.int16)
    np.savez(folder / "labels.npz", name=label, group=group, family=family)
    families = ["plain", "fluent", "third", "fourth", "fifth", "sixth", "seventh", "eighth"]
    head = {"groups": ["emoji", "icons"], "names": list(names), "families": families}
    (folder / "corpus.json").write_text(json.dumps(head))
    return folder


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Sentences that the stand-in for MiniLM was asked for; it answers with unit vectors."""
    asked: list[str] = []

    def embed(_: Path, sentences: list[str]) -> Any:
        asked.extend(sentences)
        seeds = [hashlib.sha256(sentence.encode()).digest()[:4] for sentence in sentences]
        drawn = [np.random.default_rng(list(seed)).normal(size=384) for seed in seeds]
        return np.array([row / np.linalg.norm(row) for row in drawn], dtype=np.float32)

    monkeypatch.setattr(prompts, "minilm_embed", embed)
    return asked


@pytest.fixture
def run(tmp_path: Path, embedded: list[str]) -> Callable[..., None]:
    """Run a stage as the command line would, on the toy suite and corpus unless told otherwise."""
    suite = write_suite(tmp_path / "suite", NAMES[:3])
    corpus = write_corpus(tmp_path / "corpus", NAMES)

    def stage(name: str, *options: Any, work: str = "work", **folders: Path) -> None:
        main([
            name, "--work", str(tmp_path / work),
            "--domains", str(folders.get("suite", suite)),
            "--corpus", str(folders.get("corpus", corpus)),
            "--minilm", "unused", "--vocabulary", "600",
            *TINY, *map(str, options),
        ])  # fmt: skip

    stage("prompts")
    return stage


def state(path: Path) -> dict[str, Any]:
    saved = torch.load(path, weights_only=True)
    moments = saved["optimizer"]["state"]
    tensors = {f"{row}/{key}": value for row in moments for key, value in moments[row].items()}
    return {**saved["module"], **tensors, "step": torch.tensor(saved["step"])}


@pytest.mark.parametrize(
    ("stage", "module", "loss", "file"),
    [("image", image, "image_loss", "image-main.pt"), ("text", text, "text_loss", "text.pt")],
)
def test_a_run_of_steps_is_repeatable_and_resumed_equals_uninterrupted(
    run: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    module: Any,
    loss: str,
    file: str,
) -> None:
    for copy in ("again", "killed"):
        shutil.copytree(tmp_path / "work", tmp_path / copy)
    plan = ("--steps", 4, "--warmup", 2, "--save-every", 0, "--seed", 3)
    run(stage, *plan)
    run(stage, *plan, work="again")
    original, calls = getattr(module, loss), []

    def killed(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module, loss, killed)
        with pytest.raises(KeyboardInterrupt):
            run(stage, *plan, work="killed")
    assert int(state(tmp_path / "killed" / file)["step"]) == 2
    run(stage, *plan, work="killed")
    whole = state(tmp_path / "work" / file)
    assert int(whole["step"]) == 4
    for other in ("again", "killed"):
        values = state(tmp_path / other / file)
        assert values.keys() == whole.keys()
        assert all(torch.equal(values[key], whole[key]) for key in whole), other


def test_another_seed_is_another_run(run: Callable[..., None], tmp_path: Path) -> None:
    for seed in (0, 1):
        run("image", "--steps", 1, "--seed", seed, "--name", seed)
    first, second = (state(tmp_path / "work" / f"image-{seed}.pt") for seed in (0, 1))
    assert not torch.equal(first["projection.weight"], second["projection.weight"])


def test_all_stages_make_a_stock_clip(run: Callable[..., None], tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("text", "--steps", 2)
    run("image", "--steps", 2, "--bf16")
    run("text", "--steps", 1, "--align", "main")
    run("export", "--out", out)
    model = CLIPModel.from_pretrained(out)
    image_part = torch.load(tmp_path / "work" / "image-main.pt", weights_only=True)["module"]
    text_part = torch.load(tmp_path / "work" / "text-main.pt", weights_only=True)["module"]
    product = image_part["text_map.weight"] @ text_part["head.weight"]
    torch.testing.assert_close(model.text_projection.weight, product.half().float())
    assert {"tokenizer.json", "preprocessor_config.json"} <= {file.name for file in out.iterdir()}


def test_stale_prompts_of_the_suite_are_refused_until_refreshed(
    run: Callable[..., None], tmp_path: Path, embedded: list[str]
) -> None:
    run("text", "--steps", 1)
    run("image", "--steps", 1)
    changed = write_suite(tmp_path / "changed", [NAMES[0], "violet square", NAMES[2]])
    for stage, *options in (("text",), ("text", "--align", "main"), ("image",), ("export",)):
        with pytest.raises(DataError, match=r"2 of the 6 prompts of .*changed.*'a violet square'"):
            run(stage, *options, "--steps", 2, "--out", tmp_path / "out", suite=changed)
    assert not (tmp_path / "out").exists()
    tokenizer = (tmp_path / "work" / "tokenizer" / "tokenizer.json").read_bytes()
    embedded.clear()
    run("prompts", "--refresh", suite=changed)
    assert embedded == ["a violet square", "one violet square"]
    assert (tmp_path / "work" / "tokenizer" / "tokenizer.json").read_bytes() == tokenizer
    run("image", "--steps", 2, suite=changed)


def test_stale_prompts_of_the_corpus_are_refused(run: Callable[..., None], tmp_path: Path) -> None:
    changed = write_corpus(tmp_path / "changed", (*NAMES[:3], "black square"))
    with pytest.raises(DataError, match=r"4 of the 16 prompts of .*changed.*'black square'"):
        run("image", "--steps", 1, corpus=changed)


def test_an_added_class_is_stale_and_a_dropped_last_one_is_not(
    run: Callable[..., None], tmp_path: Path
) -> None:
    more, fewer = (write_suite(tmp_path / str(n), NAMES[:n]) for n in (4, 2))
    with pytest.raises(DataError, match=r"2 of the 8 prompts .*'a grey square'"):
        run("image", "--steps", 1, suite=more)
    run("image", "--steps", 1, suite=fewer)  # what is left over is a further sentence of the text


def test_missing_and_half_written_prompts_are_named(
    run: Callable[..., None], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"prompts\.json is missing: run the stage 'prompts'"):
        run("text", "--steps", 1, work="elsewhere")
    sentences = json.loads((tmp_path / "work" / "prompts.json").read_text())
    (tmp_path / "work" / "prompts.json").write_text(json.dumps(sentences[:-1]))
    with pytest.raises(DataError, match=r"21 sentences, prompts\.npz 22 embeddings"):
        run("text", "--steps", 1)


@pytest.mark.parametrize(
    "words", [["image"], ["image", "--steps", "2", "--minutes", "3"], ["prompts"], ["walk"]]
)
def test_wrong_command_lines_are_refused(words: list[str], capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main([*words, "--work", "w"])
    assert "error:" in capsys.readouterr().err
