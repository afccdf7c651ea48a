"""Processors of models that could also see videos, without that half, which needs torchvision."""

from __future__ import annotations

from typing import Any

WITH_VIDEO = {
    "internvl": "InternVLProcessor",
    "qwen2_vl": "Qwen2VLProcessor",
    "qwen2_5_vl": "Qwen2_5_VLProcessor",
    "smolvlm": "Idefics3Processor",
}
"""``model_type`` -> its processor's class in ``transformers``, where that asks for videos.

SmolVLM's does with images what that of Idefics3 does, and asks for num2words too.
"""


def image_only(kind: str) -> Any:
    """Return the processor class of a model type without videos: images and text as by the stock.

    It saves under the stock's name, and either loads what the other saved.
    """
    import transformers

    stock: Any = getattr(transformers, WITH_VIDEO[kind])

    def parts(cls: Any) -> list[str]:
        return [name for name in stock.get_attributes() if name != "video_processor"]

    return type(stock.__name__, (stock,), {"get_attributes": classmethod(parts)})


def load_processor(kind: str, where: str, *, revision: str | None = None) -> Any:
    """Return the processor of a model of a type, from a folder or the hub."""
    from transformers import AutoProcessor

    loader: Any = image_only(kind) if kind in WITH_VIDEO else AutoProcessor
    return loader.from_pretrained(where, revision=revision)
