"""One picture of a comparison (PNG) for a README or a slide."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from evolora.errors import ConfigError
from evolora.report.figures import over_time, seen_means, stacked
from evolora.report.records import RunRecord
from evolora.report.style import LINES
from evolora.report.svg import short
from evolora.report.tables import Comparison, Group, compare

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage


def write_picture(runs: Sequence[RunRecord], out: str | Path) -> Path:
    """Write the picture and return its path.

    Left: mean score over the tasks learned so far, one line per method. Right: the matrices of
    two methods side by side, the one that forgets most and the one with the best Last among those
    that route task-free (among all, if none does).

    Args:
        runs: of one comparison, as in `write_report`.
        out: a ``.png`` file.

    Raises:
        ConfigError: no run, runs that do not compare, or another kind of file.
        StorageError: the file cannot be written.
    """
    comparisons = compare(runs)
    if len(comparisons) > 1:
        named = ", ".join(f"{one.stream} ({len(one.tasks)} tasks)" for one in comparisons)
        raise ConfigError(f"one picture shows one stream and order; got {named}")
    if Path(out).suffix.lower() != ".png":
        raise ConfigError(f"a picture is written as .png; got {Path(out).name!r}")
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no window, no global state
    from matplotlib.figure import Figure

    from evolora.storage.files import write_bytes

    comparison = comparisons[0]
    shown = _two(comparison)
    figure = Figure(figsize=(5.6 + 4.3 * len(shown), 4.7), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)  # attaches itself
    axes = figure.subplots(1, 1 + len(shown), width_ratios=[1.15] + [1.0] * len(shown))
    panels = list(np.atleast_1d(axes))
    _draw_curves(panels[0], comparison)
    image = None
    for axis, group in zip(panels[1:], shown, strict=True):
        image = _draw_matrix(axis, group)
    if image is not None:
        figure.colorbar(image, ax=panels[1:], label="score on the test set (%)", shrink=0.8)
    data = io.BytesIO()
    figure.savefig(
        data, format="png", metadata={"Software": None}
    )  # the same input gives the same file
    write_bytes(Path(out), data.getvalue())
    return Path(out)


def _two(comparison: Comparison) -> list[Group]:
    """The most forgetful group and the best one; one alone if they are the same."""

    def of(group: Group, key: str) -> float:
        value = group.value(key)
        return -1.0 if value is None else value.mean

    free = [group for group in comparison.groups if group.task_free]
    best = max(free or comparison.groups, key=lambda group: of(group, "last"))
    worst = max(comparison.groups, key=lambda group: of(group, "forgetting"))
    return [best] if worst is best or of(worst, "forgetting") < 0 else [worst, best]


def _draw_curves(axis: Axes, comparison: Comparison) -> None:
    positions = np.arange(1, len(comparison.tasks) + 1)
    for style, group in enumerate(comparison.groups):
        runs = 100 * stacked(group, seen_means)
        color, dash = LINES[style % len(LINES)]
        pattern = (0, tuple(float(x) for x in dash.split())) if dash else "solid"
        axis.plot(
            positions,
            runs.mean(axis=0),
            color=color,
            linestyle=pattern,
            marker="o",
            markersize=3.5,
            linewidth=3.5 if group.task_free else 1.6,
            zorder=2.0 if group.task_free else 2.5,
            label=group.label,
        )
        if len(runs) > 1:
            axis.fill_between(
                positions, runs.min(axis=0), runs.max(axis=0), color=color, alpha=0.15, lw=0
            )
    axis.set(
        ylim=(0, 100),
        xlabel="tasks learned",
        ylabel="mean score on them (%)",
        title=f"{comparison.stream}: tasks learned so far",
    )
    axis.set_xticks(positions)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, frameon=False, loc="best")


def _draw_matrix(axis: Axes, group: Group) -> AxesImage:
    values = 100 * stacked(group, over_time).mean(axis=0)[1:]
    tasks = [short(name) for name in group.runs[0].run.tasks]
    image = axis.imshow(values, cmap="cividis", vmin=0, vmax=100, aspect="equal")
    ticks = range(len(tasks))
    axis.set_xticks(ticks, tasks, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
    axis.set_yticks(ticks, tasks, fontsize=8)
    axis.set(title=group.label, xlabel="tested on", ylabel="after learning")
    axis.spines[:].set_visible(False)
    for (i, j), value in np.ndenumerate(values):
        if not np.isnan(value):
            ink = "white" if value < 55 else "#111111"
            axis.text(j, i, f"{value:.0f}", ha="center", va="center", color=ink, fontsize=7.5)
    return image
