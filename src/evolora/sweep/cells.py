"""One cell: an ordinary run in a folder of its own, begun, gone on with, or found finished."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from evolora.errors import EvoloraError, StorageError, UnsuitableError
from evolora.storage.files import make_folder, read_json, write_json
from evolora.sweep.grid import Cell

OUTCOME = "outcome.json"
"""Why the run in a folder is not finished; a finished run has none."""
OUTPUT = "output.log"
"""What a run printed, and where it broke off."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a cell ended.

    Args:
        state: "not applicable" where the method cannot run on the stream's backbone at all.
        error: why it is not finished; one line.
    """

    state: Literal["finished", "failed", "not applicable"]
    error: str | None = None


def run_cell(config: Mapping[str, Any], folder: Path) -> Outcome:
    """Run a cell to its end in this process, with one torch thread; errors become its outcome.

    Args:
        config: of the run, as JSON values.
        folder: of the run; what an earlier start left there is gone on with.
    """
    import torch

    torch.set_num_threads(1)
    from evolora.config import parse_config
    from evolora.training.continual import ContinualRun

    settings = parse_config(config, source="cell")
    make_folder(folder)
    (folder / OUTCOME).unlink(missing_ok=True)
    with _output_to(folder / OUTPUT):
        try:
            run = ContinualRun(settings, folder)
            run.run(resume=(folder / "config.json").exists())
            return Outcome(state="finished")
        except Exception as error:
            traceback.print_exc()
            told = str(error) if isinstance(error, EvoloraError) else _named(error)
            state: Literal["failed", "not applicable"] = (
                "not applicable" if isinstance(error, UnsuitableError) else "failed"
            )
    outcome = Outcome(state=state, error=" ".join(told.split()))
    write_json(folder / OUTCOME, _kept(outcome, settings.hash()))
    return outcome


def known_as_unsuitable(cell: Cell, folder: Path) -> Outcome | None:
    """Return the outcome of a cell that this version found not applicable before, or None."""
    try:
        value = read_json(folder / OUTCOME, kind="outcome")
    except StorageError:
        return None
    outcome = Outcome(state="not applicable", error=value.get("error"))
    return outcome if value == _kept(outcome, cell.config_hash) else None


def _kept(outcome: Outcome, config_hash: str) -> dict[str, Any]:
    from evolora import __version__

    return {
        "format_version": 1,
        "state": outcome.state,
        "error": outcome.error,
        "config_hash": config_hash,
        "evolora": __version__,
    }


def _named(error: Exception) -> str:
    """Return an error that is not the user's to mend, with its type."""
    return f"{type(error).__name__}: {error}"


@contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Add to a file what this process and its libraries write to standard output and error."""
    with path.open("ab") as file:
        _flush()
        kept = [os.dup(stream) for stream in (1, 2)]
        try:
            for stream in (1, 2):
                os.dup2(file.fileno(), stream)
            yield
        finally:
            _flush()
            for stream, own in zip((1, 2), kept, strict=True):
                os.dup2(own, stream)
                os.close(own)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
