"""When activations below the experts can be kept, and the memory that keeps them.

What a frozen tower computes below its lowest expert is a function of the sample alone: it is
computed once and used in every epoch, task and evaluation. Not so where images are augmented at
random, where a method brings its own weights, or where an expert stands in the lowest block.
"""

from __future__ import annotations

import torch

from evolora.backbones.memory import ForwardCache, Memory
from evolora.errors import ConfigError
from evolora.methods.base import Method
from evolora.storage.tensor_cache import MappedFile, TensorCache
from evolora.training.config import TrainingConfig

ROWS_PER_FORWARD = 16
"""Rows in a forward that fills the cache, at most: more are not faster on a CPU."""
ROWS_PER_FORWARD_CUDA = 64
CROP_BYTES, PASS_BYTES = 256 * 2**20, 256 * 2**20
"""Room for decoded crops, and for the base's embeddings and routing features."""
DTYPES = {"float32": torch.float32, "float16": torch.float16}


def check_training(config: TrainingConfig, method: Method) -> None:
    """Refuse what was asked for and cannot be had with a method.

    Raises:
        ConfigError: says why.
    """
    if config.gradient_checkpointing and method.replaces_weights:
        raise ConfigError(
            "training.gradient_checkpointing: true is not possible: what is run again in backward "
            f"would not see the weights of {method.config.type}"
        )
    if config.prefix_cache not in ("ram", "file"):
        return
    reason = None
    if method.replaces_weights:
        reason = f"{method.config.type} trains the weights below every block"
    elif not method.backbone.has_prefix:
        reason = f"{type(method.backbone).__name__} cannot go on from kept activations"
    elif config.augment:
        reason = "training.augment crops at random, each time other pixels; set it to false"
    elif method.backbone.host.lowest(method.backbone.cached_tower) == 0:
        reason = (
            f"an expert stands in block 0 of the {method.backbone.cached_tower} tower, nothing is "
            "below it; limit the experts to higher blocks with method.layers_to_transform"
        )
    if reason:
        raise ConfigError(f"training.prefix_cache: {config.prefix_cache} is not possible: {reason}")


def build_memory(config: TrainingConfig, device: torch.device) -> Memory:
    """Return empty caches as a configuration wants them."""
    most = ROWS_PER_FORWARD_CUDA if device.type == "cuda" else ROWS_PER_FORWARD
    rows = min(most, config.per_device_train_batch_size)
    prefixes = None
    if config.prefix_cache != "off":
        in_file = config.prefix_cache == "file"
        kept = TensorCache(
            config.prefix_cache_bytes,
            dtype=DTYPES[config.cached_dtype],
            file=MappedFile(config.prefix_cache_dir) if in_file else None,
            scan=True,
        )
        prefixes = ForwardCache(kept, rows_per_forward=rows)
    return Memory(
        crops=TensorCache(CROP_BYTES, scan=True),
        passes=ForwardCache(TensorCache(PASS_BYTES, scan=True), rows_per_forward=rows),
        prefixes=prefixes,
    )
