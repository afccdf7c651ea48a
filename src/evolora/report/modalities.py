"""The report's table of continual learning of modalities: what each stage learned and lost."""

from __future__ import annotations

from html import escape

from evolora.evaluation.metrics import forgetting_of_stages, new_modalities
from evolora.report.parts import cell
from evolora.report.tables import Comparison, Group, value_of

NOTE = (
    "T: the score on the stage's modality when it was just learned. F: the mean over the ones "
    "before it of the score when learned minus the score now; negative is gain. The first task is "
    "what the base model knows. Formulas are ours, for PathWeave's two numbers."
)


def section(comparison: Comparison) -> list[str]:
    """Return the page's section on stages; empty where no run plugs modalities in."""
    groups = [g for g in comparison.groups if g.runs[0].run.backbone.get("type") == "qformer"]
    stages = comparison.tasks[1:]
    if not groups or not stages:
        return []
    heads = "".join(f'<th colspan="2">{escape(stage)}</th>' for stage in stages)
    below = "<th>T</th><th>F</th>" * len(stages)
    rows = "".join(_row(group, len(stages)) for group in groups)
    return [
        "<h2>Modality after modality</h2>",
        f"<p>{NOTE} In %.</p>",
        f'<div class="scroll"><table><thead><tr><th rowspan="2">Method</th>{heads}</tr>'
        f"<tr>{below}</tr></thead><tbody>{rows}</tbody></table></div>",
    ]


def _row(group: Group, stages: int) -> str:
    learned = [new_modalities(run.matrix.values) for run in group.runs]
    lost = [forgetting_of_stages(run.matrix.values) for run in group.runs]
    cells = "".join(
        cell(value_of([run[stage] for run in runs]), "percent")
        for stage in range(stages)
        for runs in (learned, lost)
    )
    return f"<tr><td>{escape(group.label)}</td>{cells}</tr>"
