"""Bench "tower": what adapters add to a whole vision tower, forward and in a training step.

Bases: the frozen tower's forward, and the floor, i.e. the least that training at the same sites can
cost. Beside the library's methods stand full fine-tuning, PEFT, and loops in the cost shape of the
authors' code; what computes the same function is checked against one float64 loop first.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from evolora.backbones.clip import DualEncoder
from evolora.bench.references import LoopLoRALayer, LoopMoELayer
from evolora.bench.peft_tower import peft_hidden, peft_installed, peft_tower
from evolora.bench.session import Session, rotated
from evolora.bench.settings import Settings
from evolora.bench.timing import Comparison, Variant
from evolora.bench.towers import (
    TARGETS,
    FindSites,
    build,
    expected,
    floor,
    hidden,
    in_float64,
    insert_copies,
    learner,
    linear_sites,
    mlp_sites,
    pixels,
    routed,
    twin,
)
from evolora.experts.sites import ExpertLayer, Site
from evolora.methods.base import Method
from evolora.methods.lora import JointLoRA, JointLoRAConfig, LoRALayer
from evolora.methods.moe_adapters import (
    MoEAdapters,
    MoEAdaptersConfig,
    MoELayer,
    OracleSelectorConfig,
)

R, EXPERTS, HIDDEN, TASKS = 16, 22, 64, 20


def measure(session: Session) -> None:
    """Compare adapters in a whole tower, then let the pool of experts grow."""
    s = session.settings
    layers, batch = s.layers or s.either(3, 2), s.batch or s.either(8, 2)
    backbone = build(s, layers)
    inputs = rotated(lambda: pixels(s, batch), session.device)
    variants = [
        *bases(backbone),
        *lora(backbone, inputs[0]),
        *moe(backbone, inputs[0], EXPERTS),
    ]
    title = f"{layers} layers of ViT-B/16, {batch} images, {s.dtype}"
    comparison = session.compare(title, variants, inputs, rounds=s.either(7, 5))


def bases(backbone: DualEncoder) -> list[Variant]:
    """Return the frozen tower, its floor and full fine-tuning (no optimizer)."""
    whole = copy.deepcopy(backbone.model)
    tuned = DualEncoder(whole, name="tuned")
    whole.requires_grad_(True)
    return [
        Variant(name="frozen base", run=hidden(twin(backbone)), passes=("forward",)),
        Variant(name="floor", run=floor(backbone, linear_sites), passes=("step",)),
        Variant(name="full fine-tuning", run=hidden(tuned), passes=("step",), modules=(whole,)),
    ]


def lora(backbone: DualEncoder, x: Tensor) -> list[Variant]:
    """Return one LoRA: by PEFT if it is installed, and the library's."""
    config = JointLoRAConfig(r=R, lora_alpha=R, target_modules=TARGETS, towers=("vision",))
    method = learner(JointLoRA, config, backbone)
    reference = expected(backbone, method, linear_sites, LoopLoRALayer, x)
    ours = Variant(
        name=f"LoRA r{R}",
        run=routed(method.backbone),
        modules=(method,),
        reference=reference,
    )
    if not peft_installed():
        return [ours]
    model = peft_tower(backbone, method)
    peft = replace(ours, name=f"PEFT LoRA r{R}", run=peft_hidden(model), modules=(model,))
    return [peft, ours]


def moe(backbone: DualEncoder, x: Tensor, experts: int, suffix: str = "") -> list[Variant]:
    """Return top-2 of a pool of bottlenecks: floor, loop in the authors' shape, the library's."""
    config = MoEAdaptersConfig(
        num_experts=experts,
        top_k=2,
        r=HIDDEN,
        dropout=0.0,
        towers=("vision",),
        selector=OracleSelectorConfig(),
    )
    method = learner(MoEAdapters, config, backbone)
    reference = expected(backbone, method, mlp_sites, LoopMoELayer, x)
    own_floor = f"floor beside the MLP{suffix}"
    ours = Variant(
        name=f"MoE top-2 of {experts}",
        run=routed(method.backbone),
        modules=(method,),
        step_base=own_floor,
        reference=reference,
    )
    loops = twin(backbone)
    layers = insert_copies(loops, method, mlp_sites, LoopMoELayer)
    loop = replace(ours, name=f"{ours.name}, loop", run=routed(loops), modules=(layers,))
    least = Variant(
        name=own_floor, run=floor(backbone, mlp_sites), passes=("step",), step_base=own_floor
    )
    return [least, loop, ours]
