"""Scores of an exported model on questions that training never asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from torch import Tensor

from clip_pretraining.corpus import Corpus
from evolora.backbones.base import TextBackbone
from evolora.backbones.loading import load_backbone
from evolora.evaluation.answers.boxes import overlap, read_box
from evolora.evaluation.answers.short import exact_match, token_f1
from evolora.randomness import derive_seed
from evolora.routing.route import BASE, Route
from evolora.streams.mosaic.domains import load as load_domains
from evolora.streams.task import Example
from llava_pretraining.asking import FORMATS, Turn, Words
from llava_pretraining.scenes import Scene, draw_scene, picture
from llava_pretraining.student import held_out
from llava_pretraining.subjects import Subjects

LONGEST = 40  # answer, in tokens
BATCH = 50
BY_WORDS = ("caption", "keywords", "scene", "related")
"""Formats whose answers are judged by how many words they share; boxes are by overlap."""


@dataclass(frozen=True)
class Asked:
    """A question with its answer, about a picture [3, 64, 64] or none."""

    turn: Turn
    picture: Tensor | None


def judged(name: str) -> Callable[[str, str], float]:
    """Returns what judges an answer of a format, between 0 and 1."""
    if name == "box":
        return _overlap
    judge: Any = token_f1 if name in BY_WORDS else exact_match
    return lambda said, answer: float(judge(said, (answer,)))


def _overlap(said: str, answer: str) -> float:
    one, other = read_box(said), read_box(answer)
    return 0.0 if one is None or other is None else overlap(one, other)


def questions(corpus: Corpus, subjects: Subjects, count: int, seed: int) -> dict[str, list[Asked]]:
    """Returns ``count`` questions of each format; pictures of the corpus are held-out ones."""
    held = held_out(corpus)

    def about(kind: type, draw: Random) -> tuple[Any, Tensor | None]:
        if kind is Scene:
            scene = draw_scene(draw)
            return scene, picture(scene, draw)
        if kind is Words:
            return subjects.words(draw), None
        row = held[draw.randrange(len(held))]
        return subjects.thing(int(row), draw), corpus.pictures(row[None])[0]

    found: dict[str, list[Asked]] = {}
    for kind, formats in FORMATS.items():
        for name, (_, ask) in formats.items():
            draw, asked = Random(derive_seed(seed, "llava-score", name)), []
            while len(asked) < count:
                subject, shown = about(kind, draw)
                turn = ask(subject, draw)
                if turn is not None:
                    asked.append(Asked(turn, None if shown is None else shown.permute(2, 0, 1)))
            found[name] = asked
    return found


def of_suite(domains: Path, count: int, seed: int) -> dict[str, list[Asked]]:
    """Returns questions with four options, and of names, about the suite's test pictures."""
    found: dict[str, list[Asked]] = {}
    for task in load_domains(root=domains):
        draw, chosen, named = Random(derive_seed(seed, "llava-suite", task.name)), [], []
        classes = task.labels.classes
        for row in draw.sample(range(len(task.test)), min(count, len(task.test))):
            example = task.test[row]
            answer, shown = classes[example.label], example.inputs["image"]
            wrong = [name for name in classes if name != answer]
            letters = draw.sample(wrong, min(3, len(wrong)))
            offered = [answer, *letters]
            draw.shuffle(offered)
            lines = [f"{letter}. {name}" for letter, name in zip("ABCD", offered, strict=False)]
            text = "\n".join(["What is this?", *lines, "Answer with the letter."])
            chosen.append(Asked((text, "ABCD"[offered.index(answer)]), shown))
            named.append(Asked(("What is this?", answer), shown))
        found[f"{task.name}, of four"], found[f"{task.name}, name"] = chosen, named
    return found


def answers(backbone: TextBackbone, asked: Sequence[Asked]) -> list[str]:
    """Returns what the model writes."""
    examples = [
        Example(
            inputs={"text": one.turn[0], **({} if one.picture is None else {"image": one.picture})},
            label=one.turn[1],
            key=str(row),
        )
        for row, one in enumerate(asked)
    ]
    said: list[str] = []
    for start in range(0, len(examples), BATCH):
        part = examples[start : start + BATCH]
        said += backbone.write(backbone.collate(part), Route.of(BASE, len(part)), LONGEST)
    return said


def scores(
    folder: Path, questions: dict[str, list[Asked]], *, type: str = "image-text"
) -> tuple[list[dict[str, Any]], dict[str, list[tuple[str, str, str]]]]:
    """Returns a row per format in percent, and examples (question, answer, said) of each.

    "swapped" is what the same questions score where each has the picture of the next.
    """
    backbone = load_backbone(str(folder), type=type)
    assert isinstance(backbone, TextBackbone)
    rows, seen = [], {}
    for name, asked in questions.items():
        judge = judged(name)
        row: dict[str, Any] = {"format": name, "questions": len(asked)}
        said = answers(backbone, asked)
        row["score"] = _mean(judge, said, asked)
        if asked[0].picture is not None:
            after = [*asked[1:], asked[0]]
            other = [Asked(a.turn, b.picture) for a, b in zip(asked, after, strict=True)]
            row["swapped"] = _mean(judge, answers(backbone, other), asked)
        rows.append(row)
        seen[name] = [(*one.turn, text) for one, text in zip(asked[:3], said, strict=False)]
    return rows, seen


def _mean(judge: Callable[[str, str], float], said: Sequence[str], asked: Sequence[Asked]) -> float:
    found = [judge(text, one.turn[1]) for text, one in zip(said, asked, strict=True)]
    return round(100 * sum(found) / len(found), 1)
