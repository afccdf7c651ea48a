"""Settings of training, named as in ``transformers.TrainingArguments``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from evolora.errors import ConfigError

CHOICES = {
    "mixed_precision": ("no", "bf16"),
    "prefix_cache": ("auto", "off", "ram", "file"),
    "prefix_cache_dtype": ("auto", "float32", "float16"),
    "lr_scheduler_type": ("cosine", "legacy"),
}
LEGACY_START, LEGACY_EPOCHS = 1e-8, 40
"""Rate before the first step, and the horizon of the cosine, of :func:`legacy_rate`."""


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
        mixed_precision: "no" or "bf16" (fp16 needs a loss scaler, gains nothing).
        gradient_checkpointing: keep only the inputs of blocks and run each again in backward: less
            memory, a third more time.
        prefix_cache: keep activations below the lowest expert: "ram", "file" (a temporary file),
            "off", or "auto", which is "ram" wherever it is possible.
        prefix_cache_bytes: its bound; what does not fit is computed each time.
        prefix_cache_dtype: "float32", "float16" (half the room, rounds), or "auto": float16 in a
            file, float32 in memory.
        prefix_cache_dir: folder of the file; None is the system's temporary folder.
        report_to: accelerate trackers ("tensorboard", "trackio", "wandb"); JSONL is always written.
        lr_scheduler_type: "cosine", or "legacy" as PathWeave's released code has it, see
            :func:`legacy_rate`.
        steps_per_epoch: of "legacy": steps between its rates (published: 1000; audio and point
            clouds 5000).
        known_tasks: what the model is taken to know: these tasks are tested, and stored as learned,
            but no step is made on them.
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
    gradient_checkpointing: bool = False
    prefix_cache: Literal["auto", "off", "ram", "file"] = "auto"
    prefix_cache_bytes: int = 2 * 2**30
    prefix_cache_dtype: Literal["auto", "float32", "float16"] = "auto"
    prefix_cache_dir: str | None = None
    report_to: tuple[str, ...] = ()
    lr_scheduler_type: Literal["cosine", "legacy"] = "cosine"
    steps_per_epoch: int = 1000
    known_tasks: tuple[str, ...] = ()

    later: ClassVar[tuple[str, ...]] = ("lr_scheduler_type", "steps_per_epoch", "known_tasks")
    """Settings that came later: at their defaults they are left out of a run's hash."""

    def __post_init__(self) -> None:
        at_least_one = (
            "max_steps",
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "save_steps",
            "logging_steps",
            "steps_per_epoch",
        )
        faults = [
            f"{name} must be at least 1; got {getattr(self, name)}"
            for name in at_least_one
            if getattr(self, name) < 1
        ]
        rates = {f"learning_rates[{name!r}]": rate for name, rate in self.learning_rates.items()}
        for name, rate in {"learning_rate": self.learning_rate, **rates}.items():
            if not rate > 0 or not math.isfinite(rate):
                faults.append(f"{name} must be positive; got {rate}")
        for name in (
            "warmup_steps",
            "dataloader_num_workers",
            "weight_decay",
            "prefix_cache_bytes",
        ):
            if not getattr(self, name) >= 0:
                faults.append(f"{name} must be at least 0; got {getattr(self, name)}")
        for name in ("adam_beta1", "adam_beta2", "label_smoothing_factor"):
            if not 0.0 <= getattr(self, name) < 1.0:
                faults.append(f"{name} must be in [0, 1); got {getattr(self, name)}")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            faults.append(f"max_grad_norm must be positive or None; got {self.max_grad_norm}")
        if self.max_classes_per_step is not None and self.max_classes_per_step < 2:
            faults.append(
                f"max_classes_per_step must be at least 2 or None; got {self.max_classes_per_step}"
            )
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                known = " or ".join(repr(choice) for choice in allowed)
                faults.append(f"{name} must be {known}; got {getattr(self, name)!r}")
        trackers: Any = self.report_to
        if isinstance(trackers, str):
            faults.append(f"report_to must be a list of trackers; got {trackers!r}")
        if faults:
            raise ConfigError("; ".join(faults))

    @property
    def cached_dtype(self) -> str:
        """Type in which prefixes are kept: "float32" or "float16"."""
        if self.prefix_cache_dtype != "auto":
            return self.prefix_cache_dtype
        return "float16" if self.prefix_cache == "file" else "float32"


def learning_rate(step: int, *, base: float, warmup: int, total: int) -> float:
    """Return the rate of optimizer step ``step`` (from 0): linear warm-up, then cosine to zero.

    base * (step + 1) / warmup while step < warmup, else
    base * (1 + cos(pi * (step - warmup) / (total - warmup))) / 2   (the authors' schedule).
    """
    if step < warmup:
        return base * (step + 1) / warmup
    return 0.5 * base * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def legacy_rate(step: int, *, base: float, warmup: int, epoch: int) -> float:
    """Return the rate of optimizer step ``step`` (from 0) by PathWeave's released code (LAVIS).

    Inner epoch k has ``epoch`` steps. In the first one the rate rises from 1e-8 to ``base`` over
    ``warmup`` steps and stays there; in a later one it is base * (1 + cos(pi * k / 40)) / 2 at all
    of its steps, however long training lasts, and zero from k = 40 on.
    """
    k = min(step // epoch, LEGACY_EPOCHS)
    if k > 0:
        return 0.5 * base * (1 + math.cos(math.pi * k / LEGACY_EPOCHS))
    start = min(LEGACY_START, base)
    return base if step >= warmup else start + (base - start) * step / warmup


def rate_of(config: TrainingConfig, step: int, *, base: float, total: int) -> float:
    """Return the rate of optimizer step ``step`` of ``total`` by the configured schedule."""
    warmup = config.warmup_steps
    if config.lr_scheduler_type == "legacy":
        return legacy_rate(step, base=base, warmup=warmup, epoch=config.steps_per_epoch)
    return learning_rate(step, base=base, warmup=warmup, total=total)
