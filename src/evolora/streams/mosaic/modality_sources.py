"""The objects, animations and recordings of `mosaic/modalities`, and the side each is on.

Whoever pretrains a model for the stream reads the side "pretrain" of `objects`, `animations` and
`recordings`; what is there occurs in no split of the stream, in no modality.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from evolora.streams.mosaic.drawings import emoji_table
from evolora.streams.mosaic.furniture import catalogue
from evolora.streams.mosaic.modality_words import EMOJI, NOT_SHOWN, OBJECTS
from evolora.streams.mosaic.samples import SEED
from evolora.streams.mosaic.sources import TONES, fetch

SIDES = ("pretrain", "train", "val", "test")
_UNTIL = (0.28, 0.66, 0.74, 1.0)  # share of each group where the side ends
_TALL, _WIDE, _EVEN = 1.3, 0.75, (0.85, 1.15)
_SEMITONES = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}
_LOW, _HIGH = 48, 72  # MIDI numbers: low is below C3, high from C5 on
_WHO = frozenset("man men woman women person people boy girl old".split())
_PLAIN_ROTATION = "1 0 0 0 1 0 0 0 1"
# samples of drums, cymbals and tablas by the start of their names
_BEATS: Mapping[str, tuple[str, ...]] = {
    "drum": ("bd_", "sn_", "drum_bass", "drum_heavy", "drum_snare", "drum_tom"),
    "cymbal": ("hat_", "ride_", "drum_cymbal", "drum_splash"),
    "tabla": ("tabla_",),
}


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a sample is made of: what it shows, its key and its side.

    Args:
        name: word of `modality_words` for it.
        key: its own name; two sources of one key are on one side.
        side: one of `SIDES`.
        path: file that holds it.
    """

    name: str
    key: str
    path: Path
    side: str = ""


@dataclass(frozen=True, kw_only=True)
class Thing(Source):
    """An object with a mesh.

    Args:
        model: name of the mesh within the catalogue at `path`.
        size: width, height and depth in metres.
        rotation: that puts the mesh upright, nine numbers by row.
    """

    model: str
    size: tuple[float, float, float]
    rotation: tuple[float, ...]

    @property
    def shape(self) -> str | None:
        """One of `modality_words.SHAPES`; None between them."""
        ratio = self.size[1] / max(self.size[0], self.size[2])
        if ratio > _TALL:
            return "tall"
        if ratio < _WIDE:
            return "wide"
        return "even" if _EVEN[0] <= ratio <= _EVEN[1] else None


@dataclass(frozen=True, kw_only=True)
class Recording(Source):
    """One recorded note or beat.

    Args:
        note: its MIDI number; None of drums.
    """

    note: int | None = None

    @property
    def pitch(self) -> str | None:
        """One of `modality_words.PITCHES`; None of drums."""
        if self.note is None:
            return None
        return "low" if self.note < _LOW else "high" if self.note >= _HIGH else "middle"


S = TypeVar("S", bound=Source)


def on_sides(sources: Iterable[S]) -> list[S]:
    """Returns the sources with their sides: a fixed share of each name's keys, shuffled."""
    found = sorted(sources, key=lambda source: (source.name, source.key, source.path.name))
    keys: dict[str, list[str]] = defaultdict(list)
    for source in found:
        if source.key not in keys[source.name]:
            keys[source.name].append(source.key)
    side = {}
    for name, members in keys.items():
        random.Random(f"{SEED}/modalities/{name}").shuffle(members)
        for index, key in enumerate(members):
            share = (index + 0.5) / len(members)
            side[name, key] = SIDES[next(n for n, end in enumerate(_UNTIL) if share < end)]
    return [replace(source, side=side[source.name, source.key]) for source in found]


def object_name(name: str) -> str | None:
    """Returns the word for a catalogue's entry: its last known word decides."""
    known = {word: noun for noun, words in OBJECTS.items() for word in words}
    found = [known[word] for word in re.findall(r"[a-z]+", name.lower()) if word in known]
    return found[-1] if found and name.lower() not in NOT_SHOWN else None


def objects(cache: Path | None) -> list[Thing]:
    """Returns the objects with a mesh; a mesh that two entries share occurs once.

    Args:
        cache: folder of the registry packages; see `sources.fetch`.
    """
    root = fetch("furniture", cache) / "usr/share/sweethome3d/furniture"
    found: dict[str, Thing] = {}
    for path in sorted(root.glob("*.sh3f")):
        for entry in catalogue(path):
            name, model = object_name(entry["name"]), entry["model"].lstrip("/")
            if name is None:
                continue
            width, height, depth = (float(entry[k]) / 100 for k in ("width", "height", "depth"))
            turned = entry.get("modelRotation", _PLAIN_ROTATION).split()
            key = f"{path.stem}/{model}"
            found.setdefault(
                key,
                Thing(
                    name=name,
                    key=key,
                    path=path,
                    model=model,
                    size=(width, height, depth),
                    rotation=tuple(float(number) for number in turned),
                ),
            )
    return on_sides(found.values())


def animations(cache: Path | None) -> list[Source]:
    """Returns the emoji that move; "man cook" and "woman cook" are on one side."""
    table = emoji_table(cache)
    found = []
    for part in ("fluent-anim-1", "fluent-anim-2"):
        for path in sorted((fetch(part, cache) / "package" / "assets").glob("*.webp")):
            code = path.stem.upper()
            label, group = table.subgroups.get(code.removesuffix("-FE0F"), ("", ""))
            name = next((noun for noun, groups in EMOJI.items() if group in groups), None)
            if name and b"ANMF" in path.read_bytes():
                found.append(Source(name=name, key=f"emoji/{_role(label)}", path=path))
    return on_sides(found)


def _role(label: str) -> str:
    """Returns "cook" for "woman cook"; the label itself where nothing else is left of it."""
    words = [word for word in re.findall(r"[a-z-]+", label.lower()) if word not in _WHO]
    return label if words in ([], ["family"]) else " ".join(words)


def recordings(cache: Path | None) -> list[Recording]:
    """Returns recorded notes of instruments and beats of drums."""
    found = []
    for tone in TONES:
        for path in sorted((fetch(f"tone-{tone}", cache) / "package").glob("*.mp3")):
            name = tone.split("-")[0]
            note = midi_number(path.stem)
            found.append(Recording(name=name, key=f"{tone}/{path.stem}", path=path, note=note))
    folder = fetch("scsynth-samples", cache) / "package" / "samples"
    for name, starts in _BEATS.items():
        for path in sorted(folder.glob("*.flac")):
            if path.stem.startswith(starts):
                found.append(Recording(name=name, key=f"scsynth/{path.stem}", path=path))
    return on_sides(found)


def midi_number(note: str) -> int:
    """Returns 60 for "C4" and 61 for "Cs4"."""
    return 12 * (int(note[-1]) + 1) + _SEMITONES[note[0]] + ("s" in note)
