"""Assembles a Q-Former that speaks through a real language model, and trains the bridge.

A stock InstructBLIP: encoder and Q-Former of the embedded `qformer-tiny`, SmolLM2-135M-Instruct out
of an ordinary registry package, all frozen; only the projection between them is trained here, on
the training split of the image task of `mosaic/modalities`: on pictures alone. Nothing of it is
committed: the folder takes 0.28 GB.

Four stages, each writing into `--work`; words and bridge are resumable and, by steps, repeatable to
the bit:

  llm      takes SmolLM2 out of the GGUF file of its package, dequantized (needs gguf, accelerate);
           the same as of `assemble_smol_vlm.py`, whose `--work` may be used
  words    the mean of a picture's soft tokens learns to point at the embeddings of its answer's
           words, without the language model
  bridge   the language model, given the soft tokens and the question, shall write the answer
  export   writes a folder for `backbone: {name_or_path: ...}`, and says what answers about the
           test split's pictures cost under the right and under another picture

  python tools/assemble_smol_qformer.py llm    --work W
  python tools/assemble_smol_qformer.py words  --work W
  python tools/assemble_smol_qformer.py bridge --work W --steps 40 --bf16
  python tools/assemble_smol_qformer.py export --work W --out smol-qformer
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from clip_pretraining.command import parser_of, run_stage, start
from smol_assembly.language import stage_llm
from smol_assembly.qformer_bridge import stage_bridge, stage_words
from smol_assembly.qformer_export import stage_export

STAGES = {"llm": stage_llm, "words": stage_words, "bridge": stage_bridge, "export": stage_export}


def main(words: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__, STAGES, "smol-qformer")
    parser.add_argument("--cache", type=Path, help="folder of unpacked packages")
    parser.add_argument(
        "--eyes",
        type=Path,
        default=Path("src/evolora/assets/qformer-tiny"),
        help="folder of the InstructBLIP whose encoder and Q-Former are taken",
    )
    parser.add_argument("--word-steps", type=int, default=1500)
    parser.add_argument("--word-lr", type=float, default=3e-3)
    parser.add_argument("--tested", type=int, default=32, help="questions of the test split")
    parser.set_defaults(out=Path("smol-qformer"), batch=8, lr=1e-3, decay=0.01, warmup=5)
    run_stage(parser, STAGES, {}, words)


if __name__ == "__main__":
    start(main)
