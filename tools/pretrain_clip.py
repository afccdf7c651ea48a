"""Pretrains the tiny CLIP that is embedded in the package, on CPU, in about an hour.

Five steps, each resumable, each writing into `--work`:

  prompts  embeds names x templates with MiniLM (the teacher) and trains a small BPE vocabulary
  text     a small text transformer learns to reproduce MiniLM's sentence embeddings
  image    a small ViT learns to match its picture to W z(name), z being MiniLM's embedding and W
           a linear map learnt along; the softmax runs over all names of the corpus, so names
           drawn twice in a batch are never negatives of each other, near synonyms neither
  text     again, with --align: matches only what W keeps of the teacher's embeddings
  export   writes a stock `transformers` CLIP folder with text_projection = W P (P from `text`)
           and prints its zero-shot accuracy on `mosaic/domains`

With `--steps N` in place of `--minutes` a run is repeatable to the bit, for one number of ranks and
threads. Where names of the suite or the corpus have changed since `prompts`, the later steps refuse
to go on; `prompts --refresh` then embeds the new ones and keeps the tokenizer and the rest.

Corpus: `evolora.streams.mosaic.corpus`. Usage:

  python tools/pretrain_clip.py prompts --work W --corpus C --minilm M
  python tools/pretrain_clip.py text    --work W --minutes 10 --threads 1
  python tools/pretrain_clip.py image   --work W --corpus C --minutes 50 --ranks 2 --rank 1 &
  python tools/pretrain_clip.py image   --work W --corpus C --minutes 50 --ranks 2 --rank 0
  python tools/pretrain_clip.py text    --work W --minutes 3 --align main
  python tools/pretrain_clip.py export  --work W --out src/evolora/assets/clip-tiny
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from clip_pretraining.export import stage_export
from clip_pretraining.image import stage_image
from clip_pretraining.loop import add_loop_options, start_processes
from clip_pretraining.prompts import stage_prompts
from clip_pretraining.text import stage_text
from evolora.errors import EvoloraError

STAGES = {
    "prompts": stage_prompts,
    "text": stage_text,
    "image": stage_image,
    "export": stage_export,
}
NEEDED = {"prompts": ("corpus", "minilm"), "image": ("corpus",)}


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("stage", choices=tuple(STAGES))
    parser.add_argument("--work", type=Path, required=True, help="checkpoints and caches")
    parser.add_argument("--corpus", type=Path, help="folder of build_pretraining_corpus")
    parser.add_argument("--domains", type=Path, default=Path("src/evolora/assets/mosaic"))
    parser.add_argument("--minilm", type=Path, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--extra-names", type=Path, help="JSON list of further names for the text")
    parser.add_argument(
        "--refresh", action="store_true", help="prompts: keep the tokenizer, embed only new names"
    )
    parser.add_argument("--out", type=Path, default=Path("src/evolora/assets/clip-tiny"))
    parser.add_argument("--name", default="main", help="name of the image checkpoint")
    parser.add_argument("--align", help="text: name of the image checkpoint whose W to match in")
    parser.add_argument("--vocabulary", type=int, default=4000)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--patch", type=int, default=16)
    parser.add_argument("--text-width", type=int, default=192)
    parser.add_argument("--text-layers", type=int, default=3)
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
