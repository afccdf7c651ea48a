"""The assembled Q-Former with its language model as a folder, tried by the library."""

from __future__ import annotations

import argparse
import logging
from typing import Any

from clip_pretraining.export import staged
from evolora.backbones.loading import load_backbone
from evolora.backbones.qformer import QFormer
from evolora.learner import Learner
from evolora.methods.zero_shot import ZeroShotConfig
from smol_assembly.bridge import BRIDGE, load_projection
from smol_assembly.qformer import load_parts
from smol_assembly.qformer_bridge import carried, pictures

LOG = logging.getLogger("assemble_smol_qformer")


def stage_export(args: argparse.Namespace) -> None:
    """Writes the folder in half precision by temp + rename, once the library can use it."""
    backbone = load_parts(args.work, args.eyes, args.seed)
    model: Any = backbone.model
    load_projection(model.get_submodule("language_projection"), args, BRIDGE)
    LOG.info("%.1f M parameters", sum(p.numel() for p in model.parameters()) / 1e6)
    model.half()
    model.language_model.bfloat16()  # so does the stage `llm` store it, and float16 ends at 65,504
    task = pictures(args.tested)
    with staged(args.out, model, backbone.processor) as folder:
        read = load_backbone(str(folder))
        assert isinstance(read, QFormer)
        LOG.info("the library: %s", carried(read, list(task.test)))
        found = Learner(read, method=ZeroShotConfig()).evaluate(task)
        LOG.info("%.1f %% of them are answered to the letter", 100 * found.score)
