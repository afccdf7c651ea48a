"""Image + text samples on disk, either of which may be absent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evolora.streams.missing import COMPLETE, IMAGE_MISSING, TEXT_MISSING
from evolora.streams.task import Example, Label

MODALITIES = ("image", "text")


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One sample as it is listed.

    Args:
        image: image file, or None.
        text: its text, or None.
        label: class index, or a 0 or 1 per class.
        key: identifier within the data set.
    """

    image: Path | None
    text: str | None
    label: Label
    key: str


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Image + text samples with their labels; an image is read when its row is asked for."""

    rows: Sequence[Pair] = field(default=(), repr=False)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        from evolora.streams.images import read_image

        row = self.rows[index]
        inputs: dict[str, Any] = {}
        if row.image is not None:
            inputs["image"] = read_image(row.image)
        if row.text is not None:
            inputs["text"] = row.text
        return Example(inputs=inputs, label=row.label, key=row.key)

    @property
    def labels(self) -> Sequence[Label]:
        """All labels, without decoding an image."""
        return tuple(row.label for row in self.rows)

    @property
    def codes(self) -> tuple[int, ...]:
        """Missing code of each row, without decoding an image."""
        return tuple(_code(row) for row in self.rows)


def _code(row: Pair) -> int:
    if row.text is None:
        return TEXT_MISSING
    return IMAGE_MISSING if row.image is None else COMPLETE
