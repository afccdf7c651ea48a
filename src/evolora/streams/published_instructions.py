"""CMIT, CoIN and UCIT from a user's folder, in the layouts that their authors publish.

What is read of each task: training conversations in LLaVA's layout (every answer is a sample, the
turns before it are its prompt) and a test file with its answers. `evolora.streams.instruction_sets`
has the tables of tasks, files, requests and metrics.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from evolora.errors import StreamError, unknown_name
from evolora.registry import STREAMS
from evolora.streams.conversations import (
    Conversations,
    limited_rows,
    named_tasks,
    setting_of,
)
from evolora.streams.instruction_files import (
    answers_by_question,
    captions_by_image,
    read_questions,
)
from evolora.streams.instruction_sets import SETS, InstructionSet, PublishedTask
from evolora.streams.own_conversations import Asked, read_conversations
from evolora.streams.own_data import SPLITS
from evolora.streams.sampling import read_all, user_path
from evolora.streams.task import LabelSpace, Stream, Task

_LOG = logging.getLogger(__name__)

DEFAULT_ROOT = Path("data")
SUMMARIES = {
    "cmit": "CMIT's nine instruction tasks (VizWiz-Caption ... PMC-VQA)",
    "coin": "CoIN's eight instruction tasks (ScienceQA ... OCR-VQA)",
    "ucit": "UCIT's six instruction tasks (ImageNet-R ... Flickr30k)",
}


def load_set(
    published: InstructionSet,
    *,
    root: str | Path | None = None,
    instructions: str | None = None,
    images: str | Path | None = None,
    order: Sequence[str] | None = None,
    metric: str | Mapping[str, str] | None = None,
    max_new_tokens: int | Mapping[str, int] | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> Stream:
    """Return a benchmark's stream; rows are listed now and images decoded on access.

    Args:
        published: the benchmark.
        root: folder that holds the tasks' folders; default ``data``.
        instructions: folder below the root with the tasks' folders, where there are several sets
            of instructions ("Instructions_Diverse"); None takes the first that there is.
        images: folder that image names are relative to; None looks where they are published.
        order: tasks to learn, in order; None for all, as published.
        metric: of all tasks, or task -> its own, in place of the published one.
        max_new_tokens: longest answer, likewise.
        limit: at most so many samples per split.
        seed: chooses what ``limit`` keeps.

    Raises:
        StreamError: tasks are missing or have bad rows, then one message names all of them, where
            they were looked for, and each bad row by its file and line.
        ConfigError: an unknown task or metric.
    """
    known = {task.name: task for task in published.tasks}
    names = list(known) if order is None else list(order)
    for name in [*names, *named_tasks(metric), *named_tasks(max_new_tokens)]:
        if name not in known:
            raise unknown_name(f"{published.title} task", name, known)
    base = DEFAULT_ROOT if root is None else user_path(root)
    own = None if images is None else user_path(images)
    places = published.places(base, instructions)

    def read(name: str) -> dict[str, list[Asked]]:
        return _read(published, known[name], base, places, own)

    tasks = []
    for name, splits in read_all(names, read, f"{published.title} tasks").items():
        task = known[name]
        data = {
            part: Conversations(limited_rows(rows, limit, seed, name, part))
            for part, rows in splits.items()
        }
        limits = setting_of(max_new_tokens, name, None)
        tasks.append(
            Task(
                name=name,
                train=data["train"],
                val=Conversations(()),
                test=data["test"],
                labels=LabelSpace.of_texts(task.max_new_tokens if limits is None else limits),
                modalities=("image", "text"),
                metric=setting_of(metric, name, None) or task.metric,
            )
        )
    source = f"{published.title}, {len(tasks)} of {len(known)} tasks below {base}"
    repeated = [f"{name} {known[name].passes} times" for name in names if known[name].passes > 1]
    if repeated:
        source += f"; published training goes through {', '.join(repeated)}"
    return Stream(name=published.name, tasks=tuple(tasks), source=source)


def _read(
    published: InstructionSet,
    task: PublishedTask,
    root: Path,
    places: Sequence[Path],
    images: Path | None,
) -> dict[str, list[Asked]]:
    """Return the rows of a task, "train" and "test"."""
    folder = task.find(places)
    if folder is None:
        looked = ", ".join(str(place / task.folder[0]) for place in places)
        raise StreamError(f"no {' or '.join(task.train)} in {looked}")
    near = [folder, folder / "images", folder / "images" / "val", folder / "images" / "test"]
    around = [root / place for place in published.images]
    folders = [*around, *near] if images is None else [images]
    train = read_conversations(_file(folder, task.train), SPLITS, folders)
    known = None
    if task.people is not None:
        known = answers_by_question(_beside(folder, around, task.people))
    elif task.captions is not None:
        known = captions_by_image(_beside(folder, around, task.captions))
    test = read_questions(
        _file(folder, task.test),
        task.kind,
        task.request,
        [*near[::-1], *around] if task.kind == "captions" and images is None else folders,
        known=known,
        letters=task.metric.startswith("option"),
    )
    # A row may hold several answers; what is published is the number of rows.
    counts = (len({row.key.partition("/")[0] for row in train}), len(test))
    for what, found, expected in zip(
        ("training", "test"), counts, (task.rows, task.tests), strict=True
    ):
        if expected is not None and found != expected:
            _LOG.warning(
                "%s/%s has %d %s rows, the published set %d: complete the data before comparing",
                *(published.name, task.name, found, what, expected),
            )
    return {"train": train, "test": test}


def _file(folder: Path, names: Sequence[str]) -> Path:
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise StreamError(f"no {' or '.join(names)} in {folder}")
    return found


def _beside(folder: Path, around: Sequence[Path], name: str) -> Path:
    """Return a file of answers: in the task's folder, or where its images are."""
    places = [folder, *(place / folder.name for place in around), *around]
    found = next((place / name for place in places if (place / name).is_file()), None)
    if found is None:
        raise StreamError(f"no {name}, which has the test answers, in {folder}")
    return found


for _name, _summary in SUMMARIES.items():
    STREAMS.register(_name, summary=_summary)(partial(load_set, SETS[_name]))
