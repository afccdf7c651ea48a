"""A user's own image + text samples, either part of which may be absent."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from evolora.errors import StreamError
from evolora.registry import STREAMS
from evolora.streams.missing_manifest import MissingOption, with_missing
from evolora.streams.own_data import SPLITS, TEMPLATE, held_out, in_order
from evolora.streams.own_pairs import PairRow, read_pairs
from evolora.streams.pairs import MODALITIES, Pair, Pairs
from evolora.streams.sampling import check_choice, make_task, unique_names, user_path
from evolora.streams.task import Label, LabelProtocol, LabelSpace, Stream, Task


@STREAMS.register(
    "image-text", summary="your own image + text: a CSV or JSONL of image,text,label(s)"
)
def load(
    *,
    path: str | Path,
    missing: MissingOption = None,
    order: Sequence[str] | None = None,
    templates: Sequence[str] = (TEMPLATE,),
    label_protocol: LabelProtocol = "seen",
    test_fraction: float = 0.2,
    val_fraction: float = 0.1,
    seed: int = 0,
    limit: int | None = None,
) -> Stream:
    """Return the stream of a file; images are decoded on access.

    Args:
        path: CSV with a header, or JSON Lines (``.jsonl``). Columns ``image`` (path relative to the
            file's folder) and ``text``, of which a row may lack one; ``label`` (one class) or
            ``labels`` (several, between ";", or a list in JSON); optionally ``task`` and ``split``.
        missing: what else is missing, as in `with_missing`: settings, a manifest file, or None.
        order: task names to learn, in order; None for all, as they appear.
        templates: prompts with one "{}".
        label_protocol: "seen" (among the classes of all tasks learned so far) or "task".
        test_fraction: share of each class held out for testing where there is no test split.
        val_fraction: share of each class's training samples held out for calibration where there
            is no val split; 0 for none.
        seed: chooses the held-out samples and what ``limit`` keeps.
        limit: at most so many samples per split, class-balanced.

    Raises:
        StreamError: the file is missing or malformed, then every bad row is named by its line
            number; two tasks have a class of one name (protocol "seen").
    """
    check_choice("label_protocol", label_protocol, ("seen", "task"))
    file = user_path(path)
    rows, several = read_pairs(file, SPLITS)
    fractions = (test_fraction, val_fraction)
    tasks = tuple(
        _task(name, part, several, templates, fractions, seed, limit)
        for name, part in in_order(rows, order, fractions)
    )
    if label_protocol == "seen":
        _check_classes(tasks)
    stream = Stream(
        name="image-text",
        tasks=tasks,
        label_protocol=label_protocol,
        source=f"{file} ({len(rows)} samples)",
    )
    return with_missing(stream, missing)


def _task(
    name: str,
    rows: Sequence[PairRow],
    several: bool,
    templates: Sequence[str],
    fractions: tuple[float, float],
    seed: int,
    limit: int | None,
) -> Task:
    given: dict[str, list[PairRow]] = {"train": [], "val": [], "test": []}
    for row in rows:
        given[row.split or "train"].append(row)
    raw = sorted({label for row in given["train"] for label in row.labels})
    if not raw:
        raise StreamError(f"task {name!r} has no training samples")
    for row in (*given["val"], *given["test"]):
        unseen = [label for label in row.labels if label not in raw]
        if unseen:
            raise StreamError(
                f"{row.key}: task {name!r}: class {unseen[0]!r} has no training sample"
            )
    pairs = {split: _pairs(part, raw, several) for split, part in given.items()}
    splits = held_out(name, pairs, fractions, seed)
    if len(splits["test"]) == 0:
        raise StreamError(
            f"task {name!r} has nothing to test on: every class has a single sample; "
            "add samples or a test split"
        )
    labels = LabelSpace(
        classes=tuple(unique_names(raw)), templates=tuple(templates), multi_label=several
    )
    return make_task(name, splits, labels, limit, seed, modalities=MODALITIES)


def _pairs(rows: Sequence[PairRow], raw: Sequence[str], several: bool) -> Pairs:
    def label(row: PairRow) -> Label:
        if several:
            return tuple(int(name in row.labels) for name in raw)
        return raw.index(row.labels[0])

    return Pairs(
        rows=tuple(
            Pair(image=row.image, text=row.text, label=label(row), key=row.key) for row in rows
        )
    )


def _check_classes(tasks: Sequence[Task]) -> None:
    owner: dict[str, str] = {}
    for task in tasks:
        for name in task.labels.classes:
            if owner.setdefault(name, task.name) != task.name:
                raise StreamError(
                    f"class {name!r} is in the tasks {owner[name]!r} and {task.name!r}; among all "
                    "classes seen so far a name stands for one class: rename one, or set "
                    "label_protocol to 'task'"
                )
