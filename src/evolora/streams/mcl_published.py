"""The data sets of MCL as they are published: annotation files, where their files lie, prompts.

    sources: {audio: [{format: audiocaps, split: train, annotations: train.csv, files: flac}]}

Layouts are those that LAVIS (X-InstructBLIP) and PathWeave's code read:

    captions        JSON [{"image" | "video", "caption": text or texts}], or COCO's {"images",
                    "annotations"}: COCO, Flickr30k, NoCaps, MSRVTT, MSVD
    qa              JSON [{"image" | "video" | "video_id", "question", "answer"}]: MSRVTT, MSVD
    audiocaps       CSV youtube_id, start_time, caption [, question, answer]; <id>_<start>.flac
    clotho          CSV file_name, caption_1 ... caption_5
    clotho-qa       CSV file_name, QuestionText, answer; three rows a question
    wavcaps         JSON {"data": [{"id", "caption"}]}; <id>.flac
    depth           JSON [{"image", "conversations"}], [{"image_id", "caption"}] or both; a picture
                    and its depth map, which has the picture's name as .png in ``depth_files``
    scenes          JSON [{"image_path", "label"}]: SUN RGB-D, NYU Depth v2; likewise a pair
    cap3d           CSV without header: id, caption; or JSON [{"sample_id", "data": captions}]
    cap3d-qa        JSON or CSV: sample_id, question, answer; <id>/<id>_8192.npz, <id>.npy, .ply,
                    .obj, or features

Captions are asked for by the published prompts; questions stand in theirs. Training takes each
caption by itself, val and test all of a file together. What is listed and not there (much of what
lay at other people's addresses is gone) is left out and counted in the log.
"""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from evolora.errors import ConfigError, StreamError, unknown_name
from evolora.streams.sampling import read_text, user_path
from evolora.streams.task import Example

LOG = logging.getLogger(__name__)
SPLITS = ("train", "val", "test")
DESCRIBE: Mapping[str, str] = {
    "image": "a short description", "video": "a short description.",
    "audio": "a short description.", "depth": "describe the depth briefly.",
    "pc": "describe the 3d model.",
}  # fmt: skip
ASK: Mapping[str, str] = {
    "image": "based on the given the image respond to {}",  # as published
    "video": "based on the given video respond to {}.",
    "audio": "Question: {} Answer:",
    "depth": "{}",
    "pc": "based on the given input respond to {}.",
}
SCENE = "{} What is the category of this scene? Choose one class from the class sets."
ENDINGS = {
    "audio": (".flac", ".wav", ".ogg", ".mp3"), "pc": (".npz", ".npy", ".ply", ".obj"),
    "image": (".jpg", ".png"), "video": (".mp4", ".avi", ".webm", ".mkv"),
    "depth": (".jpg", ".png"),
}  # fmt: skip


@dataclass(frozen=True)
class Said:
    """A row: the file it is about, a question (None asks for a caption), its answers."""

    file: str
    question: str | None
    answers: tuple[str, ...]


Reader = Callable[[Any], Iterator[Said]]


@dataclass(frozen=True, kw_only=True)
class Published:
    """A data set's part.

    Args:
        format: see the module's docstring.
        split: train, val or test.
        annotations: file.
        files: folder of what it is about.
        depth_files: folder of depth maps, of "depth" and "scenes"; None: they lie beside.
        ask: prompt of questions, "{}" is the question; None: as published for the modality.
        describe: prompt of captions; None: likewise.
    """

    format: str
    split: str
    annotations: str
    files: str
    depth_files: str | None = None
    ask: str | None = None
    describe: str | None = None


def published(
    root: Path, modality: str, sources: list[Mapping[str, Any]]
) -> dict[str, list[Example]]:
    """Return split -> samples of a modality.

    Args:
        root: folder that annotations and files are named from.
        modality: of the task.
        sources: arguments of :class:`Published`.

    Raises:
        ConfigError: a source names something unknown.
        StreamError: annotations are missing or of another layout, or none of the files is there.
    """
    found: dict[str, list[Example]] = {split: [] for split in SPLITS}
    for given in sources:
        try:
            source = Published(**given)
        except TypeError as error:
            raise ConfigError(f"a source of {modality!r}: {error}") from error
        if source.split not in SPLITS:
            raise unknown_name("split", source.split, SPLITS)
        found[source.split] += samples(root, modality, source)
    return found


def samples(root: Path, modality: str, source: Published) -> list[Example]:
    """Return the samples of one source; see :func:`published`."""
    read = FORMATS.get(source.format)
    if read is None:
        raise unknown_name("format", source.format, FORMATS)
    file = root / user_path(source.annotations)
    try:
        rows = list(read(_rows(file)))
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise StreamError(f"{file} is not laid out as {source.format!r}: {error!r}") from error
    if source.split != "train":
        rows = _together(rows)
    found, gone = [], 0
    for place, row in enumerate(rows):
        names = _files(root, modality, source, row.file)
        if names is None:
            gone += 1
            continue
        found.append(_example(modality, source, row, names, f"{file.name}[{place}]"))
    if gone:
        LOG.warning("%s: %d of %d rows left out, their files are not there", file, gone, len(rows))
    if not found:
        raise StreamError(f"{file}: none of the files of its {len(rows)} rows is in {source.files}")
    return found


def _example(
    modality: str, source: Published, row: Said, names: str | tuple[str, ...], key: str
) -> Example:
    if row.question is None:
        text = source.describe or DESCRIBE.get(modality, "a short description.")
    else:
        text = (source.ask or ASK.get(modality, "{}")).replace("{}", row.question)
    label = row.answers[0] if len(row.answers) == 1 else row.answers
    return Example(inputs={modality: names, "text": text}, label=label, key=key)


def _together(rows: list[Said]) -> list[Said]:
    """Return the rows with all captions of a file in one, where it stood first."""
    found: dict[tuple[str, str | None, int], Said] = {}
    for place, row in enumerate(rows):
        key = (row.file, row.question, 0 if row.question is None else place)
        known = found.get(key)
        found[key] = row if known is None else replace(known, answers=known.answers + row.answers)
    return list(found.values())


def _files(root: Path, modality: str, source: Published, name: str) -> str | tuple[str, str] | None:
    """Return the path of a row's file, or of its picture and depth map; None where one is gone."""
    folder = root / user_path(source.files)
    path = _first(folder, name, ENDINGS.get(modality, ()))
    if path is None or source.format not in ("depth", "scenes"):
        return None if path is None else str(path)
    maps = folder if source.depth_files is None else root / user_path(source.depth_files)
    known = _first(maps, str(PurePosixPath(name).with_suffix(".png")), (".png", ".npy"))
    return None if known is None or known == path else (str(path), str(known))


def _first(folder: Path, name: str, endings: tuple[str, ...]) -> Path | None:
    plain, stem = PurePosixPath(name), PurePosixPath(name).name
    tried = [name, *(f"{plain}{ending}" for ending in endings)]
    tried += [str(plain.with_suffix(ending)) for ending in endings if plain.suffix]
    tried += [f"{plain}/{stem}_8192{ending}" for ending in endings]  # LAVIS' Objaverse
    for one in tried:
        if (folder / one).is_file():
            return folder / one
    return None


def _rows(file: Path) -> Any:
    """Return the content of a JSON file, or the lines of a CSV file as lists of cells."""
    text = read_text(file, StreamError)
    if file.suffix.lower() == ".csv":
        return list(csv.reader(io.StringIO(text, newline="")))
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise StreamError(f"{file} is not valid JSON (line {error.lineno}): {error.msg}") from error


def _named(rows: Any) -> list[dict[str, str]]:
    """Return the rows of a CSV file by the names in its first line; those of JSON as they are."""
    if rows and isinstance(rows[0], list):
        head, *body = rows
        return [dict(zip(head, cells, strict=False)) for cells in body if cells]
    return list(rows)


def _texts(value: Any) -> tuple[str, ...]:
    found = tuple(value) if isinstance(value, list | tuple) else (value,)
    if not found or not all(isinstance(one, str) for one in found):
        raise TypeError(f"expected a text or texts; got {value!r}")
    return found


def _seen(row: Mapping[str, Any]) -> str:
    """Return the file of a picture or video; MSRVTT's numbers are those of "video<n>"."""
    for key in ("image", "video", "image_id", "image_path", "video_id", "video_name"):
        if key in row:
            value = row[key]
            return f"video{value}" if isinstance(value, int) else str(value)
    raise KeyError("image or video")


def _captions(rows: Any) -> Iterator[Said]:
    if isinstance(rows, Mapping):  # COCO's own
        names = {one["id"]: one["file_name"] for one in rows["images"]}
        for one in rows["annotations"]:
            yield Said(names[one["image_id"]], None, _texts(one["caption"]))
        return
    for row in rows:
        yield from (Said(_seen(row), None, (text,)) for text in _texts(row["caption"]))


def _questions(rows: Any) -> Iterator[Said]:
    for row in rows:
        yield Said(_seen(row), str(row["question"]), _texts(row["answer"]))


def _audiocaps(rows: Any) -> Iterator[Said]:
    for row in _named(rows):
        file = f"{row['youtube_id']}_{int(float(row['start_time']))}"
        if row.get("question"):
            yield Said(file, row["question"], _texts(row["answer"]))
        else:
            yield Said(file, None, _texts(row["caption"]))


def _clotho(rows: Any) -> Iterator[Said]:
    for row in _named(rows):
        for number in range(1, 6):
            yield Said(row["file_name"], None, _texts(row[f"caption_{number}"]))


def _clotho_questions(rows: Any) -> Iterator[Said]:
    named = _named(rows)
    for first in range(0, len(named), 3):
        asked = named[first : first + 3]
        if len({(row["file_name"], row["QuestionText"]) for row in asked}) != 1:
            raise KeyError(f"three rows of one question from row {first + 1} on")
        answers = tuple(row["answer"] for row in asked)
        yield Said(asked[0]["file_name"], asked[0]["QuestionText"], answers)


def _wavcaps(rows: Any) -> Iterator[Said]:
    for row in rows["data"]:
        yield Said(str(row["id"]).split(".")[0], None, _texts(row["caption"]))


def _depth(rows: Any) -> Iterator[Said]:
    for row in rows:
        if "conversations" not in row:
            yield Said(_seen(row), None, _texts(row["caption"]))
            continue
        turns = row["conversations"]
        for asked, said in zip(turns[::2], turns[1::2], strict=True):
            question = asked["value"].replace("<image>", "").replace("\n", "")
            yield Said(_seen(row), question, _texts(said["value"]))


def _scenes(rows: Any) -> Iterator[Said]:
    classes = list(dict.fromkeys(row["label"] for row in rows))
    for row in rows:
        yield Said(row["image_path"], SCENE.format(sorted(classes)), (row["label"],))


def _cap3d(rows: Any) -> Iterator[Said]:
    for row in rows:
        name, said = (row[0], row[1]) if isinstance(row, list) else (row["sample_id"], row["data"])
        yield from (Said(name, None, (text,)) for text in _texts(said))


def _cap3d_questions(rows: Any) -> Iterator[Said]:
    for row in _named(rows):
        yield Said(row["sample_id"], str(row["question"]), _texts(row["answer"]))


FORMATS: Mapping[str, Reader] = {
    "captions": _captions,
    "qa": _questions,
    "audiocaps": _audiocaps,
    "clotho": _clotho,
    "clotho-qa": _clotho_questions,
    "wavcaps": _wavcaps,
    "depth": _depth,
    "scenes": _scenes,
    "cap3d": _cap3d,
    "cap3d-qa": _cap3d_questions,
}
