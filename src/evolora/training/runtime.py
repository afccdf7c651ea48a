"""The accelerate runtime, set up once: processes, devices, precision, trackers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from evolora.errors import ConfigError, suggest

if TYPE_CHECKING:
    from accelerate import Accelerator

    from evolora.training.batches import Share
    from evolora.training.config import TrainingConfig


def build_accelerator(config: TrainingConfig, folder: Path | None = None) -> Accelerator:
    """Return the accelerator of a run: one process, or what ``accelerate launch`` started.

    Raises:
        ConfigError: a tracker of ``report_to`` is unknown or not installed.
    """
    from accelerate import Accelerator
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
    from accelerate.utils import DistributedDataParallelKwargs

    installed = [str(name) for name in get_available_trackers()]
    known = sorted(LOGGER_TYPE_TO_CLASS)
    for name in config.report_to:
        if name not in known:
            raise ConfigError(
                f"report_to: unknown tracker {name!r}{suggest(name, known)} (known: {', '.join(known)})"
            )
        if name not in installed:
            raise ConfigError(f"report_to: tracker {name!r} is not installed; pip install {name}")
    # Experts that a batch does not choose get no gradient; usage counts must stay each process's own.
    parallel = DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        log_with=list(config.report_to) or None,
        project_dir=str(folder) if folder else None,
        kwargs_handlers=[parallel],
    )
    if config.report_to:
        accelerator.init_trackers("evolora")
    return accelerator


def share_of(accelerator: Accelerator) -> Share:
    """Return this process's part of the global batch."""
    from evolora.training.batches import Share

    return Share(index=accelerator.process_index, count=accelerator.num_processes)
