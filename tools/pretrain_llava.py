"""Pretrains the tiny LLaVA that is embedded in the package, on CPU, in under an hour.

Pictures and names are those of `pretrain_clip.py`: run its stage `prompts` first, in the same
`--work`. Three steps, each resumable, each writing into `--work`:

  words    learns a byte-level BPE vocabulary from what the model is asked and answers
  train    the encoder starts as the image tower of `--clip`, without its last block; projection and
           language model are new. They learn to answer instructions about named pictures, drawn
           scenes and texts alone: names, captions, yes or no, options, lists, numbers, boxes
  export   writes a stock `transformers` LLaVA folder, with the scores of held-out questions

With `--steps N` in place of `--minutes` a run is repeatable to the bit.

  python tools/pretrain_clip.py prompts --work W --corpus C --minilm M
  python tools/pretrain_llava.py words --work W --corpus C --minilm M
  python tools/pretrain_llava.py train --work W --corpus C --batch 64 --lr .0015 --minutes 50 --bf16
  python tools/pretrain_llava.py export --work W --corpus C --out src/evolora/assets/llava-tiny
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from clip_pretraining.command import parser_of, run_stage, start
from llava_pretraining.export import stage_export
from llava_pretraining.student import stage_train
from llava_pretraining.words import stage_words

STAGES = {"words": stage_words, "train": stage_train, "export": stage_export}
NEEDED = {"words": ("corpus", "minilm"), "train": ("corpus",), "export": ("corpus",)}


def main(words: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__, STAGES, "llava-tiny")
    parser.add_argument(
        "--clip",
        type=Path,
        default=Path("src/evolora/assets/clip-tiny"),
        help="folder of the CLIP whose image tower the encoder starts as",
    )
    parser.add_argument("--vocabulary", type=int, default=3072)
    parser.add_argument("--width", type=int, default=192, help="of the language model")
    parser.add_argument("--layers", type=int, default=4, help="of the language model")
    parser.add_argument("--attention", choices=("eager", "sdpa"), default="eager")
    parser.add_argument("--turns", type=int, default=3, help="most turns of a dialogue")
    parser.add_argument(
        "--vision-share", type=float, default=0.3, help="of the rate, for the encoder; 0 freezes it"
    )
    parser.add_argument("--questions", type=int, default=200, help="per format, for the scores")
    run_stage(parser, STAGES, NEEDED, words)


if __name__ == "__main__":
    start(main)
