"""MTIL's data sets through the `datasets` library: from the hub, its cache, or saved folders.

The ids name copies that keep the official splits and class names. A copy's columns are found by
their type (an Image, a ClassLabel), so another copy, or one's own, can be named instead. Where the
benchmark splits 80/20, all splits of the copy are joined first and then split with the same seed;
the rows differ from those of the folder source, because a copy's order does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evolora.errors import DataError
from evolora.streams.mtil_prompts import FLOWERS, class_name
from evolora.streams.mtil_readers import Listing, benchmark_split
from evolora.streams.sampling import ImageFiles, Rows, row_index
from evolora.streams.task import Example

_BACKGROUND = "background_google"  # Caltech101's clutter folder, no class of the benchmark


@dataclass(frozen=True, kw_only=True)
class HubSet:
    """One data set of the hub.

    Args:
        id: "owner/name".
        label: its label column, tried first ("label" is the usual one).
        train, val, test: names of its splits; a ``test`` of None joins all and splits 80/20.
    """

    id: str
    label: str = "label"
    train: str = "train"
    val: str | None = None
    test: str | None = "test"


HUB: dict[str, HubSet] = {
    "aircraft": HubSet(id="dpdl-benchmark/fgvc_aircraft", label="variant", val="validation"),
    "caltech101": HubSet(id="dpdl-benchmark/caltech101", test=None),
    "cifar100": HubSet(id="uoft-cs/cifar100", label="fine_label"),
    "dtd": HubSet(id="dpdl-benchmark/dtd", val="validation"),
    "eurosat": HubSet(id="timm/eurosat-rgb", test=None),
    "flowers": HubSet(id="dpdl-benchmark/oxford_flowers102", val="validation"),
    "food": HubSet(id="ethz/food101", test="validation"),
    "mnist": HubSet(id="ylecun/mnist"),
    "pets": HubSet(id="timm/oxford-iiit-pet"),
    "cars": HubSet(id="tanganke/stanford_cars"),
    "sun397": HubSet(id="dpdl-benchmark/sun397", test=None),
}


@dataclass(frozen=True, kw_only=True)
class HubImages:
    """One `datasets.Dataset` with its labels; images stay encoded until their row is asked for."""

    data: Any
    column: str
    labels: Sequence[int]
    name: str

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        from evolora.streams.images import read_image

        index = row_index(index, len(self))
        key = f"{self.name}:{index}"
        encoded = self.data[index][self.column]
        try:
            image = read_image(encoded["bytes"] or encoded["path"])
        except DataError as error:
            raise DataError(f"{key}: {error}") from error
        return Example(inputs={"image": image}, label=self.labels[index], key=key)


def open_saved(name: str, source: HubSet, root: Path | None) -> Any:
    """Return the data set's splits as `datasets` gives them.

    Args:
        name: MTIL name, the folder below ``root``.
        source: its entry of `HUB`.
        root: folder with one saved data set (`save_to_disk`, or files that `load_dataset` reads)
            per name; None asks the hub, or its local cache if HF_HUB_OFFLINE is set.

    Raises:
        DataError: `datasets` is not installed, or it cannot bring the data set.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError("needs the datasets library (pip install 'evolora[data]')") from error
    try:
        if root is None:
            return datasets.load_dataset(source.id)
        folder = root / name
        if not folder.is_dir():
            raise DataError(f"no folder {folder}")
        saved = ("dataset_dict.json", "dataset_info.json")
        if any((folder / file).exists() for file in saved):
            return datasets.load_from_disk(str(folder))
        return datasets.load_dataset(str(folder))
    except DataError:
        raise
    except Exception as error:  # hub, network and builder errors share no base
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{source.id if root is None else folder}: {reason}") from error


def read_hub(name: str, source: HubSet, root: Path | None) -> Listing:
    """Return the listing of one MTIL data set that the `datasets` library brings.

    Raises:
        DataError: see `open_saved`; or a split or column is missing, or its classes have no names.
    """
    content = open_saved(name, source, root)
    if not isinstance(content, dict):
        raise DataError(f"{name}: expected a data set with splits, got {type(content).__name__}")
    wanted = [source.train, *filter(None, (source.val, source.test))]
    splits = list(content) if source.test is None else wanted
    missing = [split for split in splits if split not in content]
    if missing or not splits:
        raise DataError(f"{name}: no split {missing[:1]} (there are: {', '.join(content)})")
    parts = {split: content[split] for split in splits}
    label = _column(name, source, parts[splits[0]], "label")
    raw = _raw_classes(name, label, list(parts.values()))
    if source.test is None:
        return _joined(name, source, list(parts.values()), label, raw)
    views = {split: _view(name, source, data, split, label, raw) for split, data in parts.items()}
    return Listing(
        train=views[source.train],
        val=views[source.val] if source.val else ImageFiles(),
        test=views[source.test],
        classes=tuple(class_name(name, each) for each in raw),
    )


def _joined(
    name: str, source: HubSet, parts: Sequence[Any], label: str, raw: Sequence[str]
) -> Listing:
    """Join the parts, leave out Caltech101's background, and split as the benchmark does."""
    import datasets

    whole = _view(name, source, datasets.concatenate_datasets(list(parts)), "all", label, raw)
    kept = [index for index, each in enumerate(raw) if each.lower() != _BACKGROUND]
    rows = [row for row, old in enumerate(whole.labels) if old in set(kept)]
    labels = [kept.index(whole.labels[row]) for row in rows]
    train, test = benchmark_split(Rows(data=whole, indices=rows, labels=labels))
    return Listing(
        train=train, test=test, classes=tuple(class_name(name, raw[index]) for index in kept)
    )


def _column(name: str, source: HubSet, data: Any, kind: str) -> str:
    """Return the image or the label column of a data set, found by its type."""
    import datasets

    features = data.features
    if kind == "image":
        found = [c for c, feature in features.items() if isinstance(feature, datasets.Image)]
    else:
        named = [c for c in (source.label, "label", "fine_label") if c in features]
        typed = [c for c, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
        found = named[:1] or typed
    if len(found) != 1:
        raise DataError(f"{name}: no single {kind} column among: {', '.join(features)}")
    return str(found[0])


def _raw_classes(name: str, label: str, parts: Sequence[Any]) -> tuple[str, ...]:
    """Return the class names in the order of the labels; all splits must agree on them."""
    import datasets

    feature = parts[0].features.get(label)
    if isinstance(feature, datasets.ClassLabel):
        tables = {tuple(part.features[label].names) for part in parts}
        if len(tables) != 1:
            raise DataError(f"{name}: its splits do not have the same classes")
        names = tables.pop()
        if name == "flowers" and set(names) == {str(n + 1) for n in range(len(FLOWERS))}:
            return tuple(FLOWERS[int(number) - 1] for number in names)
        return tuple(names)
    values = sorted({value for part in parts for value in part.unique(label)})
    if all(isinstance(value, str) for value in values):
        return tuple(values)
    known = {"flowers": FLOWERS, "mnist": tuple("0123456789")}.get(name, ())
    if all(isinstance(value, int) and 0 <= value < len(known) for value in values):
        return known
    raise DataError(f"{name}: column {label!r} has numbers without class names; use another copy")


def _view(
    name: str, source: HubSet, data: Any, split: str, label: str, raw: Sequence[str]
) -> HubImages:
    """Return a split as examples, its images left encoded."""
    import datasets

    column = _column(name, source, data, "image")
    index = {each: position for position, each in enumerate(raw)}
    values = list(data[label])
    labels = [index[value] if isinstance(value, str) else int(value) for value in values]
    if labels and not 0 <= min(labels) <= max(labels) < len(raw):
        raise DataError(f"{name}: split {split!r} has samples without a label")
    encoded = data.cast_column(column, datasets.Image(decode=False))
    return HubImages(data=encoded, column=column, labels=labels, name=f"{name}/{split}")
