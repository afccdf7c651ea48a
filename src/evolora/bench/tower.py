"""Bench "tower": what adapters add to a whole vision tower, forward and in a training step.

Bases: the frozen tower's forward, and the floor, i.e. the least that training at the same sites can
cost. Beside the library's methods stand full fine-tuning, PEFT, and loops in the cost shape of the
authors' code; what computes the same function is checked against one float64 loop first.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from evolora.backbones.clip import DualEncoder
from evolora.bench.peft_tower import peft_hidden, peft_installed, peft_tower
from evolora.bench.references import LoopLoRALayer, LoopMoELayer
from evolora.bench.session import Session, rotated
from evolora.bench.timing import Comparison, Variant
from evolora.bench.towers import (
    TARGETS,
    build,
    expected,
    floor,
    hidden,
    insert_copies,
    learner,
    linear_sites,
    mlp_sites,
    pixels,
    routed,
    twin,
)
from evolora.experts.layers import SumLayer
from evolora.methods.lora import JointLoRA, JointLoRAConfig, LoRAPerTask, LoRAPerTaskConfig
from evolora.methods.moe_adapters import MoEAdapters, MoEAdaptersConfig
from evolora.routing.selector import OracleSelectorConfig

R, EXPERTS, HIDDEN, TASKS = 16, 22, 64, 20
LORA, PEFT, TUNED = f"LoRA r{R}", f"PEFT LoRA r{R}", "full fine-tuning"
MOE = f"top-2 of {EXPERTS} experts"
HOW = ("loop", "stacked", "merged")
LOOP, STACKED, MERGED = (f"{TASKS} experts on for all, {how}" for how in HOW)


def measure(session: Session) -> None:
    """Compare adapters in a whole tower, then let the pool and the number of tasks grow."""
    s = session.settings
    layers, batch = s.layers or s.either(3, 2), s.batch or s.either(8, 1)
    backbone = build(s, layers)
    inputs = rotated(lambda: pixels(s, batch), session.device)
    variants = [
        *bases(backbone),
        *lora(backbone, inputs[0]),
        *accumulated(backbone, inputs[0], TASKS),
        *moe(backbone, inputs[0], EXPERTS),
    ]
    title = f"{layers} layers of ViT-B/16, {batch} images, {s.dtype}"
    rounds, memory = s.either(7, 3), not s.quick
    report(session, session.compare(title, variants, inputs, rounds=rounds, memory=memory))
    grow(session)


def report(session: Session, comparison: Comparison) -> None:
    """Hand over what the goals are about."""
    cells = session.result.tables[-1].cells

    def number(row: str, column: str) -> float | None:
        value = cells.get(row, {}).get(column)
        return float(value) if isinstance(value, float) else None

    session.goal("lora-forward", number(LORA, "forward"))
    session.goal("lora-step", number(LORA, "step"))
    peaks = number(LORA, "peak MiB"), number(TUNED, "peak MiB")
    session.goal("lora-peak", peaks[0] / peaks[1] if peaks[0] and peaks[1] else None)
    session.goal("moe-step", number(MOE, "step"))
    session.goal("moe-saved", number(MOE, "saved MiB"))
    session.goal("many-merged", number(MERGED, "step"))
    session.goal("many-stacked", number(STACKED, "step"))
    session.goal("many-speedup", comparison.between((LOOP, "step"), (MERGED, "step")).median)
    session.goal("many-peak", number(MERGED, "peak MiB"))
    errors = [number(row, "error") for row in (LORA, STACKED, MERGED, MOE)]
    session.goal("agreement", max(error for error in errors if error is not None))


def grow(session: Session) -> None:
    """Sweep the size of the pool and the number of experts that are on for all."""
    s = session.settings
    layers, batch = s.layers or s.either(2, 1), s.batch or s.either(8, 2)
    backbone = build(s, layers)
    inputs = rotated(lambda: pixels(s, batch), session.device)
    size, rounds = f"{layers} layers, {batch} images", s.either(5, 3)
    done = session.sweep(
        f"growing pool, {size}",
        "e",
        s.either((4, 8, 16, 32, 64, 128), (4, 64)),
        lambda e: ([*bases(backbone)[:1], *moe(backbone, inputs[0], e, "top-2")], inputs),
        rounds=rounds,
    )
    medians = [ratios["top-2", "step"].median for ratios in done.values()]
    session.goal("moe-flat", max(medians) / min(medians))
    if s.quick:
        return
    session.sweep(
        f"growing number of experts on for all, {size}",
        "t",
        (1, 2, 5, 10, 20, 32),
        lambda t: ([*bases(backbone)[:2], *accumulated(backbone, inputs[0], t, HOW)], inputs),
        rounds=3,  # loops over many experts are slow, and far from the others
    )


def bases(backbone: DualEncoder) -> list[Variant]:
    """Return the frozen tower, its floor and full fine-tuning (no optimizer)."""
    whole = copy.deepcopy(backbone.model)
    tuned = DualEncoder(whole, name="tuned")
    whole.requires_grad_(True)
    return [
        Variant(name="frozen base", run=hidden(twin(backbone)), passes=("forward",)),
        Variant(name="floor", run=floor(backbone, linear_sites), passes=("step",)),
        Variant(name=TUNED, run=hidden(tuned), passes=("step",), modules=(whole,)),
    ]


def lora(backbone: DualEncoder, x: Tensor) -> list[Variant]:
    """Return one LoRA: by PEFT if it is installed, and the library's."""
    config = JointLoRAConfig(r=R, lora_alpha=R, target_modules=TARGETS, towers=("vision",))
    method = learner(JointLoRA, config, backbone)
    method.backbone.host.merging = False  # one route at inference: what it adds when not folded
    reference = expected(backbone, method, linear_sites, LoopLoRALayer, x)
    ours = Variant(
        name=LORA,
        run=routed(method.backbone),
        modules=(method,),
        reference=reference,
    )
    if not peft_installed():
        return [ours]
    model = peft_tower(backbone, method)
    peft = replace(ours, name=PEFT, run=peft_hidden(model), modules=(model,))
    return [peft, ours]


def accumulated(
    backbone: DualEncoder, x: Tensor, tasks: int, names: Sequence[str] = (LOOP, STACKED, MERGED)
) -> list[Variant]:
    """Return experts of many tasks that are all on for everybody; only the last one trains."""
    config = LoRAPerTaskConfig(r=R, lora_alpha=R, target_modules=TARGETS, towers=("vision",))
    method = learner(LoRAPerTask, config, backbone, tasks)
    reference = expected(backbone, method, linear_sites, LoopLoRALayer, x)
    loops, stacked, training, serving = (twin(backbone) for _ in range(4))
    loop_layers = insert_copies(loops, method, linear_sites, LoopLoRALayer)
    layers = [insert_copies(b, method, linear_sites, _sum) for b in (stacked, training, serving)]
    stacked.host.merging = False

    def merged(x: Tensor) -> Tensor:
        # A training step drops what was folded for inference: each has a tower of its own here.
        return routed(training if torch.is_grad_enabled() else serving)(x)

    ways = ((routed(loops), loop_layers), (routed(stacked), layers[0]), (merged, layers[1]))
    return [
        Variant(name=name, run=run, modules=(own,), reference=reference)
        for name, (run, own) in zip(names, ways, strict=True)
    ]


def _sum(layer: nn.Module) -> SumLayer:
    assert isinstance(layer, SumLayer)
    return SumLayer(layer.bank)


def moe(backbone: DualEncoder, x: Tensor, experts: int, name: str = MOE) -> list[Variant]:
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
    # In half precision a near tie of the router's logits may pick another expert than here.
    exact = x.dtype == torch.float32
    reference = expected(backbone, method, mlp_sites, LoopMoELayer, x) if exact else None
    own_floor = "floor beside the MLP"
    ours = Variant(
        name=name,
        run=routed(method.backbone),
        modules=(method,),
        step_base=own_floor,
        reference=reference,
    )
    loops = twin(backbone)
    layers = insert_copies(loops, method, mlp_sites, LoopMoELayer)
    loop = replace(ours, name=f"{name}, loop", run=routed(loops), modules=(layers,))
    least = Variant(
        name=own_floor, run=floor(backbone, mlp_sites), passes=("step",), step_base=own_floor
    )
    return [least, loop, ours]
