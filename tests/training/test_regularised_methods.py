"""Every registered method takes a regularizer on its low-rank experts, or refuses it in one line.

Whoever is registered is enrolled, by its toy configuration in `tests.contract.cases`.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.backbones.pairs import make as make_pairs
from tests.conftest import toy_task
from tests.contract.cases import (
    CASES,
    COMBINED,
    ELSEWHERE,
    ONE_STREAM,
    PLUGGED,
    case_of,
    make,
    toy_backbone,
)
from tests.methods import modalities
from tests.methods.test_pathweave import learner as on_qformer
from torch import Tensor

from evolora.backbones.base import Batch
from evolora.errors import ConfigError
from evolora.experts.bank import ExpertBank
from evolora.learner import Learner
from evolora.registry import METHODS
from evolora.regularizers.settings import ResoraConfig
from evolora.streams.task import Task
from evolora.training.batches import TrainingBatches
from evolora.training.regularised import Regularised

COMPOSED = ("delo", "recipe, factors")
"""Their experts are composed anew for each input: weights alone can be compared."""
EXPERTS = [
    name
    for name in (*CASES, *COMBINED)
    if name not in ELSEWHERE and case_of(name).sites and not case_of(name).prompts
]
BARE = [name for name in CASES if name not in {*EXPERTS, *PLUGGED}]
RESORA = ResoraConfig(
    weight=0.5, warmup=0.0, min_tokens=4, measure_down="f_corr", measure_up="f_contrib"
)
COSINES = ResoraConfig(weight=0.5, warmup=0.0, measure_down="w_cos", measure_up="w_cos")


def test_the_methods_without_low_rank_experts_are_these() -> None:
    assert sorted(BARE) == [
        "coda-prompt", "full-finetuning", "l2p", "linear-probe", "map", "rebq", "zero-shot",
    ]  # fmt: skip
    assert {*EXPERTS, *BARE, *PLUGGED} == {*METHODS.names(), *COMBINED}


def lively(learner: Learner) -> Learner:
    """Give the experts that start an up-projection that is not zero."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in learner.method.trainable().items():
            if ".B." in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draw))
    learner.method.train()
    return learner


def first_batch(learner: Learner, task: Task, index: int = 0) -> Batch:
    feed = TrainingBatches(
        task.train, learner.backbone, learner.training, seed=0, task=index, share=learner.share
    )
    return next(feed.from_step(0))


def gradients(learner: Learner, module: torch.nn.Module, batch: Batch) -> dict[str, Tensor]:
    learner.method.zero_grad()
    torch.manual_seed(0)
    module(batch)["loss"].backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in learner.method.trainable().items()
        if parameter.grad is not None
    }


@pytest.mark.parametrize("name", EXPERTS)
@pytest.mark.parametrize("config", [RESORA, COSINES], ids=["features", "weights"])
def test_low_rank_experts_are_regularised(name: str, config: ResoraConfig) -> None:
    if name in COMPOSED and config is RESORA:
        with pytest.raises(ConfigError, match=r"composed anew.*use w_cos") as error:
            Learner(toy_backbone("clip"), method=case_of(name).config, regularizers=[config])
        assert "\n" not in str(error.value)
        return
    learner = make(name)
    learner.begin(toy_task(0))
    both = Regularised(lively(learner).method, [config], total_steps=1)
    batch = first_batch(learner, toy_task(0))
    pulled, free = (gradients(learner, module, batch) for module in (both, learner.method))
    assert float(both.seen["redundancy_down"]) > 0 and float(both.seen["redundancy_up"]) > 0
    factors = [name for name in free if ".A." in name or ".B." in name]
    assert factors and any(not torch.equal(pulled[name], free[name]) for name in factors)
    banks = [bank for bank in learner.method.modules() if isinstance(bank, ExpertBank)]
    assert all(bank.recorder is None for bank in banks)


@pytest.mark.parametrize("config", [RESORA, COSINES], ids=["features", "weights"])
@pytest.mark.parametrize("name", PLUGGED)
def test_adapters_of_modalities_are_regularised(name: str, config: ResoraConfig) -> None:
    learner = on_qformer(config=CASES[name].config)
    learner.learn(modalities.task("video"))  # whose adapters the next path reuses
    learner.begin(modalities.task("pc"))
    config = replace(config, min_tokens=3)  # what cross-attention reads of a point cloud
    both = Regularised(lively(learner).method, [config], total_steps=1)
    batch = first_batch(learner, modalities.task("pc"), 1)
    pulled, free = (gradients(learner, module, batch) for module in (both, learner.method))
    assert float(both.seen["redundancy_down"]) > 0 and float(both.seen["redundancy_up"]) > 0
    factors = [name for name in free if ".bank.A." in name]
    assert factors and all(not torch.equal(pulled[name], free[name]) for name in factors)


@pytest.mark.parametrize("config", [RESORA, COSINES], ids=["features", "weights"])
@pytest.mark.parametrize("name", BARE)
def test_methods_without_low_rank_experts_refuse_before_they_learn(
    name: str, config: ResoraConfig
) -> None:
    backbone = make_pairs("vilt") if name in ONE_STREAM else toy_backbone("clip")
    with pytest.raises(ConfigError, match=f"low-rank experts, and {name} has none") as error:
        Learner(backbone, method=CASES[name].config, regularizers=[config])
    assert "\n" not in str(error.value)
