"""Writes the attribution file of the embedded pictures from the packages' own metadata."""

from __future__ import annotations

import json
from pathlib import Path

from evolora.streams.mosaic.families import EMOJI_SPLITS, FLAG_SPLITS, ICON_SPLITS
from evolora.streams.mosaic.furniture import catalogue
from evolora.streams.mosaic.instruction_suite import TASKS as INSTRUCTIONS
from evolora.streams.mosaic.modality_suite import TASKS as MODALITIES
from evolora.streams.mosaic.pair_suite import TASKS
from evolora.streams.mosaic.sources import fetch
from evolora.streams.mosaic.suite import DOMAINS


def license_text(cache: Path | None) -> str:
    """Returns `LICENSES.md`: every set and catalogue that the suite draws from, and its terms.

    Args:
        cache: folder of the registry packages.
    """
    index = json.loads((fetch("iconify", cache) / "package" / "collections.json").read_text())
    used = [EMOJI_SPLITS, FLAG_SPLITS, ICON_SPLITS]
    prefixes = {prefix for table in used for group in table.values() for prefix in group}
    lines = ["# Licenses of the pictures and texts of the mosaic streams", ""]
    lines += ["| stream | domain or task | source | terms |", "|---|---|---|---|"]
    lines += [f"| domains | {row.name} | {row.source} | {row.licence} |" for row in DOMAINS]
    lines += [f"| missing | {row.name} | {row.source} | {row.licence} |" for row in TASKS]
    lines += [
        f"| instructions | {row.name} | {row.source} | {row.licence} |" for row in INSTRUCTIONS
    ]
    lines += [f"| modalities | {row.name} | {row.source} | {row.licence} |" for row in MODALITIES]
    lines += [
        "",
        "All pictures were rasterized at 64x64 pixels and padded; nothing else was changed",
        "but in mosaic/instructions: at most 48 colors each, flags are shown smaller too, and",
        "scenes are composed of two emoji.",
        "In mosaic/modalities objects are painted in one color and shown as pictures, films, depth",
        "maps and clouds of points; emoji are four frames of 64 pixels; recordings are cut,",
        "joined, resampled to 16 kHz and compressed.",
        "A text of mosaic/missing is a few of the keywords that the source gives for a picture.",
        "Texts of mosaic/instructions are the project's own; the words for icons were chosen among",
        "keywords of Lucide (ISC), Phosphor (MIT) and Material Design Icons (Apache-2.0).",
    ]
    lines += ["", "## Iconify sets (npm @iconify/json)", ""]
    lines += ["| set | name | author | license |", "|---|---|---|---|"]
    for prefix in sorted(prefixes):
        info = index[prefix]
        author, terms = info["author"], info["license"]
        lines.append(
            f"| {prefix} | {info['name']} | [{author['name']}]({author.get('url', '')}) "
            f"| [{terms['spdx']}]({terms.get('url', '')}) |"
        )
    lines += [
        "",
        *_SOUND_TERMS,
        "",
        *_FURNITURE_TERMS,
        "",
        "Authors of single models, as the catalogues name them:",
        "",
    ]
    root = fetch("furniture", cache) / "usr/share/sweethome3d/furniture"
    for path in sorted(root.glob("*.sh3f")):
        authors = sorted({entry["creator"] for entry in catalogue(path) if "creator" in entry})
        lines.append(f"- {path.stem}: {', '.join(authors)}")
    return "\n".join([*lines, ""])


_SOUND_TERMS = (
    "## Recordings and animations",
    "",
    "| package | author | license |",
    "|---|---|---|",
    "| tonejs-instrument-*-mp3 (npm; flute, guitars, harp, organ, piano, saxophone, trumpet, tuba, "
    "violin, xylophone) | [tonejs-instruments](https://github.com/Makefully-Studios/"
    "tonejs-instruments), edited from sources in the public domain | samples CC-BY-3.0 |",
    "| supersonic-scsynth-samples (npm; drums, cymbals, tablas) | Sam Aaron (Sonic Pi) | CC0-1.0 |",
    "| @lobehub/fluent-emoji-anim-1, -2 (npm) | LobeHub, from Fluent Emoji of Microsoft | MIT |",
)

_FURNITURE_TERMS = (
    "## Sweet Home 3D catalogues (Debian sweethome3d-furniture)",
    "",
    "| catalogue | author | license |",
    "|---|---|---|",
    "| KatorLegaz | 2003-2008 Andrew Kator & Jennifer Legaz | CC-BY-3.0-US |",
    "| Reallusion | 2008-2011 Reallusion | CC-BY-3.0-US |",
    "| Scopia | 2010-2012 Scopia Visual Interfaces Systems, s.l. | CC-BY-3.0 |",
    "| BlendSwap-CC-BY | the BlendSwap contributors named in the package | CC-BY-3.0 |",
    "| BlendSwap-CC-0 | 2014 Emmanuel Puybaret, eTeks, and contributors | CC0-1.0 |",
)
