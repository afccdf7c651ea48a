"""A user's own conversations about images, answered by texts: LLaVA's layout, JSON or JSON Lines.

    rows.json                         one task, or as many as the rows' ``task`` names
    root/<task>.json                  a task per file
    root/<task>/{train,val,test}.json a task per folder, with its own splits

Splits that are not given are held out with a seed, whole groups at a time: all that is said about
one image is on one side. Each answer of a conversation is a sample; the turns before it, with the
answers as they were given, are its prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from evolora.errors import DataError, StreamError, unknown_name
from evolora.registry import STREAMS
from evolora.streams.images import read_image
from evolora.streams.own_conversations import JSON_LINES, Asked, read_conversations
from evolora.streams.own_data import SPLITS
from evolora.streams.sampling import generator, user_path
from evolora.streams.task import MAX_NEW_TOKENS, Example, LabelSpace, Stream, Task

SUFFIXES = (".json", *JSON_LINES)


@dataclass(frozen=True)
class Conversations:
    """Answers to be given, each with its images and the turns before it."""

    rows: tuple[Asked, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        row = self.rows[index]
        inputs: dict[str, Any] = {"text": row.turns[0] if len(row.turns) == 1 else row.turns}
        try:
            images = tuple(read_image(path) for path in row.images)
        except DataError as error:
            raise DataError(f"{row.key}: {error}") from error
        if images:
            inputs["image"] = images[0] if len(images) == 1 else images
        return Example(inputs=inputs, label=row.answers, key=row.key)


@STREAMS.register("conversations", summary="your own images and dialogues: JSON as LLaVA's")
def load(
    *,
    path: str | Path,
    images: str | Path | None = None,
    metric: str | Mapping[str, str] = "exact-match",
    max_new_tokens: int | Mapping[str, int] = MAX_NEW_TOKENS,
    answer_format: str | Mapping[str, str] = "",
    order: Sequence[str] | None = None,
    test_fraction: float = 0.2,
    val_fraction: float = 0.1,
    seed: int = 0,
    limit: int | None = None,
) -> Stream:
    """Return the stream of a file or folder; images are decoded on access.

    Args:
        path: a file or folder in one of the layouts of this module's docstring.
        images: folder that image names are relative to; None is the folder of the file that names
            them.
        metric: of all tasks, or task -> its own: a metric of generated texts.
        max_new_tokens: longest answer, of all tasks, or task -> its own.
        answer_format: form that the questions ask for ("yes-no", "words:3"), of all tasks, or task
            -> its own; see :mod:`evolora.evaluation.answers.formats`.
        order: task names to learn, in order; None for all: as they appear in a file, files and
            folders by name.
        test_fraction: share of each task's groups held out for testing where there is no test
            split.
        val_fraction: share of the rest held out for calibration where there is no val split; 0
            for none.
        seed: chooses the held-out groups and what ``limit`` keeps.
        limit: at most so many samples per split.

    Raises:
        StreamError: nothing is there, or a file is malformed, then every bad row is named by its
            line number; a task cannot be split.
        ConfigError: an unknown metric, format or task.
    """
    base = user_path(path)
    folder = None if images is None else user_path(images)
    rows = _read(base, folder)
    by_task: dict[str, list[Asked]] = {}
    for row in rows:
        by_task.setdefault(row.task, []).append(row)
    for name in [*(order or ()), *named_tasks(metric, max_new_tokens, answer_format)]:
        if name not in by_task:
            raise unknown_name("task", name, by_task)
    tasks = []
    for name in order or by_task:
        splits = _split(name, by_task[name], (test_fraction, val_fraction), seed)
        data = {
            part: Conversations(limited_rows(own, limit, seed, name, part)) for part, own in splits
        }
        tasks.append(
            Task(
                name=name,
                train=data["train"],
                val=data["val"],
                test=data["test"],
                labels=LabelSpace.of_texts(setting_of(max_new_tokens, name, MAX_NEW_TOKENS)),
                modalities=("image", "text"),
                metric=setting_of(metric, name, "exact-match"),
                answer_format=setting_of(answer_format, name, ""),
            )
        )
    return Stream(name="conversations", tasks=tuple(tasks), source=f"{base} ({len(rows)} answers)")


def _read(base: Path, images: Path | None) -> list[Asked]:
    """Return all samples under a file or folder."""
    if not base.is_dir():
        return read_conversations(base, SPLITS, images)
    rows: list[Asked] = []
    for entry in sorted(base.iterdir()):
        if entry.is_file() and entry.suffix.lower() in SUFFIXES:
            rows += read_conversations(entry, SPLITS, images)
        elif entry.is_dir():
            for file in sorted(entry.iterdir()):
                if file.suffix.lower() in SUFFIXES and file.stem.lower() in SPLITS:
                    split = SPLITS[file.stem.lower()]
                    found = read_conversations(file, SPLITS, images)
                    rows += [replace(row, task=entry.name, split=split) for row in found]
    if not rows:
        raise StreamError(
            f"no conversations in {str(base)!r}: expected <task>.json or "
            "<task>/{train,val,test}.json (.jsonl will do too)"
        )
    return rows


def _split(
    name: str, rows: Sequence[Asked], fractions: tuple[float, float], seed: int
) -> list[tuple[str, list[Asked]]]:
    """Return the parts of a task; what has no split is training, unless it is held out."""
    parts: dict[str, list[Asked]] = {"train": [], "val": [], "test": []}
    for row in rows:
        parts[row.split or "train"].append(row)
    for part, fraction in zip(("test", "val"), fractions, strict=True):
        if not 0 <= fraction < 1:
            raise StreamError(f"{part}_fraction must be in [0, 1); got {fraction}")
        if not parts[part] and fraction:
            groups = list(dict.fromkeys(row.group for row in parts["train"]))
            order = torch.randperm(len(groups), generator=generator(seed, f"{name}/{part}"))
            count = min(max(1, round(fraction * len(groups))), len(groups) - 1)
            held = {groups[place] for place in order[: max(0, count)].tolist()}
            parts[part] = [row for row in parts["train"] if row.group in held]
            parts["train"] = [row for row in parts["train"] if row.group not in held]
    return list(parts.items())


def limited_rows(
    rows: Sequence[Asked], limit: int | None, seed: int, name: str, part: str
) -> tuple[Asked, ...]:
    """Return the rows, or at most ``limit`` of them, chosen by the seed, in their order."""
    if limit is None or len(rows) <= limit:
        return tuple(rows)
    order = torch.randperm(len(rows), generator=generator(seed, f"{name}/{part}/limit"))
    return tuple(rows[place] for place in sorted(order[:limit].tolist()))


def named_tasks(*options: Any) -> Sequence[str]:
    """Return the tasks that settings name."""
    return [name for option in options if isinstance(option, Mapping) for name in option]


def setting_of(option: Any, name: str, default: Any) -> Any:
    """Return a setting of one task, given for all or by name."""
    return option.get(name, default) if isinstance(option, Mapping) else option
