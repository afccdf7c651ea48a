"""Toy tasks of modalities, each answered by a few words."""

from __future__ import annotations

from functools import cache

from tests.backbones.qformers import sample

from evolora.streams.task import Example, LabelSpace, Task

TEXTS = LabelSpace.of_texts(4)
ANSWERS = ("red dot", "green bar", "blue cross")


class Rows(list[Example]):
    """Samples that may be referred to weakly, as a data set must."""


@cache
def task(modalities: str, count: int = 6, name: str = "") -> Task:
    """Return a task of modalities, given as words; it is tested on what it learns."""
    rows = Rows(sample(modalities, "what is it ?", row, ANSWERS[row % 3]) for row in range(count))
    return Task(
        name=name or modalities, train=rows, val=Rows(), test=rows, labels=TEXTS,
        modalities=(*modalities.split(), "text"), metric="exact-match",
    )  # fmt: skip
