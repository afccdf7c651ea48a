"""Bench "pairs": DeLo on samples of image and text, in one stream (ViLT) and in two (CLIP).

A training step is held against the floor of the same forward. The consistency term is a second
forward of the complete samples in ViLT, and has a floor of its own; in CLIP, whose towers never
meet, it runs nothing again. Predictions without being told the task are held against those with.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from evolora.backbones.base import Backbone, Batch
from evolora.backbones.clip_fusion import ClipFusion
from evolora.backbones.memory import Known
from evolora.backbones.vilt import TOWER, Vilt
from evolora.bench import towers
from evolora.bench.references import LoopFactorLayer
from evolora.bench.session import Session
from evolora.bench.settings import Settings
from evolora.bench.timing import Comparison, Variant
from evolora.bench.towers import END_TOKEN, LABELS, begin_gradient, build, taught, twin_of
from evolora.experts.factor_layer import Queries
from evolora.experts.sites import Site
from evolora.methods.base import Method
from evolora.methods.delo import DeLo, DeLoConfig
from evolora.methods.lora import JointLoRA, JointLoRAConfig
from evolora.randomness import StepRandom, generator
from evolora.routing.route import BASE, Route
from evolora.routing.selector import OracleSelectorConfig
from evolora.training.config import TrainingConfig
from evolora.training.prefix_cache import build_memory

SIDE, QUICK_SIDE, PATCH, TEXT = 384, 224, 32, 40
"""Pixels of ViLT's images (in full and in quick runs) and patches, and tokens of a text."""
START_TOKEN = 1022
TASKS = 5
CODES = (0, 1, 2, 1, 2, 0, 1, 2, 0, 1)
"""Missing code of each row, over and over: 0 complete, 1 without text, 2 without image."""
TARGETS = ("q_proj", "k_proj", "v_proj")
BASE_ROW, FLOOR, TWICE = "frozen base", "floor", "floor, complete samples twice"
EXPERTS, PLAIN, WHOLE = "DeLo, experts alone", "DeLo, no consistency term", "DeLo"
ANEW = "DeLo, queries computed in every step"
TOLD, UNTOLD, MIXED = "told the task", "not told, one task", f"not told, {TASKS} tasks mixed"
SEEN = "not told, samples seen before"


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A frozen model of image and text.

    Args:
        name: for titles.
        model: random weights, shared by all variants.
        wrap: makes a backbone of a model.
        side: of an image, in pixels.
        r: ranks that DeLo composes for a sample at a site.
        apart: towers that never meet; what a sample is described by is then its clean embedding.
    """

    name: str
    model: nn.Module
    wrap: Callable[[nn.Module], Backbone]
    side: int
    r: int
    apart: bool

    def backbone(self) -> Backbone:
        """Return a backbone with modules and hooks of its own, over the shared tensors."""
        return self.wrap(twin_of(self.model))


class EmptyText:
    """A tokenizer that is asked for the empty text alone."""

    pad_token_id = 0

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        """Return the start and the end token."""
        return {"input_ids": [START_TOKEN, END_TOKEN]}


def measure(session: Session) -> None:
    """Time steps and predictions on ViLT and on CLIP."""
    s = session.settings
    layers, count = s.layers or s.either(3, 1), s.batch or s.either(10, 3)
    fused, apart = vilt(s, layers), clip(s, layers)
    batch = samples(s, fused.side, count)
    twice = Variant(name=TWICE, run=floor(fused, twice=True), passes=("step",))
    done = steps(session, fused, batch, twice)
    session.goal("delo-step", done.between((PLAIN, "step"), (FLOOR, "step")).median)
    session.goal("delo-consistency", done.between((WHOLE, "step"), (TWICE, "step")).median)
    extra = predictions(session, fused, batch)

    batch = samples(s, apart.side, count)
    anew = losses(ANEW, taught(DeLo, DeLoConfig(), apart.backbone()), forget=True)
    done = steps(session, apart, batch, *s.either([anew], []))
    session.goal("delo-streams", done.between((WHOLE, "step"), (FLOOR, "step")).median)
    session.goal("task-free", max(extra, predictions(session, apart, batch)))


def vilt(settings: Settings, layers: int) -> Kind:
    """Return ViLT-B/32 with so many layers."""
    from transformers import ViltConfig, ViltModel

    side = settings.either(SIDE, QUICK_SIDE)
    config = ViltConfig(
        hidden_size=towers.WIDTH,
        intermediate_size=towers.MLP,
        num_attention_heads=towers.HEADS,
        num_hidden_layers=layers,
        image_size=side,
        patch_size=PATCH,
        max_position_embeddings=TEXT,
        vocab_size=1024,
    )
    torch.manual_seed(settings.seed)
    model: Any = ViltModel(config)
    model.eval().to(settings.device, settings.torch_dtype)
    return Kind(
        name=f"{layers} layers of ViLT-B/32",
        model=model,
        wrap=lambda model: Vilt(model, EmptyText(), name="random"),
        side=side,
        r=8,
        apart=False,
    )


def clip(settings: Settings, layers: int) -> Kind:
    """Return CLIP ViT-B/16 with so many layers in each tower."""
    return Kind(
        name=f"{layers} layers of both towers of CLIP ViT-B/16",
        model=build(settings, layers, text_layers=layers).model,
        wrap=lambda model: ClipFusion(model, EmptyText(), name="random"),
        side=towers.IMAGE,
        r=4,
        apart=True,
    )


def samples(settings: Settings, side: int, count: int) -> Batch:
    """Return random pairs of a training step, seven of ten without one side."""
    draw = generator(settings.seed, "pairs")
    codes = torch.tensor([CODES[row % len(CODES)] for row in range(count)])
    lengths = torch.randint(TEXT // 2, TEXT + 1, (count, 1), generator=draw)
    lengths[0] = TEXT
    lengths[codes == 1] = 2
    place = torch.arange(TEXT)
    ids = torch.randint(1, 1000, (count, TEXT), generator=draw)
    ids[:, 0] = START_TOKEN
    ids = torch.where(place == lengths - 1, END_TOKEN, ids).masked_fill(place >= lengths, 0)
    pixels = torch.randn(count, 3, side, side, generator=draw)
    pixels[codes == 2] = 0.0
    device = settings.device
    return Batch(
        inputs={
            "input_ids": ids.to(device),
            "attention_mask": (place < lengths).long().to(device),
            "pixel_values": pixels.to(device, settings.torch_dtype),
        },
        labels=torch.arange(count, device=device) % len(LABELS.classes),
        keys=("",) * count,
        task=0,
        random=StepRandom(settings.seed),
        present={"image": (codes != 2).to(device), "text": (codes != 1).to(device)},
    )


def remembered(batch: Batch) -> Known:
    """Return a memory of what the untouched model makes of the samples; no prefixes."""
    config = TrainingConfig(
        prefix_cache="off", augment=False, per_device_train_batch_size=len(batch)
    )
    names = tuple(str(row).encode() for row in range(len(batch)))
    return Known(samples=names, memory=build_memory(config, batch.labels.device))


def steps(session: Session, kind: Kind, batch: Batch, *own: Variant) -> Comparison:
    """Time training steps on known samples, as where images are not augmented.

    Args:
        session: gets the table.
        kind: the frozen model.
        batch: samples.
        own: variants for this kind alone.
    """
    s = session.settings
    plain, bare = DeLoConfig(consistency=0.0), DeLoConfig(consistency=0.0, align=0.0)
    variants = [
        Variant(name=BASE_ROW, run=frozen(kind.backbone()), passes=("forward",)),
        Variant(name=FLOOR, run=floor(kind), passes=("step",)),
        *s.either([lora(kind)], []),
        experts(kind, taught(DeLo, bare, kind.backbone()), batch),
        losses(PLAIN, taught(DeLo, plain, kind.backbone())),
        losses(WHOLE, taught(DeLo, DeLoConfig(), kind.backbone())),
        *own,
    ]
    title = f"{kind.name}, {len(batch)} samples, 7 of 10 without image or text"
    known = replace(batch, known=remembered(batch))
    return session.compare(title, variants, [known], rounds=s.either(7, 3), memory=not s.quick)


def sites(backbone: Backbone) -> list[Site]:
    """Return the Linears that get factors: in all towers."""
    return backbone.sites("linear", target_modules=TARGETS)


def frozen(backbone: Backbone) -> Callable[[Batch], Tensor]:
    """Return a function from samples to the embeddings of a model without experts."""

    def run(batch: Batch) -> Tensor:
        route = Route.of(BASE, len(batch), device=batch.labels.device)
        return backbone.encode(replace(batch, known=None), route)

    return run


def floor(kind: Kind, *, twice: bool = False) -> Callable[[Batch], Tensor]:
    """Return the least that training can cost: no experts, but their gradient.

    Args:
        kind: the frozen model.
        twice: complete samples run once more, without their text.
    """
    backbone = kind.backbone()
    begin_gradient(sites(backbone))
    run = frozen(backbone)

    def run_twice(batch: Batch) -> Tensor:
        complete = torch.stack([*batch.present.values()]).all(dim=0).nonzero()[:, 0]
        part = backbone.without(batch.take(complete), {"text": torch.ones_like(complete).bool()})
        return torch.cat([run(batch), run(part)])

    return run_twice if twice else run


def routed(method: Method) -> Callable[[Batch], Tensor]:
    """Return a function from samples to their embeddings by the first task's experts."""
    return lambda batch: method.backbone.encode(batch, method.make_route(0, batch))


def lora(kind: Kind) -> Variant:
    """Return one LoRA for all samples, of as many ranks as DeLo composes for each."""
    backbone = kind.backbone()
    config = JointLoRAConfig(
        r=kind.r, lora_alpha=kind.r, target_modules=TARGETS, towers=backbone.towers
    )
    method = taught(JointLoRA, config, backbone)
    backbone.host.merging = False  # one route at inference: what it adds when not folded
    return Variant(name=f"LoRA r{kind.r}", run=routed(method), modules=(method,))


def experts(kind: Kind, method: Method, batch: Batch) -> Variant:
    """Return DeLo's experts without any loss, held against loops in double precision."""
    exact = kind.wrap(copy.deepcopy(kind.model).double())
    queries = Queries(exact.modalities, "symmetric")
    if exact.one_stream:
        exact.watch_blocks(TOWER, queries.see)
    for site in sites(exact):
        layer = LoopFactorLayer(method.layers[site.key], queries).double()
        exact.host.insert(site, layer)
    pixels = batch.inputs["pixel_values"]
    double = replace(batch, inputs={**batch.inputs, "pixel_values": pixels.double()})
    # In half precision a near tie of scores may pick another factor than here.
    reference = None
    if pixels.dtype == torch.float32:
        with torch.no_grad():
            route = Route.of(0, len(batch), device=batch.labels.device)
            if kind.apart:
                seen = exact.encode_base(double).features["modalities"]
                route = replace(route, queries=seen)
            reference = exact.encode(double, route)
    return Variant(name=EXPERTS, run=routed(method), modules=(method,), reference=reference)


def losses(name: str, method: Method, *, forget: bool = False) -> Variant:
    """Return a whole step, from the samples to the sum of all losses.

    Args:
        name: of the variant.
        method: what learns.
        forget: nothing is known of the samples, as where images are augmented.
    """

    def run(batch: Batch) -> Tensor:
        loss: Tensor = method(replace(batch, known=None) if forget else batch)["loss"]
        return loss

    return Variant(name=name, run=run, passes=("step",), modules=(method,))


def predictions(session: Session, kind: Kind, batch: Batch) -> float:
    """Time answers; return how many frozen forwards not being told the task costs."""
    s = session.settings
    told = taught(DeLo, DeLoConfig(selector=OracleSelectorConfig()), kind.backbone(), TASKS)
    one, mixed = (taught(DeLo, DeLoConfig(), kind.backbone(), TASKS) for _ in range(2))
    features = one.backbone.encode_base(batch).features["modalities"]
    for task in range(TASKS):
        one.selector.learn(task, features if task == 0 else -features, features[:0], 0)
        mixed.selector.learn(task, features[task % len(batch)].unsqueeze(0), features[:0], 0)
    known = replace(batch, known=remembered(batch))
    frozen_pass = kind.backbone()
    ways: dict[str, Callable[[Batch], Tensor]] = {
        BASE_ROW: lambda batch: frozen_pass.encode_base(batch, features=False).embedding,
        TOLD: lambda batch: told.predict(batch, LABELS, oracle=0).scores,
        UNTOLD: lambda batch: one.predict(batch, LABELS).scores,
        MIXED: lambda batch: mixed.predict(batch, LABELS).scores,
        SEEN: lambda _: one.predict(known, LABELS).scores,
    }
    variants = [Variant(name=name, run=run, passes=("forward",)) for name, run in ways.items()]
    title = f"predictions, {kind.name}, {len(batch)} samples"
    table = session.table(title, ("forward", "fastest forward"))
    done = session.time(title, variants, [batch], rounds=s.either(7, 2), table=table)
    return done.extra((UNTOLD, "forward"), (TOLD, "forward"), (BASE_ROW, "forward"))
