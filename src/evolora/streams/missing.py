"""Simulated missing modalities: which sample of an image + text stream loses what.

Of each task's split, with N samples that have both modalities, n = floor(N * rate) become
incomplete. Kind "text": all n lose their text; "image": their image; "both": floor(n * both_ratio)
lose the image and the rest the text. No sample loses both; one that lacks a modality to begin with
keeps what it has and is not counted in N. Rounding errors of floats are forgiven: 29 of 100 samples
at rate 0.29, where int(100 * 0.29) is 28.

The meaning is that of RebQ (Zhao et al., arXiv 2403.11373) and DeLo (arXiv 2603.01632), whose
published setting is kind "both", rate 0.7, both_ratio 0.5, in training and test alike. Their drawn
table is cached under a name without its seed and both_ratio, so that a changed setting finds the
old table; here a table is a function of (seed, task, split, kind, rate, both_ratio), and a
:class:`~evolora.streams.missing_manifest.Manifest` keeps the settings beside the table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import floor
from typing import Any, Literal, get_args

from evolora.errors import DataError, StreamError, suggest
from evolora.streams.sampling import Labelled, Rows, check_choice, row_index
from evolora.streams.task import Example, Examples, Label, Subset

Kind = Literal["none", "text", "image", "both"]
KINDS: tuple[Kind, ...] = get_args(Kind)
SPLITS = ("train", "val", "test")
COMPLETE, TEXT_MISSING, IMAGE_MISSING = 0, 1, 2
CODE_NAMES = ("complete", "text_missing", "image_missing")
"""Name of each missing code."""
SETTINGS = ("kind", "rate", "both_ratio")
LOST = {TEXT_MISSING: "text", IMAGE_MISSING: "image"}


@dataclass(frozen=True, kw_only=True)
class Missing:
    """What one split loses.

    Args:
        kind: "none", "text", "image" or "both" (some lose the text, others the image).
        rate: share of the samples that become incomplete, in [0, 1].
        both_ratio: of kind "both", the share of the incomplete samples that lose the image.
    """

    kind: Kind = "none"
    rate: float = 0.7
    both_ratio: float = 0.5

    def __post_init__(self) -> None:
        check_choice("missing kind", self.kind, KINDS)
        for name in ("rate", "both_ratio"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise StreamError(f"missing {name} must be a number in [0, 1]; got {value!r}")


@dataclass(frozen=True, kw_only=True)
class MissingConfig(Missing):
    """What each split of every task loses.

    Args:
        seed: chooses the samples.
        train, val, test: settings of one split that differ from the others'.
    """

    seed: int = 0
    train: Missing | None = None
    val: Missing | None = None
    test: Missing | None = None

    @classmethod
    def from_options(cls, options: Any) -> MissingConfig:
        """Return the settings that a mapping describes, as in a configuration.

        Args:
            options: field -> value; ``train``, ``val`` and ``test`` are mappings whose absent
                settings are those of the whole.

        Raises:
            StreamError: an unknown or wrong setting, or settings without a ``kind``.
        """
        if not isinstance(options, Mapping):
            known = ", ".join((*SETTINGS, "seed", *SPLITS))
            raise StreamError(f"missing: expected settings ({known}) or a file; got {options!r}")
        common = {name: options[name] for name in SETTINGS if name in options}
        check_names("missing", options, (*SETTINGS, "seed", *SPLITS))
        parts: dict[str, Missing] = {}
        for split in SPLITS:
            own = options.get(split)
            if own is None:
                continue
            if not isinstance(own, Mapping):
                raise StreamError(f"missing.{split} must be a mapping of settings; got {own!r}")
            check_names(f"missing.{split}", own, SETTINGS)
            parts[split] = Missing(**_with_kind(f"missing.{split}", {**common, **own}))
        seed = options.get("seed", 0)
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise StreamError(f"missing seed must be a whole number; got {seed!r}")
        if "kind" not in common and len(parts) < len(SPLITS):
            _with_kind("missing", common)
        return cls(
            **common,
            seed=seed,
            train=parts.get("train"),
            val=parts.get("val"),
            test=parts.get("test"),
        )

    def of(self, split: str) -> Missing:
        """Return what a split loses."""
        own: Missing | None = getattr(self, split)
        return own or Missing(kind=self.kind, rate=self.rate, both_ratio=self.both_ratio)

    def describe(self) -> str:
        """Return the settings in a few words."""
        return f"missing {self.words()}, seed {self.seed}"

    def words(self) -> str:
        """Return what is lost in a few words, without the seed: "both 70 %"."""
        words = {split: _words(self.of(split)) for split in SPLITS}
        if len(set(words.values())) == 1:
            return words["train"]
        return ", ".join(f"{split} {word}" for split, word in words.items())


@dataclass(frozen=True, kw_only=True, eq=False)
class Incomplete:
    """A data set whose samples have lost a modality: what is lost is absent from their inputs.

    Args:
        data: the samples as they were.
        codes: missing code per row: 0 complete, 1 text missing, 2 image missing.
    """

    data: Examples = field(repr=False)
    codes: Sequence[int] = field(repr=False)

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, index: int) -> Example:
        index = row_index(index, len(self))
        example = self.data[index]
        lost = LOST.get(self.codes[index])
        if lost is None:
            return example
        left = {name: value for name, value in example.inputs.items() if name != lost}
        if not left:
            raise DataError(nothing_left(example.key, lost))
        return replace(example, inputs=left)

    @property
    def labels(self) -> Sequence[Label]:
        """All labels; without decoding a sample where the data set can tell them."""
        if isinstance(self.data, Labelled):
            return self.data.labels
        return tuple(self.data[row].label for row in range(len(self)))


def draw_codes(
    count: int,
    missing: Missing,
    *,
    seed: int,
    task: str,
    split: str,
    own: Sequence[int] | None = None,
) -> tuple[int, ...]:
    """Return the missing code of each sample of one split; a function of the arguments alone.

    Args:
        count: number of samples.
        missing: what they lose.
        seed: run seed of the choice.
        task: name of the task.
        split: name of the split.
        own: code of each sample before; None if all are complete.
    """
    codes = list(own) if own is not None else [COMPLETE] * count
    whole = [row for row, code in enumerate(codes) if code == COMPLETE]
    losing = 0 if missing.kind == "none" else _share(len(whole), missing.rate)
    images = {"image": losing, "both": _share(losing, missing.both_ratio)}.get(missing.kind, 0)
    if losing:
        import torch

        from evolora.randomness import generator

        key = (missing.kind, float(missing.rate), float(missing.both_ratio))
        rng = generator("missing", seed, task, split, *key)
        order = torch.randperm(len(whole), generator=rng).tolist()
        for place, chosen in enumerate(order[:losing]):
            codes[whole[chosen]] = IMAGE_MISSING if place < images else TEXT_MISSING
    return tuple(codes)


def own_codes(data: Examples) -> tuple[int, ...] | None:
    """Return the missing code of each row if the data set tells it (``codes``); else None."""
    if isinstance(data, Rows | Subset):
        inner = own_codes(data.data)
        return None if inner is None else tuple(inner[row] for row in data.indices)
    codes = getattr(data, "codes", None)
    return None if codes is None else tuple(codes)


def _share(count: int, ratio: float) -> int:
    """Return floor(count * ratio) without the rounding error of floats."""
    return floor(round(count * ratio, 9))


def _words(missing: Missing) -> str:
    return "none" if missing.kind == "none" else f"{missing.kind} {100 * missing.rate:g} %"


def nothing_left(sample: str, lost: str) -> str:
    other = "image" if lost == "text" else "text"
    return f"{sample} has no {other} to begin with and must not lose its {lost} too"


def check_names(path: str, given: Mapping[str, Any], known: Sequence[str]) -> None:
    for name in given:
        if name not in known:
            raise StreamError(
                f"{path}.{name}: unknown setting{suggest(str(name), known)} "
                f"(known: {', '.join(known)})"
            )


def _with_kind(path: str, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """A rate alone would be taken for the kind "none": nothing would be missing."""
    if "kind" not in settings:
        raise StreamError(f"{path}: say the kind, one of {', '.join(KINDS)}")
    return settings
