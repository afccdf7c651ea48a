"""Tiny random image-text-to-text models with real processors around a tokenizer of few words."""

from __future__ import annotations

from typing import Any

import torch

from evolora.backbones.image_text import ImageText
from evolora.backbones.processors import image_only
from evolora.streams.task import Example

FAMILIES = ("llava", "internvl", "idefics3", "smolvlm", "qwen2_vl", "qwen2_5_vl")
WORDS = (
    *("what", "is", "it", "this", "where", "Question", "Answer", ":", "?", "."),
    *("red", "green", "blue", "dot", "bar", "cross", "user", "assistant", "yes", "no"),
)
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "<img>", "</img>", "<fake>", "<video>")
IMAGE = SPECIAL.index("<image>")
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} : {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %} "
    "{% if m['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)
DECODER: dict[str, Any] = {
    "vocab_size": len(SPECIAL) + len(WORDS) + 8, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: index for index, word in enumerate((*SPECIAL, *WORDS))}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=["<image>", "<img>", "</img>", "<fake>", "<video>"],
        extra_special_tokens={
            "image_token": "<image>", "context_image_token": "<image>", "video_token": "<video>",
            "start_image_token": "<img>", "end_image_token": "</img>",
            "fake_image_token": "<fake>", "global_image_token": "<img>",
        },
    )  # fmt: skip


def writer(kind: str, seed: int = 0, *, template: bool = True, **options: Any) -> ImageText:
    """Return a backbone of a family whose answers depend on all of its input."""
    torch.manual_seed(seed)
    model, processor = globals()[f"_{kind}"]()
    processor.chat_template = TEMPLATE if template else None
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.2)
    return ImageText(model.eval(), processor, name="toy", **options)


def _llava() -> tuple[Any, Any]:
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
        image_size=16, patch_size=8, projection_dim=32,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(**DECODER), image_token_id=IMAGE,
        vision_feature_layer=-2, image_seq_length=4,
    )  # fmt: skip
    size = {"height": 16, "width": 16}
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=size)
    processor = LlavaProcessor(
        images, tokenizer(), patch_size=8, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config), processor


def _internvl() -> tuple[Any, Any]:
    from transformers import (
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLVisionConfig,
        Qwen2Config,
    )
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    vision = InternVLVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        image_size=[16, 16], patch_size=[4, 4],
    )  # fmt: skip
    config = InternVLConfig(
        vision_config=vision, text_config=Qwen2Config(**DECODER), image_token_id=IMAGE,
        image_seq_length=4,
    )  # fmt: skip
    images = GotOcr2ImageProcessorPil(
        size={"height": 16, "width": 16}, crop_to_patches=True, min_patches=1, max_patches=4
    )
    processor = image_only("internvl")(images, tokenizer(), image_seq_length=4)
    return InternVLForConditionalGeneration(config), processor


def _smolvlm() -> tuple[Any, Any]:
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

    return _idefics(SmolVLMConfig, SmolVLMForConditionalGeneration)


def _idefics3() -> tuple[Any, Any]:
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration

    return _idefics(Idefics3Config, Idefics3ForConditionalGeneration)


def _idefics(config_class: Any, model_class: Any) -> tuple[Any, Any]:
    from transformers import LlamaConfig
    from transformers.models.idefics3.image_processing_pil_idefics3 import (
        Idefics3ImageProcessorPil,
    )

    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": 16, "patch_size": 4,
    }  # fmt: skip
    config = config_class(
        vision_config=vision, text_config=LlamaConfig(**DECODER), image_token_id=IMAGE,
        scale_factor=2, pad_token_id=0,
    )  # fmt: skip
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": 32}, max_image_size={"longest_edge": 16}, do_image_splitting=True
    )
    processor = image_only("smolvlm")(images, tokenizer(), image_seq_len=4)
    return model_class(config), processor


def _qwen2_vl() -> tuple[Any, Any]:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    vision = {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}
    return _qwen("qwen2_vl", Qwen2VLConfig, Qwen2VLForConditionalGeneration, vision)


def _qwen2_5_vl() -> tuple[Any, Any]:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = {
        "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32, "window_size": 16,
        "fullatt_block_indexes": [1],
    }  # fmt: skip
    return _qwen("qwen2_5_vl", Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, vision)


def _qwen(kind: str, config_class: Any, model_class: Any, vision: Any) -> tuple[Any, Any]:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    config = config_class(
        vision_config={
            "depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2,
            "temporal_patch_size": 2, **vision,
        },
        text_config={**DECODER, "rope_parameters": rope},
        image_token_id=IMAGE, video_token_id=SPECIAL.index("<video>"),
        vision_start_token_id=SPECIAL.index("<img>"), vision_end_token_id=SPECIAL.index("</img>"),
    )  # fmt: skip
    images = Qwen2VLImageProcessorPil(
        patch_size=4, temporal_patch_size=2, merge_size=2,
        size={"shortest_edge": 64, "longest_edge": 1024},
    )  # fmt: skip
    return model_class(config), image_only(kind)(images, tokenizer())


def picture(seed: int, height: int = 16, width: int = 16) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), generator=draw, dtype=torch.uint8)


def samples() -> list[Example]:
    """One image, none, two of different size, one without text; questions of different length."""
    return [
        Example(inputs={"image": picture(0), "text": "what is it ?"}, label="red dot", key="one"),
        Example(inputs={"text": "is it red or is it this ?"}, label="yes", key="none"),
        Example(
            inputs={
                "image": (picture(1), picture(2, 16, 32)),
                "text": "is <image> this <image> ?",
            },
            label=("no", "green bar .", "green bar ."),
            key="two",
        ),
        Example(inputs={"image": picture(3)}, label="blue", key="image alone"),
    ]
