"""``mosaic/instructions``: eight tasks that are answered in words, each in its own form, offline.

Stands for CMIT, CoIN and UCIT where nothing can be downloaded: one word or yes or no (shapes), a
phrase (emoji), a country (flags), an option's letter (scripts), a list (icons), a word, a number or
yes or no (furniture), a sentence (clip-art), a box (scenes). No vendor family, letter, model or
series is on two sides of a split. With ``blind: true`` the same prompts come without any image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evolora.registry import STREAMS
from evolora.streams.mosaic.reading import SPLITS, decode_image, packed_text, read_packed
from evolora.streams.sampling import generator, row_index
from evolora.streams.task import Example, LabelSpace, Stream, Task


@dataclass(frozen=True, eq=False)
class PackedQuestions:
    """Some questions of a packed file; a picture is decoded on access.

    Args:
        packed: tensors of the file.
        rows: row of each question in the file.
        families: names of what does not cross splits.
        name: prefix of the samples' keys.
        blind: leave the pictures out.
    """

    packed: dict[str, Tensor]
    rows: Tensor
    families: Sequence[str]
    name: str
    blind: bool = False

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        row = int(self.rows[row_index(index, len(self))])
        inputs: dict[str, Any] = {"text": packed_text(self.packed, "question", row)}
        if not self.blind:
            inputs["image"] = decode_image(self.packed, int(self.packed["picture"][row]))
        answers = tuple(packed_text(self.packed, "answers", row).split("\n"))
        return Example(inputs=inputs, label=answers, key=f"{self.name}/{row}")

    def group(self, index: int) -> str:
        """Return what a question must not share with one of another split, by name."""
        return self.families[int(self.packed["family"][self.rows[index]])]


@STREAMS.register(
    "mosaic/instructions",
    summary="questions about pictures, embedded: eight tasks, each with its own form of answer",
)
def load(
    *,
    root: str | Path | None = None,
    order: Sequence[str] | None = None,
    limit: int | None = None,
    test_limit: int | None = None,
    blind: bool = False,
    seed: int = 0,
) -> Stream:
    """Return the stream.

    Args:
        root: folder with ``instructions.safetensors`` and ``instructions.json`` made by ``evolora
            data build``; None uses the embedded compact version.
        order: task names in learning order (a subset is allowed); None uses the stored order.
        limit: at most so many samples per task and split.
        test_limit: the same for the test splits alone.
        blind: leave the images out, of all splits: what the words alone can tell.
        seed: chooses what a limit keeps.
    """
    packed, info = read_packed(root, "instructions")
    limits = {"train": limit, "val": limit, "test": smaller(limit, test_limit)}
    tasks = []
    for index, task in enumerate(info["tasks"]):
        data = {}
        for number, split in enumerate(SPLITS):
            chosen = (packed["task"] == index) & (packed["split"] == number)
            name = f"{task['name']}/{split}"
            rows = limited(torch.nonzero(chosen).squeeze(1), limits[split], seed, name)
            data[split] = PackedQuestions(packed, rows, info["families"], name, blind)
        tasks.append(
            Task(
                name=task["name"],
                **data,
                labels=LabelSpace.of_texts(task["max_new_tokens"]),
                modalities=("text",) if blind else ("image", "text"),
                metric=task["metric"],
                answer_format=task["answer_format"],
            )
        )
    stream = Stream(
        name="mosaic/instructions",
        tasks=tuple(tasks),
        source=f"{info['size']} version, {len(packed['task'])} questions about "
        f"{len(packed['offsets']) - 1} pictures of registry packages"
        f"{', without the pictures' if blind else ''}",
    )
    return stream if order is None else stream.reordered(order)


def smaller(limit: int | None, other: int | None) -> int | None:
    """Return the smaller of two limits; None is no limit."""
    known = [one for one in (limit, other) if one is not None]
    return min(known, default=None)


def limited(rows: Tensor, limit: int | None, seed: int, purpose: str) -> Tensor:
    """Return at most ``limit`` of the rows, chosen by the seed, in their order."""
    if limit is None or len(rows) <= limit:
        return rows
    order = torch.randperm(len(rows), generator=generator(seed, f"{purpose}/limit"))
    return rows[order[:limit].sort().values]
