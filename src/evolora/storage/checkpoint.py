"""Checkpoints: what a killed run needs to go on and end bit for bit where it would have.

A checkpoint is a folder ``checkpoints/TTT-SSSSSS`` (task, step) with ``tensors.safetensors`` and
``state.json``; the JSON is written last and carries the hash of the tensors and of itself, so a
folder without a valid JSON is not a checkpoint, and a flipped bit in either file is noticed. All
randomness is a function of (seed, task, step), so no generator state has to be kept.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from evolora.errors import StorageError
from evolora.storage.files import (
    read_json,
    read_tensors,
    sweep_temporary,
    write_json,
    write_tensors,
)

KEEP = 2
"""Checkpoints kept: the newest, and the one before it in case the newest is damaged."""

_NAME = re.compile(r"\d+-\d+")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A point in a run.

    Args:
        task: index of the task being learned, or number of tasks when all are done.
        step: optimizer steps taken in that task.
        tensors: method state and optimizer moments.
        state: JSON values: matrix, history, configuration hash.
    """

    task: int
    step: int
    tensors: Mapping[str, Tensor]
    state: Mapping[str, Any]


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint and drop all but the newest two (and what killed writes left behind)."""
    place = folder / f"{checkpoint.task:03d}-{checkpoint.step:06d}"
    (place / "state.json").unlink(missing_ok=True)
    sha256 = write_tensors(place / "tensors.safetensors", checkpoint.tensors, {})
    record = {
        "format_version": 1,
        "task": checkpoint.task,
        "step": checkpoint.step,
        "sha256": sha256,
        **checkpoint.state,
    }
    write_json(place / "state.json", {**record, "digest": _digest(record)})
    kept = _folders(folder)[-KEEP:]
    for other in folder.iterdir():
        if other.is_dir() and other not in kept:
            shutil.rmtree(other, ignore_errors=True)
    for whole in kept:
        sweep_temporary(whole)


def load_newest(folder: Path) -> Checkpoint | None:
    """Return the newest intact checkpoint, or None; a damaged one is named and skipped.

    Raises:
        StorageError: there are checkpoints and none is intact.
    """
    found = _folders(folder)
    for place in reversed(found):
        try:
            record = read_json(place / "state.json", kind="checkpoint")
            if record.pop("digest", None) != _digest(record):
                raise StorageError(f"{place / 'state.json'} is altered: its digest does not fit it")
            tensors = read_tensors(place / "tensors.safetensors", sha256=record["sha256"])
            return Checkpoint(
                task=record["task"], step=record["step"], tensors=tensors, state=record
            )
        except (StorageError, KeyError) as error:
            logger.warning("damaged checkpoint %s skipped: %s", place, error)
    if found:
        raise StorageError(
            f"none of the {len(found)} checkpoints in {folder} is intact; delete it to start over"
        )
    return None


def _folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    places = [path.parent for path in folder.glob("*/state.json")]
    found = [path for path in places if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: tuple(int(part) for part in path.name.split("-")))


def _digest(record: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a record's JSON values, whatever their order and layout."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
