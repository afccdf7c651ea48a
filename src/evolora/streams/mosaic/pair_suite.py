"""The tables of `mosaic/missing`: classes, sources, prompts and caps of its tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from evolora.streams.mosaic.pairs import (
    Pair,
    clip_art_pairs,
    emoji_pairs,
    furniture_pairs,
    icon_pairs,
)
from evolora.streams.mosaic.samples import Size
from evolora.streams.mosaic.words import label_stems

Labels = Literal["single", "multi"]


@dataclass(frozen=True, kw_only=True)
class PairTask:
    """One task: what it is called and where its pairs come from."""

    name: str
    title: str
    labels: Labels
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    licence: str
    source: str
    split_rule: str
    collect: Callable[[Path | None, Size], Iterator[Pair]]
    caps: tuple[int, int, int] = (600, 80, 240)  # compact: pairs in train, val, test
    class_caps: tuple[int, int, int] = (110, 16, 40)  # compact: the same of one class


def _emoji(name: str, title: str, group: str, classes: Mapping[str, tuple[str, ...]]) -> PairTask:
    return PairTask(
        name=name,
        title=title,
        labels="single",
        classes=tuple(classes),
        templates=("an emoji of a {}", "a drawing of a {}", "a colorful cartoon of a {}"),
        licence="Apache-2.0 (noto, fxemoji), CC-BY-4.0 (twemoji, emojione); text MIT (emojibase)",
        source="npm @iconify/json, emojibase-data",
        split_rule="by emoji, 65/10/25 per class; all vendors' drawings of one stay together",
        collect=partial(emoji_pairs, group, classes),
    )


_ANIMALS = {
    "mammal": ("animal-mammal",),
    "bird": ("animal-bird",),
    "sea creature": ("animal-marine",),
    "insect": ("animal-bug",),
    "reptile": ("animal-reptile", "animal-amphibian"),
    "plant": ("plant-other", "plant-flower"),
}
_FOOD = {
    "fruit": ("food-fruit",),
    "vegetable": ("food-vegetable",),
    "meal": ("food-prepared", "food-asian"),
    "dessert": ("food-sweet",),
    "drink": ("drink",),
    "tableware": ("dishware",),
}
_OUTDOORS = {
    "land vehicle": ("transport-ground",),
    "aircraft": ("transport-air",),
    "boat": ("transport-water",),
    "building": ("place-building", "place-religious"),
    "landscape": ("place-geographic", "place-other"),
    "weather": ("sky-weather",),
}
_THINGS = {
    "garment": ("clothing",),
    "musical instrument": ("musical-instrument", "music"),
    "tool": ("tool",),
    "stationery": ("office", "writing"),
    "household item": ("household",),
    "computer or telephone": ("computer", "phone"),
    "book or newspaper": ("book-paper",),
    "lamp or camera": ("light-video",),
}
_CLIP_ART = {
    "national flag": "signs_and_symbols/flags",
    "geography": "geography",
    "road sign": "transportation/roadsigns",
    "holiday": "recreation/holiday",
    "party": "recreation/party",
    "sport": "recreation/sports",
    "ornament": "special/patterns",
    "hardware": "computer/hardware",
    "arrow": "shapes/arrows",
    "person": "people",
}
_ROOMS = {
    "living room": "Living room",
    "kitchen": "Kitchen",
    "bedroom": "Bedroom",
    "bathroom": "Bathroom",
    "workplace": "Office",
    "garden": "Exterior",
    "doorway": "Doors and windows",
    "illumination": "Lights",
    "automobile": "Vehicles",
    "character": "Characters",
}

# label -> keywords that stand for it, as Material Design Icons, Phosphor and Lucide spell them
_KEYWORDS: dict[str, dict[str, tuple[str, ...]]] = {
    "icons-transport": {
        "road traffic": (
            *("automotive", "transportation + road", "car", "bus", "road", "driving", "truck"),
            "bike",
        ),
        "public transit": ("transit", "commuter", "train", "railway", "subway", "tram"),
        "aviation": (
            *("transportation + flying", "plane", "planes", "airplane", "aeroplane", "flight"),
            *("flights", "flying", "airport", "airports"),
        ),
        "vehicle": (
            *("vehicles", "vehicle", "transportation + other", "transport", "transportation"),
            *("transportation + water", "boat", "boats", "ship", "ships", "sailing"),
        ),
        "navigation": (
            *("navigation", "gps", "navigate", "location", "locations", "map", "pin", "waypoint"),
            *("directions", "geographic information system"),
        ),
        "travel": (*("travel", "traveling", "tourism", "trip", "vacation", "baggage", "luggage"),),
    },
    "icons-money": {
        "money": (
            *("banking", "money", "bank", "cash", "coin", "coins", "finance", "savings"),
            "wealth",
        ),
        "currency": (
            *("currency", "dollar", "euro", "foreign exchange", "forex", "exchange", "usd"),
        ),
        "payment": (
            *("payment", "paying", "pay", "transaction", "credit", "debit", "purchase"),
            *("checkout", "billing"),
        ),
        "shop": (
            *("shopping", "store", "shop", "market", "e-commerce", "ecommerce", "retail"),
            *("grocery", "groceries", "sale", "commerce", "marketplace"),
        ),
        "discount": ("voucher", "coupon", "discount", "deal", "offer", "price", "promotion"),
        "chart": ("statistics", "graph", "graphs", "charts", "chart", "analytics", "diagram"),
    },
    "icons-nature": {
        "food": (
            *("food / drink", "food", "meal", "eating", "eat", "snack", "breakfast", "lunch"),
            "dinner",
        ),
        "beverage": (
            *("drink", "drinks", "beverage", "beverages", "alcohol", "beer", "wine", "coffee"),
            *("tea", "cafe"),
        ),
        "restaurant": (
            *("dining", "restaurants", "restaurant", "bar", "cooking", "kitchen", "chef"),
            "cutlery",
        ),
        "plant": (
            *("plant", "plants", "tree", "trees", "flower", "flowers", "leaf", "leaves"),
            *("forest", "garden", "gardening", "botany", "botanical"),
        ),
        "animal": ("animal", "animals", "pet", "pets", "wildlife", "bird", "zoo"),
        "farm": (
            *("agriculture", "farm", "farming", "harvest", "crops", "vegetable", "vegetables"),
            *("fruit", "fruits", "veggies"),
        ),
    },
    "icons-calendar": {
        "weather": (
            *("weather", "in: weather", "meteorology", "forecast", "climate", "rain", "snow"),
            *("storm", "wind", "clouds"),
        ),
        "temperature": (
            *("temperature", "hot", "cold", "warm", "thermometer", "heat", "winter", "summer"),
            *("celsius", "fahrenheit"),
        ),
        "time": (
            *("date / time", "time", "times", "timer", "hour", "hours", "clock", "duration"),
            "stopwatch",
        ),
        "schedule": (
            *("schedule", "events", "event", "calendar", "date", "dates", "appointment"),
            "appointments",
        ),
        "night": (
            *("night", "evening", "moon", "sunset", "sunrise", "dawn", "dusk", "midnight"),
            *("astronomy", "space", "stars"),
        ),
        "holiday": (
            *("holiday", "christmas", "celebration", "party", "xmas", "halloween", "celebrate"),
            *("festival", "birthday"),
        ),
    },
    "icons-media": {
        "sound": ("audio", "sound", "volume", "noise", "speaker", "speakers", "listen", "hearing"),
        "music": ("music", "song", "songs", "instrument", "melody", "musical"),
        "film": (
            *("video / movie", "video", "movie", "movies", "film", "films", "cinema", "videos"),
        ),
        "photo": (
            *("photography", "photo", "photos", "camera", "picture", "pictures", "photograph"),
            "photographs",
        ),
        "telephone": (
            *("cellphone / phone", "phone", "telephone", "call", "calls", "mobile", "cellular"),
            *("landline", "smartphone"),
        ),
        "device": (
            *("device / tech", "device", "devices", "computer", "hardware", "electronics"),
            *("laptop", "desktop", "pc"),
        ),
    },
    "icons-people": {
        "person": (
            *("people / family", "person", "people", "human", "man", "woman", "family", "child"),
            *("baby", "in: people"),
        ),
        "user account": ("account / user", "account", "user", "users", "profile", "avatar"),
        "sport": (
            *("sport", "sports", "exercise", "fitness", "ball", "athletics", "athletic"),
            *("workout", "olympics"),
        ),
        "game": (
            *("gaming / rpg", "game", "games", "gaming", "gamer", "gambling", "casino", "rpg"),
            "in: games",
        ),
        "medicine": (
            *("medical / hospital", "medical", "medicine", "hospital", "doctor", "health"),
            *("healthcare", "in: health", "disease"),
        ),
        "garment": ("clothing", "clothes", "fashion", "wear", "wearing", "shoes", "shirt"),
    },
}


def _icons(name: str, labels: Mapping[str, tuple[str, ...]]) -> PairTask:
    others = frozenset(
        word
        for task, table in _KEYWORDS.items()
        for words in table.values()
        for word in words
        if task != name
    )
    return PairTask(
        name=name,
        title=f"Icons: {', '.join(labels)}",
        labels="multi",
        classes=tuple(labels),
        templates=("an icon of {}", "a symbol that stands for {}", "{}"),
        licence="MIT, Apache-2.0, ISC, CC-BY-4.0, CC0-1.0, OFL-1.1, Unlicense, by set; "
        "text Apache-2.0 (@mdi/svg), MIT (@phosphor-icons/core), ISC (lucide-static)",
        source="npm @iconify/json, @mdi/svg, @phosphor-icons/core, lucide-static",
        split_rule="by icon name, 65/10/25; all vendors' drawings of one stay together",
        collect=partial(icon_pairs, labels, others),
        class_caps=(200, 30, 80),
    )


TASKS: tuple[PairTask, ...] = (
    _emoji("animals", "Emoji of animals and plants", "animals-nature", _ANIMALS),
    PairTask(
        name="clip-art",
        title="Clip art",
        labels="single",
        classes=tuple(_CLIP_ART),
        templates=("clip art: {}", "a drawing of a {}", "{}"),
        licence="public domain",
        source="Debian openclipart-svg",
        split_rule="by series (file name without number), 65/10/25 per class",
        collect=partial(clip_art_pairs, _CLIP_ART),
    ),
    _emoji("food", "Emoji of food and drink", "food-drink", _FOOD),
    PairTask(
        name="furniture",
        title="Rendered furniture by place",
        labels="single",
        classes=tuple(_ROOMS),
        templates=("a 3D render of an object: {}", "a rendered model for the {}", "{}"),
        licence="CC0-1.0, CC-BY-3.0 (see LICENSES.md for the authors)",
        source="Debian sweethome3d-furniture",
        split_rule="by name of the model, 65/10/25 per class; all views stay together",
        collect=partial(furniture_pairs, _ROOMS),
    ),
    _emoji("outdoors", "Emoji of vehicles, places and sky", "travel-places", _OUTDOORS),
    _emoji("things", "Emoji of objects", "objects", _THINGS),
    *(_icons(name, labels) for name, labels in _KEYWORDS.items()),
)


def forbidden_stems(labels: Labels) -> frozenset[str]:
    """Returns the stems of every class name of the stream, which no text of it may hold."""
    return label_stems(name for task in TASKS if task.labels == labels for name in task.classes)
