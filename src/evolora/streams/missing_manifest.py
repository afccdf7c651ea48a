"""The missing manifest: a drawn table of missing modalities with its settings, kept as a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from evolora.errors import StreamError, suggest
from evolora.streams.missing import (
    CODE_NAMES,
    COMPLETE,
    KINDS,
    LOST,
    SPLITS,
    Incomplete,
    MissingConfig,
    check_names,
    draw_codes,
    nothing_left,
    own_codes,
)
from evolora.streams.sampling import user_path
from evolora.streams.task import Examples, Stream, Task

FORMAT_VERSION = 1
MissingOption = Mapping[str, Any] | MissingConfig | str | Path | None
"""What a stream's ``missing`` option takes; see :func:`with_missing`."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Which samples of a stream are incomplete, and the settings that chose them.

    Args:
        stream: name of the stream it was drawn for.
        settings: what it was drawn with.
        codes: task -> split -> missing code of each sample, in the order of the data set.
    """

    stream: str
    settings: MissingConfig
    codes: Mapping[str, Mapping[str, tuple[int, ...]]] = field(repr=False)

    @classmethod
    def draw(cls, stream: Stream, settings: MissingConfig) -> Manifest:
        """Return a manifest for every task and split of a stream.

        Raises:
            StreamError: a task whose samples have no image or no text at all.
        """
        codes = {}
        for task in stream:
            check_modalities(task)
            codes[task.name] = {
                split: draw_codes(
                    len(data := getattr(task, split)),
                    settings.of(split),
                    seed=settings.seed,
                    task=task.name,
                    split=split,
                    own=own_codes(data),
                )
                for split in SPLITS
            }
        return cls(stream=stream.name, settings=settings, codes=codes)

    def apply(self, stream: Stream) -> Stream:
        """Return the stream with the modalities taken away; the manifest may know more tasks.

        Raises:
            StreamError: a task that the manifest does not know, a split of another size, or a
                sample that would be left with nothing.
        """
        tasks = []
        for task in stream:
            check_modalities(task)
            views = {}
            for split in SPLITS:
                data, codes = getattr(task, split), self.codes_of(task, split)
                views[split] = Incomplete(data=data, codes=codes) if any(codes) else data
            tasks.append(replace(task, **views))
        source = "; ".join(part for part in (stream.source, self.settings.describe()) if part)
        return replace(stream, tasks=tuple(tasks), source=source)

    def counts(self) -> dict[str, dict[str, dict[str, int]]]:
        """Return task -> split -> number of samples, of complete ones and of each kind missing."""
        return {
            task: {
                split: {
                    "samples": len(codes),
                    **{name: codes.count(code) for code, name in enumerate(CODE_NAMES)},
                }
                for split, codes in splits.items()
            }
            for task, splits in self.codes.items()
        }

    def save(self, path: str | Path) -> None:
        """Write the manifest as JSON; the file is whole or unchanged, else StorageError."""
        from evolora.storage.files import write_json

        write_json(
            user_path(path),
            {
                "format_version": FORMAT_VERSION,
                "stream": self.stream,
                "settings": asdict(self.settings),
                "meaning": {str(code): name for code, name in enumerate(CODE_NAMES)},
                "counts": self.counts(),
                "codes": {
                    task: {split: "".join(map(str, codes)) for split, codes in splits.items()}
                    for task, splits in self.codes.items()
                },
            },
        )

    @classmethod
    def load(cls, path: str | Path) -> Manifest:
        """Return the manifest in a file.

        Raises:
            StorageError: missing, not JSON, or of a newer format.
            StreamError: a field is missing or wrong, or a code is none of 0, 1, 2.
        """
        from evolora.storage.files import read_json

        file = user_path(path)
        value = read_json(file, kind="missing manifest", newest=FORMAT_VERSION)
        try:
            for name, kind in (("stream", str), ("settings", Mapping), ("codes", Mapping)):
                if not isinstance(value.get(name), kind):
                    raise StreamError(f"{name!r} is missing or of the wrong type")
            codes = {task: _read_splits(task, splits) for task, splits in value["codes"].items()}
            settings = MissingConfig.from_options(value["settings"])
        except StreamError as error:
            raise StreamError(f"{file} is no missing manifest: {error}") from error
        return cls(stream=value["stream"], settings=settings, codes=codes)

    def codes_of(self, task: Task, split: str) -> tuple[int, ...]:
        """Return the missing code of each sample of a task; the errors are those of `apply`."""
        if task.name not in self.codes:
            raise StreamError(
                f"the missing manifest of {self.stream!r} has no task {task.name!r}"
                f"{suggest(task.name, self.codes)} (known: {', '.join(self.codes)})"
            )
        data: Examples = getattr(task, split)
        codes = self.codes[task.name].get(split, ())
        if len(codes) != len(data):
            raise StreamError(
                f"task {task.name!r}, {split}: the missing manifest of {self.stream!r} is for "
                f"{len(codes)} samples, the stream has {len(data)}; draw it again for this stream "
                "with the options that it is used with (limit, seed)"
            )
        own = own_codes(data)
        if own is None:
            return codes
        for row, (code, before) in enumerate(zip(codes, own, strict=True)):
            if code and before not in (COMPLETE, code):
                what = f"task {task.name!r}, {split}, sample {row}"
                raise StreamError(nothing_left(what, LOST[code]))
        return tuple(code or before for code, before in zip(codes, own, strict=True))


def with_missing(stream: Stream, missing: MissingOption) -> Stream:
    """Return the stream with missing modalities simulated.

    Args:
        stream: samples with image and text.
        missing: settings (`MissingConfig`, or a mapping of its fields), a kind alone, the file of a
            `Manifest`, or None for none.
    """
    manifest = manifest_of(stream, missing)
    return stream if manifest is None else manifest.apply(stream)


def manifest_of(stream: Stream, missing: MissingOption) -> Manifest | None:
    """Return the manifest that a ``missing`` option means for a stream; None if for none."""
    chosen = _read_option(missing)
    return Manifest.draw(stream, chosen) if isinstance(chosen, MissingConfig) else chosen


def missing_settings(missing: MissingOption) -> MissingConfig | None:
    """Return the settings that a ``missing`` option stands for; those of a manifest are in it."""
    chosen = _read_option(missing)
    return chosen.settings if isinstance(chosen, Manifest) else chosen


def _read_option(missing: MissingOption) -> Manifest | MissingConfig | None:
    if isinstance(missing, str) and missing in KINDS:
        missing = {"kind": missing}
    if isinstance(missing, str | Path):
        if not user_path(missing).is_file():
            hint = suggest(str(missing), KINDS)
            raise StreamError(
                f"missing {str(missing)!r} is no file and no kind{hint} (known: {', '.join(KINDS)})"
            )
        return Manifest.load(missing)
    if missing is None or isinstance(missing, MissingConfig):
        return missing
    return MissingConfig.from_options(missing)


def check_modalities(task: Task) -> None:
    """Raise StreamError where a task's samples have no image or no text at all."""
    if not {"image", "text"} <= set(task.modalities):
        raise StreamError(
            f"task {task.name!r} has only {' and '.join(task.modalities)}; a modality can be "
            "missing only where samples have image and text"
        )


def _read_splits(task: str, splits: Any) -> dict[str, tuple[int, ...]]:
    if not isinstance(splits, Mapping):
        raise StreamError(f"task {task!r} needs a mapping of splits; got {splits!r}")
    check_names(f"codes.{task}", splits, SPLITS)
    codes = {}
    for split, digits in splits.items():
        if not isinstance(digits, str):
            raise StreamError(f"codes.{task}.{split} must be a string of digits; got {digits!r}")
        for row, digit in enumerate(digits):
            if digit not in "012":
                raise StreamError(
                    f"codes.{task}.{split}: code {digit!r} of sample {row} is out of range "
                    "(0 complete, 1 text missing, 2 image missing)"
                )
        codes[split] = tuple(map(int, digits))
    return codes
