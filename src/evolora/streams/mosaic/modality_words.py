"""What `mosaic/modalities` talks about: its few words, the wordings of its questions, its captions.

The same question about the same object has the same answer in every modality: "chair" is a chair
as a picture, a film, a depth map or a cloud of points.
"""

from __future__ import annotations

from collections.abc import Mapping

from evolora.streams.mosaic.instruction_words import with_article

MODALITIES = ("image", "video", "audio", "depth", "pc")

# object -> words of a catalogue's name that tell it; the last known word of the name counts
OBJECTS: Mapping[str, tuple[str, ...]] = {
    "chair": ("chair", "armchair", "stool"),
    "table": ("table", "desk", "tablecloth", "trestles"),
    "sofa": ("sofa", "couch", "seats", "bz"),
    "bed": ("bed", "crib", "futon", "mattress"),
    "lamp": ("lamp", "light", "lantern", "lamppost", "spotlight", "chandelier"),
    "cabinet": ("cabinet", "wardrobe", "cupboard", "bookcase", "shelves", "chest", "dresser"),
    "plant": (
        *("plant", "tree", "ficus", "bamboo", "cactus", "tulips", "pine", "maple", "bush"),
        *("flowers", "orchids", "yucca", "lily", "acacia", "cypress", "poplar", "beech"),
        *("blossom", "snow", "hedge", "spathiphyllum"),
    ),
    "person": ("female", "male", "boy", "girl"),
    "door": ("door",),
    "window": ("window", "panes", "pane"),
    "vehicle": (
        *("sedan", "sport", "car", "chevrolet", "focus", "cc", "scenic", "suv", "leon", "beetle"),
        *("van", "bus", "truck", "scooter", "motorbike", "bike", "bicycle", "tricycle", "lift"),
    ),
    "animal": ("dog", "cat", "horse", "chicken", "bulldog", "rabbit", "deer", "bear"),
    "bottle": ("bottle", "flacon"),
    "cup": ("cup", "mug", "glass", "bowl", "pot", "teapot", "vase"),
}
# catalogue names that have a word of an object and show something else
NOT_SHOWN = frozenset(
    (
        *("abdominal bench", "bread box", "clothes horse", "cup cake", "dog house", "flower box"),
        *("hot dog", "rocking horse", "roasted chicken", "football table", "pool table"),
        *("plate, glass and cutlery", "window blind", "window shutter", "elevator door"),
        *("lying down boy", "lying down female", "lying down male", "screen door"),
        *("changing table", "medicine bottle", "bended coconut tree", "armchair ottoman"),
        *("table fan", "table tennis bat", "chest freezer", "indoor bike", "stone lantern"),
        *("cosmetics pot", "utensils pot", "double door with panes", "plant box", "glass door"),
    )
)

# name of a color -> how an object is painted in it, RGB
COLORS: Mapping[str, tuple[int, int, int]] = {
    "red": (220, 30, 30),
    "yellow": (245, 215, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "purple": (150, 50, 180),
    "brown": (130, 80, 40),
    "gray": (150, 150, 150),
    "black": (30, 30, 30),
}
SHAPES = ("tall", "wide", "even")
"""Height to the longer side of the ground plan: above 1.3, below 0.75, within 0.85 to 1.15."""

# what a film shows an object do -> how a caption says it
MOTIONS: Mapping[str, str] = {
    "left": "turning left",
    "right": "turning right",
    "up": "moving up",
    "down": "moving down",
    "nearer": "coming nearer",
    "away": "going away",
}
# how far the object of a depth map is -> how a caption says it
DISTANCES: Mapping[str, str] = {"near": "nearby", "middle": "not far away", "far": "far away"}
# how a cloud of points is placed -> how a caption says it
POSES: Mapping[str, str] = {
    "upright": "standing upright",
    "lying": "lying on its side",
    "inverted": "upside down",
}

# what an animated emoji shows -> groups or subgroups of Unicode's list of emoji
EMOJI: Mapping[str, tuple[str, ...]] = {
    "face": (
        *("face-affection", "face-concerned", "face-glasses", "face-neutral-skeptical"),
        *("face-sleepy", "face-smiling", "face-tongue"),
    ),
    "animal": ("animal-bird", "animal-bug", "animal-mammal", "animal-marine", "animal-reptile"),
    "person": ("person", "person-role", "person-gesture"),
    "family": ("family",),
    "heart": ("heart",),
    "hand": (
        *("hand-fingers-closed", "hand-fingers-open", "hand-fingers-partial", "hands"),
        "hand-single-finger",
    ),
    "clock": ("time",),
}

# what is heard -> what one stroke of it is called
SOUNDS: Mapping[str, str] = {
    "piano": "note",
    "violin": "note",
    "flute": "note",
    "trumpet": "note",
    "saxophone": "note",
    "tuba": "note",
    "harp": "note",
    "guitar": "note",
    "organ": "note",
    "xylophone": "note",
    "drum": "beat",
    "cymbal": "beat",
    "tabla": "beat",
}
PITCHES = ("low", "middle", "high")
COUNTS = ("one", "two", "three")
STEPS = ("rises", "falls", "stays")

# kind of question -> ways to put it
WORDINGS: Mapping[str, tuple[str, ...]] = {
    "what": ("What is it?", "Name the object.", "Which object is this?"),
    "color": ("What color is it?", "Name its color.", "Which color does it have?"),
    "shape": ("Is it tall, wide or even?", "What shape is it: tall, wide or even?"),
    "is-it": ("Is it {}?", "Is this {}?"),
    "motion": ("How does it move?", "Which way does it go?"),
    "emoji": ("What does the emoji show?", "Who or what is the emoji?"),
    "distance": ("How far is it?", "Is it near, far or in the middle?"),
    "pose": ("How is it placed?", "Is it upright, lying or inverted?"),
    "sound": ("What do you hear?", "Which instrument is it?", "What plays?"),
    "pitch": ("Is it low, middle or high?", "How high is the note?"),
    "count": ("How many notes or beats are there?", "How often does it sound?"),
    "step": ("How does the tone go on?", "Does the tone rise, fall or stay?"),
    "caption": ("Describe it.", "Say what it is in a sentence.", "Give a short description."),
}
KINDS: Mapping[str, tuple[str, ...]] = {
    "image": ("what", "color", "shape", "is-it", "caption"),
    "video": ("what", "color", "motion", "emoji", "is-it", "caption"),
    "audio": ("sound", "pitch", "count", "step", "is-it", "caption"),
    "depth": ("what", "shape", "distance", "is-it", "caption"),
    "pc": ("what", "color", "shape", "pose", "is-it", "caption"),
}
"""Kinds of question of each modality, keys of WORDINGS; captions come last."""

ANSWERS: Mapping[str, tuple[str, ...]] = {
    "what": tuple(OBJECTS),
    "color": tuple(COLORS),
    "shape": SHAPES,
    "is-it": ("yes", "no"),
    "motion": tuple(MOTIONS),
    "emoji": tuple(EMOJI),
    "distance": tuple(DISTANCES),
    "pose": tuple(POSES),
    "sound": tuple(SOUNDS),
    "pitch": PITCHES,
    "count": COUNTS,
    "step": STEPS,
}
"""All answers to each kind of question but captions."""


def image_captions(noun: str, color: str, shape: str | None = None) -> tuple[str, ...]:
    """Returns what is true of a picture, the usual caption first: "a red chair."."""
    said = (f"{color} {noun}", f"{shape} {color} {noun}")
    return tuple(f"{with_article(thing)}." for thing in said[: 2 if shape else 1])


def video_captions(noun: str, color: str, motion: str) -> tuple[str, ...]:
    """Returns what is true of a film, the usual caption first: "a red chair turning left."."""
    said = (f"{color} {noun}", noun)
    return tuple(f"{with_article(thing)} {MOTIONS[motion]}." for thing in said)


def audio_captions(sound: str, count: str, pitch: str | None = None) -> tuple[str, ...]:
    """Returns what is true of a recording: "two high notes of a piano."; beats have no pitch."""
    stroke = SOUNDS[sound] if count == "one" else f"{SOUNDS[sound]}s"
    said = (f"{pitch} {stroke}", stroke) if pitch else (stroke,)
    return tuple(f"{count} {thing} of {with_article(sound)}." for thing in said)


def depth_captions(noun: str, distance: str, shape: str | None = None) -> tuple[str, ...]:
    """Returns what is true of a depth map, the usual caption first: "a chair far away."."""
    said = (noun, f"{shape} {noun}")[: 2 if shape else 1]
    return tuple(f"{with_article(thing)} {DISTANCES[distance]}." for thing in said)


def pc_captions(noun: str, color: str, pose: str) -> tuple[str, ...]:
    """Returns what is true of a cloud of points: "a red chair lying on its side."."""
    said = (f"{color} {noun}", noun)
    return tuple(f"{with_article(thing)} {POSES[pose]}." for thing in said)
