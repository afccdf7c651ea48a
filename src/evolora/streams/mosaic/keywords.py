"""Finds the keywords that packages give for emoji, icons and clip art."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path

from evolora.streams.mosaic.families import icon_base_name
from evolora.streams.mosaic.sources import fetch
from evolora.streams.mosaic.words import split_words


def emoji_keywords(cache: Path | None) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Returns emoji label -> (subgroup of emojibase, its name and tags)."""
    root = fetch("emojibase", cache) / "package"
    names = json.loads((root / "meta" / "groups.json").read_text())["subgroups"]
    entries = json.loads((root / "en" / "data.json").read_text())
    return {
        entry["label"]: (names[str(entry["subgroup"])], (entry["label"], *entry.get("tags", ())))
        for entry in entries
        if "subgroup" in entry
    }


def icon_keywords(cache: Path | None) -> dict[str, tuple[str, frozenset[str]]]:
    """Returns icon name -> (its main name, lower-case keywords), from three icon sets.

    Names are without words for a style; the main name of an alias is what it is an alias of.
    Material Design Icons give tags and aliases, Phosphor categories ("PEOPLE" as "in: people")
    and tags, Lucide tags.
    """
    found: dict[str, set[str]] = defaultdict(set)
    aliases: dict[str, str] = {}
    for entry in json.loads((fetch("mdi", cache) / "package" / "meta.json").read_text()):
        name = icon_base_name(entry["name"])
        if not entry["deprecated"]:
            found[name] |= {tag.lower() for tag in entry["tags"]}
            others = {icon_base_name(alias) for alias in entry["aliases"]} - {name}
            found[name] |= {other.replace("-", " ") for other in others}
            aliases |= dict.fromkeys(sorted(others), name)
    for alias, name in aliases.items():
        found[alias] |= found[name] | {name.replace("-", " ")}
    for name, words in _phosphor(cache):
        found[icon_base_name(name)] |= words
    lucide = json.loads((fetch("lucide", cache) / "package" / "tags.json").read_text())
    for name, tags in lucide.items():
        found[icon_base_name(name)] |= {tag.lower() for tag in tags}
    return {name: (aliases.get(name, name), frozenset(words)) for name, words in found.items()}


def _phosphor(cache: Path | None) -> list[tuple[str, set[str]]]:
    """Returns (icon, keywords) of Phosphor's type declarations, its only list of them."""
    text = (fetch("phosphor", cache) / "package" / "dist" / "icons.d.ts").read_text()
    icons = []
    for part in text.split("readonly name: ")[1:]:
        tags = re.search(r"readonly tags: readonly \[([^\]]*)\]", part)
        words = re.findall(r'"([^"]*)"', tags.group(1)) if tags else []
        groups = re.findall(r"IconCategory\.([A-Z]+)", part)
        own = {word.lower() for word in words if "*" not in word}  # "*new*" is no keyword
        icons.append((part.split('"')[1], own | {f"in: {group.lower()}" for group in groups}))
    return icons


def clip_art_keywords(svg: str) -> tuple[str, ...]:
    """Returns the title and the keywords of an OpenClipart drawing, without its author's name."""
    credit = " ".join(re.findall(r"<dc:creator>.*?</dc:creator>", svg, re.DOTALL))
    author = re.sub(r"<[^>]*>", " ", credit)
    head = svg.partition("<dc:publisher>")[0]
    title = re.search(r"<dc:title>([^<]*)</dc:title>", head)
    listed = re.findall(r"<rdf:li>([^<]*)</rdf:li>", head)
    texts = [title.group(1) if title else "", *listed]
    no_keyword = {*split_words(author), "clipart", "clip", "art", "by", "hash", "svg", "image"}
    clean = (" ".join(w for w in split_words(text) if w not in no_keyword) for text in texts)
    return tuple(dict.fromkeys(text for text in clean if text))
