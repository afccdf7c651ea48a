"""Pretrains the small frozen encoders of `mosaic/modalities` that are embedded in the package.

  sounds   `audio-tiny`: a stock Whisper encoder, 2 seconds at most; each token tells which
           instrument sounds, at which note, and whether a stroke begins, in mixtures of strokes
  clouds   `pointnet-tiny`: what an object is, how it is placed, its color and its size, and which
           other cloud is of the same object

Only the side "pretrain" of the stream's recordings and objects is used
(`evolora.streams.mosaic.modality_sources`). Both end with linear probes on frozen features, fitted
on the stream's train objects, told on its test objects, beside an untrained encoder of that shape.
With `--steps N` in place of `--minutes` a run is repeatable to the bit.

  python tools/pretrain_encoders.py sounds --minutes 4
  python tools/pretrain_encoders.py clouds --minutes 4
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from clip_pretraining.command import start
from encoder_pretraining.clouds import stage_clouds
from encoder_pretraining.sounds import stage_sounds

STAGES = {"sounds": stage_sounds, "clouds": stage_clouds}


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("stage", choices=tuple(STAGES))
    parser.add_argument("--cache", type=Path, help="folder of unpacked packages")
    parser.add_argument("--out", type=Path, help="folder to write; else the embedded one")
    parser.add_argument("--assets", type=Path, default=Path("src/evolora/assets"))
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--steps", type=int, help="in place of --minutes")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(words)
    torch.set_num_threads(args.threads)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    STAGES[args.stage](args)


if __name__ == "__main__":
    start(main)
