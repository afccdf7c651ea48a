"""What a user gives to be answered: modality by modality, one value or a list, as samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from evolora.backbones.modalities import OWN
from evolora.errors import DataError, suggest
from evolora.methods.base import Method
from evolora.methods.entries import stages
from evolora.streams.images import read_image
from evolora.streams.task import Example

NOTHING = "neither an image nor a text was given; pass at least one of them"


def rows_of(method: Method, given: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the inputs, modality -> value; None in a list is what an input lacks.

    Where modalities are plugged in, what is no list goes with every input.

    Raises:
        DataError: nothing was given, sides differ in length, or a modality is one that the model
            does not see or the run has not learned.
    """
    sides = {name: value for name, value in given.items() if value is not None}
    _check_known(method, sides)
    lists = {
        name: list(value) if isinstance(value, list | tuple) else [value]
        for name, value in sides.items()
    }
    if method.backbone.takes_modalities:
        count = max((len(side) for side in lists.values()), default=0)
        for name, value in sides.items():
            if not isinstance(value, list | tuple):
                lists[name] *= count
    if not any(lists.values()):
        raise DataError(NOTHING)
    if len({len(side) for side in lists.values()}) > 1:
        counts = " and ".join(f"{len(side)} {name}s" for name, side in lists.items())
        raise DataError(
            f"{counts} were given; pass as many of each, with None where an input has no "
            f"{' or no '.join(lists)}"
        )
    for text in lists.get("text", []):
        if isinstance(text, str) and not text.strip():
            raise DataError("a text is empty; leave it out (None) where an input has no text")
    rows = [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]
    return [{name: value for name, value in row.items() if value is not None} for row in rows]


def example_of(method: Method, rows: Sequence[Mapping[str, Any]], index: int) -> Example:
    """Return one input as an example; among several, an error says which one it was."""
    try:
        inputs = dict(rows[index])
        if not inputs:
            raise DataError(NOTHING)
        if "text" in inputs and not isinstance(inputs["text"], str):
            raise DataError(f"a text must be a string; got {type(inputs['text']).__name__}")
        if method.backbone.takes_modalities:  # each of them reads its own
            if "text" not in inputs:
                raise DataError(
                    f"no question was given beside {' and '.join(inputs)}; say what is asked, as "
                    "a text"
                )
        elif "image" in inputs:
            inputs["image"] = _read(method, inputs["image"])
    except DataError as error:
        if len(rows) == 1:
            raise
        kind = "image" if len(method.backbone.modalities) == 1 else "input"
        raise DataError(f"{kind} {index + 1} of {len(rows)}: {error}") from error
    return Example(inputs=inputs, label=0, key=f"input {index + 1}")


def known_modalities(method: Method) -> tuple[str, ...]:
    """Return what a method can be asked about: what the model sees, and it has learned of it."""
    seen = method.backbone.modalities
    if method.entries is None:
        return seen
    learned = stages(method.task_modalities[: len(method.labels)])
    return tuple(name for name in seen if name in (OWN, "text") or name in learned)


def _check_known(method: Method, names: Mapping[str, Any]) -> None:
    seen, known = method.backbone.modalities, known_modalities(method)
    for name in names:
        if name not in seen:
            known_words = f"{', '.join(seen)}{suggest(name, seen)}"
            raise DataError(f"this model sees no {name}, only {known_words}")
        if name not in known:
            told = [one for one in known if one != "text"]
            raise DataError(f"this run has not learned {name}; it knows {', '.join(told)}")


def _read(method: Method, source: Any) -> Any:
    """Return an input's image; where the model writes, several of them may go with one text."""
    if not isinstance(source, tuple):
        return read_image(source)
    if method.backbone.answers != "text":
        raise DataError(f"this model looks at one image at a time; got {len(source)} with one text")
    return tuple(read_image(one) for one in source)
