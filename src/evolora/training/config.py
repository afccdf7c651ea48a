"""Settings of training, named as in ``transformers.TrainingArguments``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from evolora.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How one task is trained.

    Args:
        max_steps: optimizer steps per task.
        per_device_train_batch_size: samples per process and step.
        gradient_accumulation_steps: forward passes per optimizer step.
        learning_rate: peak, per step.
        learning_rates: task name -> its own peak, where it differs.
        warmup_steps: linear warm-up, then cosine to zero (MoE-Adapters: 100 of 1000).
        weight_decay, adam_beta1, adam_beta2: AdamW.
        max_grad_norm: clip the gradient norm; None does not clip.
        label_smoothing_factor: in [0, 1) (MoE-Adapters on MTIL: 0.2).
        max_classes_per_step: classes in a step's softmax; None takes all of the task's.
        augment: random resized crop in training.
        save_steps: steps between checkpoints; a finished task is always one.
        logging_steps: steps between log lines.
        dataloader_num_workers: processes that read images; 0 reads in the training process.
        mixed_precision: "no" or "bf16" (fp16 would need a loss scaler and buys nothing on current cards).
        report_to: accelerate trackers ("tensorboard", "trackio", "wandb"); JSONL is always written.
    """

    max_steps: int = 1000
    per_device_train_batch_size: int = 64
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-3
    learning_rates: Mapping[str, float] = field(default_factory=dict)
    warmup_steps: int = 100
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    max_grad_norm: float | None = None
    label_smoothing_factor: float = 0.2
    max_classes_per_step: int | None = None
    augment: bool = True
    save_steps: int = 200
    logging_steps: int = 10
    dataloader_num_workers: int = 0
    mixed_precision: Literal["no", "bf16"] = "no"
    report_to: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        at_least_one = (
            "max_steps",
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "save_steps",
            "logging_steps",
        )
        for name in at_least_one:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1; got {getattr(self, name)}")
        if not self.learning_rate > 0 or not math.isfinite(self.learning_rate):
            raise ConfigError(f"learning_rate must be positive; got {self.learning_rate}")
        if not 0.0 <= self.label_smoothing_factor < 1.0:
            raise ConfigError(
                f"label_smoothing_factor must be in [0, 1); got {self.label_smoothing_factor}"
            )


def learning_rate(step: int, *, base: float, warmup: int, total: int) -> float:
    """Return the rate of optimizer step ``step`` (from 0): linear warm-up, then cosine to zero.

    base * (step + 1) / warmup while step < warmup, else
    base * (1 + cos(pi * (step - warmup) / (total - warmup))) / 2   (authors' schedule, section 4.1).
    """
    if step < warmup:
        return base * (step + 1) / warmup
    return 0.5 * base * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
