"""The accelerate runtime, set up once: processes, devices, precision, trackers."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from evolora.errors import ConfigError, suggest

if TYPE_CHECKING:
    from accelerate import Accelerator

    from evolora.training.batches import Share
    from evolora.training.config import TrainingConfig

logger = logging.getLogger(__name__)


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
                f"report_to: unknown tracker {name!r}{suggest(name, known)} "
                f"(known: {', '.join(known)})"
            )
        if name not in installed:
            raise ConfigError(f"report_to: tracker {name!r} is not installed; pip install {name}")
    # Experts a batch does not choose get no gradient; usage counts stay each process's own.
    parallel = DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)
    # Precision is the loop's own (autocast per step): accelerate keeps one per interpreter, which a
    # second learner could not choose, and wraps the method's forward for good.
    accelerator = Accelerator(
        mixed_precision="no",
        log_with=list(config.report_to) or None,
        project_dir=str(folder) if folder else None,
        kwargs_handlers=[parallel],
    )
    _warn_if_alone()
    if config.report_to:
        accelerator.init_trackers("evolora")
    return accelerator


def _warn_if_alone() -> None:
    """Warn where ``accelerate launch --cpu --num_processes N`` has started one process only.

    accelerate 1.x then names a rendezvous but starts no second process (it leaves that to mpirun).
    """
    if "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ and not _under_mpi():
        logger.warning(
            "accelerate launch --cpu has started one process only; for N processes on the CPU use "
            "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N"
        )


def _under_mpi() -> bool:
    launchers = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
    return any(name in os.environ for name in launchers)


def share_of(accelerator: Accelerator) -> Share:
    """Return this process's part of the global batch."""
    from evolora.training.batches import Share

    return Share(index=accelerator.process_index, count=accelerator.num_processes)
