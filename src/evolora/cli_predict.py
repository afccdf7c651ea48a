"""The verb `evolora predict`: a saved learner answers files and questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evolora.cli_parts import AsJson, learner_of, print_json
from evolora.errors import ConfigError

if TYPE_CHECKING:
    from evolora.answering import Answer
    from evolora.learner import Learner

POINTS = ("pc", "points", "point cloud", "point-cloud", "point_cloud", "3d")
"""What a backbone may call the modality of --points."""
Files = list[str] | None


def predict(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="run folder or artefact")],
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[FILE]... [QUESTION]", help="image files; last, what is asked"),
    ] = None,
    image: Annotated[Files, typer.Option(help="an image")] = None,
    video: Annotated[Files, typer.Option(help="a video, or its frames with commas between")] = None,
    audio: Annotated[Files, typer.Option(help="a sound")] = None,
    depth: Annotated[Files, typer.Option(help="a depth map")] = None,
    points: Annotated[Files, typer.Option(help="a point cloud")] = None,
    other: Annotated[
        Files, typer.Option("--input", help="NAME=FILE: a modality of your own, thermal=a.npy")
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(help="the question, or a text about the image, all images, or none"),
    ] = None,
    classes: Annotated[str, typer.Option(help="comma-separated class names to choose from")] = "",
    as_json: AsJson = False,
) -> None:
    """Answer images (or an image, a text or both); says which task answered, or the base.

    A run that has learned modalities answers a question about any of them, or several at once:
    evolora predict RUN --audio dog.wav --image dog.png "Is it the same?". An option given again is
    another input with the same question.

    Elsewhere several images with --text are one input, for models that write; the text may say by
    <image> where each of them stands.
    """
    learner = learner_of(run_folder)
    seen = learner.backbone.modalities
    cloud = next((name for name in POINTS if name in seen), "points")
    given = {
        "video": list(video or []),
        "audio": list(audio or []),
        "depth": list(depth or []),
        cloud: list(points or []),
    }
    for name, file in map(_named, other or ()):
        given.setdefault(name, []).append(file)
    sides = {name: files for name, files in given.items() if files}
    if learner.backbone.takes_modalities:
        answered = _of_modalities(learner, words or [], image or [], sides, text)
    else:
        answered = _of_images(learner, [*(words or []), *(image or [])], sides, text, classes)
    if as_json:
        print_json([_record(source, answer) for source, answer in answered])
        return
    for source, answer in answered:
        print(f"{source}\t{answer.line(used=len(seen) > 1)}")


def _of_images(
    learner: Learner,
    images: Sequence[str],
    sides: Mapping[str, Sequence[str]],
    text: str | None,
    classes: str,
) -> list[tuple[str, Answer]]:
    """Return (source, answer) of each image; with a text, of all together."""
    names = [word.strip() for word in classes.split(",") if word.strip()] or None
    together = text is not None and len(images) > 1
    answers = learner.predict(
        [tuple(images)] if together else images or None,
        None if text is None else [text],
        classes=names,
        **sides,
    )
    sources = [", ".join(images)] if together else images or ["text"]
    return list(zip(sources, answers, strict=True))


def _of_modalities(
    learner: Learner,
    words: Sequence[str],
    images: Sequence[str],
    sides: Mapping[str, Sequence[str]],
    text: str | None,
) -> list[tuple[str, Answer]]:
    """Return (sources, answer) of each input: files of one or several modalities, one question."""
    files, question = _question(words, text)
    listed = dict(sides)
    if files or images:
        listed["image"] = [*files, *images]
    count = max(map(len, listed.values()), default=0)
    if count == 0:
        raise ConfigError(
            "there is nothing to be asked about: give a file, by --image, --video, --audio, "
            f"--depth, --points or --input (got {', '.join(words) or 'none'})"
        )
    if question is None:
        raise ConfigError(
            f"what is asked about {next(iter(listed.values()))[0]}? Give the question last, or by "
            "--text"
        )
    for name, side in listed.items():
        if len(side) not in (1, count):
            raise ConfigError(
                f"{len(side)} files of {name} and {count} of another modality; give one of each "
                "for every input, or one that goes with all"
            )
    rows = {name: [side[row % len(side)] for row in range(count)] for name, side in listed.items()}
    answers = learner.predict(
        texts=question, **{name: [_value(file) for file in side] for name, side in rows.items()}
    )
    sources = [", ".join(side[row] for side in rows.values()) for row in range(count)]
    return list(zip(sources, answers, strict=True))


def _question(words: Sequence[str], text: str | None) -> tuple[list[str], str | None]:
    """Return the files among words, and the question: the last word that is no file."""
    files = list(words)
    if text is None and files and not _is_file(files[-1]):
        text = files.pop()
    for file in files:
        if not Path(file).exists():
            raise ConfigError(f"no file {file!r}; one question is asked at a time, given last")
    return files, text


def _is_file(word: str) -> bool:
    """Return whether a word is meant as a file: there is one, or it looks like the name of one."""
    named = bool(Path(word).suffix.strip(".").isalnum()) and " " not in word.strip()
    return named or Path(word).exists()


def _value(file: str) -> Any:
    """Return a file's name, or those of frames between commas."""
    parts = tuple(part.strip() for part in file.split(",") if part.strip())
    return file if len(parts) < 2 or Path(file).exists() else parts


def _named(word: str) -> tuple[str, str]:
    name, equals, file = word.partition("=")
    if not (name and equals and file):
        raise ConfigError(f"--input takes NAME=FILE (thermal=a.npy); got {word!r}")
    return name, file


def _record(source: str, answer: Answer) -> dict[str, Any]:
    return {
        "file": source,
        "label": answer.label,
        "score": answer.score,
        "task": answer.task,
        "used": answer.used,
        "top": answer.top,
    }
