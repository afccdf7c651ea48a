"""Errors a user can act on: what came, what is allowed, and the nearest valid name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EvoloraError(Exception):
    """Base of the errors that are the user's to mend; the CLI prints one line, exit code 2."""


class ConfigError(EvoloraError, ValueError):
    """A configuration value, name or combination is not allowed."""


class UnsuitableError(ConfigError):
    """A method cannot work on this kind of backbone or task at all, whatever its settings."""


class DataError(EvoloraError, ValueError):
    """A file, image, manifest or data set is missing, unreadable or inconsistent."""


class StreamError(DataError):
    """A stream cannot be built: its data or layout is missing."""


class RouteError(EvoloraError, RuntimeError):
    """An expert site was asked to run without a route, or with one that does not fit."""


class StorageError(EvoloraError, RuntimeError):
    """A checkpoint or artefact is missing, corrupt, of a newer format or for another backbone."""


def suggest(name: str, allowed: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the closest allowed name, or an empty string."""
    close = difflib.get_close_matches(str(name), list(allowed), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def unknown_name(kind: str, name: str, allowed: Iterable[str]) -> ConfigError:
    """Return the one error for a name that is not in a closed list."""
    names = sorted(allowed)
    return ConfigError(f"unknown {kind} {name!r}{suggest(name, names)} (known: {', '.join(names)})")
