"""The model as training starts, and its shape.

PathWeave adds to a Q-Former of n_s self- and n_c cross-attention blocks, of width h and reading
width e, per modality of rank r with t experts

    (4 n_s + 2 n_c) (2 h r + r + h + 1) + 2 n_c (e r + r + h r + h + 1)      adapters
    4 (t - 1) (n_s + n_c) (r^2 + r) + 2 t ((4 n_s + 2 n_c) h + 2 n_c e)       in-adapters, gates

parameters. The shape is chosen so that this, with queries, norm and the projection's adapter,
stays below 2 % of the model for r = 4 and t = 4: few attention blocks, and all 128 wide, so that
an encoder of that width needs no projection.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import InstructBlipConfig, InstructBlipForConditionalGeneration, LlamaConfig

from clip_pretraining.config import IMAGE_SIZE
from llava_pretraining.words import BEGIN, END, IMAGE, PAD

QUERIES = 8
ASKED = 64  # longest instruction that the Q-Former reads, in tokens
POSITIONS = 160  # of the language model: soft tokens, cues, text and answer


def qformer_config(args: argparse.Namespace, vocabulary: int) -> InstructBlipConfig:
    """Returns the configuration of the whole model."""
    width, heads = args.width, args.width // 32
    vision = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": args.vision_layers,
        "num_attention_heads": heads,
        "image_size": IMAGE_SIZE,
        "patch_size": 16,
        "initializer_range": 0.02,
    }
    qformer = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": args.qformer_layers,
        "num_attention_heads": heads,
        "max_position_embeddings": ASKED,
        "encoder_hidden_size": width,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "pad_token_id": PAD,
    }
    text = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=args.layers,
        num_attention_heads=heads,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BEGIN,
        eos_token_id=END,
    )
    return InstructBlipConfig(
        vision_config=vision,
        qformer_config=qformer,
        text_config=text,
        num_query_tokens=QUERIES,
        image_token_index=IMAGE,
        tie_word_embeddings=True,
    )


def start_model(
    args: argparse.Namespace, vocabulary: int, vision: Path | None = None
) -> InstructBlipForConditionalGeneration:
    """Returns a new model; its encoder starts as that of a checkpoint of the stage ``vision``."""
    torch.manual_seed(args.seed)
    config = qformer_config(args, vocabulary)
    # with 17 tokens plain attention in bf16 trains faster on CPU than "sdpa"
    model = InstructBlipForConditionalGeneration._from_config(config, attn_implementation="eager")
    torch.nn.init.normal_(model.query_tokens, std=0.02)
    if vision is not None:
        saved = torch.load(vision, weights_only=True)["module"]
        start = "tower."
        tower = {k.removeprefix(start): v for k, v in saved.items() if k.startswith(start)}
        model.vision_model.load_state_dict(tower)
    return model
