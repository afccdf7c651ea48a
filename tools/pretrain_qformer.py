"""Pretrains the tiny Q-Former."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from clip_pretraining.command import parser_of, run_stage, start
from qformer_pretraining.export import stage_export
from qformer_pretraining.rendering import stage_objects
from qformer_pretraining.student import stage_train
from qformer_pretraining.vision import stage_vision
from qformer_pretraining.words import stage_words

STAGES = {
    "vision": stage_vision,
    "objects": stage_objects,
    "words": stage_words,
    "train": stage_train,
    "export": stage_export,
}
NEEDED = {
    "vision": ("corpus",),
    "words": ("corpus", "minilm"),
    "train": ("corpus",),
    "export": ("corpus",),
}


def main(words: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__, STAGES, "qformer-tiny")
    parser.add_argument(
        "--clip",
        type=Path,
        default=Path("src/evolora/assets/clip-tiny"),
        help="folder of the CLIP whose image tower teaches the encoder",
    )
    parser.add_argument("--cache", type=Path, help="folder of registry packages")
    parser.add_argument("--views", type=int, default=12, help="renders of an object")
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--vision-layers", type=int, default=4)
    parser.add_argument("--qformer-layers", type=int, default=3)
    parser.add_argument("--layers", type=int, default=3, help="of the language model")
    parser.add_argument("--vision", default="main", help="name of the encoder's checkpoint")
    parser.add_argument(
        "--vision-share", type=float, default=0.3, help="of the rate, for the encoder"
    )
    parser.add_argument("--questions", type=int, default=200, help="per format, for the scores")
    parser.add_argument(
        "--probe-steps", type=int, default=150, help="to learn a soft prompt for each answer"
    )
    run_stage(parser, STAGES, NEEDED, words)


if __name__ == "__main__":
    start(main)
