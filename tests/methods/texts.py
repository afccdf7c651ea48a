"""Toy tasks that are answered by texts."""

from __future__ import annotations

from typing import Any

from tests.backbones.writers import picture

from evolora.streams.task import Example, LabelSpace, Task

TEXTS = LabelSpace.of_texts(6)


class Questions:
    """Questions about one picture or none, all with a task's own answer."""

    def __init__(self, answer: str, rows: int, seed: int) -> None:
        self.answer, self.rows, self.seed = answer, rows, seed

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> Example:
        words = ("what is it ?", "is this it ?", "where is it . what is this ?")
        inputs: dict[str, Any] = {"text": f"{words[index % 3]} {self.answer.split()[0]}"}
        if index % 4:
            inputs["image"] = picture(self.seed + index)
        return Example(inputs=inputs, label=self.answer, key=f"{self.answer}/{self.seed}/{index}")


def task(name: str, answer: str, rows: int = 12, *, metric: str = "exact-match") -> Task:
    parts = [Questions(answer, count, seed) for count, seed in ((rows, 0), (4, 50), (6, 70))]
    return Task(
        name=name, train=parts[0], val=parts[1], test=parts[2], labels=TEXTS,
        modalities=("image", "text"), metric=metric,
    )  # fmt: skip
