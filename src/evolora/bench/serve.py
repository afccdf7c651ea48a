"""Bench "serve": a batch in which rows have different adapters, one in which all have the same, and
what recognising the task adds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from evolora.backbones.blocks import layer_statistics, statistic_layers
from evolora.backbones.clip import DualEncoder
from evolora.bench.peft_tower import peft_hidden, peft_installed, peft_one_pass_each, peft_tower
from evolora.bench.references import RoutedLoopLayer
from evolora.bench.session import Session, rotated
from evolora.bench.timing import Variant
from evolora.bench.towers import (
    TARGETS,
    build,
    expected,
    hidden,
    learner,
    linear_sites,
    pixels,
    routed,
    twin,
)
from evolora.methods.lora import LoRAPerTask, LoRAPerTaskConfig
from evolora.randomness import generator
from evolora.routing.autoencoders import AutoEncoderBank

R, TASKS, TOKENS = 16, 16, 197
MIXED = "Evolora, mixed batch"
ONE = "Evolora, one route"
ADAPTERS = (1, 4, 16, 64)


def measure(session: Session) -> None:
    """Time mixed batches of ever more adapters, then the selector."""
    s = session.settings
    batch = s.batch or s.either(32, 16)
    backbone = build(s, s.layers or 1, patch=32)
    inputs = rotated(lambda: pixels(s, batch), session.device)
    done = session.sweep(
        f"{s.layers or 1} layer of ViT-B/32, {batch} images, LoRA r {R} on {', '.join(TARGETS)}",
        "adapters",
        s.either(ADAPTERS, (1, 16)),
        lambda adapters: (serving(backbone, inputs[0], adapters), inputs),
        rounds=s.either(9, 3),
        passes=("forward",),
        note="Time over the frozen base's.",
    )
    session.goal("serve-mixed", max(ratios[MIXED, "forward"].median for ratios in done.values()))
    session.goal("serve-one", done[1][ONE, "forward"].median)
    recognising(session)


def serving(backbone: DualEncoder, x: Tensor, adapters: int) -> list[Variant]:
    """Return the frozen base and every way of serving a batch whose rows have so many adapters."""
    config = LoRAPerTaskConfig(r=R, lora_alpha=R, target_modules=TARGETS, towers=("vision",))
    method: Any = learner(LoRAPerTask, config, backbone, adapters)
    method.finish_task()
    tasks = torch.arange(len(x), device=x.device) % adapters
    reference = expected(backbone, method, linear_sites, RoutedLoopLayer, x, tasks)

    def served(name: str, run: Any) -> Variant:
        return Variant(name=name, run=run, passes=("forward",), reference=reference)

    made = [Variant(name="frozen base", run=hidden(twin(backbone)), passes=("forward",))]
    if peft_installed():
        model = peft_tower(backbone, method)
        names: Sequence[int] = tasks.tolist()
        made.append(served("PEFT, adapter_names", peft_hidden(model, names)))
        made.append(served("PEFT, one pass each", peft_one_pass_each(model, tasks)))
    made.append(served(MIXED, routed(method.backbone, tasks)))
    if adapters == 1:
        made.append(served(ONE, routed(method.backbone, 0)))
    return made


def recognising(session: Session) -> None:
    """Time the auto-encoders of 16 tasks, on features of a forward that runs anyway."""
    s = session.settings
    layers, batch = s.layers or 12, s.batch or s.either(8, 2)
    backbone = build(s, layers)
    width = backbone.feature_widths()["layers"]
    scorer = AutoEncoderBank(width, 64, device=session.device)
    draw = generator(s.seed, "auto-encoders")
    for _ in range(TASKS):
        stacks = (*scorer.networks(), scorer.center)
        scorer.add([torch.randn(stack.shape, generator=draw) / width for stack in stacks])
    x = pixels(s, batch)
    depths = statistic_layers(layers + 1)
    wide = width // (2 * len(depths))
    states = [torch.randn(batch, TOKENS, wide).to(x) for _ in depths]
    features = layer_statistics(states)
    whole, recognise = f"forward, {layers} layers", f"recognise 1 of {TASKS} tasks"
    ways = {
        whole: hidden(backbone),
        "- features of four depths": lambda _: layer_statistics(states),
        f"- errors of {TASKS} auto-encoders": lambda _: scorer.errors(features),
        recognise: lambda _: scorer.errors(layer_statistics(states)),
    }
    variants = [
        Variant(name=name, run=run, passes=("forward",), forward_base=whole)
        for name, run in ways.items()
    ]
    title = f"recognising the task, {layers} layers of ViT-B/16, {batch} images"
    table = session.table(title, ("ms", "share of a forward"))
    comparison = session.time(title, variants, [x], rounds=s.either(5, 2))
    for (name, which), ratio in comparison.ratios().items():
        percent = {"share of a forward": f"{100 * ratio.median:.2f} %"}
        table.put(name, ms=1000 * comparison.seconds(name, which), **percent)
    share = comparison.ratio(recognise, "forward")
    session.goal("selector-share", share.median if share else None)
