"""Reads the test files of instruction benchmarks into prompts and accepted answers.

A file is a JSON list or JSON Lines, a row per question, of one of these kinds:

    question         {"question_id", "image", "question", "answer"}                  (InternVL's)
    choice           {"image", "question", "choices": ["...", ...], "answer": 0}
    box              {"image", "sent", "knowledge", "bbox": [x1, y1, x2, y2], "width", "height"}
    instruction      {"question_id", "image", "text", "answer"}                 (LLaVA's, CoIN's)
    instruction-box  {"question_id", "image", "text", "answer_bbox"}

or, of the kind "captions", one object as COCO's: {"images": [{"id", "file_name"}, ...],
"annotations": [{"image_id", "caption"}, ...]}. What several people answered may stand in a file of
its own, see `answers_by_question`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from evolora.errors import StreamError
from evolora.evaluation.answers.boxes import read_box
from evolora.evaluation.answers.vqa import FEWEST
from evolora.streams.own_conversations import (
    MARKER,
    Asked,
    image_fault,
    image_folder,
    image_names,
    json_rows,
)
from evolora.streams.own_csv import refuse_bad
from evolora.streams.sampling import read_text

TestKind = Literal["question", "choice", "box", "instruction", "instruction-box", "captions"]
LETTERS = "ABCDEFGHIJ"

Answers = Mapping[str, tuple[str, ...]]


def read_questions(
    file: Path,
    kind: TestKind,
    request: str,
    folders: Sequence[Path],
    *,
    known: Answers | None = None,
    letters: bool = False,
) -> list[Asked]:
    """Return the questions of a test file.

    Args:
        file: what is read.
        kind: its layout, see the module's docstring.
        request: how an answer is asked for, where rows do not say: "" where they do.
        folders: image names are relative to the first of them that holds some.
        known: accepted answers by question id, or by the image's file name; in place of the row's.
        letters: answers are letters of options.

    Raises:
        StreamError: no such file, another layout, or bad rows, each named by its line.
    """
    if kind == "captions":
        rows: list[tuple[int, str, Any]] = _caption_rows(file)
    else:
        rows = json_rows(file)
    folder = image_folder([row for _, _, row in rows], folders)
    found: list[Asked] = []
    bad: list[str] = []
    for line, name, row in rows:
        try:
            found.append(_question(name, row, kind, request, folder, known, letters))
        except StreamError as fault:
            bad.append(f"{f'line {line}' if line else name}: {fault}")
    refuse_bad(file, bad)
    return found


def answers_by_question(file: Path) -> dict[str, tuple[str, ...]]:
    """Return question id -> what people answered, of VQA's or TextVQA's annotations.

    They are {"annotations": rows} or {"data": rows}, a row {"question_id", "answers"} with a list
    of texts, or of {"answer": text}.

    Raises:
        StreamError: no such file, or another layout.
    """
    whole = _object(file)
    rows = whole.get("annotations", whole.get("data"))
    if not isinstance(rows, list):
        raise StreamError(f"{file} has neither annotations nor data; it has {_keys(whole)}")
    found: dict[str, tuple[str, ...]] = {}
    bad: list[str] = []
    for place, row in enumerate(rows):
        said = row.get("answers") if isinstance(row, dict) else None
        texts = [_said(one) for one in said] if isinstance(said, list) else []
        if "question_id" in (row or ()) and len(texts) >= FEWEST and None not in texts:
            found[str(row["question_id"])] = tuple(text for text in texts if text is not None)
        else:
            bad.append(f"row {place + 1}: needs question_id and at least {FEWEST} answers")
    refuse_bad(file, bad)
    return found


def captions_by_image(file: Path) -> dict[str, tuple[str, ...]]:
    """Return file name of an image -> its captions, of COCO's annotations."""
    found: dict[str, tuple[str, ...]] = {}
    for _, name, row in _caption_rows(file):
        if isinstance(row, str):
            raise StreamError(f"{file}, {name}: {row}")
        key = Path(row["image"]).name
        found[key] = (*found.get(key, ()), *row["captions"])
    return found


def _question(
    name: str,
    row: Any,
    kind: TestKind,
    request: str,
    folder: Path,
    known: Answers | None,
    letters: bool,
) -> Asked:
    """Return one question; StreamError says what is wrong with its row."""
    if isinstance(row, str):
        raise StreamError(row)
    images = image_names(row)
    if images is None:
        raise StreamError(f"image must be a file name or a list of them; got {row['image']!r}")
    for image in images:
        fault = image_fault(folder, image)
        if fault:
            raise StreamError(fault)
    prompt, answers = READERS[kind](row, request, known is None)
    if known is not None:
        keys = [str(row.get("question_id")), *(Path(image).name for image in images)]
        key = next((key for key in keys if key in known), None)
        if key is None:
            raise StreamError(f"no answers of question {keys[0]!r} in the file that has them")
        answers = known[key]
    if letters and not re.fullmatch("[A-J]", answers[0].strip().upper()):
        raise StreamError(f"the answer must be an option's letter; got {answers[0]!r}")
    marked = prompt.count(MARKER)
    if marked not in (0, len(images)):
        raise StreamError(f"{len(images)} images and {marked} {MARKER} markers")
    return Asked(
        images=tuple(folder / image for image in images),
        turns=(prompt,),
        answers=answers,
        task="",
        split="test",
        key=name,
        group="|".join(images) or name,
    )


def _own_question(
    row: Mapping[str, Any], request: str, answered: bool
) -> tuple[str, tuple[str, ...]]:
    asked = f"{_text(row, 'question')} {request}".strip()
    return asked, _answers(_field(row, "answer")) if answered else ()


def _choice(row: Mapping[str, Any], request: str, _: bool) -> tuple[str, tuple[str, ...]]:
    choices = _field(row, "choices")
    if not isinstance(choices, list) or not 1 < len(choices) <= len(LETTERS):
        raise StreamError(f"choices must be a list of 2 to {len(LETTERS)}; got {choices!r}")
    place = _field(row, "answer")
    if isinstance(place, bool) or not isinstance(place, int) or not 0 <= place < len(choices):
        raise StreamError(f"answer must be the place of a choice from 0; got {place!r}")
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
    asked = "\n".join([_text(row, "question"), *lines, request])
    return asked, (LETTERS[place], str(choices[place]))


def _box(row: Mapping[str, Any], request: str, _: bool) -> tuple[str, tuple[str, ...]]:
    box = _field(row, "bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        raise StreamError(f"bbox must be [x1, y1, x2, y2]; got {box!r}")
    size = [_field(row, name) for name in ("width", "height")]
    if not all(_is_number(one) and one > 0 for one in size):
        raise StreamError(f"width and height must be positive; got {size}")
    if not (box[0] < box[2] and box[1] < box[3]):
        raise StreamError(f"bbox must be [x1, y1, x2, y2] with x1 < x2, y1 < y2; got {box!r}")
    thousandths = [round(1000 * edge / size[axis % 2]) for axis, edge in enumerate(box)]
    asked = request.format(knowledge=_text(row, "knowledge"), phrase=_text(row, "sent"))
    return asked, (f"[{thousandths}]",)


def _instruction(row: Mapping[str, Any], _: str, answered: bool) -> tuple[str, tuple[str, ...]]:
    return _text(row, "text"), _answers(_field(row, "answer")) if answered else ()


def _instruction_box(row: Mapping[str, Any], *_: Any) -> tuple[str, tuple[str, ...]]:
    box = str(_field(row, "answer_bbox"))
    read = read_box(box)
    if read is None or not (read[0] < read[2] and read[1] < read[3]):
        raise StreamError(f"answer_bbox must be [x1, y1, x2, y2]; got {box!r}")
    return _text(row, "text"), (box,)


def _captioned(row: Mapping[str, Any], request: str, _: bool) -> tuple[str, tuple[str, ...]]:
    return request, _answers(row["captions"])


READERS: Mapping[TestKind, Callable[..., tuple[str, tuple[str, ...]]]] = {
    "question": _own_question,
    "choice": _choice,
    "box": _box,
    "instruction": _instruction,
    "instruction-box": _instruction_box,
    "captions": _captioned,
}


def _caption_rows(file: Path) -> list[tuple[int, str, Any]]:
    """Return (0, name, {"image", "captions"}) per image of COCO's layout; a text is a fault."""
    whole = _object(file)
    images, notes = whole.get("images"), whole.get("annotations")
    if not isinstance(images, list) or not isinstance(notes, list):
        raise StreamError(f"{file} needs the lists images and annotations; it has {_keys(whole)}")
    captions: dict[Any, list[str]] = {}
    rows: list[tuple[int, str, Any]] = []
    for place, note in enumerate(notes):
        try:
            captions.setdefault(note["image_id"], []).append(_text(note, "caption"))
        except (KeyError, TypeError, StreamError):
            rows.append((0, f"annotations[{place}]", "needs image_id and a caption"))
    for place, image in enumerate(images):
        name = f"images[{place}]"
        file_name = image.get("file_name", image.get("image")) if isinstance(image, dict) else None
        if not isinstance(file_name, str) or "id" not in image:
            rows.append((0, name, "needs id and file_name"))
        elif image["id"] not in captions:
            rows.append((0, name, f"no caption of image id {image['id']!r}"))
        else:
            rows.append((0, name, {"image": file_name, "captions": captions[image["id"]]}))
    if not rows:
        raise StreamError(f"{file} has no images")
    return rows


def _object(file: Path) -> dict[str, Any]:
    try:
        whole = json.loads(read_text(file, StreamError))
    except json.JSONDecodeError as error:
        raise StreamError(f"{file}, line {error.lineno}: not valid JSON ({error.msg})") from error
    if not isinstance(whole, dict):
        raise StreamError(f"{file} must hold a JSON object; it holds {type(whole).__name__}")
    return whole


def _field(row: Mapping[str, Any], name: str) -> Any:
    if row.get(name) is None:
        raise StreamError(f"no {name}; it has {_keys(row)}")
    return row[name]


def _text(row: Mapping[str, Any], name: str) -> str:
    value = _field(row, name)
    if not isinstance(value, str) or not value.strip():
        raise StreamError(f"{name} must be a text; got {value!r}")
    return value


def _answers(value: Any) -> tuple[str, ...]:
    """Return accepted answers: one text or number, or a list of them."""
    found = value if isinstance(value, list) else [value]
    texts = tuple(str(one) if _is_number(one) else one for one in found)
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise StreamError(f"answer must be a text or a list of them; got {value!r}")
    return texts


def _said(one: Any) -> str | None:
    text = one.get("answer") if isinstance(one, dict) else one
    return text if isinstance(text, str) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _keys(row: Mapping[str, Any]) -> str:
    return ", ".join(map(str, row)) or "nothing"
