"""Builds `mosaic/domains`: nine kinds of picture, classified by class name, from real drawings.

Pictures come from registry packages (`sources`), drawn at 64x64 (`render`). Where a class is drawn
by several vendors, whole vendor families go to train, to val, to test or to the pretraining corpus
of the embedded backbone, never to two of them: a random split lets a pixel comparison score 72 % on
animals, a family split 26 %.

Everything is decided by the tables below and a seed; two builds from the same packages are equal.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from evolora.errors import DataError
from evolora.streams.mosaic import render
from evolora.streams.mosaic.licenses import license_text
from evolora.streams.mosaic.samples import SEED, SPLITS, Sample, Size
from evolora.streams.mosaic.suite import DOMAINS

Progress = Callable[[str], None]
FORMAT_VERSION = 1
S = TypeVar("S", bound=Sample)


class Described(Protocol):
    """A row of a suite's table, as far as the manifest tells of it."""

    @property
    def name(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def templates(self) -> tuple[str, ...]: ...
    @property
    def licence(self) -> str: ...
    @property
    def source(self) -> str: ...
    @property
    def split_rule(self) -> str: ...


def keep_usable(samples: Iterable[S]) -> list[S]:
    """Returns the samples of the classes that have at least two train and one test picture."""
    by_class: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    kept = list(samples)
    for sample in kept:
        by_class[sample.name][sample.split] += 1
    usable = {n for n, counts in by_class.items() if counts["train"] >= 2 and counts["test"] >= 1}
    return [sample for sample in kept if sample.name in usable]


def balanced(samples: Sequence[S], cap: int | None, seed: str) -> list[S]:
    """Returns at most `cap` samples, shuffled, taking turns among classes, then among families."""
    order = list(samples)
    random.Random(seed).shuffle(order)
    if cap is None or len(order) <= cap:
        return order
    turn: dict[int, tuple[int, int]] = {}
    per_class: dict[str, int] = defaultdict(int)
    per_family: dict[tuple[str, str], int] = defaultdict(int)
    for index, sample in enumerate(order):
        per_family[sample.name, sample.family] += 1
        turn[index] = (per_family[sample.name, sample.family], index)
    ranked = sorted(range(len(order)), key=turn.__getitem__)
    place = {}
    for index in ranked:
        per_class[order[index].name] += 1
        place[index] = (per_class[order[index].name], turn[index])
    chosen = sorted(range(len(order)), key=place.__getitem__)[:cap]
    return [order[index] for index in sorted(chosen)]


def encode(image: Image.Image) -> bytes:
    """Returns the picture as lossless WebP or PNG, whichever is smaller."""
    webp, png = io.BytesIO(), io.BytesIO()
    image.save(webp, "WEBP", lossless=True, quality=80, method=4)
    palette = image.convert("P", palette=Image.Palette.ADAPTIVE, colors=256)
    exact = np.array_equal(np.asarray(palette.convert("RGB")), np.asarray(image))
    (palette if exact else image).save(png, "PNG", optimize=True)
    return min(webp.getvalue(), png.getvalue(), key=len)


def build(
    out: Path, size: Size, cache: Path | None = None, progress: Progress | None = None
) -> Path:
    """Writes `domains.safetensors` and `domains.json` into `out`; returns the JSON's path.

    Args:
        out: folder, made if missing.
        size: "compact" (capped, as embedded in the package) or "large" (everything).
        cache: folder of the registry packages; see `sources.fetch`.
        progress: called with one line per domain.
    """
    from safetensors.numpy import save

    check_size(size)
    drawn = _Drawn()
    rows = []
    for number, domain in enumerate(DOMAINS):
        samples = keep_usable(domain.collect(cache, size))
        classes = sorted({sample.name for sample in samples})
        for split, most in zip(SPLITS, domain.caps, strict=True):
            cap = most if size == "compact" else None
            part = [sample for sample in samples if sample.split == split]
            for sample in balanced(part, cap, f"{SEED}/{domain.name}/{split}"):
                drawn.add(sample, number, classes.index(sample.name))
        rows.append(describe(domain, classes))
        if progress:
            progress(f"{domain.name}: {len(classes)} classes, {len(drawn.files)} images so far")
    manifest = {"size": size, "domains": rows, "families": drawn.families}
    return write_stream(out, "domains", save(drawn.tensors()), manifest, cache)


def check_size(size: str) -> None:
    """Raises DataError for anything but the two sizes."""
    if size not in ("compact", "large"):
        raise DataError(f"size is {size!r}; allowed: 'compact', 'large'")


class _Drawn:
    """The pictures drawn so far, as the columns of the file."""

    def __init__(self) -> None:
        self.files: list[bytes] = []
        self.families: list[str] = []
        self.columns: dict[str, list[int]] = {"domain": [], "label": [], "split": [], "family": []}

    def add(self, sample: Sample, domain: int, label: int) -> None:
        """Draws and encodes one sample."""
        if sample.family not in self.families:
            self.families.append(sample.family)
        self.files.append(encode(sample.draw()))
        self.columns["domain"].append(domain)
        self.columns["label"].append(label)
        self.columns["split"].append(SPLITS.index(sample.split))
        self.columns["family"].append(self.families.index(sample.family))

    def tensors(self) -> dict[str, NDArray[Any]]:
        """Returns the content of `domains.safetensors`."""
        return {
            "bytes": np.frombuffer(b"".join(self.files), dtype=np.uint8),
            "offsets": np.cumsum([0, *map(len, self.files)], dtype=np.int64),
            "domain": np.asarray(self.columns["domain"], dtype=np.uint8),
            "label": np.asarray(self.columns["label"], dtype=np.int16),
            "split": np.asarray(self.columns["split"], dtype=np.uint8),
            "family": np.asarray(self.columns["family"], dtype=np.int16),
        }


def describe(part: Described, classes: list[str]) -> dict[str, Any]:
    """Returns what the manifest says of a domain or task."""
    return {
        "name": part.name,
        "title": part.title,
        "classes": classes,
        "templates": list(part.templates),
        "license": part.licence,
        "source": part.source,
        "split_rule": part.split_rule,
    }


def write_stream(
    out: Path, stem: str, data: bytes, manifest: dict[str, Any], cache: Path | None
) -> Path:
    """Writes `<stem>.safetensors`, `LICENSES.md` and, last, `<stem>.json` by temp + rename.

    Args:
        out: folder, made if missing.
        stem: name of the stream below `mosaic/`.
        data: content of the safetensors file.
        manifest: what the JSON says besides format, name, seed and checksum.
        cache: folder of the registry packages, for the terms of their content.
    """
    out.mkdir(parents=True, exist_ok=True)
    head = {
        "format_version": FORMAT_VERSION,
        "name": f"mosaic/{stem}",
        "image_size": render.IMAGE_SIZE,
        "seed": SEED,
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    text = json.dumps({**head, **manifest}, ensure_ascii=False, indent=1) + "\n"
    files = {
        f"{stem}.safetensors": data,
        "LICENSES.md": license_text(cache).encode(),
        f"{stem}.json": text.encode(),
    }
    for name, content in files.items():
        temporary = out / f".{name}.tmp"
        temporary.write_bytes(content)
        os.replace(temporary, out / name)
    return out / f"{stem}.json"
