"""Pretrains the tiny Q-Former that is embedded in the package, on pictures and texts, on CPU.

Pictures and names are those of `pretrain_clip.py`: run its stage `prompts` first, in the same
`--work`. The steps, each writing into `--work`; vision and train are resumable:

  vision   a small ViT learns to see what the image tower of `--clip` sees (no names)
  objects  renders meshes of the side "pretrain" of `mosaic/modalities`, which no split of it has;
           those of the side "val" for the scores
  words    learns a byte-level BPE vocabulary from what the model is asked and answers
  train    vision encoder, Q-Former, projection and language model learn jointly to answer: names of
           pictures, painted drawings and objects in the stream's words, drawn scenes; and, from
           text alone, what stands described where soft tokens would be. Never from films, sounds,
           depth maps or clouds of points, nor from what a stream shows
  export   writes a stock `transformers` InstructBLIP folder, with the scores of other questions
           and a probe: which answers can soft tokens, learnt for it alone, make the model say?

With `--steps N` in place of `--minutes` a run is repeatable to the bit; `--bf16` is faster.

  python tools/pretrain_clip.py prompts --work W --corpus C --minilm M
  python tools/pretrain_qformer.py vision --work W --corpus C --batch 128 --lr .002 --minutes 14
  python tools/pretrain_qformer.py objects --work W --cache P
  python tools/pretrain_qformer.py words --work W --corpus C --minilm M
  python tools/pretrain_qformer.py train --work W --corpus C --batch 64 --lr .002 --minutes 41
  python tools/pretrain_qformer.py export --work W --corpus C --out src/evolora/assets/qformer-tiny
"""

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
        "--vision-share", type=float, default=0.5, help="of the rate, for the encoder"
    )
    parser.add_argument("--questions", type=int, default=200, help="per format, for the scores")
    parser.add_argument(
        "--probe-steps", type=int, default=150, help="to learn a soft prompt for each answer"
    )
    run_stage(parser, STAGES, NEEDED, words)


if __name__ == "__main__":
    start(main)
