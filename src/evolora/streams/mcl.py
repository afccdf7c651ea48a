"""Continual learning of modalities (MCL): images, then video, audio, depth and point clouds.

    root/<modality>/train.json, test.json (and val.json)

each a JSON list or JSON Lines of rows {"<modality>": file, "question": text, "answer": text or
texts, "id"}; files are named relative to the modality's folder, a list of files is several frames
(a depth sample: the picture and its depth map), and a row may name files of further modalities. A
caption is the answer to a request for one. How a file is read is its encoder's matter
(:mod:`evolora.backbones.modalities`). Data sets in the layouts in which they are published are
named by ``sources``, see :mod:`evolora.streams.mcl_published`.

Order: that of PathWeave's code and of arXiv 2410.20178; its abstract in the proceedings has depth
before audio (``order``). The first task is what the base model knows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evolora.errors import StreamError, unknown_name
from evolora.registry import STREAMS
from evolora.streams.conversations import setting_of
from evolora.streams.mcl_published import published
from evolora.streams.own_conversations import json_rows
from evolora.streams.own_csv import refuse_bad
from evolora.streams.sampling import read_all, user_path
from evolora.streams.task import MAX_NEW_TOKENS, Example, Label, LabelSpace, Stream, Task

DEFAULT_ROOT = Path("data/mcl")
ORDER = ("image", "video", "audio", "depth", "pc")
TEXTS = ("question", "answer", "id")


@dataclass(frozen=True)
class Asked:
    """Rows of a modality's file: what is asked about which files."""

    rows: tuple[Example, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        return self.rows[index]


@STREAMS.register("mcl", summary="images, video, audio, depth, point clouds: questions on each")
def load(
    *,
    root: str | Path | None = None,
    order: Sequence[str] = ORDER,
    metric: str | Mapping[str, str] = "exact-match",
    max_new_tokens: int | Mapping[str, int] = MAX_NEW_TOKENS,
    limit: int | None = None,
    sources: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
) -> Stream:
    """Return the stream of a folder; files are read when a sample is prepared.

    Args:
        root: folder in the layout of this module's docstring; None takes "data/mcl".
        order: modalities to learn, in order: any names, of which there is a folder each.
        metric: of all tasks, or modality -> its own: a metric of generated texts.
        max_new_tokens: longest answer, of all tasks, or modality -> its own.
        limit: rows of each split, at most, the first ones.
        sources: modality -> data sets in a published layout, in place of a folder in ours; paths
            are relative to the root.

    Raises:
        ConfigError: a source names something unknown.
        StreamError: a folder or file is missing, or rows are bad, each named by its line.
    """
    base = DEFAULT_ROOT if root is None else user_path(root)
    there = sorted(place.name for place in base.iterdir()) if base.is_dir() else []
    named = dict(sources or {})
    for modality in order:
        if modality not in there and modality not in named:
            raise StreamError(f"{unknown_name('modality folder', modality, there)} in {base}")

    def read(modality: str) -> dict[str, list[Example]]:
        if modality in named:
            found = published(base, modality, list(named[modality]))
            return {split: rows[:limit] for split, rows in found.items()}
        folder = base / modality
        files = {split: folder / f"{split}.json" for split in ("train", "val", "test")}
        return {
            split: rows_of(file, modality)[:limit] if split != "val" or file.is_file() else []
            for split, file in files.items()
        }

    tasks = []
    for name, splits in read_all(list(order), read, "modalities").items():
        data = {split: Asked(tuple(rows)) for split, rows in splits.items()}
        every = [key for rows in splits.values() for row in rows for key in row.inputs]
        tasks.append(
            Task(
                name=name,
                train=data["train"],
                val=data["val"],
                test=data["test"],
                labels=LabelSpace.of_texts(setting_of(max_new_tokens, name, MAX_NEW_TOKENS)),
                modalities=tuple(dict.fromkeys([name, *every])),
                metric=setting_of(metric, name, "exact-match"),
            )
        )
    return Stream(name="mcl", tasks=tuple(tasks), source=f"{len(tasks)} modalities below {base}")


def rows_of(file: Path, modality: str) -> list[Example]:
    """Return the samples of a file.

    Raises:
        StreamError: no such file, another layout, or bad rows, each named by its line.
    """
    found: list[Example] = []
    bad: list[str] = []
    for line, name, row in json_rows(file):
        try:
            found.append(_example(row, modality, file.parent, name))
        except StreamError as fault:
            bad.append(f"{f'line {line}' if line else name}: {fault}")
    refuse_bad(file, bad)
    return found


def _example(row: Any, modality: str, folder: Path, name: str) -> Example:
    if not isinstance(row, dict) or modality not in row:
        raise StreamError(f"needs {modality!r}, the file of the sample")
    question, answer = row.get("question", ""), row.get("answer")
    answers = answer if isinstance(answer, list) else [answer]
    if not isinstance(question, str) or not answers or not all(isinstance(a, str) for a in answers):
        raise StreamError("needs a question (a text) and an answer (a text, or a list of texts)")
    inputs = {key: _files(value, key, folder) for key, value in row.items() if key not in TEXTS}
    if question:
        inputs["text"] = question
    said = tuple(str(one) for one in answers)
    label: Label = said[0] if len(said) == 1 else said
    return Example(inputs=inputs, label=label, key=str(row.get("id", name)))


def _files(value: Any, key: str, folder: Path) -> str | tuple[str, ...]:
    """Return the paths of a value; StreamError where it names no file, or one that is not there."""
    names = value if isinstance(value, list) else [value]
    if not names or not all(isinstance(one, str) for one in names):
        raise StreamError(f"{key!r} must be a file name, or a list of some; got {value!r}")
    paths = [folder / one for one in names]
    for path in paths:
        if not path.is_file():
            raise StreamError(f"no file {path}")
    return str(paths[0]) if isinstance(value, str) else tuple(str(path) for path in paths)
