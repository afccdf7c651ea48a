"""The shape of the model: a stock CLIP configuration made of the options."""

from __future__ import annotations

import argparse

from transformers import CLIPConfig

IMAGE_SIZE = 64  # pixels, as the suite and the corpus are drawn
POSITIONS = 32  # longest text, in tokens
TEACHER_WIDTH = 384  # of all-MiniLM-L6-v2


def clip_config(args: argparse.Namespace, vocabulary: int) -> CLIPConfig:
    """Returns the configuration; the end token is the vocabulary's last, never id 2."""
    ids = {
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": vocabulary - 1,
    }
    text = {
        "vocab_size": vocabulary,
        "hidden_size": args.text_width,
        "intermediate_size": 4 * args.text_width,
        "num_hidden_layers": args.text_layers,
        "num_attention_heads": args.text_width // 64,
        "max_position_embeddings": POSITIONS,
        "hidden_act": "gelu",
        "projection_dim": args.projection,
        **ids,
    }
    vision = {
        "hidden_size": args.width,
        "intermediate_size": 4 * args.width,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.width // 64,
        "image_size": IMAGE_SIZE,
        "patch_size": args.patch,
        "hidden_act": "gelu",
        "projection_dim": args.projection,
    }
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=args.projection, **ids)
