"""Artefact: the portable learned result. safetensors and JSON, a model card, no training data.

evolora.json        what was learned, on which backbone (hash of its weights), with which method
experts.safetensors everything the method added: experts, gates, selector
README.md           model card
allocation.json     which sites have experts of which task, where that was chosen: for readers, and
                    for the ``allocation`` of other runs
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evolora.allocation.value import FILE as ALLOCATION
from evolora.errors import StorageError, StreamError
from evolora.storage.files import read_json, read_tensors, write_bytes, write_json, write_tensors
from evolora.storage.state import export_state, load_state

if TYPE_CHECKING:
    from torch import nn

    from evolora.backbones.base import Backbone
    from evolora.evaluation.cost import Cost
    from evolora.learner import Learner
    from evolora.streams.task import LabelSpace
    from evolora.training.config import TrainingConfig

FORMAT = 1
OPTIONS = ("type", "text_length", "modalities")
"""What of a backbone's description decides how its model is wrapped."""
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
            {
                "name": name,
                "classes": list(labels.classes),
                "templates": list(labels.templates),
                "multi_label": labels.multi_label,
                "modalities": list(modalities),
                **({"max_new_tokens": labels.max_new_tokens} if labels.text else {}),
            }
            for name, labels, modalities in zip(
                method.task_names, method.labels, method.task_modalities, strict=True
            )
        ],
        "tensors": {"file": TENSORS, "sha256": sha256},
        "cost": [cost.to_json() for cost in learner.costs],
    }
    write_bytes(folder / CARD, _card(learner).encode())
    if method.allocation is not None:
        method.allocation.save(folder / ALLOCATION)
    write_json(folder / INDEX, record)


def load_artefact(
    folder: Path,
    model: nn.Module | Backbone | None = None,
    processor: Any | None = None,
    *,
    training: TrainingConfig | None = None,
) -> Learner:
    """Return the learner an artefact holds, on the backbone it was made on.

    Args:
        folder: what :func:`save_artefact` wrote.
        model: the backbone; None loads the one the artefact names.
        processor: its processor.
        training: how further tasks are trained.

    Raises:
        StorageError: missing, corrupt, of a newer format, or made on another backbone.
        DataError: no model was given and the one the artefact names is not to be found.
    """
    from evolora.learner import Learner

    record = read_json(folder / INDEX, kind="artefact", newest=FORMAT)
    try:
        index = _parse(record)
    except (KeyError, TypeError, AttributeError, StreamError) as error:
        reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else error
        raise StorageError(f"{folder / INDEX} is corrupt: {reason}") from error
    backbone = _backbone(folder, index.backbone, model, processor)
    config = _method_config(index.method, folder)
    tensors = read_tensors(folder / TENSORS, sha256=index.sha256)
    learner = Learner(backbone, method=config, seed=index.seed, training=training)
    for name, labels, modalities in index.tasks:
        learner.method.begin_task(name, labels, modalities)
        learner.method.finish_task()
    load_state(learner.method, tensors)
    learner.costs = list(index.costs)
    learner.method.eval()
    return learner


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Index:
    """What ``evolora.json`` says, see the module docstring."""

    backbone: Mapping[str, Any]
    method: Mapping[str, Any]
    tasks: tuple[tuple[str, LabelSpace, tuple[str, ...]], ...]
    costs: tuple[Cost, ...]
    sha256: str
    seed: int


def _parse(record: Mapping[str, Any]) -> _Index:
    """Return the index; KeyError, TypeError, AttributeError or StreamError where it is damaged."""
    from evolora.evaluation.cost import Cost

    return _Index(
        backbone={
            **{key: record["backbone"][key] for key in OPTIONS if key in record["backbone"]},
            **{key: str(record["backbone"][key]) for key in ("class", "name_or_path", "sha256")},
        },
        method=dict(record["method"].items()),
        tasks=tuple(
            (str(task["name"]), _labels(task), tuple(task.get("modalities", ())))
            for task in record["tasks"]
        ),
        costs=tuple(Cost(**cost) for cost in record["cost"]),
        sha256=str(record["tensors"]["sha256"]),
        seed=record["seed"],
    )


def _labels(task: Mapping[str, Any]) -> LabelSpace:
    """Return a task's label space; one that has a length in tokens is of texts."""
    from evolora.streams.task import LabelSpace

    if "max_new_tokens" in task:
        return LabelSpace.of_texts(int(task["max_new_tokens"]))
    return LabelSpace(
        classes=tuple(task["classes"]),
        templates=tuple(task["templates"]),
        multi_label=bool(task.get("multi_label", False)),
    )


def _backbone(
    folder: Path,
    wanted: Mapping[str, Any],
    model: nn.Module | Backbone | None,
    processor: Any | None,
) -> Backbone:
    """Return the artefact's backbone, found or given; refuse any other."""
    from evolora.backbones.base import Backbone
    from evolora.backbones.loading import load_backbone, wrap_model

    name = wanted["name_or_path"]
    options = {key: wanted[key] for key in OPTIONS if key in wanted}
    if model is None and not name:
        raise StorageError(
            f"{folder} was learned on a {wanted['class']} that had no name (weights sha256 "
            f"{wanted['sha256'][:12]}...); pass it as model="
        )
    if model is None:
        model = load_backbone(name, **options)
    elif not isinstance(model, Backbone):
        model = wrap_model(model, processor, name=name, **options)
    if model.fingerprint() != wanted["sha256"]:
        raise StorageError(
            f"{folder} was learned on {wanted['class']} {name!r} with weights "
            f"sha256 {wanted['sha256'][:12]}...; the given {type(model.model).__name__} has "
            f"{model.fingerprint()[:12]}..."
        )
    return model


def _method_config(value: Mapping[str, Any], folder: Path) -> Any:
    from evolora.config import check_method
    from evolora.registry import METHODS

    if value.get("type") not in METHODS:
        raise StorageError(
            f"{folder} was made by method {value.get('type')!r}, which is not installed here "
            f"(known: {', '.join(METHODS.names())})"
        )
    faults: list[str] = []
    config = check_method(value, faults)
    if faults:
        raise StorageError(f"{folder / INDEX} is corrupt: {'; '.join(faults)}")
    return config


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
        f"Learned with Evolora, task by task; the backbone ({backbone['class']}) is unchanged and",
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
            f"| {name} | {'texts' if labels.text else len(labels.classes)} |"
            for name, labels in zip(method.task_names, method.labels, strict=True)
        ),
        "",
        f"Backbone weights sha256: `{backbone['sha256']}`",
        "",
    ]
    if learner.costs:
        lines.insert(-2, f"Stored parameters: {learner.costs[-1].stored_parameters:,}")
    return "\n".join(lines)
