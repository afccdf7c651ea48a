"""Pretrains the tiny ViLT that is embedded in the package, on CPU.

Pictures, names and sentences are those of `pretrain_clip.py`: run its stage `prompts` first, in the
same `--work`. Three steps, each resumable, each writing into `--work`:

  words    keeps the part of MiniLM's vocabulary that is needed; its embeddings, projected on their
           main directions, are what the text embeddings start from
  train    pairs of a picture and a sentence with its name: hidden words (up to all of them, so that
           words are told by the picture), whether both match, and a softmax of the pooled state
           over the embeddings of all names; a part of the pairs lacks its text or its picture
  export   writes a stock `transformers` ViLT folder

With `--steps N` in place of `--minutes` a run is repeatable to the bit.

  python tools/pretrain_clip.py prompts --work W --corpus C --minilm M
  python tools/pretrain_vilt.py words   --work W --minilm M
  python tools/pretrain_vilt.py train   --work W --corpus C --minutes 60 --bf16
  python tools/pretrain_vilt.py export  --work W --out src/evolora/assets/vilt-tiny
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from clip_pretraining.loop import add_loop_options, start_processes
from evolora.errors import EvoloraError
from vilt_pretraining.export import stage_export
from vilt_pretraining.student import stage_train
from vilt_pretraining.words import stage_words

STAGES = {"words": stage_words, "train": stage_train, "export": stage_export}
NEEDED = {"words": ("minilm",), "train": ("corpus",)}


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("stage", choices=tuple(STAGES))
    parser.add_argument("--work", type=Path, required=True, help="checkpoints and caches")
    parser.add_argument("--corpus", type=Path, help="folder of build_pretraining_corpus")
    parser.add_argument("--domains", type=Path, default=Path("src/evolora/assets/mosaic"))
    parser.add_argument("--minilm", type=Path, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--out", type=Path, default=Path("src/evolora/assets/vilt-tiny"))
    parser.add_argument("--name", default="main", help="name of the checkpoint")
    parser.add_argument("--vocabulary", type=int, default=5000)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--patch", type=int, default=16)
    parser.add_argument("--projection", type=int, default=192)
    add_loop_options(parser)
    args = parser.parse_args(words)
    for option in NEEDED.get(args.stage, ()):
        if getattr(args, option) is None:
            parser.error(f"the stage {args.stage!r} needs --{option}")
    return args


def main(words: Sequence[str] | None = None) -> None:
    args = parse(words)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    start_processes(args)
    STAGES[args.stage](args)


if __name__ == "__main__":
    try:
        main()
    except EvoloraError as error:
        sys.exit(f"error: {error}")
