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

from collections.abc import Sequence
from pathlib import Path

from clip_pretraining.command import parser_of, run_stage, start
from clip_pretraining.export import stage_export
from clip_pretraining.image import stage_image
from clip_pretraining.prompts import stage_prompts
from clip_pretraining.text import stage_text

STAGES = {
    "prompts": stage_prompts,
    "text": stage_text,
    "image": stage_image,
    "export": stage_export,
}
NEEDED = {"prompts": ("corpus", "minilm"), "image": ("corpus",)}


def main(words: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__, STAGES, "clip-tiny")
    parser.add_argument("--extra-names", type=Path, help="JSON list of further names for the text")
    parser.add_argument(
        "--refresh", action="store_true", help="prompts: keep the tokenizer, embed only new names"
    )
    parser.add_argument("--align", help="text: name of the image checkpoint whose W to match in")
    parser.add_argument("--vocabulary", type=int, default=4000)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--patch", type=int, default=16)
    parser.add_argument("--text-width", type=int, default=192)
    parser.add_argument("--text-layers", type=int, default=3)
    parser.add_argument("--projection", type=int, default=192)
    run_stage(parser, STAGES, NEEDED, words)


if __name__ == "__main__":
    start(main)
