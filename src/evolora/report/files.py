"""The files of a run that reports read, checked: what each must hold."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from evolora.errors import StorageError

Model = TypeVar("Model", bound=BaseModel)


class _Known(BaseModel):
    # Later versions add fields; a report of an older program still shows what it knows.
    model_config = ConfigDict(extra="ignore", frozen=True, protected_namespaces=())


class Protocol(_Known):
    """How test samples were classified and routed."""

    label_space: str
    routing: str
    group_size: int = Field(default=1, ge=1)


class Step(_Known):
    """What learning one task cost: seconds, parameters (numbers) and bytes after it."""

    task: str
    seconds_learn: float = Field(ge=0)
    seconds_evaluate: float = Field(ge=0)
    trainable_parameters: int = Field(ge=0)
    stored_parameters: int = Field(ge=0)
    stored_bytes: int = Field(ge=0)
    final_loss: float | None = None
    full_tuning: int = Field(default=0, ge=0)


class RunFile(_Known):
    """``run.json``."""

    format_version: Literal[1]
    name: str = Field(min_length=1)
    method: dict[str, Any]
    stream: str
    source: str = ""
    tasks: tuple[str, ...] = Field(min_length=1)
    protocol: Protocol
    seed: int
    config_hash: str
    versions: dict[str, str]
    device: str
    processes: int = Field(ge=1)
    started: str
    seconds: float = Field(ge=0)
    history: tuple[Step, ...]
    backbone: dict[str, Any] = Field(default_factory=dict)


class Sources(_Known):
    """How much each site of the newest path takes from each path, mean gate weights."""

    paths: tuple[str, ...] = Field(min_length=2)
    sites: dict[str, tuple[float, ...]] = Field(min_length=1)

    @model_validator(mode="after")
    def _one_share_each(self) -> Self:
        if any(len(shares) != len(self.paths) for shares in self.sites.values()):
            raise ValueError(f"a site needs a share of each of {', '.join(self.paths)}")
        return self


class AfterTask(_Known):
    """What each task's test set gave after learning ``task``.

    ``routes``: which route answered how many samples; ``scores_by_missing``: the score on samples
    that are complete, lack the text, lack the image (names of missing codes); ``following``: the
    share of answers in the format that was asked for; ``normalised``: accuracy whatever the format;
    ``captions``: CIDEr-D of the answers that must be sentences, beside an exact metric;
    ``questions``: that metric over the other answers;
    ``sources``: what the newest path is mixed from.
    """

    task: str
    routes: dict[str, dict[str, int]]
    scores_by_missing: dict[str, dict[str, float]] = Field(default_factory=dict)
    following: dict[str, float] = Field(default_factory=dict)
    normalised: dict[str, float] = Field(default_factory=dict)
    captions: dict[str, float] = Field(default_factory=dict)
    questions: dict[str, float] = Field(default_factory=dict)
    sources: Sources | None = None


class TowerExperts(_Known):
    """Selections of each expert: task -> layer -> expert; and the frozen ids per layer."""

    tasks: dict[str, list[list[int]]]
    frozen: list[list[int]] = Field(default_factory=list)


class Routing(_Known):
    """``routing.json``."""

    format_version: Literal[1]
    after: tuple[AfterTask, ...] = ()
    experts: dict[str, TowerExperts] = Field(default_factory=dict)


class TableScores(_Known):
    """Scores under one missing table: AP, of each task, and AP by what is missing."""

    ap: float = Field(ge=0, le=1)
    tasks: dict[str, float]
    by_missing: dict[str, float]


class TablePoint(_Known):
    """Scores under tables of one kind and rate, with the task inferred and told."""

    kind: Literal["none", "text", "image", "both"]
    rate: float = Field(ge=0, le=1)
    task_free: TableScores | None = None
    oracle: TableScores | None = None
    task_identification: float | None = None

    @property
    def shown(self) -> TableScores | None:
        """Scores without a word about the task, or else those with."""
        return self.task_free or self.oracle


class Robustness(_Known):
    """``robustness.json``, which ``evolora eval --missing-rates`` writes."""

    format_version: Literal[1]
    samples: dict[str, int]
    seeds: tuple[int, ...]
    points: tuple[TablePoint, ...] = Field(min_length=1)
    own: TablePoint | None = None


def read(path: Path, model: type[Model]) -> Model:
    """Return a file's content; StorageError, with its name, where it is not as it must be."""
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise StorageError(f"{path}: missing; a finished run has it") from error
    except (OSError, ValueError) as error:
        raise StorageError(f"{path}: cannot be read as JSON ({error})") from error
    return checked(data, model, path)


def checked(data: Any, model: type[Model], where: Path | str) -> Model:
    """Return what was read as JSON, checked; StorageError names ``where`` and the fields."""
    if isinstance(data, Mapping) and data.get("format_version") not in (1, None):
        raise StorageError(f"{where}: format {data['format_version']!r} is not readable; known: 1")
    try:
        return model.model_validate(data)
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, fault['loc'])) or 'the file'}: {fault['msg']}"
            for fault in error.errors()[:3]
        )
        raise StorageError(f"{where}: {faults}") from error
