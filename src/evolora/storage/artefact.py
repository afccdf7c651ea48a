"""Artefact: the portable learned result. safetensors and JSON, a model card, no training data.

evolora.json        what was learned, on which backbone (hash of its weights), with which method
experts.safetensors everything the method added: experts, gates, selector
README.md           model card
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evolora.errors import ConfigError, StorageError
from evolora.storage.files import read_json, read_tensors, write_bytes, write_json, write_tensors
from evolora.storage.state import export_state, load_state

if TYPE_CHECKING:
    from torch import nn

    from evolora.backbones.base import Backbone
    from evolora.learner import Learner

FORMAT = 1
INDEX, TENSORS, CARD = "evolora.json", "experts.safetensors", "README.md"


def save_artefact(learner: Learner, folder: Path) -> None:
    """Write the artefact; the index is written last, so an interrupted write is no artefact."""
    import evolora

    method = learner.method
    sha256 = write_tensors(folder / TENSORS, export_state(method), {"format": "evolora"})
    record = {
        "format_version": FORMAT,
        "evolora": evolora.__version__,
        "method": dataclasses.asdict(method.config),
        "seed": learner.seed,
        "backbone": learner.backbone.describe(),
        "tasks": [
            {"name": name, "classes": list(labels.classes), "templates": list(labels.templates)}
            for name, labels in zip(method.task_names, method.labels, strict=True)
        ],
        "tensors": {"file": TENSORS, "sha256": sha256},
        "cost": [cost.to_json() for cost in learner.costs],
    }
    write_bytes(folder / CARD, _card(learner).encode())
    write_json(folder / INDEX, record)


def load_artefact(
    folder: Path, model: nn.Module | Backbone | None = None, processor: Any | None = None
) -> Learner:
    """Return the learner an artefact holds, on the backbone it was made on."""
    from evolora.backbones.base import Backbone
    from evolora.backbones.clip import DualEncoder, load_dual_encoder
    from evolora.evaluation.cost import Cost
    from evolora.learner import Learner
    from evolora.streams.task import LabelSpace

    record = read_json(folder / INDEX, kind="artefact", newest=FORMAT)
    wanted = record["backbone"]
    if model is None:
        model = load_dual_encoder(wanted["name_or_path"])
    elif not isinstance(model, Backbone):
        model = DualEncoder(model, processor, name=wanted["name_or_path"])
    if model.fingerprint() != wanted["sha256"]:
        raise StorageError(
            f"{folder} was learned on {wanted['class']} {wanted['name_or_path']!r} with weights "
            f"sha256 {wanted['sha256'][:12]}...; the given {type(model.model).__name__} has "
            f"{model.fingerprint()[:12]}..."
        )
    learner = Learner(model, method=_method_config(record["method"], folder), seed=record["seed"])
    for task in record["tasks"]:
        labels = LabelSpace(classes=tuple(task["classes"]), templates=tuple(task["templates"]))
        learner.method.begin_task(task["name"], labels)
        learner.method.finish_task()
    load_state(learner.method, read_tensors(folder / TENSORS, sha256=record["tensors"]["sha256"]))
    learner.costs = [Cost(**cost) for cost in record["cost"]]
    learner.method.eval()
    return learner


def _method_config(value: dict[str, Any], folder: Path) -> Any:
    from evolora.config import parse_config
    from evolora.registry import METHODS, STREAMS

    if value.get("type") not in METHODS:
        raise StorageError(
            f"{folder} was made by method {value.get('type')!r}, which is not installed here "
            f"(known: {', '.join(METHODS.names())})"
        )
    try:
        return parse_config({"method": value, "stream": STREAMS.names()[0]}).method
    except ConfigError as error:
        raise StorageError(f"{folder / INDEX} is corrupt: {error}") from error


def _card(learner: Learner) -> str:
    """Return the model card in Markdown with a YAML header."""
    method = learner.method
    backbone = learner.backbone.describe()
    lines = [
        "---",
        "library_name: evolora",
        f"base_model: {backbone['name_or_path'] or backbone['class']}",
        "tags: [continual-learning, mixture-of-experts, low-rank]",
        "---",
        "",
        f"# {method.config.type} on {backbone['name_or_path'] or backbone['class']}",
        "",
        f"Learned with Evolora, task after task; the backbone ({backbone['class']}) is unchanged and",
        "not included. Experts here are not a PEFT adapter; load them with Evolora:",
        "",
        "```python",
        "import evolora",
        'learner = evolora.Learner.from_pretrained("this folder")',
        'learner.predict("image.png")',
        "```",
        "",
        f"Task known at inference: {method.routing}.",
        "",
        "| task | classes |",
        "|---|---|",
        *(
            f"| {name} | {len(labels.classes)} |"
            for name, labels in zip(method.task_names, method.labels, strict=True)
        ),
        "",
        f"Backbone weights sha256: `{backbone['sha256']}`",
        "",
    ]
    if learner.costs:
        lines.insert(-2, f"Stored parameters: {learner.costs[-1].stored_parameters:,}")
    return "\n".join(lines)
