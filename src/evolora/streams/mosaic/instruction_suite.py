"""The table of `mosaic/instructions`: what each task asks, in which form, and where it is from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from evolora.streams.mosaic.instruction_samples import (
    Question,
    clip_art_questions,
    emoji_questions,
    flag_questions,
    furniture_questions,
    icon_questions,
    scene_questions,
    script_questions,
    shape_questions,
)
from evolora.streams.mosaic.instruction_words import WORDINGS
from evolora.streams.mosaic.samples import Size


@dataclass(frozen=True, kw_only=True)
class InstructionTask:
    """One row of the suite."""

    name: str
    title: str
    kinds: tuple[str, ...]  # of questions, keys of WORDINGS
    answer_format: str  # see evaluation.answers.formats
    metric: str
    max_new_tokens: int
    licence: str
    source: str
    split_rule: str
    collect: Callable[[Path | None, Size], Iterator[Question]]
    caps: tuple[int, int, int] = (400, 40, 120)  # compact: questions in train, val, test

    @property
    def templates(self) -> tuple[str, ...]:
        """All wordings of the task's questions."""
        return tuple(text for kind in self.kinds for text in WORDINGS[kind])


_EMOJI_LICENCE = "Apache-2.0 (noto, fxemoji), CC-BY-4.0 (twemoji, emojione)"
_VENDORS = "whole vendor families: train noto, twemoji; val fxemoji; test emojione"

TASKS: tuple[InstructionTask, ...] = (
    InstructionTask(
        name="shapes",
        title="Questions about a colored shape",
        kinds=("color", "shape", "is-it"),
        answer_format="yes-no|words:1",
        metric="exact-match",
        max_new_tokens=8,
        licence="MIT",
        source="PyPI easy-vqa",
        split_rule="official; val is every tenth image of the official training part",
        collect=shape_questions,
    ),
    InstructionTask(
        name="emoji",
        title="Naming an emoji in a phrase",
        kinds=("emoji",),
        answer_format="phrase:2",
        metric="exact-match",
        max_new_tokens=8,
        licence=_EMOJI_LICENCE,
        source="npm @iconify/json",
        split_rule=_VENDORS,
        collect=emoji_questions,
    ),
    InstructionTask(
        name="flags",
        title="The country of a flag",
        kinds=("flag",),
        answer_format="words:3",
        metric="exact-match",
        max_new_tokens=12,
        licence="MIT (circle-flags, flagpack), CC0-1.0 (cif), CC-BY-4.0 (twemoji, emojione)",
        source="npm @iconify/json",
        split_rule="whole sets: train twemoji, circle-flags; val cif; test flagpack, emojione",
        collect=flag_questions,
    ),
    InstructionTask(
        name="scripts",
        title="Multiple choice of a writing system",
        kinds=("script",),
        answer_format="letter:ABCD",
        metric="option-accuracy",
        max_new_tokens=8,
        licence="OFL-1.1",
        source="Debian fonts-noto-core",
        split_rule="disjoint letters per script: 60/15/25",
        collect=script_questions,
    ),
    InstructionTask(
        name="icons",
        title="Words for the function of an icon",
        kinds=("icon",),
        answer_format="list:3",
        metric="token-f1",
        max_new_tokens=20,
        licence="MIT, Apache-2.0, ISC, CC-BY-4.0, CC0-1.0, OFL-1.1, Unlicense; see LICENSES.md",
        source="npm @iconify/json",
        split_rule="whole families of icon sets",
        collect=icon_questions,
    ),
    InstructionTask(
        name="furniture",
        title="Name, proportion and height of a rendered object",
        kinds=("furniture", "wider", "height"),
        answer_format="yes-no|number|words:1",
        metric="exact-match",
        max_new_tokens=8,
        licence="CC0-1.0, CC-BY-3.0 (see LICENSES.md for the authors)",
        source="Debian sweethome3d-furniture",
        split_rule="by model, 65/10/25 per class; all views and questions of one stay together",
        collect=furniture_questions,
    ),
    InstructionTask(
        name="clip-art",
        title="A sentence about a drawing",
        kinds=("clip-art",),
        answer_format="sentence",
        metric="cider-d-share",
        max_new_tokens=24,
        licence="public domain",
        source="Debian openclipart-svg",
        split_rule="by series (file name without number), 65/10/25 per class",
        collect=clip_art_questions,
    ),
    InstructionTask(
        name="scenes",
        title="The box of a thing in a scene of two",
        kinds=("scene",),
        answer_format="box",
        metric="iou-accuracy",
        max_new_tokens=32,
        licence=_EMOJI_LICENCE,
        source="npm @iconify/json",
        split_rule=_VENDORS,
        collect=scene_questions,
    ),
)
