"""Scores of the exported model on questions about pictures that training never drew."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any

import torch
from torch import Tensor

from clip_pretraining.corpus import Corpus
from evolora.randomness import derive_seed, generator
from llava_pretraining.about_things import Thing
from llava_pretraining.scenes import Scene, draw_scene, picture
from llava_pretraining.score import Asked
from llava_pretraining.student import held_out
from llava_pretraining.subjects import Subjects
from qformer_pretraining.about_views import View
from qformer_pretraining.asking import PICTURES
from qformer_pretraining.objects import Objects


def questions(
    corpus: Corpus, subjects: Subjects, objects: Objects | None, count: int, seed: int
) -> dict[str, list[Asked]]:
    """Returns ``count`` questions of each format, about held-out pictures, scenes and objects."""
    found: dict[str, list[Asked]] = {}
    for kind, formats in PICTURES.items():
        if kind is View and objects is None:
            continue
        for name, (_, ask) in formats.items():
            words, asked = Random(derive_seed(seed, "qformer-score", name)), []
            shown = _shown(kind, corpus, subjects, objects, words)
            while len(asked) < count:
                subject, pixels = next(shown)
                turn = ask(subject, words)
                if turn is not None:
                    asked.append(Asked(turn, pixels))
            found[name] = asked
    return found


def _shown(
    kind: type, corpus: Corpus, subjects: Subjects, objects: Objects | None, draw: Random
) -> Iterator[tuple[Any, Tensor]]:
    """Yields subjects of a kind with their pictures, uint8 [3, 64, 64]."""
    held = held_out(corpus)
    while True:
        if kind is Scene:
            scene = draw_scene(draw)
            yield scene, picture(scene, draw).permute(2, 0, 1)
        elif kind is Thing:
            row = held[draw.randrange(len(held))]
            yield subjects.thing(int(row), draw), corpus.pictures(row[None])[0].permute(2, 0, 1)
        else:
            assert objects is not None
            pixels, views = objects.batch(1, generator(draw.random()), draw)
            yield views[0], ((pixels[0] + 1) * 127.5).round().to(torch.uint8)
