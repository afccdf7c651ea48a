"""Who drew what, and which side of the split they are on.

A vendor family is a group of sets by one hand or derived from one another. Families listed for
train, val or test never reach the pretraining corpus; only sets under a permissive licence
(MIT, Apache-2.0, ISC, BSD, CC0, CC-BY, OFL, Unlicense) are listed at all.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

EMOJI_SPLITS: dict[str, tuple[str, ...]] = {
    "train": ("noto", "noto-v1", "twemoji"),
    "val": ("fxemoji",),
    "test": ("emojione",),
}
EMOJI_PRETRAIN = (
    "fluent-emoji",
    "fluent-emoji-flat",
    "fluent-emoji-high-contrast",
    "streamline-emojis",
)

FLAG_SPLITS: dict[str, tuple[str, ...]] = {
    "train": ("twemoji", "circle-flags"),
    "val": ("cif",),
    "test": ("flagpack", "emojione"),
}
FLAG_PRETRAIN = ("flag",)

ICON_SPLITS: dict[str, tuple[str, ...]] = {
    "train": (
        *("lucide", "lucide-lab", "feather"),
        *("tabler", "ph", "carbon", "iconoir", "jam", "eva", "f7", "mingcute", "bi"),
        *("bx", "bxs", "boxicons", "uil", "uim", "uis", "uit", "ion", "famicons"),
        *("pepicons", "pepicons-pencil", "pepicons-pop", "pepicons-print"),
        *("majesticons", "pixelarticons", "flat-color-icons", "icons8", "la", "wpf"),
        *("teenyicons", "zondicons", "whh", "subway", "pixel", "healthicons", "uiw", "vs"),
    ),
    "val": ("ri", "gg", "clarity", "grommet-icons", "el", "basil"),
    "test": (
        *("octicon", "ant-design", "heroicons", "heroicons-outline", "heroicons-solid"),
        *("sidekickicons", "icon-park", "icon-park-outline", "icon-park-solid"),
        *("icon-park-twotone", "mynaui", "vadivam", "bytesize", "radix-icons", "ei"),
        *("simple-line-icons", "tdesign", "akar-icons", "system-uicons", "vaadin"),
        *("nrk", "cil", "foundation", "raphael", "websymbol"),
    ),
}

# categories of the Iconify index that never serve: brand marks, emoji, flags, programming logos
ICON_CATEGORIES_OUT = ("Logos", "Emoji", "Programming")
# sets that are drawings of other sets, brands or spinners although their category says otherwise
ICON_SETS_OUT = ("fa-brands", "fa6-brands", "svg-spinners", "token", "flat-ui", "ls")
PERMISSIVE = (
    *("MIT", "Apache-2.0", "ISC", "BSD-3-Clause", "CC0-1.0", "OFL-1.1", "Unlicense"),
    *("CC-BY-4.0", "CC-BY-3.0"),
)

# set-name prefix -> family; the longest matching prefix wins, otherwise the set is its own family
_FAMILY_PREFIXES = {
    "ic": "material",
    "mdi": "material",
    "zmdi": "material",
    "material-symbols": "material",
    "line-md": "material",
    "memory": "material",
    "fa": "font-awesome",
    "fa-solid": "font-awesome",
    "fa-regular": "font-awesome",
    "fa6": "font-awesome",
    "fa7": "font-awesome",
    "fluent": "fluent",
    "codicon": "fluent",
    "streamline": "streamline",
    "covid": "streamline",
    "guidance": "streamline",
    "noto": "noto",
    "emojione": "emojione",
    "lucide": "lucide",
    "feather": "lucide",
    "bx": "boxicons",
    "bxs": "boxicons",
    "boxicons": "boxicons",
    "uil": "unicons",
    "uim": "unicons",
    "uis": "unicons",
    "uit": "unicons",
    "ion": "ionicons",
    "famicons": "ionicons",
    "pepicons": "pepicons",
    "majesticons": "halfmann",
    "pixelarticons": "halfmann",
    "flat-color-icons": "icons8",
    "icons8": "icons8",
    "la": "icons8",
    "wpf": "icons8",
    "heroicons": "heroicons",
    "sidekickicons": "heroicons",
    "icon-park": "icon-park",
    "mynaui": "mynaui",
    "vadivam": "mynaui",
    "glyphs": "glyphs",
    "cil": "coreui",
    "cif": "coreui",
}


def family_of(prefix: str) -> str:
    """Returns the vendor family of an Iconify set."""
    parts = prefix.split("-")
    for length in range(len(parts), 0, -1):
        family = _FAMILY_PREFIXES.get("-".join(parts[:length]))
        if family:
            return family
    return prefix


ICON_CONCEPTS = tuple(
    """
    calendar star bookmark camera heart link folder home flag search cloud lock clock play filter
    pause share phone check arrow-left arrow-right arrow-up arrow-down eye sun book key tag moon
    credit-card download bell globe keyboard plus map shield minus clipboard code user pin compass
    circle database upload briefcase gift copy trophy trash file stop refresh calculator microphone
    image inbox table wallet info square rocket laptop bug printer archive chevron-left
    chevron-right folder-open pencil hourglass list menu wifi bluetooth ticket umbrella zoom-in
    shuffle zoom-out align-left mouse terminal car video building crop shopping-bag tablet layers
    grid paperclip shopping-cart music server wrench anchor crown headphones fire expand palette
    monitor send bus magnet rss thermometer undo truck barcode brush diamond qr-code leaf train
    hospital ruler scissors target usb thumbs-up snowflake skull
    """.split()
)

_STYLE_WORDS = frozenset(
    """
    outline outlined filled fill solid line linear bold thin light regular duotone twotone two tone
    round rounded sharp broken baseline fa 10 12 16 18 20 24 28 32 48 small large mini micro s m l
    sm lg xs 1 color o glyph flat
    """.split()
)
_NOT_STRIPPED = frozenset({"text", "font", "format", "traffic", "letter", "type", "cloud-sun"})


def icon_base_name(key: str) -> str:
    """Returns the icon's name without words for its style or size ("bell-outline-24": "bell")."""
    words = key.split("-")
    while len(words) > 1 and words[-1] in _STYLE_WORDS and words[-2] not in _NOT_STRIPPED:
        words.pop()
    while len(words) > 1 and words[0] in _STYLE_WORDS:
        words.pop(0)
    return "-".join(words)


# last word of a catalogue name -> class; only nouns with enough objects and one meaning
MESH_NOUNS = {
    "table": "table",
    "chair": "chair",
    "lamp": "lamp",
    "light": "lamp",
    "lantern": "lamp",
    "cabinet": "cabinet",
    "bed": "bed",
    "sofa": "sofa",
    "couch": "sofa",
    "door": "door",
    "armchair": "armchair",
    "female": "woman",
    "male": "man",
    "box": "box",
    "bottle": "bottle",
    "window": "window",
    "plant": "plant",
    "tree": "tree",
    "radiator": "radiator",
    "desk": "desk",
    "stool": "stool",
    "bench": "bench",
    "railing": "railing",
    "bookcase": "bookcase",
    "shelves": "bookcase",
    "wardrobe": "wardrobe",
    "washbasin": "washbasin",
    "vase": "vase",
    "glass": "cup",
    "cup": "cup",
    "plug": "plug",
    "horse": "horse",
}


def split_letters(letters: Sequence[str], seed: int) -> dict[str, list[str]]:
    """Returns disjoint train (60 %), val (15 %) and test (25 %) letters of one script."""
    order = sorted(letters)
    random.Random(f"{seed}/{order[0]}").shuffle(order)
    first, second = round(len(order) * 0.6), round(len(order) * 0.75)
    return {"train": order[:first], "val": order[first:second], "test": order[second:]}
