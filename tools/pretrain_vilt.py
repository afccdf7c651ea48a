"""Pretrains the tiny ViLT that is embedded in the package, on CPU, in under an hour.

Pictures, names and sentences are those of `pretrain_clip.py`: run its stage `prompts` first, in the
same `--work`. Three steps, each resumable, each writing into `--work`:

  words    keeps the part of MiniLM's vocabulary that is needed; its embeddings, projected on their
           main directions, are what the text embeddings start from
  train    blocks and patches start as the image tower of `--clip`. Linear heads on the pooled
           state, and on the means over patches and words, learn to tell what two frozen teachers
           say: that CLIP of the picture, MiniLM of the text. Half of the pairs have the text of
           another picture, so that the state must hold both; a part lacks its text or its picture
  export   writes a stock `transformers` ViLT folder

With `--steps N` in place of `--minutes` a run is repeatable to the bit.

  python tools/pretrain_clip.py prompts --work W --corpus C --minilm M
  python tools/pretrain_vilt.py words   --work W --minilm M
  python tools/pretrain_vilt.py train   --work W --corpus C --batch 128 --minutes 45 --bf16
  python tools/pretrain_vilt.py export  --work W --out src/evolora/assets/vilt-tiny
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from clip_pretraining.command import parser_of, run_stage, start
from vilt_pretraining.export import stage_export
from vilt_pretraining.student import stage_train
from vilt_pretraining.words import stage_words

STAGES = {"words": stage_words, "train": stage_train, "export": stage_export}
NEEDED = {"words": ("minilm",), "train": ("corpus",)}


def main(words: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__, STAGES, "vilt-tiny")
    parser.add_argument(
        "--clip",
        type=Path,
        default=Path("src/evolora/assets/clip-tiny"),
        help="folder of the CLIP that it starts as and learns from",
    )
    parser.add_argument("--vocabulary", type=int, default=5000)
    run_stage(parser, STAGES, NEEDED, words)


if __name__ == "__main__":
    start(main)
