"""MTIL: eleven image data sets, learned one after another, each with its own classes.

Benchmark of ZSCL (Zheng et al., ICCV 2023, arXiv 2303.06628), also used by MoE-Adapters (Yu et al.,
CVPR 2024, arXiv 2403.11549): 1,201 classes; a test image is classified among its own data set's
classes. Order I is alphabetical, order II the published second order. Training uses the first
template, evaluation averages all.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from evolora.errors import DataError, StreamError, suggest
from evolora.registry import STREAMS
from evolora.streams.mtil_layouts import LAYOUTS
from evolora.streams.mtil_prompts import CLASS_COUNTS, OFFICIAL_SIZES, ORDERS, TEMPLATES
from evolora.streams.mtil_readers import Listing
from evolora.streams.sampling import (
    check_choice,
    few_per_class,
    generator,
    make_task,
    pick,
    read_all,
    user_path,
)
from evolora.streams.task import LabelSpace, Stream, Task

_LOG = logging.getLogger(__name__)

DEFAULT_ROOT = Path("data")


@STREAMS.register(
    "mtil", summary="MTIL's 11 image data sets (Aircraft ... SUN397), orders I and II"
)
def load(
    *,
    root: str | Path | None = None,
    source: Literal["folders", "datasets"] = "folders",
    order: str | Sequence[str] = "I",
    shots: int | None = None,
    seed: int = 42,
    limit: int | None = None,
    hub: Mapping[str, str] | None = None,
) -> Stream:
    """Return the MTIL stream; files are listed now and images decoded on access.

    Args:
        root: folder that holds the data sets; for "folders" default ``data`` in the working
            folder; for "datasets" one saved data set per MTIL name, and None asks the hub's cache
            or the hub (HF_HUB_OFFLINE is respected).
        source: "folders" for the authors' layouts, "datasets" for the `datasets` library.
        order: "I", "II", or the names of the data sets to learn, in order.
        shots: training samples per class (5 in the few-shot protocol); None for all.
        seed: chooses the shots and what ``limit`` keeps; the 80/20 splits always use 42, as
            published.
        limit: at most so many samples per split, class-balanced.
        hub: MTIL name -> hub id of another copy to use with "datasets".

    Raises:
        StreamError: unknown order or source; or data sets are missing, then the one message lists
            all of them, where they were looked for and what was expected there.
    """
    names = _order(order)
    check_choice("source", source, ("folders", "datasets"))
    for argument, value in (("shots", shots), ("limit", limit)):
        if value is not None and value < 1:
            raise StreamError(f"{argument} must be at least 1; got {value}")
    if source == "folders":
        base = DEFAULT_ROOT if root is None else user_path(root)
        listings = read_all(names, lambda name: _from_folders(name, base), "MTIL data sets")
        where = f"folders below {base}"
    else:
        saved = None if root is None else user_path(root)
        listings = read_all(names, lambda name: _from_hub(name, saved, hub or {}), "MTIL data sets")
        where = "the datasets library" if saved is None else f"saved data sets below {saved}"
    tasks = tuple(_task(name, listings[name], shots, limit, seed) for name in names)
    return Stream(name="mtil", tasks=tasks, source=f"MTIL, {len(tasks)} data sets from {where}")


def _order(order: str | Sequence[str]) -> tuple[str, ...]:
    if isinstance(order, str):
        check_choice("order", order, tuple(ORDERS))
        return ORDERS[order]
    names = tuple(order)
    for name in names:
        if name not in CLASS_COUNTS:
            known = ", ".join(CLASS_COUNTS)
            hint = suggest(name, CLASS_COUNTS)
            raise StreamError(f"unknown MTIL data set {name!r}{hint} (known: {known})")
    if not names or len(set(names)) != len(names):
        raise StreamError(f"an order names each data set once; got {list(names)}")
    return names


def _from_folders(name: str, root: Path) -> Listing:
    layout = LAYOUTS[name]
    folder = layout.find(root)
    if folder is None:
        places = ", ".join(str(root / place) for place in layout.folders)
        raise DataError(f"not in {places} (expected there: {layout.expected})")
    return layout.read(folder)


def _from_hub(name: str, root: Path | None, hub: Mapping[str, str]) -> Listing:
    from dataclasses import replace

    from evolora.streams.mtil_hub import HUB, read_hub

    source = HUB[name]
    return read_hub(name, replace(source, id=hub[name]) if name in hub else source, root)


def _task(name: str, listing: Listing, shots: int | None, limit: int | None, seed: int) -> Task:
    _warn_if_partial(name, listing)
    train = listing.train
    if shots is not None:
        train = pick(train, few_per_class(train.labels, shots, generator(seed, f"{name}/shots")))
    splits = {"train": train, "val": listing.val, "test": listing.test}
    labels = LabelSpace(classes=listing.classes, templates=TEMPLATES[name])
    return make_task(name, splits, labels, limit, seed)


def _warn_if_partial(name: str, listing: Listing) -> None:
    """Say so when the data at hand is not the published set: its numbers do not compare."""
    if len(listing.classes) != CLASS_COUNTS[name]:
        _LOG.warning(
            "mtil/%s has %d classes, the published set %d: complete the data before comparing",
            *(name, len(listing.classes), CLASS_COUNTS[name]),
        )
        return
    sizes = (len(listing.train), len(listing.test))
    if sizes != OFFICIAL_SIZES.get(name, sizes):
        _LOG.warning(
            "mtil/%s has %d training and %d test samples, the published split %d and %d: "
            "complete the data before comparing",
            *(name, *sizes, *OFFICIAL_SIZES[name]),
        )
