"""Named things (methods, streams, ...): filled by a decorator, read by string, listed.

A registry maps a public name to an object and a one-line summary. Built-in entries live in modules
that are imported on first use, so listing names does not import torch before it must. Outside
packages register through the entry-point groups ``evolora.methods``, ``evolora.streams``,
``evolora.backbones``, ``evolora.encoders``, ``evolora.metrics``, ``evolora.regularizers`` and, for
parts of recipes, ``evolora.experts``, ``evolora.sites``, ``evolora.gates``, ``evolora.selectors``,
``evolora.allocations`` and ``evolora.terms``; an entry point's module is imported and is expected
to call the decorator.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from evolora.errors import ConfigError, unknown_name

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Entry(Generic[T]):
    """One registered thing: its public name, what it is in one line, and the object itself."""

    name: str
    summary: str
    value: T


@dataclass
class Registry(Generic[T]):
    """Name -> object of one kind.

    Args:
        kind: singular word used in messages ("method").
        modules: built-in modules whose import fills this registry.
    """

    kind: str
    modules: tuple[str, ...]
    _entries: dict[str, Entry[T]] = field(default_factory=dict)
    _loaded: bool = False

    def register(self, name: str, *, summary: str) -> Callable[[T], T]:
        """Return a decorator that enters its object under ``name``; a second owner is refused."""

        def enter(value: T) -> T:
            known = self._entries.get(name)
            if known is not None and _identity(known.value) != _identity(value):
                raise ConfigError(f"{self.kind} {name!r} is already registered by {known.value!r}")
            self._entries[name] = Entry(name=name, summary=summary, value=value)
            return value

        return enter

    def get(self, name: str) -> T:
        """Return the object called ``name``; ConfigError with the nearest name otherwise."""
        self._load()
        if name not in self._entries:
            raise unknown_name(self.kind, name, self._entries)
        return self._entries[name].value

    def __iter__(self) -> Iterator[Entry[T]]:
        self._load()
        return iter(sorted(self._entries.values(), key=lambda entry: entry.name))

    def __contains__(self, name: object) -> bool:
        self._load()
        return isinstance(name, str) and name in self._entries

    def names(self) -> list[str]:
        """Return every registered name, sorted."""
        return [entry.name for entry in self]

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True
        for module in self.modules:
            importlib.import_module(module)
        for point in entry_points(group=f"evolora.{self.kind}s"):
            point.load()


def _identity(value: Any) -> tuple[str, str]:
    """A re-imported module defines the same thing again; that is not a second owner."""
    return getattr(value, "__module__", ""), getattr(value, "__qualname__", repr(value))


METHODS: Registry[Any] = Registry(
    kind="method",
    modules=(
        "evolora.methods.zero_shot",
        "evolora.methods.linear_probe",
        "evolora.methods.full_finetuning",
        "evolora.methods.lora",
        "evolora.methods.ewc",
        "evolora.methods.er",
        "evolora.methods.branch_lora",
        "evolora.methods.evolora",
        "evolora.methods.recipe",
        "evolora.methods.coda_prompt",
        "evolora.methods.d_mole",
        "evolora.methods.delo",
        "evolora.methods.dyn_mole",
        "evolora.methods.l2p",
        "evolora.methods.lwf",
        "evolora.methods.map",
        "evolora.methods.moe_adapters",
        "evolora.methods.moe_cl",
        "evolora.methods.moe_lora",
        "evolora.methods.o_lora",
        "evolora.methods.pathweave",
        "evolora.methods.rebq",
    ),
)
STREAMS: Registry[Any] = Registry(
    kind="stream",
    modules=(
        "evolora.streams.mosaic.domains",
        "evolora.streams.mosaic.missing",
        "evolora.streams.mosaic.instructions",
        "evolora.streams.mosaic.modalities",
        "evolora.streams.mcl",
        "evolora.streams.mtil",
        "evolora.streams.class_incremental",
        "evolora.streams.own_data",
        "evolora.streams.image_text",
        "evolora.streams.conversations",
        "evolora.streams.published_instructions",
        "evolora.streams.cmml",
    ),
)
BACKBONES: Registry[Any] = Registry(
    kind="backbone",
    modules=(
        "evolora.backbones.clip",
        "evolora.backbones.clip_fusion",
        "evolora.backbones.image_text",
        "evolora.backbones.qformer",
        "evolora.backbones.vilt",
    ),
)
REGULARIZERS: Registry[Any] = Registry(
    kind="regularizer",
    modules=("evolora.regularizers.resora",),
)
EXPERTS: Registry[Any] = Registry(kind="expert", modules=("evolora.recipes.experts",))
SITES: Registry[Any] = Registry(kind="site", modules=("evolora.recipes.experts",))
GATES: Registry[Any] = Registry(kind="gate", modules=("evolora.recipes.gates",))
SELECTORS: Registry[Any] = Registry(kind="selector", modules=("evolora.recipes.choices",))
ALLOCATIONS: Registry[Any] = Registry(kind="allocation", modules=("evolora.recipes.choices",))
TERMS: Registry[Any] = Registry(kind="term", modules=("evolora.recipes.terms",))
PARTS = {
    "experts": EXPERTS,
    "sites": SITES,
    "gate": GATES,
    "selector": SELECTORS,
    "allocation": ALLOCATIONS,
    "losses": TERMS,
    "regularizers": REGULARIZERS,
}
"""Setting of a recipe -> the parts it takes, which are dataclasses of settings."""
A_PART, SOME_PARTS = {"takes": "part"}, {"takes": "parts"}
"""Metadata of a field that takes one of the ``PARTS`` of its name, or a list of them."""
ENCODERS: Registry[Any] = Registry(
    kind="encoder",
    modules=(
        "evolora.backbones.encoders.depth",
        "evolora.backbones.encoders.features",
        "evolora.backbones.encoders.pointnet",
        "evolora.backbones.encoders.vision",
        "evolora.backbones.encoders.whisper",
    ),
)
"""Encoders of modalities of a Q-Former, see :mod:`evolora.backbones.modalities`."""
ANSWER_METRICS: Registry[Any] = Registry(
    kind="metric",
    modules=(
        "evolora.evaluation.answers.short",
        "evolora.evaluation.answers.vqa",
        "evolora.evaluation.answers.choices",
        "evolora.evaluation.answers.captions",
        "evolora.evaluation.answers.boxes",
    ),
)
