"""The table of `mosaic/modalities`: what each task asks, and where it is from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from evolora.streams.mosaic.modality_words import KINDS, WORDINGS

METRIC = "exact-match"
ANSWER_FORMAT = "yes-no|words:1|sentence"
_OBJECTS = "by object, the same in all modalities: 28 % for pretraining, 38/8/26"


@dataclass(frozen=True, kw_only=True)
class ModalityTask:
    """One row of the suite."""

    name: str
    title: str
    licence: str
    source: str
    split_rule: str = _OBJECTS
    max_new_tokens: int = 12

    def described(self) -> dict[str, Any]:
        """Returns what the manifest says of the task."""
        return {
            "name": self.name,
            "title": self.title,
            "kinds": list(KINDS[self.name]),
            "templates": [text for kind in KINDS[self.name] for text in WORDINGS[kind]],
            "metric": METRIC,
            "answer_format": ANSWER_FORMAT,
            "max_new_tokens": self.max_new_tokens,
            "license": self.licence,
            "source": self.source,
            "split_rule": self.split_rule,
        }


_MESHES = "CC0-1.0, CC-BY-3.0 (see LICENSES.md for the authors)"
_FURNITURE = "Debian sweethome3d-furniture"

TASKS: tuple[ModalityTask, ...] = (
    ModalityTask(
        name="image",
        title="Pictures of painted objects",
        licence=_MESHES,
        source=_FURNITURE,
    ),
    ModalityTask(
        name="video",
        title="Films of four frames: objects that turn or move, animated emoji",
        licence=f"{_MESHES}; MIT (emoji)",
        source=f"{_FURNITURE}; npm @lobehub/fluent-emoji-anim-1, -2",
        split_rule=f"{_OBJECTS}; emoji by role, women and men of one role together",
    ),
    ModalityTask(
        name="audio",
        title="Recorded notes and beats",
        licence="CC-BY-3.0 (instruments), CC0-1.0 (drums)",
        source="npm tonejs-instrument-*-mp3, supersonic-scsynth-samples",
        split_rule="by recording: 28 % for pretraining, 38/8/26",
    ),
    ModalityTask(
        name="depth",
        title="Depth maps of objects",
        licence=_MESHES,
        source=_FURNITURE,
    ),
    ModalityTask(
        name="pc",
        title="Clouds of 512 colored points on objects",
        licence=_MESHES,
        source=_FURNITURE,
    ),
)
