"""``mosaic/missing``: pairs of a picture and a few words, offline; the stand-in for CMML.

Six tasks of one label per sample (emoji, clip art, furniture; the stand-in for UPMC-Food101) or
six of several (icons; for MM-IMDb), class-incremental. No text holds a label's word, and no object
is on two sides of a split, so that neither modality gives the answer away. The file holds complete
pairs; which of them lack a modality is decided by :mod:`evolora.streams.missing`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evolora.registry import STREAMS
from evolora.streams.missing_manifest import MissingOption, with_missing
from evolora.streams.mosaic.reading import SPLITS, decode_image, read_packed
from evolora.streams.sampling import Labelled, check_choice, limited, make_task, row_index
from evolora.streams.task import Example, Label, LabelSpace, Stream, Task

LABELS = ("single", "multi")


@dataclass(frozen=True, eq=False)
class PackedPairs:
    """Some pairs of a packed file; a picture is decoded on access.

    Args:
        packed: tensors of the file.
        rows: row of each pair in the file.
        classes: number of classes of the task.
        multi_label: a label is a tuple of 0 and 1 per class, otherwise a class index.
        name: prefix of the samples' keys.
    """

    packed: dict[str, Tensor]
    rows: Tensor
    classes: int
    multi_label: bool
    name: str

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        index = row_index(index, len(self))
        row = int(self.rows[index])
        return Example(
            inputs={"image": decode_image(self.packed, row), "text": self.text(index)},
            label=self._label(row),
            key=f"{self.name}/{row}",
        )

    def text(self, index: int) -> str:
        """Return a pair's text without decoding its picture."""
        row = int(self.rows[index])
        start, stop = self.packed["text_offsets"][row : row + 2].tolist()
        return self.packed["text_bytes"][start:stop].numpy().tobytes().decode()

    @property
    def labels(self) -> Sequence[Label]:
        """All labels, without decoding a picture."""
        return [self._label(row) for row in self.rows.tolist()]

    def _label(self, row: int) -> Label:
        has: list[int] = self.packed["label"][row, : self.classes].tolist()
        return tuple(has) if self.multi_label else has.index(1)


@STREAMS.register(
    "mosaic/missing",
    summary="image + text pairs, embedded: six tasks of one label or six of several",
)
def load(
    *,
    labels: str = "single",
    root: str | Path | None = None,
    order: Sequence[str] | None = None,
    limit: int | None = None,
    test_limit: int | None = None,
    missing: MissingOption = None,
    seed: int = 0,
) -> Stream:
    """Return the stream.

    Args:
        labels: "single" (one class per sample) or "multi" (any number of them).
        root: folder with ``missing.safetensors`` and ``missing.json`` made by ``evolora data
            build``; None uses the embedded compact version.
        order: task names in learning order (a subset is allowed); None uses the stored order.
        limit: at most so many samples per task and split, class-balanced.
        test_limit: the same for the test splits alone.
        missing: which samples lack the text or the image: settings (kind, rate, seed ...), a kind,
            or a manifest file; None leaves all complete.
        seed: of the class-balanced choice.
    """
    check_choice("labels", labels, LABELS)
    packed, info = read_packed(root, "missing")
    tasks = tuple(
        _task(packed, task, index, limit, test_limit, seed)
        for index, task in enumerate(info["tasks"])
        if task["labels"] == labels
    )
    stream = Stream(
        name="mosaic/missing",
        tasks=tasks,
        label_protocol="seen",
        source=f"{info['size']} version, {labels} label, "
        f"{sum(len(t.train) + len(t.val) + len(t.test) for t in tasks)} pairs",
    )
    chosen = stream if order is None else stream.reordered(order)
    return with_missing(chosen, missing)


def _task(
    packed: dict[str, Tensor],
    info: dict[str, Any],
    index: int,
    limit: int | None,
    test_limit: int | None,
    seed: int,
) -> Task:
    several, classes = info["labels"] == "multi", tuple(info["classes"])
    splits: dict[str, Labelled] = {}
    for number, split in enumerate(SPLITS):
        chosen = (packed["task"] == index) & (packed["split"] == number)
        rows = torch.nonzero(chosen).squeeze(1)
        splits[split] = PackedPairs(packed, rows, len(classes), several, f"{info['name']}/{split}")
    splits["test"] = limited(splits["test"], test_limit, seed, f"{info['name']}/test")
    labels = LabelSpace(classes=classes, templates=tuple(info["templates"]), multi_label=several)
    return make_task(info["name"], splits, labels, limit, seed, modalities=("image", "text"))
