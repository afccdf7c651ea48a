"""Bench "resora": what keeping the ranks of a LoRA apart adds to a training step.

A ViT-B-wide tower with a LoRA is trained with each measure of redundancy and without any, by
Evolora's own experts and, where PEFT is installed, by PEFT's under hooks. The loss of the task is
next to nothing here, so whatever is added shows.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor, nn

from evolora.backbones.clip import DualEncoder
from evolora.bench.peft_tower import peft_hidden, peft_installed, peft_tower
from evolora.bench.session import Session, rotated
from evolora.bench.timing import Variant
from evolora.bench.towers import TARGETS, build, learner, pixels, routed
from evolora.methods.lora import JointLoRA, JointLoRAConfig
from evolora.regularizers.bank_records import BankRecords
from evolora.regularizers.peft_records import PeftRecords
from evolora.regularizers.resora import Record, Resora
from evolora.regularizers.settings import ResoraConfig

R = 16
PLAIN, DEFAULT = "LoRA alone", "the default"
STEPS = 100
"""A step in the middle of so many is timed, when the warm-up is over."""
MEASURES = {
    "w_orth": ResoraConfig(measure_down="w_orth", measure_up="w_orth"),
    "gor": ResoraConfig(measure_down="gor", measure_up="gor"),
    "f_corr + f_contrib": ResoraConfig(measure_down="f_corr", measure_up="f_contrib"),
    "f_corr + f_contrib of 1024 tokens": ResoraConfig(
        measure_down="f_corr", measure_up="f_contrib", max_tokens=1024
    ),
    "f_dist": ResoraConfig(measure_down="f_dist", measure_up="f_dist"),
    "f_hsic, groups of 4": ResoraConfig(measure_down="f_hsic", measure_up="none", groups=R // 4),
}


class Reader(Protocol):
    """What reads the records of a forward."""

    def watching(self) -> AbstractContextManager[None]: ...

    def collect(self) -> list[Record]: ...


def measure(session: Session) -> None:
    """Time steps with every measure on every host; the default's slowest is the goal's number."""
    s = session.settings
    layers, batch = s.layers or s.either(3, 1), s.batch or s.either(8, 2)
    backbone = build(s, layers)
    inputs = rotated(lambda: pixels(s, batch), session.device)
    added = []
    for name, make in (("Evolora", experts), ("PEFT", adapters)):
        if name == "PEFT" and not peft_installed():
            continue
        chosen = {DEFAULT: ResoraConfig(), **s.either(MEASURES, {})}
        variants = [make(backbone, PLAIN, ResoraConfig(weight=0.0))]
        variants += [make(backbone, title, config) for title, config in chosen.items()]
        title = f"{name}: LoRA r {R} on {', '.join(TARGETS)}; {layers} layers, {batch} images"
        done = session.compare(title, variants, inputs, rounds=s.either(9, 3), memory=not s.quick)
        added.append(done.between((DEFAULT, "step"), (PLAIN, "step")).median)
    session.goal("resora-step", max(added))


def experts(backbone: DualEncoder, name: str, config: ResoraConfig) -> Variant:
    """Return a step of Evolora's LoRA under a regulariser."""
    method = learner(JointLoRA, JointLoRAConfig(r=R, target_modules=TARGETS, towers=("vision",)),
                     backbone)  # fmt: skip
    resora = Resora(config)
    reader = BankRecords(method.layers, method.backbone.host, resora) if config.active else None
    return _variant(name, routed(method.backbone), method, resora, reader)


def adapters(backbone: DualEncoder, name: str, config: ResoraConfig) -> Variant:
    """Return a step of PEFT's LoRA with the same weights under a regulariser."""
    method = learner(JointLoRA, JointLoRAConfig(r=R, target_modules=TARGETS, towers=("vision",)),
                     backbone)  # fmt: skip
    model = peft_tower(backbone, method).train()
    resora = Resora(config)
    reader = PeftRecords(model, resora).__enter__() if config.active else None
    return _variant(name, peft_hidden(model), model, resora, reader)


def _variant(
    name: str,
    hidden: Callable[[Tensor], Tensor],
    module: nn.Module,
    resora: Resora,
    reader: Reader | None,
) -> Variant:
    def run(x: Tensor) -> Tensor:
        if reader is None:
            return hidden(x).square().mean()
        with reader.watching():
            loss = hidden(x).square().mean()
        term, _ = resora.total(reader.collect(), step=STEPS // 2, total_steps=STEPS)
        return loss + term

    return Variant(name=name, run=run, passes=("step",), modules=(module,), step_base=PLAIN)
