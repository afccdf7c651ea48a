"""Bench "tower": what adapters add to a whole vision tower, forward and in a training step.

Bases: the frozen tower's forward, and the floor, i.e. the least that training at the same sites can
cost. Beside the library's methods stand full fine-tuning, PEFT, and loops in the cost shape of the
authors' code; what computes the same function is checked against one float64 loop first.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from evolora.backbones.clip import DualEncoder
from evolora.bench.references import LoopLoRALayer, LoopMoELayer
from evolora.bench.session import Session, rotated
from evolora.bench.settings import Settings
from evolora.bench.timing import Comparison, Variant
from evolora.bench.towers import (
    TARGETS,
    FindSites,
    build,
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
    if importlib.util.find_spec("peft") is None:
        return [ours]
    adapted, model = peft_lora(backbone, method)
    return [replace(ours, name=f"PEFT LoRA r{R}", run=hidden(adapted), modules=(model,)), ours]


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


def expected(
    backbone: DualEncoder,
    method: Method,
    sites: FindSites,
    make: Callable[[nn.Module], ExpertLayer],
    x: Tensor,
) -> Tensor:
    """Return what the method's function gives in double precision, computed by naive loops."""
    exact = in_float64(backbone)
    insert_copies(exact, method, sites, make)
    with torch.no_grad():
        return routed(exact)(x.double())


def peft_lora(backbone: DualEncoder, method: Method) -> tuple[DualEncoder, nn.Module]:
    """Return a twin with PEFT's LoRA of the method's weights, and the PEFT model."""
    from peft import LoraConfig, get_peft_model

    other = twin(backbone)
    names = {module: name for name, module in other.model.named_modules()}
    sites = linear_sites(other)
    targets = [names[site.module] for site in sites]
    config = LoraConfig(r=R, lora_alpha=R, target_modules=targets)
    model: nn.Module = get_peft_model(other.model, config)
    for site, target in zip(sites, targets, strict=True):
        bank: Any = method.layers[site.key].bank
        adapted: Any = other.model.get_submodule(target)
        with torch.no_grad():
            adapted.lora_A["default"].weight.copy_(bank.A.all()[0])
            adapted.lora_B["default"].weight.copy_(bank.B.all()[0].T)
    return other, model
