"""Drawings of the corpus that show what the stream asks for: painted, and named by its words."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from random import Random

import numpy as np
import torch
from torch import Tensor

from clip_pretraining.corpus import Corpus, augment
from evolora.streams.mosaic.modality_words import COLORS
from llava_pretraining.student import held_out
from qformer_pretraining.about_views import View

# kind of question -> answer -> names of the corpus that show it; the stream's other words are
# names of something else there ("table" of numbers, "window" of a program)
SHOWN: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "what": {
        "chair": ("chair", "chair 2", "office chair", "stool", "bar stool", "armchair"),
        "table": ("desk",),
        "sofa": ("couch", "sofa"),
        "bed": ("bed",),
        "lamp": ("chandelier", "desk lamp", "floor lamp", "lamp", "lantern", "table lamp"),
        "cabinet": ("chest", "file cabinet"),
        "plant": (
            *("cactus", "deciduous tree", "evergreen tree", "palm tree", "pine tree", "plant"),
            *("potted plant", "tree", "tree 2"),
        ),
        "person": ("person", "boy", "girl", "older person"),
        "door": ("door",),
        "vehicle": (
            *("car", "bus", "truck", "van", "bike", "bicycle", "motorbike", "scooter"),
            *("motor scooter", "delivery truck", "pickup truck", "police car", "school bus"),
        ),
        "animal": (
            *("bear", "cat", "chicken", "cow", "deer", "dog", "elephant", "guide dog", "horse"),
            *("pig", "rabbit"),
        ),
        "bottle": ("bottle", "baby bottle", "lotion bottle", "water bottle", "wine bottle"),
        "cup": (
            *("cup", "mug", "glass", "coffee cup", "coffee mug", "tea cup", "teapot", "beer mug"),
            *("wine glass", "water glass", "pot", "steaming bowl"),
        ),
    },
    "sound": {
        "piano": ("piano", "musical keyboard"),
        "violin": ("violin",),
        "flute": ("flute",),
        "trumpet": ("trumpet",),
        "saxophone": ("saxophone",),
        "harp": ("harp",),
        "guitar": ("guitar",),
        "drum": ("drum", "long drum"),
    },
    "motion": {
        side: (
            *(f"arrow {side}", f"arrow {side} 2", f"{side} arrow", f"arrow {side} long"),
            *(f"arrow circle {side}", f"arrow {side} circle", f"circle arrow {side}"),
            *(f"square arrow {side}", f"arrow {side} square"),
        )
        for side in ("left", "right", "up", "down")
    },
    "emoji": {
        "clock": ("clock", "alarm clock", "mantelpiece clock", "watch"),
        "hand": ("hand", "raised hand", "waving hand", "thumbs up", "OK hand", "victory hand"),
        "heart": ("heart", "red heart", "blue heart", "green heart", "yellow heart", "black heart"),
        "face": ("face", "grinning face", "smiling face", "crying face", "winking face"),
        "family": ("family", "family: man, woman, boy", "family: man, woman, girl"),
    },
}
SHARES = {"what": 0.5, "sound": 0.2, "motion": 0.15, "emoji": 0.15}
JITTER = 14  # of a color's parts
LEFT_OUT = "fluent"
"""The family whose emoji the stream animates."""


class Drawn:
    """Drawings of `SHOWN`, each answer as often as the others of its kind.

    Args:
        corpus: of the pictures.
        folder: of the corpus.
    """

    def __init__(self, corpus: Corpus, folder: Path) -> None:
        self.corpus = corpus
        head = json.loads((folder / "corpus.json").read_text())
        place = {name: row for row, name in enumerate(head["names"])}
        of = {
            place[name]: (kind, noun)
            for kind, nouns in SHOWN.items()
            for noun, names in nouns.items()
            for name in names
            if name in place
        }
        allowed = torch.ones(len(corpus.names), dtype=torch.bool)
        allowed[held_out(corpus)] = False
        allowed[without(folder, LEFT_OUT)] = False
        known = torch.tensor(sorted(of), dtype=torch.long)
        self.of_corpus = (torch.isin(corpus.names, known) & allowed).nonzero()[:, 0]
        self.shown = [of[name] for name in corpus.names[self.of_corpus].tolist()]
        counts = Counter(self.shown)
        kinds = Counter(kind for kind, _ in counts)
        self.weights = torch.tensor(
            [SHARES[one[0]] / kinds[one[0]] / counts[one] for one in self.shown]
        )

    def batch(self, size: int, draw: torch.Generator, words: Random) -> tuple[Tensor, list[View]]:
        """Returns normalized pictures [b, 3, 64, 64], grey ones painted, and what they show."""
        rows = torch.multinomial(self.weights, size, replacement=True, generator=draw)
        rows = rows.sort().values
        pictures, views = self.corpus.pictures(self.of_corpus[rows]), []
        for place, row in enumerate(rows.tolist()):
            kind, noun = self.shown[row]
            color = None
            if self.corpus.grey[self.of_corpus[row]]:
                color = words.choice(tuple(COLORS))
                ink = 1 - pictures[place].float().mean(-1) / 255
                pictures[place] = painted(ink, ink, color, words)
            views.append(View(noun, kind, color))
        return augment(pictures, torch.zeros(size, dtype=torch.bool), draw), views


def painted(shade: Tensor, cover: Tensor, color: str, words: Random) -> Tensor:
    """Returns a picture uint8 [64, 64, 3] on white, in a color that varies a little.

    Args:
        shade: [64, 64] how bright the object is in white, 0 where there is none.
        cover: [64, 64] how much of a pixel the object covers.
        color: its name.
        words: source of randomness.
    """
    ink = [part + words.randint(-JITTER, JITTER) for part in COLORS[color]]
    seen = shade.unsqueeze(2) * torch.tensor(ink).float() + 255 * (1 - cover.unsqueeze(2))
    return seen.clamp(0, 255).to(torch.uint8)


def without(folder: Path, family: str) -> Tensor:
    """Returns the rows of the corpus that a family drew."""
    head = json.loads((folder / "corpus.json").read_text())
    families = torch.from_numpy(np.load(folder / "labels.npz")["family"].astype(np.int64))
    if family not in head["families"]:
        return torch.zeros(0, dtype=torch.long)
    return (families == head["families"].index(family)).nonzero()[:, 0]
