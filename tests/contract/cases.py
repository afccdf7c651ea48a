"""Every registered method's toy configuration and claims, and what the contract's tests share."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from tests.conftest import ToyProcessor, toy_model, toy_task
from torch import Tensor

from evolora.backbones.base import Batch
from evolora.backbones.clip import DualEncoder
from evolora.experts.bank import GrowingStack
from evolora.learner import Learner
from evolora.methods.branch_lora import BranchLoRAConfig
from evolora.methods.coda_prompt import CodaPromptConfig
from evolora.methods.d_mole import DMoLEConfig
from evolora.methods.delo import DeLoConfig
from evolora.methods.dyn_mole import DynMoLEConfig
from evolora.methods.er import ERConfig
from evolora.methods.evolora import EvoloraConfig
from evolora.methods.ewc import EWCConfig
from evolora.methods.full_finetuning import FullFinetuningConfig
from evolora.methods.l2p import L2PConfig
from evolora.methods.linear_probe import LinearProbeConfig
from evolora.methods.lora import JointLoRAConfig, LoRAPerTaskConfig, SequentialLoRAConfig
from evolora.methods.lwf import LwFConfig
from evolora.methods.map import MapConfig
from evolora.methods.moe_adapters import MoEAdaptersConfig
from evolora.methods.moe_cl import MoECLConfig
from evolora.methods.moe_lora import MoELoRAConfig
from evolora.methods.o_lora import OLoRAConfig
from evolora.methods.pathweave import PathWeaveConfig
from evolora.methods.rebq import RebQConfig
from evolora.methods.recipe import RecipeConfig
from evolora.methods.zero_shot import ZeroShotConfig
from evolora.recipes.choices import AutoEncoderPart, Pool, Shared
from evolora.recipes.experts import (
    AttentionSites,
    BottleneckExperts,
    FactorExperts,
    LoRAExperts,
    MLPSites,
)
from evolora.recipes.gates import QueryGate, TokenGate, TopKGate
from evolora.recipes.terms import LoadBalance
from evolora.registry import METHODS
from evolora.routing.autoencoders import AutoEncoderTraining, UnitAutoEncoderTraining
from evolora.routing.route import BASE
from evolora.routing.selector import (
    AutoEncoderSelectorConfig,
    NoSelectorConfig,
    RecogniserConfig,
)
from evolora.routing.task_keys import BoundedTaskKeySelectorConfig
from evolora.training.config import TrainingConfig


@dataclass(frozen=True, kw_only=True)
class Case:
    """How a method takes part.

    Args:
        config: toy configuration.
        sites: whether it has experts at sites (the others own whole weights or vectors).
        retains: it claims that a finished task's answers never change under its route.
        fresh: it claims that every task, not only the first, starts as the base model.
        prompts: it puts prompts into sequences: it starts elsewhere than at the base, and rows of
            the base are refused in its forwards.
        settings: training settings that differ from the toy ones.
        dead: parameter name endings whose gradient is zero by mathematics.
    """

    config: Any
    sites: bool = True
    retains: bool = False
    fresh: bool = False
    prompts: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    dead: tuple[str, ...] = ()


SELECTOR = AutoEncoderSelectorConfig(training=AutoEncoderTraining(hidden=6, steps=60))
CASES = {
    "zero-shot": Case(config=ZeroShotConfig(), sites=False, retains=True, fresh=True),
    "linear-probe": Case(config=LinearProbeConfig(), sites=False, retains=True, fresh=True),
    # A shift of all keys does not change a softmax over them: k_proj.bias has no gradient.
    "full-finetuning": Case(
        config=FullFinetuningConfig(),
        sites=False,
        dead=("k_proj/bias",),
        settings={"learning_rate": 1e-3},
    ),
    "sequential-lora": Case(config=SequentialLoRAConfig(r=3, lora_dropout=0.1)),
    "ewc": Case(config=EWCConfig(r=3, fisher_samples=5)),
    "er": Case(config=ERConfig(r=3, capacity=10)),
    "lwf": Case(config=LwFConfig(r=3)),
    "o-lora": Case(config=OLoRAConfig(r=3)),
    "joint-lora": Case(config=JointLoRAConfig(r=3)),
    "evolora": Case(config=EvoloraConfig(experts=LoRAExperts(r=3)), retains=True, fresh=True),
    "recipe": Case(
        config=RecipeConfig(
            experts=BottleneckExperts(r=8),
            sites=MLPSites(),
            selector=AutoEncoderPart(
                helper="threshold", training=AutoEncoderTraining(hidden=6, steps=60)
            ),
        ),
        retains=True,
        fresh=True,
    ),
    "lora-per-task": Case(config=LoRAPerTaskConfig(r=3), retains=True, fresh=True),
    # Where gradients put experts is known only once data are there: every site has one here.
    "d-mole": Case(
        config=DMoLEConfig(
            r=3,
            allocation=None,
            selector=RecogniserConfig(training=UnitAutoEncoderTraining(hidden=6, steps=60)),
        ),
        retains=True,
        fresh=True,
    ),
    "moe-lora": Case(config=MoELoRAConfig(r=6, num_experts=3, lora_alpha=12.0, lora_dropout=0.1)),
    # The first task uses both branches, so that both are frozen and it is retained exactly.
    "branch-lora": Case(config=BranchLoRAConfig(r=3, num_branches=2), retains=True, fresh=True),
    "delo": Case(config=DeLoConfig(num_factors=4, r=2), retains=True, fresh=True),
    "dyn-mole": Case(config=DynMoLEConfig(r=3, num_experts=4)),
    "map": Case(config=MapConfig(prompt_length=6, layers_to_transform=(0, 1)), prompts=True),
    "rebq": Case(
        config=RebQConfig(components_per_task=3, prompt_length=4, layers_to_transform=(0, 1)),
        prompts=True,
    ),
    "pathweave": Case(config=PathWeaveConfig(r=2), retains=True),
    "coda-prompt": Case(
        config=CodaPromptConfig(components_per_task=3, prompt_length=4, layers_to_transform=(0, 1)),
        prompts=True,
        settings={"learning_rate": 3e-2},
    ),
    "l2p": Case(config=L2PConfig(pool_size=4, top_k=2, prompt_length=2), prompts=True),
    # Of the first task, which is what is asked, there is nothing to tell it from.
    "moe-cl": Case(config=MoECLConfig(r=3, discriminator_memory=4), dead=("discriminator.active",)),
    # All that a task used is frozen here, so that retention is exact; the paper freezes two.
    "moe-adapters": Case(
        # every used expert is frozen, so a new router starts on experts that are still zero
        config=MoEAdaptersConfig(num_experts=4, freeze_top=9, r=8, selector=SELECTOR),
        retains=True,
        fresh=True,
    ),
}
COMBINED = {
    "recipe, pool": Case(
        config=RecipeConfig(
            experts=LoRAExperts(r=3, lora_alpha=6.0),
            sites=AttentionSites(),
            gate=TopKGate(),
            selector=BoundedTaskKeySelectorConfig(quantile=0.9),
            allocation=Pool(num_experts=4, freeze_top=9),
            losses=(LoadBalance(),),
        ),
        retains=True,
        fresh=True,
    ),
    "recipe, factors": Case(
        config=RecipeConfig(
            experts=FactorExperts(num_factors=4, r=2),
            sites=MLPSites(),
            gate=QueryGate(),
            selector=AutoEncoderPart(training=AutoEncoderTraining(hidden=6, steps=60)),
        ),
        retains=True,
        fresh=True,
    ),
    "recipe, tokens": Case(
        config=RecipeConfig(
            experts=BottleneckExperts(r=3),
            gate=TokenGate(num_experts=3),
            selector=NoSelectorConfig(),
            allocation=Shared(),
        ),
    ),
}
"""Further combinations of a recipe's parts, held to the same."""
KINDS = ("clip", "siglip")
ONE_STREAM = [entry.name for entry in METHODS if entry.value.needs_one_stream]
"""They refuse dual encoders; tests/methods/test_one_stream.py holds them to the same on a ViLT."""
PLUGGED = [entry.name for entry in METHODS if entry.value.needs_modalities]
"""They refuse dual encoders; tests/methods/test_pathweave.py holds them to it on Q-Formers."""
ELSEWHERE = {*ONE_STREAM, *PLUGGED}
EVERY = pytest.mark.parametrize(
    "name", [*(n for n in METHODS.names() if n not in ELSEWHERE), *COMBINED]
)
BOTH = pytest.mark.parametrize("kind", KINDS)


def case_of(name: str) -> Case:
    if name not in CASES | COMBINED:
        pytest.fail(f"method {name!r} is registered but has no toy configuration in CASES")
    return (CASES | COMBINED)[name]


def toy_backbone(kind: str) -> DualEncoder:
    return DualEncoder(toy_model(kind), ToyProcessor(), name="toy")


def make(name: str, kind: str = "clip", **settings: Any) -> Learner:
    case = case_of(name)
    values: dict[str, Any] = {
        "max_steps": 4,
        "warmup_steps": 1,
        "per_device_train_batch_size": 6,
        "learning_rate": 1e-2,
        "label_smoothing_factor": 0.0,
        **case.settings,
        **settings,
    }
    return Learner(toy_backbone(kind), method=case.config, training=TrainingConfig(**values))


def teach(learner: Learner, count: int = 2) -> Learner:
    tasks = [toy_task(index) for index in range(count)]
    if learner.method.joint:
        learner.learn_jointly(tasks)
    else:
        for task in tasks:
            learner.learn(task)
    return learner


@functools.cache
def taught(name: str, kind: str = "clip") -> Learner:
    """A learner of two tasks; shared, so a test must leave it as it was."""
    return teach(make(name, kind))


def mixed_batch(backbone: DualEncoder, rows: int = 3) -> Batch:
    """Rows of two learned tasks and one that nobody learned, alternating."""
    examples = [toy_task(task).test[row] for row in range(rows) for task in (0, 1, 2)]
    return backbone.collate(examples)


def answer(learner: Learner, batch: Batch, task: int) -> Tensor:
    """Scores over the task's labels with the selector overruled."""
    tasks = torch.full((len(batch),), learner.method.expert_task(task))
    labels = toy_task(task).labels
    with torch.no_grad():
        return learner.method.answer(batch, None, tasks, labels).scores


def base_scores(kind: str, batch: Batch, task: int) -> Tensor:
    """Scores of an untouched model of the same weights, through a method that cannot touch it."""
    plain = Learner(toy_backbone(kind), method=ZeroShotConfig())
    with torch.no_grad():
        tasks = torch.full((len(batch),), BASE)
        return plain.method.answer(batch, None, tasks, toy_task(task).labels).scores


def image_features(model: Any, batch: Batch) -> Tensor:
    with torch.no_grad():
        output = model.get_image_features(pixel_values=batch.inputs["pixel_values"])
    return output if isinstance(output, Tensor) else output.pooler_output


def text_features(model: Any, tokens: Mapping[str, Tensor]) -> Tensor:
    with torch.no_grad():
        output = model.get_text_features(**tokens)
    return output if isinstance(output, Tensor) else output.pooler_output


def digest(model: torch.nn.Module) -> str:
    """Hash of the weights as they are now (the backbone's own fingerprint is cached)."""
    total = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        total.update(key.encode() + value.detach().contiguous().numpy().tobytes())
    return total.hexdigest()


def call_counts(learner: Learner) -> tuple[dict[str, int], Callable[[], None]]:
    """Count forwards of every expert layer; returns (counts, stop)."""
    counts = dict.fromkeys(learner.method.layers, 0)
    handles = []
    for key, layer in learner.method.layers.items():

        def count(*_: Any, key: str = key) -> None:
            counts[key] += 1

        handles.append(layer.register_forward_hook(count))
    return counts, lambda: [handle.remove() for handle in handles] and None


def training_batches(learner: Learner, task: int) -> Iterator[Batch]:
    from evolora.training.batches import TrainingBatches

    feed = TrainingBatches(
        toy_task(task).train,
        learner.backbone,
        learner.training,
        seed=0,
        task=task,
        share=learner.share,
    )
    return feed.from_step(0)


def stacks(method: torch.nn.Module) -> dict[str, GrowingStack]:
    return {name: m for name, m in method.named_modules() if isinstance(m, GrowingStack)}
