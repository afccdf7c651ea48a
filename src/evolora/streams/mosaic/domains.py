"""``mosaic/domains``: real image domains in turn, offline; the stand-in for MTIL.

Images come from registry packages (fonts, icon sets, emoji vendors, flags, furniture models,
Fashion-MNIST, digits); train, validation and test come from different vendor families, so that a
domain has to be recognised across drawing styles. ``evolora data build`` makes a larger version.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from evolora.assets import ROOT
from evolora.errors import StreamError
from evolora.registry import STREAMS
from evolora.streams.sampling import Labelled, limited, make_task
from evolora.streams.task import Example, LabelSpace, Stream, Task

SPLITS = ("train", "val", "test")
FORMATS = ("PNG", "WEBP")
"""What pictures are packed as; PIL need not try all others first."""


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
        start, stop = self.packed["offsets"][row : row + 2].tolist()
        encoded = self.packed["bytes"][start:stop].numpy().tobytes()
        pixels = np.asarray(Image.open(io.BytesIO(encoded), formats=FORMATS).convert("RGB"))
        image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
        label = int(self.packed["label"][row])
        return Example(inputs={"image": image}, label=label, key=f"{self.name}/{row}")

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
    folder = Path(root) if root is not None else ROOT / "mosaic"
    packed, info = _read(folder)
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


@lru_cache(maxsize=2)
def _read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        info = json.loads((folder / "domains.json").read_text(encoding="utf-8"))
        packed = load_file(folder / "domains.safetensors")
    except FileNotFoundError as error:
        raise StreamError(
            f"no mosaic/domains in {folder}: {Path(error.filename).name} is missing; "
            "make it with: evolora data build mosaic/domains --out DIR"
        ) from None
    except (OSError, ValueError, SafetensorError) as error:
        raise StreamError(f"mosaic/domains in {folder} cannot be read: {error}") from error
    if info.get("format_version") != 1:
        raise StreamError(f"{folder / 'domains.json'}: format_version 1 expected")
    return packed, info
