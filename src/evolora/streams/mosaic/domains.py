"""``mosaic/domains``: real image domains in turn, offline; the stand-in for MTIL.

Images come from registry packages (fonts, icon sets, emoji vendors, flags, furniture models,
Fashion-MNIST, digits); train, validation and test come from different vendor families, so that a
domain has to be recognised across drawing styles. ``evolora data build`` makes a larger version.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evolora.registry import STREAMS
from evolora.streams.mosaic.reading import SPLITS, decode_image, read_packed
from evolora.streams.sampling import Labelled, limited, make_task
from evolora.streams.task import Example, LabelSpace, Stream, Task


@dataclass(frozen=True, eq=False)
class PackedImages:
    """Some images of a packed file, decoded on access.

    Args:
        packed: tensors of the file.
        rows: row of each image in the file.
        name: prefix of the samples' keys.
    """

    packed: dict[str, Tensor]
    rows: Tensor
    name: str

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        row = int(self.rows[index])
        return Example(
            inputs={"image": decode_image(self.packed, row)},
            label=int(self.packed["label"][row]),
            key=f"{self.name}/{row}",
        )

    @property
    def labels(self) -> Sequence[int]:
        """All labels, without decoding an image."""
        labels: list[int] = self.packed["label"][self.rows].tolist()
        return labels


@STREAMS.register(
    "mosaic/domains",
    summary="real image domains, embedded: digits, fashion, emoji, flags, icons ...",
)
def load(
    *,
    root: str | Path | None = None,
    order: Sequence[str] | None = None,
    limit: int | None = None,
    test_limit: int | None = None,
    seed: int = 0,
) -> Stream:
    """Return the stream.

    Args:
        root: folder with ``domains.safetensors`` and ``domains.json`` made by ``evolora data
            build``; None uses the embedded compact version.
        order: task names in learning order (a subset is allowed); None uses the stored order.
        limit: at most so many samples per task and split, class-balanced.
        test_limit: the same for the test splits alone.
        seed: of the class-balanced choice.
    """
    packed, info = read_packed(root, "domains")
    tasks = tuple(
        _task(packed, domain, index, limit, test_limit, seed)
        for index, domain in enumerate(info["domains"])
    )
    stream = Stream(
        name="mosaic/domains",
        tasks=tasks,
        source=f"{info['size']} version, {len(packed['label'])} images of registry packages",
    )
    return stream if order is None else stream.reordered(order)


def _task(
    packed: dict[str, Tensor],
    domain: dict[str, Any],
    index: int,
    limit: int | None,
    test_limit: int | None,
    seed: int,
) -> Task:
    splits: dict[str, Labelled] = {}
    for number, split in enumerate(SPLITS):
        chosen = (packed["domain"] == index) & (packed["split"] == number)
        rows = torch.nonzero(chosen).squeeze(1)
        splits[split] = PackedImages(packed, rows, f"{domain['name']}/{split}")
    splits["test"] = limited(splits["test"], test_limit, seed, f"{domain['name']}/test")
    labels = LabelSpace(classes=tuple(domain["classes"]), templates=tuple(domain["templates"]))
    return make_task(domain["name"], splits, labels, limit, seed)
