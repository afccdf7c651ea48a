"""Pictures of the corpus as the encoder sees them, and what is asked and answered about them."""

from __future__ import annotations

import argparse
import io
import json
import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from clip_pretraining.corpus import GROUP_SHARE
from clip_pretraining.prompts import corpus_prompts
from evolora.errors import DataError
from evolora.storage.files import write_bytes
from smol_assembly.model import encoded, load_parts

LOG = logging.getLogger("assemble_smol_vlm")
NAME = ("What is this?", "Name what is drawn.", "What does the picture show?")
CAPTION = ("Describe the picture.", "Write a caption for the picture.")
HELD_OUT = 0.05  # of the pictures
PIECE = 256  # pictures of one file


@dataclass(frozen=True)
class Pairs:
    """Chosen pictures of the corpus.

    Args:
        rows: their places in the corpus [n].
        names: index [n] of each one's name.
        texts: name -> its bare name, then captions.
        held_out: bool [n]; a name drawn by one hand is whole on one side, and was seen in training
            as drawn by another.
    """

    rows: NDArray[np.int64]
    names: NDArray[np.int64]
    texts: list[list[str]]
    held_out: NDArray[np.bool_]

    def tested(self, count: int) -> NDArray[np.int64]:
        """Returns at most so many held-out pictures, of all groups: the corpus has them in turn."""
        rows = np.flatnonzero(self.held_out)
        return rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(np.int64)]

    def drawn(
        self, chosen: NDArray[np.int64], draw: torch.Generator
    ) -> tuple[list[str], list[str]]:
        """Returns a question and an answer for each of the pictures; half are captions."""
        asked, told = [], []
        for name in self.names[chosen]:
            kind = int(torch.randint(2, (1,), generator=draw))
            questions, answers = (
                (NAME, self.texts[name][:1]) if kind == 0 else (CAPTION, self.texts[name][1:])
            )
            asked.append(questions[int(torch.randint(len(questions), (1,), generator=draw))])
            told.append(answers[int(torch.randint(len(answers), (1,), generator=draw))])
        return asked, told


def choose(corpus: Path, count: int, seed: int) -> Pairs:
    """Returns pictures drawn with the shares of the groups, rare names more often than common."""
    head = json.loads((corpus / "corpus.json").read_text())
    with np.load(corpus / "labels.npz") as saved:
        labels = {key: saved[key].astype(np.int64) for key in ("name", "group", "family")}
    weights = 1.0 / np.sqrt(np.bincount(labels["name"])[labels["name"]])
    for number, group in enumerate(head["groups"]):
        own = labels["group"] == number
        weights[own] *= GROUP_SHARE[group] / max(weights[own].sum(), 1e-9)
    draw = np.random.default_rng(seed)
    count = min(count, len(weights))
    rows = np.sort(draw.choice(len(weights), count, replace=False, p=weights / weights.sum()))
    names, families = labels["name"][rows], labels["family"][rows]
    return Pairs(rows, names, corpus_prompts(corpus), _held_out(names, families, draw))


def _held_out(
    names: NDArray[np.int64], families: NDArray[np.int64], draw: np.random.Generator
) -> NDArray[np.bool_]:
    """Returns which pictures are held out, at most the share and never all of a name."""
    sizes = Counter(zip(names.tolist(), families.tolist(), strict=True))
    hands = Counter(name for name, _ in sizes)
    taken: set[tuple[int, int]] = set()
    order, left = sorted(sizes), HELD_OUT * len(names)
    for place in draw.permutation(len(order)):
        name, _ = pair = order[place]
        if hands[name] > 1 and sizes[pair] <= left:
            taken.add(pair)
            hands[name], left = hands[name] - 1, left - sizes[pair]
    return np.array([pair in taken for pair in zip(names.tolist(), families.tolist(), strict=True)])


def pictures(corpus: Path, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Returns pictures [n, 64, 64, 3] of the corpus."""
    found: NDArray[np.uint8] = np.load(corpus / "images.npy", mmap_mode="r")[rows]
    return found


def seen(processor: Any, images: NDArray[np.uint8]) -> Tensor:
    """Returns pictures as the processor hands them to the encoder."""
    found = processor.image_processor([Image.fromarray(image) for image in images])
    return torch.as_tensor(np.stack(found["pixel_values"]))


def _folder(args: argparse.Namespace) -> Path:
    folder: Path = args.work / f"features-{args.pictures}-{args.seed}"
    return folder


def stage_features(args: argparse.Namespace) -> None:
    """Writes what the projection takes of each picture, in half precision, piece by piece."""
    pairs = choose(args.corpus, args.pictures, args.seed)
    model, processor = load_parts(args.work)
    for start in range(0, len(pairs.rows), PIECE):
        path = _folder(args) / f"{start:06d}.npy"
        if path.is_file():
            continue
        images = pictures(args.corpus, pairs.rows[start : start + PIECE])
        parts = [encoded(model, part) for part in seen(processor, images).split(32)]
        content = io.BytesIO()
        np.save(content, torch.cat(parts).half().numpy())
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, content.getvalue())
        LOG.info("%d of %d pictures", start + len(images), len(pairs.rows))


def load_features(args: argparse.Namespace) -> tuple[Pairs, Tensor]:
    """Returns the pictures and their features [n, tokens, 4 d] in half precision.

    Raises:
        DataError: some are missing.
    """
    pairs = choose(args.corpus, args.pictures, args.seed)
    paths = [_folder(args) / f"{at:06d}.npy" for at in range(0, len(pairs.rows), PIECE)]
    for path in paths:
        if not path.is_file():
            raise DataError(f"{path} is missing: run the stage 'features' first")
    return pairs, torch.cat([torch.from_numpy(np.load(path)) for path in paths])
