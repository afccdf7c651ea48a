"""Builds `mosaic/missing`: pairs of a picture and a short text, with one label or several.

Pictures and keywords come from registry packages (`sources`). The file holds complete pairs;
which modality a sample lacks is decided when the stream is loaded. Everything is decided by the
tables (`pair_suite`) and a seed; two builds from the same packages are equal.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evolora.streams.mosaic.build_domains import (
    Progress,
    balanced,
    check_size,
    describe,
    encode,
    keep_usable,
    write_stream,
)
from evolora.streams.mosaic.pair_suite import TASKS, PairTask, forbidden_stems
from evolora.streams.mosaic.pairs import Pair
from evolora.streams.mosaic.samples import SEED, SPLITS, Size
from evolora.streams.mosaic.words import short_text, telltale_words, usable_words


def build(
    out: Path, size: Size, cache: Path | None = None, progress: Progress | None = None
) -> Path:
    """Writes `missing.safetensors` and `missing.json` into `out`; returns the JSON's path.

    Args:
        out: folder, made if missing.
        size: "compact" (capped, as embedded in the package) or "large" (everything).
        cache: folder of the registry packages; see `sources.fetch`.
        progress: called with one line per task.
    """
    from safetensors.numpy import save

    check_size(size)
    drawn = _Pairs()
    rows = []
    for number, task in enumerate(TASKS):
        pairs = with_usable_words(task.collect(cache, size), forbidden_stems(task.labels))
        if task.labels == "single":
            pairs = keep_usable(pairs)
        used = {label for pair in pairs for label in pair.labels}
        classes = [name for name in task.classes if name in used]
        for split, cap, class_cap in zip(SPLITS, task.caps, task.class_caps, strict=True):
            chosen = [pair for pair in pairs if pair.split == split]
            if size == "compact":
                seed = f"{SEED}/{task.name}/{split}"
                parts = ([p for p in chosen if p.name == name] for name in task.classes)
                chosen = [p for part in parts for p in balanced(part, class_cap, seed)]
                chosen = balanced(chosen, cap, seed)
            for pair in chosen:
                drawn.add(pair, number, [classes.index(label) for label in pair.labels])
        rows.append(_describe(task, classes))
        if progress:
            progress(f"{task.name}: {len(classes)} classes, {len(drawn.files)} pairs so far")
    manifest = {"size": size, "tasks": rows, "families": drawn.families, "objects": drawn.objects}
    return write_stream(out, "missing", save(drawn.tensors()), manifest, cache)


def with_usable_words(pairs: Iterable[Pair], stems: frozenset[str]) -> list[Pair]:
    """Returns the pairs with the keywords that may be in their texts; those without any are out.

    Args:
        pairs: of one task.
        stems: stems of the labels' words.
    """
    usable = [replace(pair, words=usable_words(pair.words, stems)) for pair in pairs]
    objects = {pair.object: (pair.words, pair.labels) for pair in usable}
    out = telltale_words(list(objects.values()))
    kept = (replace(pair, words=tuple(w for w in pair.words if w not in out)) for pair in usable)
    return [pair for pair in kept if pair.words]


class _Pairs:
    """The pairs drawn so far, as the columns of the file."""

    def __init__(self) -> None:
        self.seen: dict[bytes, str] = {}
        self.files: list[bytes] = []
        self.texts: list[bytes] = []
        self.labels: list[list[int]] = []
        self.families: list[str] = []
        self.objects: list[str] = []
        self.columns: dict[str, list[int]] = {"task": [], "split": [], "family": [], "object": []}

    def add(self, pair: Pair, task: int, labels: list[int]) -> None:
        """Draws and encodes one pair; a picture that another object has too is left out."""
        encoded = encode(pair.draw())
        if self.seen.setdefault(encoded, pair.object) != pair.object:
            return
        for name, known in ((pair.family, self.families), (pair.object, self.objects)):
            if name not in known:
                known.append(name)
        self.files.append(encoded)
        self.texts.append(short_text(pair.words, f"{SEED}/{pair.key}").encode())
        self.labels.append(labels)
        self.columns["task"].append(task)
        self.columns["split"].append(SPLITS.index(pair.split))
        self.columns["family"].append(self.families.index(pair.family))
        self.columns["object"].append(self.objects.index(pair.object))

    def tensors(self) -> dict[str, NDArray[Any]]:
        """Returns the content of `missing.safetensors`; `label` is 0 or 1 per class of the task."""
        widest = 1 + max(label for labels in self.labels for label in labels)
        label = np.zeros((len(self.labels), widest), dtype=np.uint8)
        for row, labels in enumerate(self.labels):
            label[row, labels] = 1
        return {
            "bytes": np.frombuffer(b"".join(self.files), dtype=np.uint8),
            "offsets": np.cumsum([0, *map(len, self.files)], dtype=np.int64),
            "text_bytes": np.frombuffer(b"".join(self.texts), dtype=np.uint8),
            "text_offsets": np.cumsum([0, *map(len, self.texts)], dtype=np.int64),
            "label": label,
            "task": np.asarray(self.columns["task"], dtype=np.uint8),
            "split": np.asarray(self.columns["split"], dtype=np.uint8),
            "family": np.asarray(self.columns["family"], dtype=np.int16),
            "object": np.asarray(self.columns["object"], dtype=np.int16),
        }


def _describe(task: PairTask, classes: list[str]) -> dict[str, Any]:
    return {**describe(task, classes), "labels": task.labels}
