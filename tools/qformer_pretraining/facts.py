"""Described things: what is told in words where a picture's soft tokens would stand, and asked.

The language model so learns every word that the stream's modalities will have to say, from text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from random import Random

from evolora.streams.mosaic.modality_words import (
    ANSWERS,
    KINDS,
    MODALITIES,
    SOUNDS,
    WORDINGS,
    audio_captions,
    depth_captions,
    image_captions,
    pc_captions,
    video_captions,
)
from qformer_pretraining.about_views import is_it

Traits = Mapping[str, str]
"""Kind of question -> its answer."""
CAPTIONS: Mapping[str, Callable[[Traits], tuple[str, ...]]] = {
    "image": lambda t: image_captions(t["what"], t["color"], t["shape"]),
    "video": lambda t: video_captions(t["what"], t["color"], t["motion"]),
    "audio": lambda t: audio_captions(
        t["sound"], t["count"], t["pitch"] if SOUNDS[t["sound"]] == "note" else None
    ),
    "depth": lambda t: depth_captions(t["what"], t["distance"], t["shape"]),
    "pc": lambda t: pc_captions(t["what"], t["color"], t["pose"]),
}
CUED = 0.5  # share of descriptions that begin with the modality's name


def draw_fact(draw: Random) -> tuple[str, str, str]:
    """Returns a question, its answer, and the description that tells it."""
    modality, kind = draw.choice([(one, kind) for one in MODALITIES for kind in KINDS[one]])
    if kind == "emoji":
        emoji = draw.choice(ANSWERS[kind])
        return draw.choice(WORDINGS[kind]), emoji, _cued(f"{emoji} emoji", modality, draw)
    kinds = [one for one in KINDS[modality] if one not in ("is-it", "emoji", "caption")]
    traits = {one: draw.choice(ANSWERS[one]) for one in kinds}
    captions = CAPTIONS[modality](traits)
    told = _words(traits, draw)
    if kind == "caption":
        question, answer = draw.choice(WORDINGS[kind]), captions[0]
    elif kind == "is-it":
        named = "sound" if modality == "audio" else "what"
        question, answer = is_it(traits[named], named, draw)
    else:
        question, answer = draw.choice(WORDINGS[kind]), traits[kind]
        said = [caption for caption in captions if answer in caption]
        if said and draw.random() < 0.4:
            told = draw.choice(said)
    return question, answer, _cued(told, modality, draw)


def _cued(told: str, modality: str, draw: Random) -> str:
    return f"{modality}: {told}" if draw.random() < CUED else told


def _words(traits: Traits, draw: Random) -> str:
    said = list(traits.values())
    draw.shuffle(said)
    return " ".join(said)


def all_answers() -> list[tuple[str, str]]:
    """Returns every answer but captions with a question that it answers."""
    return [(WORDINGS[kind][0], word) for kind, words in ANSWERS.items() for word in words]
