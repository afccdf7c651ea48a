"""Reads Iconify sets and finds, under any vendor's spelling, which emoji or flag a drawing is."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from evolora.streams.mosaic import render
from evolora.streams.mosaic.sources import fetch


def squash(text: str) -> str:
    """Returns the text without case, accents' neighbours, spaces and punctuation."""
    return re.sub(r"[^a-z0-9]", "", text.lower())


def iconify_set(cache: Path | None, prefix: str) -> dict[str, Any]:
    """Returns one Iconify set's JSON, with plain aliases resolved into `icons`."""
    path = fetch("iconify", cache) / "package" / "json" / f"{prefix}.json"
    icons: dict[str, Any] = json.loads(path.read_text())
    for alias, target in icons.get("aliases", {}).items():
        if set(target) == {"parent"} and target["parent"] in icons["icons"]:
            icons["icons"].setdefault(alias, icons["icons"][target["parent"]])
    return icons


def draw_icon(icons: dict[str, Any], name: str, paper: str = "#ffffff") -> Image.Image:
    return render.render_svg(render.icon_svg(icons, name), paper=paper)


@dataclass(frozen=True)
class EmojiTable:
    """Unicode emoji names, found under any vendor's spelling."""

    names: dict[str, tuple[str, str]]  # squashed spelling -> (label, group)
    countries: dict[str, str]  # ISO code or squashed spelling -> country name
    codes: dict[str, tuple[str, str]]  # hexcode -> (label, group)
    subgroups: dict[str, tuple[str, str]]  # hexcode -> (label, subgroup)


def emoji_table(cache: Path | None) -> EmojiTable:
    """Returns labels and groups of emojibase; a shortcode counts where only one emoji has it."""
    root = fetch("emojibase", cache) / "package"
    listed = json.loads((root / "meta" / "groups.json").read_text())
    groups, subgroups = listed["groups"], listed.get("subgroups", {})
    entries = [e for e in json.loads((root / "en" / "data.json").read_text()) if "group" in e]
    names: dict[str, tuple[str, str]] = {}
    spellings: dict[str, set[str]] = defaultdict(set)
    by_code: dict[str, tuple[str, str]] = {}
    for entry in entries:
        found = (entry["label"], groups[str(entry["group"])])
        by_code[entry["hexcode"]] = found
        names[squash(entry["label"])] = found
    for vendor in ("cldr", "emojibase", "emojibase-legacy", "github", "iamcal", "joypixels"):
        path = root / "en" / "shortcodes" / f"{vendor}.json"
        for code, short in json.loads(path.read_text()).items() if path.is_file() else ():
            for spelling in [short] if isinstance(short, str) else short:
                spellings[squash(spelling)].add(code)
    for spelling, codes in spellings.items():
        owners = {by_code[code] for code in codes if code in by_code}
        if len(owners) == 1:
            names.setdefault(spelling, owners.pop())
    parts = {
        entry["hexcode"]: (entry["label"], subgroups.get(str(entry.get("subgroup")), ""))
        for entry in entries
    }
    return EmojiTable(names, _countries(entries), by_code, parts)


def _countries(entries: Iterable[dict[str, Any]]) -> dict[str, str]:
    """Returns ISO code and spelling -> country name, from the flag emoji."""
    found = {}
    for entry in entries:
        points = [int(code, 16) - 0x1F1E6 for code in entry["hexcode"].split("-")]
        if len(points) == 2 and all(0 <= point < 26 for point in points):
            name = entry["label"].removeprefix("flag: ")
            found["".join(chr(97 + point) for point in points)] = name
            found[country_key(name)] = name
    return found


def country_key(text: str) -> str:
    """Returns a spelling of a country that all vendors share."""
    text = text.lower().replace("&", " ").replace("flag-for-", "").replace("flag-", "")
    text = re.sub(r"\b(and|st|saint|the|islands?|sar|china)\b", " ", text.replace("-", " "))
    folded = text.translate(str.maketrans("åçéíôãñü", "aceioanu"))
    return squash(folded) or squash(text)


def emoji_drawings(
    icons: dict[str, Any], table: EmojiTable, groups: tuple[str, ...]
) -> dict[str, str]:
    """Returns icon key -> emoji label, one drawing per label, for emoji of the groups."""
    best: dict[str, str] = {}
    for key in sorted(icons["icons"], key=lambda k: (squash(k) not in table.names, len(k), k)):
        label, group = table.names.get(squash(key), ("", ""))
        if group in groups:
            best.setdefault(label, key)
    return {key: label for label, key in best.items()}


def flag_drawings(icons: dict[str, Any], countries: dict[str, str]) -> dict[str, str]:
    """Returns icon key -> country, one drawing per country and shape.

    Sets name a flag by ISO code (with `-1x1` or `-4x3` where both shapes exist) or
    `flag-<country>`.
    """
    best: dict[tuple[str, str], str] = {}
    for key in sorted(icons["icons"], key=lambda k: (len(k), k)):
        code, _, shape = key.partition("-") if key[2:] in ("-1x1", "-4x3") else (key, "", "")
        country = countries.get(code if len(code) == 2 else country_key(key))
        if country and (len(code) == 2 or key.startswith("flag-")):
            best.setdefault((country, shape), key)
    return {key: country for (country, _), key in best.items()}
