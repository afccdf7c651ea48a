"""The demo's third part: a model that sees images learns video, then sound, by PathWeave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from evolora.answering import Answer

if TYPE_CHECKING:
    from evolora.report.records import RunRecord
    from evolora.streams.task import Task


@dataclass(frozen=True, kw_only=True)
class Heard:
    """A test sample of each learned modality, and what was answered.

    Args:
        modality: what it is.
        question: its text.
        right: the answers that count as right.
        answer: what the model wrote, and whose path it took.
    """

    modality: str
    question: str
    right: tuple[str, ...]
    answer: Answer

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)


def ask_each(folder: Path, stream: Mapping[str, Any]) -> list[Heard]:
    """Ask the learner of a run for the first test sample of each task.

    Args:
        folder: the run's.
        stream: the stream's name and options.
    """
    from evolora.config import load_stream
    from evolora.learner import Learner

    learner = Learner.from_pretrained(folder)
    return [_ask(learner, task) for task in load_stream(**stream).tasks]


def _ask(learner: Any, task: Task) -> Heard:
    sample = task.test[0]
    label, question = sample.label, sample.inputs["text"]
    given = {"images" if task.name == "image" else task.name: [sample.inputs[task.name]]}
    return Heard(
        modality=task.name,
        question=question,
        right=tuple(str(one) for one in (label if isinstance(label, tuple) else (label,))),
        answer=learner.predict(texts=[question], **given)[0],
    )


def print_modalities(runs: Sequence[RunRecord], heard: Sequence[Heard], console: Console) -> None:
    """Print the stages of the third part and how the samples were answered."""
    from evolora.report.modalities import stage_table

    console.print("\nA model of images learns video, then sound:\n")
    console.print(stage_table(runs))
    if not heard:
        return
    lines = ["PathWeave, asked for a test sample of each modality:"]
    lines += [
        f'  {one.modality}: "{one.question}" {one.answer.label} (right: {one.right[0]})'
        for one in heard
    ]
    console.print("", *lines, sep="\n", markup=False, soft_wrap=True)
