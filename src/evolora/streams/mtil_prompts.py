"""Facts of the MTIL benchmark: data sets, orders, prompt templates, rewritten class names.

Templates are CLIP's published zero-shot prompts (Radford et al., ICML 2021), in the selection and
order of the MTIL benchmark (Zheng et al., ICCV 2023, arXiv 2303.06628). Where MTIL departs from
CLIP's list we follow MTIL, since its numbers are what people compare with: "a photo of a {}, a type
of food." (CLIP: "a photo of {}, ..."), digits named "0 - zero" (CLIP: "0"), and three flower names
(globe-flower, pink-yellow dahlia, ball moss).
"""

from __future__ import annotations

import re

ORDER_I = (
    *("aircraft", "caltech101", "cifar100", "dtd", "eurosat", "flowers"),
    *("food", "mnist", "pets", "cars", "sun397"),
)
ORDER_II = (
    *("cars", "food", "mnist", "pets", "flowers", "sun397"),
    *("aircraft", "caltech101", "dtd", "eurosat", "cifar100"),
)
ORDERS = {"I": ORDER_I, "II": ORDER_II}

CLASS_COUNTS = {
    "aircraft": 100,
    "caltech101": 101,
    "cifar100": 100,
    "dtd": 47,
    "eurosat": 10,
    "flowers": 102,
    "food": 101,
    "mnist": 10,
    "pets": 37,
    "cars": 196,
    "sun397": 397,
}

# (train, test) samples of the official splits; the other data sets are split by us.
OFFICIAL_SIZES = {
    "aircraft": (3334, 3333),
    "cifar100": (50000, 10000),
    "dtd": (1880, 1880),
    "flowers": (1020, 6149),
    "food": (75750, 25250),
    "mnist": (60000, 10000),
    "pets": (3680, 3669),
    "cars": (8144, 8041),
}

_ARTISTIC = (
    *("a photo of {0} {{}}.", "a painting of {0} {{}}.", "{0} plastic {{}}."),
    *("a sculpture of {0} {{}}.", "a sketch of {0} {{}}.", "a tattoo of {0} {{}}."),
    *("{0} toy {{}}.", "a rendition of {0} {{}}.", "{0} embroidered {{}}."),
    *("{0} cartoon {{}}.", "{0} {{}} in a video game.", "{0} plushie {{}}."),
    *("{0} origami {{}}.", "art of {0} {{}}.", "graffiti of {0} {{}}."),
    *("a drawing of {0} {{}}.", "a doodle of {0} {{}}."),
)
_QUALITIES = ("", "blurry ", "black and white ", "low contrast ", "high contrast ", "bad ", "good ")


def _with_articles(forms: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(form.format(article) for article in ("a", "the") for form in forms)


TEMPLATES: dict[str, tuple[str, ...]] = {
    "aircraft": tuple(f"a photo of {a} {{}}, a type of aircraft." for a in ("a", "the")),
    "caltech101": _with_articles(_ARTISTIC),
    "cifar100": _with_articles(
        (
            *(f"a {quality}photo of {{0}} {{{{}}}}." for quality in _QUALITIES),
            "a photo of {0} small {{}}.",
            "a photo of {0} big {{}}.",
        )
    ),
    "dtd": tuple(
        f"a photo of {a} {{}} {thing}."
        for a in ("a", "the")
        for thing in ("texture", "pattern", "thing", "object")
    ),
    "eurosat": tuple(f"a centered satellite photo of {a}{{}}." for a in ("", "a ", "the ")),
    "flowers": ("a photo of a {}, a type of flower.",),
    "food": ("a photo of a {}, a type of food.",),
    "mnist": ('a photo of the number: "{}".',),
    "pets": ("a photo of a {}, a type of pet.",),
    "cars": (
        *("a photo of a {}, a type of car.", "a photo of a {}.", "a photo of the {}."),
        *("a photo of my {}.", "i love my {}!", "a photo of my dirty {}."),
        *("a photo of my clean {}.", "a photo of my new {}.", "a photo of my old {}."),
    ),
    "sun397": ("a photo of a {}.", "a photo of the {}."),
}

# Raw name (folder, label) -> words. Names not listed only lose their underscores.
RENAMED: dict[str, dict[str, str]] = {
    "caltech101": {
        "Faces": "off-center face",
        "Faces_easy": "centered face",
        "Leopards": "leopard",
        "Motorbikes": "motorbike",
        "airplanes": "airplane",
        "car_side": "side of a car",
        "cougar_body": "body of a cougar cat",
        "cougar_face": "face of a cougar cat",
        "crocodile_head": "head of a crocodile",
        "flamingo_head": "head of a flamingo",
        "snoopy": "snoopy (cartoon beagle)",
        "yin_yang": "yin and yang symbol",
    },
    "eurosat": {
        "AnnualCrop": "annual crop land",
        "Forest": "forest",
        "HerbaceousVegetation": "brushland or shrubland",
        "Highway": "highway or road",
        "Industrial": "industrial buildings or commercial buildings",
        "Pasture": "pasture land",
        "PermanentCrop": "permanent crop land",
        "Residential": "residential buildings or homes or apartments",
        "River": "river",
        "SeaLake": "lake or sea",
    },
    "mnist": {
        str(digit): f"{digit} - {word}"
        for digit, word in enumerate(
            ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
        )
    },
}

# Converted copies of the data sets spell the names in lower case.
_RENAMED_LOWER = {
    dataset: {raw.lower(): name for raw, name in names.items()}
    for dataset, names in RENAMED.items()
}

# The data set's files number its classes 1 to 102 and name none.
FLOWERS: tuple[str, ...] = tuple(
    """pink primrose|hard-leaved pocket orchid|canterbury bells|sweet pea|english marigold
tiger lily|moon orchid|bird of paradise|monkshood|globe thistle|snapdragon|colt's foot
king protea|spear thistle|yellow iris|globe-flower|purple coneflower|peruvian lily
balloon flower|giant white arum lily|fire lily|pincushion flower|fritillary|red ginger
grape hyacinth|corn poppy|prince of wales feathers|stemless gentian|artichoke|sweet william
carnation|garden phlox|love in the mist|mexican aster|alpine sea holly|ruby-lipped cattleya
cape flower|great masterwort|siam tulip|lenten rose|barbeton daisy|daffodil|sword lily
poinsettia|bolero deep blue|wallflower|marigold|buttercup|oxeye daisy|common dandelion|petunia
wild pansy|primula|sunflower|pelargonium|bishop of llandaff|gaura|geranium|orange dahlia
pink-yellow dahlia|cautleya spicata|japanese anemone|black-eyed susan|silverbush
californian poppy|osteospermum|spring crocus|bearded iris|windflower|tree poppy|gazania|azalea
water lily|rose|thorn apple|morning glory|passion flower|lotus|toad lily|anthurium|frangipani
clematis|hibiscus|columbine|desert-rose|tree mallow|magnolia|cyclamen|watercress|canna lily
hippeastrum|bee balm|ball moss|foxglove|bougainvillea|camellia|mallow|mexican petunia|bromelia
blanket flower|trumpet creeper|blackberry lily""".replace("\n", "|").split("|")
)


def class_name(dataset: str, raw: str) -> str:
    """Return the words MTIL uses for a raw class name of one of its data sets.

    Args:
        dataset: one of `CLASS_COUNTS`.
        raw: folder name or label as the data set's files, or a converted copy of them, spell it.
    """
    if dataset == "sun397":
        raw = re.sub(r"^/?[a-z]/", "", raw)  # "/a/abbey" -> "abbey"
    name = _RENAMED_LOWER.get(dataset, {}).get(raw.lower()) or " ".join(
        raw.replace("_", " ").split()
    )
    # "american_bulldog" -> "American Bulldog"
    return name.title() if dataset == "pets" else name
