"""What several verbs of the command line share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evolora.errors import ConfigError

if TYPE_CHECKING:
    from evolora.learner import Learner

AsJson = Annotated[bool, typer.Option("--json", help="print the result as JSON")]
Quiet = Annotated[bool, typer.Option("--quiet", help="no progress bars")]


def print_json(value: Any) -> None:
    """Print a JSON value, indented."""
    print(json.dumps(value, indent=1, ensure_ascii=False))


def learner_of(folder: Path) -> Learner:
    """Return the learner of a run or artefact; ConfigError where there is no such folder."""
    from evolora.learner import Learner

    if not folder.exists():
        raise ConfigError(f"no run or artefact at {folder}")
    return Learner.from_pretrained(folder)
