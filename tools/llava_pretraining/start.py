"""The model as training starts: an encoder that sees already, and a new language model."""

from __future__ import annotations

import argparse

import torch
from transformers import CLIPModel, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from clip_pretraining.config import IMAGE_SIZE
from llava_pretraining.words import BEGIN, END, IMAGE, PAD, POSITIONS


def llava_config(args: argparse.Namespace, clip: CLIPModel, vocabulary: int) -> LlavaConfig:
    """Returns the configuration; the encoder's last block is left out, its class token read."""
    vision = clip.config.vision_config.to_dict()
    vision["num_hidden_layers"] -= 1
    text = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=args.width,
        intermediate_size=2 * args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=args.width // 32,
        num_key_value_heads=args.width // 64,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BEGIN,
        eos_token_id=END,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE,
        image_seq_length=(IMAGE_SIZE // vision["patch_size"]) ** 2 + 1,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BEGIN,
        eos_token_id=END,
    )


def start_model(args: argparse.Namespace, vocabulary: int) -> LlavaForConditionalGeneration:
    """Returns a model whose encoder is the image tower of ``--clip``."""
    clip = CLIPModel.from_pretrained(args.clip)
    torch.manual_seed(args.seed)
    config = llava_config(args, clip, vocabulary)
    config._attn_implementation = args.attention
    model = LlavaForConditionalGeneration(config)
    tower = model.model.vision_tower
    state = clip.vision_model.state_dict()
    tower.load_state_dict({name: state[name] for name in tower.state_dict()})
    return model
