"""Atomic files: a reader sees the old content or the new, never half of it."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from evolora.errors import StorageError

TEMPORARY = ".partial"
"""How the name of a file ends that is still being written."""


def make_folder(path: Path) -> None:
    """Make a folder and its parents; one StorageError if that cannot be done."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot make the folder {path}: {error.strerror or error}") from error


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` through a temporary file in the same folder and a rename.

    Raises:
        StorageError: the folder cannot be written (permission, full disk, a file in the way).
    """
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(
            prefix=f".{path.name}.", suffix=TEMPORARY, dir=path.parent
        )
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error
    finally:  # also after Ctrl-C; a kill -9 leaves it to sweep_temporary
        if temporary:
            with suppress(OSError):
                os.unlink(temporary)


def sweep_temporary(folder: Path) -> None:
    """Remove what writes that were killed half-way left in a folder; nobody else may be writing."""
    for left in folder.glob(f".*{TEMPORARY}"):
        with suppress(OSError):
            left.unlink()


def write_json(path: Path, value: Any) -> None:
    """Write a JSON value, indented, with a final newline."""
    write_bytes(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def read_json(path: Path, *, kind: str, newest: int = 1) -> dict[str, Any]:
    """Return a JSON object written by :func:`write_json`.

    Args:
        path: the file.
        kind: what it should be, for messages ("artefact").
        newest: highest ``format_version`` this version of Evolora reads.

    Raises:
        StorageError: missing, not JSON, not an object, or of a newer format.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StorageError(f"no {kind} at {path.parent}: {path.name} is missing") from None
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"cannot read {path}: {error}") from error
    except json.JSONDecodeError as error:
        raise StorageError(
            f"{path} is not valid JSON (line {error.lineno}): corrupt {kind}?"
        ) from error
    if not isinstance(value, dict) or "format_version" not in value:
        raise StorageError(f"{path} is not an Evolora {kind}: it has no format_version")
    version = value["format_version"]
    if not isinstance(version, int) or version < 1:
        raise StorageError(f"{path} has format_version {version!r}, which is none: corrupt {kind}?")
    if version > newest:
        raise StorageError(
            f"{path} has format_version {version}, this Evolora reads up to {newest}; "
            "update evolora"
        )
    return value


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Write tensors as safetensors and return the SHA-256 of the file."""
    from safetensors.torch import save

    plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    # Empty metadata beside no tensors (a method that learns nothing) would be written unreadably.
    content = save(plain, metadata=dict(metadata) or None)
    write_bytes(path, content)
    return hashlib.sha256(content).hexdigest()


def read_tensors(path: Path, *, sha256: str | None = None) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, checked against its hash if one is given.

    Raises:
        StorageError: missing, truncated, altered, or no safetensors file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        content = path.read_bytes()
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror or error}") from error
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        raise StorageError(f"{path} is truncated or altered: its SHA-256 is not the recorded one")
    try:
        return load(content)
    except SafetensorError as error:
        raise StorageError(f"{path} is not a readable safetensors file: {error}") from error
