"""Both students as one stock `transformers` CLIP folder."""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer, PreTrainedModel

from clip_pretraining.config import IMAGE_SIZE, clip_config
from clip_pretraining.image import ImageStudent
from clip_pretraining.prompts import load_prompts
from clip_pretraining.text import TextStudent
from clip_pretraining.zero_shot import zero_shot

LOG = logging.getLogger("pretrain_clip")


def compose(args: argparse.Namespace) -> CLIPModel:
    """Returns a stock CLIP model made of both students; text_projection = W P."""
    vocabulary = len(CLIPTokenizer.from_pretrained(args.work / "tokenizer"))
    config = clip_config(args, vocabulary)
    text, image = TextStudent(config), ImageStudent(config)
    aligned = args.work / f"text-{args.name}.pt"
    path = aligned if aligned.is_file() else args.work / "text.pt"
    text.load_state_dict(torch.load(path, weights_only=True)["module"])
    saved = torch.load(args.work / f"image-{args.name}.pt", weights_only=True)
    image.load_state_dict(saved["module"])
    model = CLIPModel(config)
    model.text_model.load_state_dict(text.tower.state_dict())
    model.vision_model.load_state_dict(image.tower.state_dict())
    with torch.no_grad():
        model.visual_projection.weight.copy_(image.projection.weight)
        model.text_projection.weight.copy_(image.text_map.weight @ text.head.weight)
        model.logit_scale.copy_(image.log_scale)
    return model


@contextmanager
def staged(out: Path, model: PreTrainedModel, *processors: Any) -> Iterator[Path]:
    """Yields a folder with a model in half precision; its files are moved to ``out`` afterwards."""
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        for part in (model, *processors):
            part.save_pretrained(staging)
        config = json.loads((staging / "config.json").read_text())
        config["dtype"] = "float32"  # stored in half precision, but CPUs compute faster in single
        (staging / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for file in staging.rglob("tokenizer.json"):  # half as large without indents
            words = json.loads(file.read_text(encoding="utf-8"))
            text = json.dumps(words, ensure_ascii=False, separators=(",", ":"))
            file.write_text(text + "\n", encoding="utf-8")
        yield staging
        for file in sorted(path for path in staging.rglob("*") if path.is_file()):
            target = out / file.relative_to(staging)
            target.parent.mkdir(exist_ok=True)
            file.chmod(0o644)
            os.replace(file, target)
    finally:
        shutil.rmtree(staging)


def stage_export(args: argparse.Namespace) -> None:
    """Writes the folder in half precision by temp + rename and prints its zero-shot accuracy."""
    load_prompts(args.work, args.domains)  # fails where the text tower learnt other prompts
    model = compose(args).half()
    tokenizer = CLIPTokenizer.from_pretrained(args.work / "tokenizer")
    processor = CLIPImageProcessor(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        do_center_crop=False,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    with staged(args.out, model, tokenizer, processor) as folder:
        rows = zero_shot(folder, args.domains)
    LOG.info("%.2f M parameters", sum(p.numel() for p in model.parameters()) / 1e6)
    for row in rows:
        LOG.info("%s", row)
