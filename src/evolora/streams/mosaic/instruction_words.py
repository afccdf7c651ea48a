"""What `mosaic/instructions` talks about: its classes, few and coarse, and the wordings."""

from __future__ import annotations

from collections.abc import Mapping

# noun -> words by which an emoji's label is known to show it
EMOJI_NOUNS: Mapping[str, tuple[str, ...]] = {
    "cat": ("cat",),
    "dog": ("dog", "poodle"),
    "monkey": ("monkey", "gorilla"),
    "bear": ("bear", "koala", "panda"),
    "mouse": ("mouse", "rat", "hamster"),
    "pig": ("pig", "boar"),
    "horse": ("horse", "unicorn"),
    "bird": ("bird", "chick", "chicken", "rooster", "duck", "eagle", "dove", "owl", "penguin"),
    "fish": ("fish", "blowfish", "shark"),
    "insect": ("ant", "bug", "honeybee", "cricket", "beetle", "butterfly"),
    "flower": ("flower", "blossom", "hibiscus", "rose", "sunflower", "tulip", "bouquet"),
    "tree": ("tree",),
    "moon": ("moon",),
    "clock": ("clock", "thirty", "watch"),
    "heart": ("heart", "hearts"),
    "book": ("book", "books", "notebook", "ledger"),
    "car": ("automobile", "taxi"),
    "train": ("train", "locomotive", "tram", "metro", "monorail"),
    "boat": ("boat", "sailboat", "ship", "ferry", "speedboat"),
    "cloud": ("cloud",),
    "ball": ("baseball", "basketball", "volleyball", "tennis", "soccer", "football", "bowling"),
    "fruit": (
        *("apple", "banana", "cherries", "grapes", "lemon", "melon", "peach", "pear", "pineapple"),
        *("strawberry", "tangerine", "watermelon", "kiwi"),
    ),
    "face": ("grinning", "smiling", "frowning", "crying", "winking", "kissing"),
    "building": ("building", "hotel", "hospital", "school", "bank", "factory", "store"),
}
EMOJI_GROUPS = (
    *("animals-nature", "food-drink", "travel-places", "objects", "activities"),
    "smileys-emotion",
)
# labels that have a word of a noun and show something else
NOT_SHOWN = frozenset(
    (
        *("hot dog", "carousel horse", "computer mouse", "fish cake with swirl", "cricket game"),
        *("paw prints", "moon viewing ceremony", "love hotel", "heart suit", "tram car"),
        *("smiling cat with heart-eyes", "smiling face with heart-eyes", "pig nose"),
        *("hear-no-evil monkey", "sun behind cloud", "building construction"),
    )
)
SOUGHT = ("cat", "heart", "tree", "fish", "clock", "car", "flower", "book")
"""Nouns of EMOJI_NOUNS that scenes are made of."""

COUNTRIES = (
    *("Argentina", "Australia", "Belgium", "Brazil", "Canada", "China", "Denmark", "Finland"),
    *("France", "Germany", "Greece", "India", "Israel", "Italy", "Jamaica", "Japan", "Mexico"),
    *("Nigeria", "Norway", "Poland", "Saudi Arabia", "South Africa", "South Korea", "Spain"),
    *("Sweden", "Switzerland", "Thailand", "Ukraine", "United Kingdom", "United States"),
)

SCRIPTS = ("Arabic", "Cyrillic", "Devanagari", "Ethiopic", "Hebrew", "Latin", "Tamil", "Thai")

# icon's name -> what it stands for, by the keywords of Lucide, Phosphor and Material Design Icons
FUNCTIONS: Mapping[str, tuple[str, str, str]] = {
    "anchor": ("ship", "boat", "nautical"),
    "bell": ("alarm", "notification", "reminder"),
    "book": ("reading", "library", "story"),
    "calendar": ("date", "month", "event"),
    "camera": ("photography", "lens", "picture"),
    "car": ("vehicle", "drive", "trip"),
    "clock": ("time", "watch", "alarm"),
    "cloud": ("weather", "storage", "backup"),
    "credit card": ("payment", "bank", "purchase"),
    "eye": ("view", "show", "visible"),
    "flag": ("marker", "report", "country"),
    "gift": ("present", "birthday", "box"),
    "globe": ("world", "language", "country"),
    "headphones": ("music", "audio", "sound"),
    "heart": ("love", "like", "favorite"),
    "key": ("password", "login", "unlock"),
    "lock": ("security", "password", "privacy"),
    "moon": ("night", "dark", "sleep"),
    "pencil": ("edit", "draw", "write"),
    "phone": ("call", "telephone", "talk"),
    "rocket": ("launch", "space", "boost"),
    "scissors": ("cut", "snip", "crafts"),
    "shield": ("safety", "protection", "security"),
    "star": ("favorite", "rating", "review"),
    "sun": ("light", "brightness", "day"),
    "trash": ("delete", "remove", "garbage"),
    "trophy": ("prize", "award", "victory"),
    "truck": ("delivery", "shipping", "vehicle"),
}

# class of the catalogues' nouns (families.MESH_NOUNS) -> word of the answer
FURNITURE: Mapping[str, str] = {
    "table": "table",
    "chair": "chair",
    "stool": "chair",
    "lamp": "lamp",
    "sofa": "sofa",
    "cabinet": "cabinet",
    "wardrobe": "cabinet",
    "bed": "bed",
    "door": "door",
    "woman": "person",
    "man": "person",
    "bottle": "bottle",
    "plant": "plant",
    "tree": "plant",
}

# what a clip art's folder shows -> folders
CLIP_ART: Mapping[str, tuple[str, ...]] = {
    "fruit": ("food/fruit",),
    "bird": ("animals/birds",),
    "insect": ("animals/bugs",),
    "mammal": ("animals/mammals",),
    "flower": ("plants/flowers",),
    "car": ("transportation/vehicles",),
    "boat": ("transportation/boating",),
    "house": ("buildings/homes",),
    "smiley": ("people/smilies",),
    "stick figure": ("people/stickmen",),
    "hat": ("people/clothing/hats",),
    "clock": ("signs_and_symbols/clocks",),
    "road sign": ("transportation/roadsigns",),
    "flag": ("signs_and_symbols/flags/europe", "signs_and_symbols/flags/africa"),
    "dessert": ("food/desserts",),
}

# kind of question -> ways to put it; the form of the answer is asked for in each
WORDINGS: Mapping[str, tuple[str, ...]] = {
    "color": (
        "What color is the shape? Answer with one word.",
        "Which color does the shape have? One word.",
        "Name the color of the shape in one word.",
    ),
    "shape": (
        "Which shape is it? Answer with one word.",
        "What shape is in the picture? One word.",
        "Name the shape in one word.",
    ),
    "is-it": (
        "Is the shape {}? Answer yes or no.",
        "Does the picture show a shape that is {}? Yes or no.",
    ),
    "emoji": (
        "What does this emoji show? Answer with a short phrase.",
        "Name this emoji in a short phrase.",
        "What is it? A short phrase.",
    ),
    "flag": (
        "Which country has this flag? Answer with its name.",
        "Name the country of this flag.",
        "Whose flag is it? Answer with the country.",
    ),
    "script": (
        "Which script is this?\n{}\nAnswer with the letter.",
        "These letters are written in\n{}\nAnswer with the letter of the option.",
        "Choose the writing system.\n{}\nAnswer with the letter.",
    ),
    "icon": (
        "What does this icon stand for? List three words.",
        "List three words for the function of this icon.",
        "What is this icon for? Answer with a list of three words.",
    ),
    "furniture": (
        "What is this object? Answer with one word.",
        "Name the object in one word.",
    ),
    "wider": (
        "Is it wider than tall? Answer yes or no.",
        "Is the object wider than it is tall? Yes or no.",
    ),
    "height": (
        "How tall is it in cm, to the nearest 50? Answer with a number.",
        "Give the height of the object as a number of cm, rounded to 50.",
    ),
    "clip-art": (
        "Describe the drawing in one sentence.",
        "Write one sentence about this drawing.",
        "What does the drawing show? Answer with a sentence.",
    ),
    "scene": (
        "Where is the {}? Answer with its box [x1, y1, x2, y2].",
        "Give the box [x1, y1, x2, y2] of the {}.",
        "Find the {} and answer with its box [x1, y1, x2, y2].",
    ),
}


def with_article(noun: str) -> str:
    """Returns "an insect" for "insect"."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def emoji_noun(label: str) -> str | None:
    """Returns what an emoji with this label shows, or None if that is no noun of the table."""
    if label in NOT_SHOWN:
        return None
    words = set(label.lower().replace("’", "'").replace("-", " ").replace("o'", "o ").split())
    found = [noun for noun, known in EMOJI_NOUNS.items() if words.intersection(known)]
    return found[0] if len(found) == 1 else None
