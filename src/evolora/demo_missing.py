"""The demo's second part: image + text, either of which may be missing, learned by DeLo."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from evolora.answering import Answer

if TYPE_CHECKING:
    from evolora.report.records import RunRecord

COLUMNS = (
    "last", "forgetting", "complete", "text_missing", "image_missing", "selector_accuracy",
    "trainable_parameters",
)  # fmt: skip
"""Columns of the table."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One test sample, answered three times: from both modalities and from either alone.

    Args:
        task: the sample's own.
        label: name of its class.
        text: its text.
        answers: from image and text, from the image, from the text.
    """

    task: str
    label: str
    text: str
    answers: tuple[Answer, ...]

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)


def ask(folder: Path, stream: Mapping[str, Any]) -> Asked:
    """Ask the learner of a run for the first test sample of the stream's last task.

    Args:
        folder: the run's.
        stream: the stream's name and options.
    """
    from evolora.config import load_stream
    from evolora.learner import Learner

    task = load_stream(**{**stream, "missing": None}).tasks[-1]
    sample = task.test[0]
    image, text = sample.inputs["image"], sample.inputs["text"]
    answers = Learner.from_pretrained(folder).predict([image, image, None], [text, None, text])
    assert isinstance(sample.label, int)
    return Asked(
        task=task.name, label=task.labels.classes[sample.label], text=text, answers=tuple(answers)
    )


def print_missing(runs: Sequence[RunRecord], asked: Asked | None, console: Console) -> None:
    """Print the table of the second part and how the sample was answered."""
    from evolora.report import missing
    from evolora.report.tables import COLUMNS as GENERAL
    from evolora.report.tables import summary_table

    known = {column.key: column for column in (*missing.COLUMNS, *GENERAL)}
    console.print("\nImage + text, 70 % of all samples without one of them:\n")
    console.print(summary_table(runs, [known[key] for key in COLUMNS]))
    if asked is None:
        return
    lines = [f'DeLo, asked for a test sample of {asked.task}: {asked.label}, "{asked.text}"']
    lines += [f"  {answer.line(used=True)}" for answer in asked.answers]
    console.print("", *lines, sep="\n", markup=False, soft_wrap=True)
