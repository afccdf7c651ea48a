"""The hash of a configuration: of all that decides a run's result, whenever a setting came."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from evolora.config import RunConfig

HOW_ONLY = (
    *("report_to", "save_steps", "logging_steps", "dataloader_num_workers"),
    *("gradient_checkpointing", "prefix_cache", "prefix_cache_bytes", "prefix_cache_dtype"),
    "prefix_cache_dir",
)
"""Training settings that decide how a result is reached, not what it is."""
BACKBONE_LATER = ("type", "text_length", "modalities")
"""Settings of the backbone that came later; of other sections, the class attribute ``later``."""


def hash_of(config: RunConfig) -> str:
    """Return twelve digits; a setting that came later counts only where it is not its default."""
    value = config.to_json()
    for name in HOW_ONLY:
        value["training"].pop(name)
    value["evaluation"].pop("cache")
    if config.training.cached_dtype == "float16":  # rounding is all a cache can change
        value["training"]["cached_dtype"] = "float16"
    value.pop("name")
    if not value["regularizers"]:  # as before there were any
        value.pop("regularizers")
    allocation = value["method"].get("allocation", "")
    if allocation is None:  # as before there was a choice
        value["method"].pop("allocation")
    elif isinstance(allocation, str) and Path(allocation).is_file():
        content = Path(allocation).read_bytes()  # what it says decides, not what it is called
        value["method"]["allocation"] = hashlib.sha256(content).hexdigest()
    sections = {
        "backbone": (config.backbone, BACKBONE_LATER),
        "training": (config.training, config.training.later),
        "method": (config.method, getattr(config.method, "later", ())),
    }
    for section, (part, later) in sections.items():
        for name in later:
            if value[section][name] == getattr(type(part), name):
                value[section].pop(name)
    text = json.dumps(value, sort_keys=True, default=list)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
