"""Builds `mosaic/instructions`: pictures, and questions about them with answers in words.

A picture is kept once, however many questions are about it, in at most 48 colors; one that looks
the same in two splits is kept in the first. Everything is decided by the tables
(`instruction_suite`, `instruction_words`) and a seed; two builds from the same packages are equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from evolora.streams.mosaic.build_domains import (
    Progress,
    balanced,
    check_size,
    describe,
    encode,
    keep_usable,
    write_stream,
)
from evolora.streams.mosaic.instruction_samples import Question
from evolora.streams.mosaic.instruction_suite import TASKS, InstructionTask
from evolora.streams.mosaic.samples import SEED, SPLITS, Size

_COLORS = 48  # of one picture: a third fewer bytes, hardly to be seen at 64 pixels

_COLUMNS = {
    "task": np.uint8,
    "split": np.uint8,
    "family": np.int16,
    "picture": np.int32,
    "question": np.int32,
    "answers": np.int32,
}


def build(
    out: Path,
    size: Size,
    cache: Path | None = None,
    progress: Progress | None = None,
    tasks: Sequence[InstructionTask] = TASKS,
) -> Path:
    """Writes `instructions.safetensors` and `instructions.json`; returns the JSON's path.

    Args:
        out: folder, made if missing.
        size: "compact" (capped, as embedded in the package) or "large" (everything).
        cache: folder of the registry packages; see `sources.fetch`.
        progress: called with one line per task.
        tasks: rows of the suite.
    """
    from safetensors.numpy import save

    check_size(size)
    drawn = _Questions()
    rows = []
    for number, task in enumerate(tasks):
        questions = keep_usable(task.collect(cache, size))
        for split, most in zip(SPLITS, task.caps, strict=True):
            part = [question for question in questions if question.split == split]
            cap = most if size == "compact" else None
            for question in balanced(part, cap, f"{SEED}/{task.name}/{split}"):
                drawn.add(question, number)
        rows.append(_describe(task, sorted({question.name for question in questions})))
        if progress:
            progress(f"{task.name}: {drawn.count} questions, {drawn.size} bytes so far")
    manifest = {"size": size, "tasks": rows, "families": list(drawn.families)}
    return write_stream(out, "instructions", save(drawn.tensors()), manifest, cache)


class _Questions:
    """The questions kept so far, as the columns of the file."""

    def __init__(self) -> None:
        self.files: list[bytes] = []
        self.pictures: dict[tuple[int, str], int] = {}
        self.looks: dict[bytes, tuple[str, int]] = {}
        self.texts: dict[str, int] = {}
        self.families: dict[str, int] = {}
        self.columns: dict[str, list[int]] = {name: [] for name in _COLUMNS}

    @property
    def count(self) -> int:
        """Number of questions."""
        return len(self.columns["task"])

    @property
    def size(self) -> int:
        """Bytes of all pictures."""
        return sum(map(len, self.files))

    def add(self, question: Question, task: int) -> None:
        """Draws and encodes one picture, unless it is there, and keeps what is asked about it."""
        place = self._picture(question, task)
        if place is None:
            return
        row = {
            "task": task,
            "split": SPLITS.index(question.split),
            "family": self.families.setdefault(question.family, len(self.families)),
            "picture": place,
            "question": self._text(question.text),
            "answers": self._text("\n".join(question.answers)),
        }
        for name, value in row.items():
            self.columns[name].append(value)

    def _text(self, text: str) -> int:
        return self.texts.setdefault(text, len(self.texts))

    def _picture(self, question: Question, task: int) -> int | None:
        """Returns the place of a question's picture; None for one that another split has."""
        known = self.pictures.get((task, question.picture))
        if known is not None:
            return known
        encoded = encode(few_colors(question.draw()))
        split, place = self.looks.setdefault(encoded, (question.split, len(self.files)))
        if split != question.split:
            return None
        if place == len(self.files):
            self.files.append(encoded)
        self.pictures[task, question.picture] = place
        return place

    def tensors(self) -> dict[str, NDArray[Any]]:
        """Returns the content of `instructions.safetensors`; several answers are lines."""
        columns = self.columns.items()
        return {
            **packed("", self.files),
            **packed("text_", [text.encode() for text in self.texts]),
            **{name: np.asarray(values, dtype=_COLUMNS[name]) for name, values in columns},
        }


def few_colors(image: Image.Image) -> Image.Image:
    """Returns the picture in at most `_COLORS` colors of its own, without dithering."""
    plain = Image.Dither.NONE
    return image.quantize(_COLORS, method=Image.Quantize.MEDIANCUT, dither=plain).convert("RGB")


def packed(name: str, parts: Sequence[bytes]) -> dict[str, NDArray[Any]]:
    """Returns the parts one after another, and where each begins and the last one ends."""
    return {
        f"{name}bytes": np.frombuffer(b"".join(parts), dtype=np.uint8),
        f"{name}offsets": np.cumsum([0, *map(len, parts)], dtype=np.int32),
    }


def _describe(task: InstructionTask, classes: list[str]) -> dict[str, Any]:
    return {
        **describe(task, classes),
        "answer_format": task.answer_format,
        "metric": task.metric,
        "max_new_tokens": task.max_new_tokens,
    }
