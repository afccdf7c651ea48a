"""The table of `mosaic/domains`: names, prompts, licences and caps of its domains."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from evolora.streams.mosaic.samples import (
    Sample,
    Size,
    digit_samples,
    emoji_samples,
    flag_samples,
    furniture_samples,
    garment_samples,
    icon_samples,
    script_samples,
    shape_samples,
)


@dataclass(frozen=True, kw_only=True)
class Domain:
    """One row of the suite."""

    name: str
    title: str
    templates: tuple[str, ...]
    licence: str
    source: str
    split_rule: str
    collect: Callable[[Path | None, Size], Iterator[Sample]]
    caps: tuple[int, int, int] = (1500, 300, 500)  # compact: images in train, val, test


_VENDORS = "whole vendor families: train noto, twemoji; val fxemoji; test emojione"
_EMOJI_LICENCE = "Apache-2.0 (noto, fxemoji), CC-BY-4.0 (twemoji, emojione)"

DOMAINS: tuple[Domain, ...] = (
    Domain(
        name="digits",
        title="Handwritten digits",
        templates=("the digit {}", "a handwritten digit {}", "a blurry number {}"),
        licence="CC-BY-4.0 (UCI optical recognition of handwritten digits)",
        source="PyPI scikit-learn, load_digits",
        split_rule="random 65/10/25 by seed",
        collect=digit_samples,
    ),
    Domain(
        name="fashion",
        title="Garments",
        templates=("a photo of a {}", "a gray photo of a {}", "a picture of clothing: {}"),
        licence="MIT",
        source="Debian dataset-fashion-mnist",
        split_rule="official; val is the last tenth of the official training part",
        collect=garment_samples,
        caps=(1000, 200, 400),
    ),
    Domain(
        name="shapes",
        title="Colored shapes",
        templates=("a {}", "a picture of a {}", "one {} on a plain background"),
        licence="MIT",
        source="PyPI easy-vqa",
        split_rule="official; val is every tenth image of the official training part",
        collect=shape_samples,
    ),
    Domain(
        name="emoji",
        title="Emoji of animals, nature, food and faces",
        templates=("an emoji of a {}", "a drawing of a {}", "a colorful cartoon of a {}"),
        licence=_EMOJI_LICENCE,
        source="npm @iconify/json",
        split_rule=_VENDORS,
        collect=partial(emoji_samples, ("animals-nature", "food-drink", "smileys-emotion")),
    ),
    Domain(
        name="flags",
        title="Flags of countries",
        templates=("the flag of {}", "a drawing of the flag of {}", "the national flag: {}"),
        licence="MIT (circle-flags, flagpack), CC0-1.0 (cif), CC-BY-4.0 (twemoji, emojione)",
        source="npm @iconify/json",
        split_rule="whole sets: train twemoji, circle-flags; val cif; test flagpack, emojione",
        collect=flag_samples,
    ),
    Domain(
        name="icons",
        title="User-interface icons",
        templates=("an icon of {}", "a white icon: {}", "a user interface symbol for {}"),
        licence="MIT, Apache-2.0, ISC, CC-BY-4.0, CC0-1.0, OFL-1.1, Unlicense; see LICENSES.md",
        source="npm @iconify/json",
        split_rule="whole families of icon sets",
        collect=icon_samples,
        caps=(1500, 300, 480),
    ),
    Domain(
        name="scripts",
        title="Writing systems",
        templates=("text in the {} script", "letters of the {} alphabet", "{} writing"),
        licence="OFL-1.1",
        source="Debian fonts-noto-core",
        split_rule="disjoint letters per script: 60/15/25",
        collect=script_samples,
        caps=(1500, 300, 500),
    ),
    Domain(
        name="furniture",
        title="Rendered furniture",
        templates=("a 3D render of a {}", "a rendered model of a {}", "a shaded picture of a {}"),
        licence="CC0-1.0, CC-BY-3.0 (see LICENSES.md for the authors)",
        source="Debian sweethome3d-furniture",
        split_rule="by object, 62/13/25 per class; all views of an object stay together",
        collect=furniture_samples,
        caps=(900, 200, 400),
    ),
)
