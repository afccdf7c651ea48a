"""Regularizers in training: on every method's experts, and no trace where there are none."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tests.backbones.writers import writer
from tests.conftest import ToyProcessor, toy_model, toy_task
from tests.contract.cases import training_batches
from tests.methods.texts import task
from tests.training.caching import learner_of
from tests.training.test_distributed import HARD, assert_same_result, two
from tests.training.worker import TERMS, TOY, toy_run
from torch import Tensor

from evolora.backbones.clip import DualEncoder
from evolora.experts.bank import ExpertBank
from evolora.learner import Learner, Progress
from evolora.methods.lora import LoRAPerTaskConfig, SequentialLoRAConfig
from evolora.methods.moe_adapters import MoEAdaptersConfig
from evolora.methods.o_lora import OLoRAConfig
from evolora.regularizers.settings import ResoraConfig
from evolora.routing.selector import OracleSelectorConfig
from evolora.storage.state import export_state, load_state
from evolora.training.batches import TrainingBatches
from evolora.training.config import TrainingConfig
from evolora.training.regularised import Regularised

RESORA = ResoraConfig(
    weight=0.5, warmup=0.0, min_tokens=4, measure_down="f_corr", measure_up="f_contrib"
)
COSINES = ResoraConfig(weight=0.5, warmup=0.0, measure_down="w_cos", measure_up="w_cos")
LORA = SequentialLoRAConfig(r=4, target_modules=("q_proj", "fc1"))


def test_padding_is_no_token_of_a_model_that_writes() -> None:
    learner = Learner(
        writer("llava"),
        method=SequentialLoRAConfig(r=2, towers=("language",), target_modules=("q_proj",)),
        training=TrainingConfig(max_steps=1, per_device_train_batch_size=4, augment=False),
    )
    data = task("first", "red dot")
    learner.begin(data)
    feed = TrainingBatches(
        data.train, learner.backbone, learner.training, seed=0, task=0, share=learner.share
    )
    batch = next(feed.from_step(0))
    both = Regularised(learner.method, [RESORA])
    ((_, records),) = both.parts
    with records.watching():
        learner.method(batch)
        (call,) = next(iter(records.recorder.calls.values())).values()
    real = call.route.real(torch.empty(*call.shape, 0), answers=True)
    assert real is not None and not real.all()
    for record in records.collect():
        assert record.features is not None
        assert record.features.count.tolist() == [float(real.sum())]


def learned(method: Any, *configs: ResoraConfig, **training: Any) -> dict[str, Tensor]:
    settings: dict[str, Any] = {
        "max_steps": 4, "warmup_steps": 1, "learning_rate": 1e-2, "augment": False,
        "per_device_train_batch_size": 8, **training,
    }  # fmt: skip
    learner = Learner(
        DualEncoder(toy_model(), ToyProcessor(), name="toy"),
        method=method,
        training=TrainingConfig(**settings),
        regularizers=configs,
    )
    learner.learn(toy_task(0, 40))
    return export_state(learner.method)


def close(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    assert mine.keys() == theirs.keys()
    return all(torch.allclose(mine[n].float(), theirs[n].float(), atol=1e-5) for n in theirs)


def test_without_weight_everything_is_bit_for_bit_what_it_was() -> None:
    plain = learned(LORA)
    off = learned(LORA, ResoraConfig(weight=0.0), ResoraConfig(w_down=0.0, w_up=0.0))
    assert all(torch.equal(off[name], value) for name, value in plain.items())
    assert off.keys() == plain.keys() == learned(LORA, RESORA).keys()
    assert not close(learned(LORA, RESORA), plain)


def test_learning_lowers_redundancy_and_gradient_checkpointing_changes_nothing() -> None:
    strong = ResoraConfig(weight=20.0, warmup=0.0, min_tokens=4)
    found = {}
    for name, configs in (("free", ()), ("held", (strong,))):
        learner = learner_of(LORA, max_steps=12)
        learner.regularizers = list(configs)
        learner.learn(toy_task(0, 20))
        watched = Regularised(learner.method, [strong])
        terms = watched(next(training_batches(learner, 0)))
        found[name] = float(terms["redundancy_down"] + terms["redundancy_up"])
    assert found["held"] < 0.7 * found["free"]
    for method in (LORA, MoEAdaptersConfig(num_experts=4, r=4, selector=OracleSelectorConfig())):
        plain = learned(method, RESORA)
        again = learned(method, RESORA, gradient_checkpointing=True)
        assert close(again, plain)
        assert not close(learned(method), plain)


def test_bf16_forwards_are_measured_in_float32() -> None:
    half = learned(LORA, RESORA, mixed_precision="bf16")
    assert all(torch.isfinite(value).all() for value in half.values())
    assert not close(half, learned(LORA, mixed_precision="bf16"))


def test_weights_alone_do_not_mind_how_a_batch_is_cut() -> None:
    whole = learned(LORA, COSINES)
    parts = learned(LORA, COSINES, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-4)


def test_old_experts_keep_new_ones_away_from_their_subspaces() -> None:
    apart = ResoraConfig(
        weight=5.0, warmup=0.0, measure_down="w_cos", measure_up="none", across="tasks"
    )
    shared = {}
    for name, configs in (("free", []), ("held", [apart])):
        learner = learner_of(LoRAPerTaskConfig(r=4), max_steps=12)
        learner.regularizers = configs
        for index in range(2):
            learner.learn(toy_task(index, 20))
        total = 0.0
        for bank in learner.method.modules():
            if isinstance(bank, ExpertBank):
                old, new = (torch.linalg.qr(a.T).Q for a in bank.A.all().detach())
                total += float((old.T @ new).pow(2).sum())
        shared[name] = total
    assert shared["held"] < 0.8 * shared["free"]


def test_o_lora_s_own_term_is_a_setting() -> None:
    term = ResoraConfig(
        weight=0.5, warmup=0.0, measure_down="overlap", measure_up="none", across="tasks",
        reduction="sum",
    )  # fmt: skip
    states = []
    for orthogonality, configs in ((0.5, []), (0.0, [term]), (0.0, [])):
        learner = learner_of(OLoRAConfig(r=2, orthogonality=orthogonality), max_steps=6)
        learner.regularizers = configs
        for index in range(2):
            learner.learn(toy_task(index, 20))
        states.append(export_state(learner.method))
    own, setting, free = states
    torch.testing.assert_close(setting, own, rtol=1e-4, atol=1e-5)
    assert not close(free, own)


def test_a_task_that_was_broken_off_goes_on_with_its_learned_scales() -> None:
    def learner() -> Learner:
        made = learner_of(TOY["regularised-lora"], max_steps=6, save_steps=3)
        made.regularizers = list(TERMS["regularised-lora"])
        return made

    whole, kept = learner(), {}

    def save(step: int, moments: Mapping[str, Tensor]) -> None:
        state = {n: t.clone() for n, t in export_state(whole.method).items()}
        kept[step] = (state, {n: t.clone() for n, t in moments.items()})

    whole.learn(toy_task(0, 20), save=save)
    state, moments = kept[3]
    scales = {name: value for name, value in moments.items() if ".value." in name}
    assert len(scales) == 2 and all(float(value) != 0 for value in scales.values())
    again = learner()
    again.begin(toy_task(0, 20))
    load_state(again.method, state)
    again.learn(toy_task(0, 20), progress=Progress(step=3, moments=moments))
    for name, value in export_state(whole.method).items():
        assert torch.equal(export_state(again.method)[name], value), name


def test_two_processes_regularise_as_one_does(tmp_path: Path) -> None:
    """Correlations are those of the global batch, whoever holds which of its rows."""
    two(tmp_path / "two", "regularised-lora", per_device_train_batch_size=4, **HARD)
    one = toy_run(tmp_path / "one", "regularised-lora", per_device_train_batch_size=8, **HARD)
    one.run()
    assert_same_result(tmp_path / "two", tmp_path / "one")
    text = (tmp_path / "one" / "log.jsonl").read_text()
    assert '"redundancy_down"' in text and '"task_loss"' in text
