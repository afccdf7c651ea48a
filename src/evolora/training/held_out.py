"""Which samples of a task train, which calibrate, and which teach its selector."""

from __future__ import annotations

from evolora.streams.task import Examples, Subset, Task

HELD_OUT_SHARE = 0.1
"""Share of a task's training samples kept for calibration when it brings no validation split."""
SELECTOR_SAMPLES = 4096
"""At most so many training samples teach a selector; more do not change its statistics."""


def split_held_out(task: Task) -> tuple[Examples, Examples]:
    """Return (train, held out): the task's validation split, or a tenth of its training samples."""
    if len(task.val):
        return task.train, task.val
    count = len(task.train)
    held = set(range(0, count, round(1 / HELD_OUT_SHARE)))
    if len(held) == count:
        return task.train, task.train
    kept = [row for row in range(count) if row not in held]
    return Subset(task.train, kept), Subset(task.train, sorted(held))


def spread(data: Examples) -> Subset:
    """Return at most SELECTOR_SAMPLES rows, spread evenly."""
    count = min(len(data), SELECTOR_SAMPLES)
    return Subset(data, [row * len(data) // count for row in range(count)])
