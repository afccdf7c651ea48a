"""Count what a configuration will cost, before any weight or image exists.

The backbone is built on the meta device (shapes without storage), the method is attached and walked
through the stream's tasks; every number is counted on the tensors that this allocates.
FLOPs of the base are counted by torch while a meta tensor runs through it; those of experts follow
from the shapes (two per multiply-add of the experts that answer one row).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evolora.allocation.value import FILE as ALLOCATION
from evolora.allocation.value import Allocation
from evolora.assets import ROOT, embedded_backbone
from evolora.backbones.base import Backbone
from evolora.backbones.loading import AUTO, WRITING, wrap_model
from evolora.backbones.shapes import ShapeModel
from evolora.config import BackboneConfig, RunConfig, build_method, load_stream, parse_config
from evolora.errors import ConfigError, DataError
from evolora.evaluation.training_cost import TowerTraining, base_flops, training_cost
from evolora.methods.base import Method
from evolora.routing.selector import AutoEncoderSelector
from evolora.storage.files import read_json
from evolora.streams.mcl import ORDER
from evolora.streams.task import LabelSpace

PARTS = {
    "/prompts.": "prompts",
    "/memory.": "prompts",
    "/answer.": "prompts",
    "/pooler.": "tuned_weights",
    ".bank.": "experts",
    ".trunk.": "experts",
    ".router.": "gates",
    ".routers.": "gates_and_noise",
    ".pools.": "adapters",
    "heads.": "heads",
    "vectors.": "class_vectors",
    "entries.": "entries",
    "tuned.": "tuned_weights",
    "elastic.": "importance",
    ".discriminator.": "discriminators",
    ".memory.": "remembered_features",
}
"""Mark in a tensor's name -> part it is counted under."""


@dataclass(frozen=True, kw_only=True)
class SiteCost:
    """Cost of one site.

    Args:
        name, tower, layer: where.
        parameters: values stored there after the last task.
        flops: extra FLOPs for one row (an image, or a prompt of full length).
    """

    name: str
    tower: str
    layer: int
    parameters: int
    flops: int


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What a configuration costs.

    Args:
        method, backbone: names.
        tasks: number of tasks counted.
        backbone_parameters: of the frozen model.
        parameters: part -> values stored after the last task ("experts", "gates_and_noise", ...).
        totals: sums the literature quotes: "adapters_and_routers" (experts, gates, noise), one
            "autoencoder", and everything "stored".
        trainable: values that train, per task in order; for activate-freeze an upper bound, since
            which experts a task freezes is only known from its data.
        trainable_parts: the same by part, those of the selector left out.
        full_tuning: values that would train per task if what experts stand in did, where the method
            tells it; else 0.
        saved: share of these that the method does not train, per task; None where nothing does.
        stored_bytes: float32 bytes after the last task, per task in order.
        flops: tower -> {"base", "experts"} for one row.
        training: tower -> how deep gradients go and what a training step costs for one row.
        sites: per site.
        allocation: which sites have experts of which task, where an allocator decides it. Scores of
            gradients need data: without, their number is right and their places are a guess.
    """

    method: str
    backbone: str
    tasks: int
    backbone_parameters: int
    parameters: Mapping[str, int]
    totals: Mapping[str, int]
    trainable: list[int]
    trainable_parts: list[Mapping[str, int]]
    full_tuning: list[int]
    saved: list[float | None]
    stored_bytes: list[int]
    flops: Mapping[str, Mapping[str, int]]
    training: Mapping[str, TowerTraining]
    sites: list[SiteCost]
    allocation: Allocation | None = None

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        allocation = None if self.allocation is None else self.allocation.to_json()
        return {**asdict(self), "allocation": allocation}


def inspect_run(folder: Path) -> Inspection:
    """Return what a run costs, with its experts where it has put them.

    Args:
        folder: of a run; tasks that it has not come to yet are not counted.

    Raises:
        StorageError: it is no run, or a file of it is damaged.
    """
    config = parse_config(read_json(folder / "config.json", kind="run")["config"])
    if not (folder / ALLOCATION).exists():
        return inspect_config(config)
    known = Allocation.load(folder / ALLOCATION)
    method = replace(config.method, allocation=str(folder / ALLOCATION))
    labels = _label_spaces(config, None)[: len(known.tasks)]
    return replace(_inspect(replace(config, method=method), labels), allocation=known)


def inspect_config(config: RunConfig, *, tasks: int | None = None) -> Inspection:
    """Return what a run will cost.

    Args:
        config: the run.
        tasks: number of tasks; None takes the stream's.
    """
    return _inspect(config, _label_spaces(config, tasks))


def _inspect(config: RunConfig, labels: list[LabelSpace]) -> Inspection:
    backbone = meta_backbone(config.backbone)
    method = build_method(config.method, backbone, seed=config.seed)
    trainable, stored = [], []
    writes = backbone.answers == "text"  # how many classes there are says nothing then
    full: list[int] = []
    trained: list[Mapping[str, int]] = []
    named = _modalities(config, backbone.takes_modalities)
    for index, (space, modalities) in enumerate(zip(labels, named, strict=False)):
        method.begin_task(f"task {index}", LabelSpace.of_texts() if writes else space, modalities)
        method.preview(index, None)
        trainable.append(_trainable(method))
        trained.append(_counted(method, method.trainable()))
        entries = method.entries
        full.append(entries.full_tuning(method.task_modalities, index) if entries else 0)
        if not method.joint:
            method.finish_task()
        stored.append(4 * sum(_parts(method).values()))
    parts = _parts(method)
    sites = _sites(method, backbone)
    flops = {
        tower: {
            "base": base,
            "experts": sum(site.flops for site in sites if site.tower == tower),
        }
        for tower, base in base_flops(backbone).items()
    }
    return Inspection(
        method=config.title,
        backbone=config.backbone.name_or_path,
        tasks=len(labels),
        backbone_parameters=sum(p.numel() for p in backbone.model.parameters()),
        parameters=parts,
        totals=_totals(method, parts),
        trainable=trainable,
        trainable_parts=trained,
        full_tuning=full,
        saved=[
            1 - own / all if own and all else None for own, all in zip(trainable, full, strict=True)
        ],
        stored_bytes=stored,
        flops=flops,
        training=training_cost(method, backbone, {t: c["experts"] for t, c in flops.items()}),
        sites=sites,
        allocation=method.allocation,
    )


def meta_backbone(wanted: BackboneConfig) -> Backbone:
    """Return a backbone of the named shape on the meta device.

    The shape comes from an embedded backbone, an embedded shape file, a local folder or the hub.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

    name = wanted.name_or_path
    shape = ROOT / "shapes" / f"{name.replace('/', '--')}.json"
    values = json.loads(shape.read_text(encoding="utf-8")) if shape.exists() else {}
    if "table" in values:
        return _shape_table(wanted, values)
    try:
        if values:
            config: Any = AutoConfig.for_model(**values)
        else:
            config = AutoConfig.from_pretrained(str(embedded_backbone(name) or name))
    except (OSError, ValueError) as error:
        known = ", ".join(
            p.stem.replace("--", "/") for p in sorted((ROOT / "shapes").glob("*.json"))
        )
        raise DataError(
            f"no configuration of backbone {name!r} (embedded shapes: {known})"
        ) from error
    writes = config.model_type in WRITING
    build: Any = (AutoModelForImageTextToText if writes else AutoModel).from_config
    with torch.device("meta"):
        model: nn.Module = build(config)
    return wrap_model(
        model,
        name=name,
        type=wanted.type,
        text_length=wanted.text_length,
        modalities=wanted.modalities,
    )


def _shape_table(wanted: BackboneConfig, table: Mapping[str, Any]) -> Backbone:
    """Return a backbone of a table's shape, which no stock class has."""
    with torch.device("meta"):
        model = ShapeModel(table)
    type = table["table"] if wanted.type == AUTO else wanted.type
    return wrap_model(model, name=wanted.name_or_path, type=type, text_length=wanted.text_length)


def _trainable(method: Method) -> int:
    count = sum(parameter.numel() for parameter in method.trainable().values())
    if isinstance(method.selector, AutoEncoderSelector):
        count += method.selector.bank.parameters_per_task()
    return count


def _counted(method: Method, tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the values of tensors by part, those of the selector left out."""
    parts: dict[str, int] = {}
    marks = {**method.counted_as, **PARTS}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not name.startswith("selector."):
            part = next((p for mark, p in marks.items() if mark in name), "other")
            parts[part] = parts.get(part, 0) + tensor.numel()
    return parts


def _parts(method: Method) -> dict[str, int]:
    """Return stored values by part; sums that the literature quotes are included by name."""
    parts = _counted(method, method.stored())
    if isinstance(method.selector, AutoEncoderSelector):
        one = method.selector.bank.parameters_per_task()
        parts["autoencoders"] = one * len(method.labels)
    return parts


def _totals(method: Method, parts: Mapping[str, int]) -> dict[str, int]:
    totals = {"stored": sum(parts.values())}
    if "adapters" in parts:
        totals["adapters_per_task"] = parts["adapters"] // len(method.labels)
    if "gates_and_noise" in parts:
        totals["adapters_and_routers"] = parts["experts"] + parts["gates_and_noise"]
    if isinstance(method.selector, AutoEncoderSelector):
        totals["autoencoder"] = method.selector.bank.parameters_per_task()
    return totals


def _sites(method: Method, backbone: Backbone) -> list[SiteCost]:
    tokens = {tower: backbone.tokens(tower) for tower in backbone.towers}
    sites = []
    for key, layer in method.layers.items():
        tower, index, *_ = key.split("/")
        count = getattr(layer, "flops", None)
        sites.append(
            SiteCost(
                name=key.replace("/", "."),
                tower=tower,
                layer=int(index),
                parameters=sum(
                    t.numel() for t in layer.state_dict().values() if t.is_floating_point()
                ),
                flops=int(count(tokens[tower])) if callable(count) else 0,
            )
        )
    return sites


def _modalities(config: RunConfig, plugged: bool) -> Iterator[tuple[str, ...]]:
    """Yield the modalities of each task where the model has some plugged in; then none for ever."""
    if config.stream["name"] == "mcl":
        for name in config.stream.get("order", ORDER):
            yield (name,)
    elif plugged:
        for task in load_stream(**config.stream):
            yield task.modalities
    yield from repeat(())


def _label_spaces(config: RunConfig, tasks: int | None) -> list[LabelSpace]:
    """Return a label space per task: of the published counts where the data need not be there."""
    from evolora.streams.cmml import BENCHMARKS
    from evolora.streams.instruction_sets import SETS

    counts: list[int] | None = None
    name = str(config.stream["name"])
    if tasks is not None:
        if tasks < 1:
            raise ConfigError(f"tasks must be at least 1; got {tasks}")
        counts = [1] * tasks
    elif name == "mtil":
        from evolora.streams.mtil_prompts import CLASS_COUNTS, ORDERS

        order = config.stream.get("order", "I")
        names = ORDERS[order] if isinstance(order, str) else order
        counts = [CLASS_COUNTS[task] for task in names]
    elif name == "mcl":
        return [LabelSpace.of_texts() for _ in config.stream.get("order", ORDER)]
    elif name == "class-incremental":
        counts = [1] * (int(config.stream["steps"]) + bool(config.stream.get("base_classes")))
    elif name in BENCHMARKS:
        counts = [BENCHMARKS[name].classes] * BENCHMARKS[name].tasks
    elif name in SETS:
        return [LabelSpace.of_texts() for _ in config.stream.get("order") or SETS[name].tasks]
    if counts is None:
        options = {key: value for key, value in config.stream.items() if key != "name"}
        return [task.labels for task in load_stream(name, **options)]
    return [LabelSpace(classes=tuple(f"class {i}" for i in range(count))) for count in counts]
