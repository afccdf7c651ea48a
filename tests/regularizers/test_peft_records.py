"""Stock PEFT models: what each kind of layer tells, and when it is silent or refused."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

pytest.importorskip("peft")

from peft import (
    AdaLoraConfig,
    DeloraConfig,
    HiraConfig,
    LoraConfig,
    PeftModel,
    get_peft_model,
)
from tests.regularizers.peft_models import Net, adapted, lively, tokens

from evolora.errors import ConfigError
from evolora.regularizers.features import Features
from evolora.regularizers.peft_records import PeftRecords
from evolora.regularizers.redundancy import Update, redundancy
from evolora.regularizers.resora import Record, Resora
from evolora.regularizers.settings import ResoraConfig

FEATURES: dict[str, Any] = {
    "weight": 1.0,
    "warmup": 0.0,
    "min_tokens": 4,
    "measure_down": "f_corr",
    "measure_up": "f_contrib",
}
WEIGHTS: dict[str, Any] = {**FEATURES, "measure_down": "w_cos", "measure_up": "w_cos"}
FIRST, SECOND = "base_model.model.first", "base_model.model.second"


def run(model: Any, x: Tensor | None = None, mask: Tensor | None = None, **settings: Any) -> Any:
    """Records of one training forward, and the term."""
    resora = Resora(ResoraConfig(**{**FEATURES, **settings}))
    with PeftRecords(model, resora) as records:
        with records.watching(mask):
            model(tokens() if x is None else x)
        found = records.collect()
    term, _ = resora.total(found, step=0, total_steps=1)
    return found, term


def gradients(model: Any, term: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    term.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def by_hand(layer: Any, x: Tensor) -> Record:
    """The record of one lora.Linear from its input."""
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return Record("", a.unsqueeze(0), b.T.unsqueeze(0), Features.of((x @ a.T).reshape(1, -1, 4)))


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_linears_tell_what_they_make_of_tokens(dora: bool) -> None:
    """DoRA also runs lora_A on the identity matrix: of that nothing is kept."""
    model = adapted(use_dora=dora)
    keys = set(model.state_dict())
    found, term = run(model)
    assert [record.name for record in found] == [f"{FIRST}.default", f"{SECOND}.default"]
    base = model.base_model.model
    x = base.embed(tokens())
    inputs = [x, torch.relu(base.first(x))]
    wanted = [
        by_hand(layer, own) for layer, own in zip((base.first, base.second), inputs, strict=True)
    ]
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.features is not None and theirs.features is not None
        assert int(mine.features.count[0]) == 36
        torch.testing.assert_close(mine.features.covariance, theirs.features.covariance)
    resora = Resora(ResoraConfig(**FEATURES))
    torch.testing.assert_close(term, resora.total(wanted, step=0, total_steps=1)[0])
    assert all("lora_" in name for name in gradients(model, term))
    assert hooks(model) == 0 and set(model.state_dict()) == keys


def test_convolutions_tell_each_position() -> None:
    model = adapted(target_modules=["conv"])
    (record,), _ = run(model)
    assert record.a.shape == (1, 4, 36) and record.b.shape == (1, 4, 12)
    seen: list[Tensor] = []
    layer = model.base_model.model.conv
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(tokens())
    handle.remove()
    z = torch.nn.functional.conv1d(seen[0], layer.lora_A["default"].weight, padding=1)
    expected = Features.of(z.mT.reshape(1, -1, 4))
    assert record.features is not None
    torch.testing.assert_close(record.features.covariance, expected.covariance)
    (again,), _ = run(model, detach_input=True)
    assert again.features is not None
    torch.testing.assert_close(again.features.covariance, expected.covariance)


SILENT: dict[str, Any] = {
    "attention": (LoraConfig(target_modules=["attention"], r=4), 2),
    "embedding": (LoraConfig(target_modules=["embed"], r=4), 1),
    "adalora": (AdaLoraConfig(target_modules=["first"], init_r=4, total_step=10), 1),
    "hira": (HiraConfig(target_modules=["first"], r=4), 1),
    "delora": (DeloraConfig(target_modules=["first"], r=4), 1),
    "experts": (LoraConfig(target_modules=[], target_parameters=["experts.weight"], r=4), 1),
}


@pytest.mark.parametrize("kind", SILENT)
def test_factors_that_act_on_weights_tell_weights_alone(kind: str) -> None:
    config, count = SILENT[kind]
    model = adapted(config)
    with pytest.raises(ConfigError, match=r"has no activations to read.*w_cos"):
        PeftRecords(model, Resora(ResoraConfig(**FEATURES)))
    found, term = run(model, **WEIGHTS)
    assert len(found) == count and all(record.features is None for record in found)
    assert torch.isfinite(term) and term > 0
    pulled = gradients(model, term)
    assert pulled and all(torch.isfinite(gradient).all() for gradient in pulled.values())


def test_experts_of_a_mixture_are_updates_of_their_own() -> None:
    model = adapted(SILENT["experts"][0])
    (record,), _ = run(model, **WEIGHTS)
    assert record.a.shape == (3, 4, 12) and record.b.shape == (3, 4, 12)
    layer = model.base_model.model.experts
    delta = layer.get_delta_weight("default") / layer.scaling["default"]
    torch.testing.assert_close(record.b.mT @ record.a, delta)


def test_adapters_that_do_not_answer_have_no_term() -> None:
    model = adapted()
    resora = Resora(ResoraConfig(**FEATURES))
    with PeftRecords(model, resora) as records:
        with records.watching(), model.disable_adapter():
            model(tokens())
        with model.disable_adapter():
            assert records.collect() == []
        with records.watching():
            model(tokens())
        model.merge_adapter()
        assert records.collect() == []
        model.unmerge_adapter()
        with pytest.raises(ConfigError, match="told no activations in this step"):
            records.collect()  # what was told before is stale
    model.base_model.model.first.merge()
    assert [record.name for record in run(model)[0]] == [f"{SECOND}.default"]


def test_two_active_adapters_are_kept_apart_and_others_are_left_alone() -> None:
    model = adapted()
    model.add_adapter("other", LoraConfig(target_modules=["first", "second"], r=2))
    model.add_adapter("idle", LoraConfig(target_modules=["first"], r=3))
    lively(model)
    model.base_model.set_adapter(["default", "other"])
    found, term = run(model)
    assert [record.a.shape[1] for record in found] == [4, 2, 4, 2]
    x = model.base_model.model.embed(tokens())
    for record, adapter in zip(found[:2], ("default", "other"), strict=True):
        z = x @ model.base_model.model.first.lora_A[adapter].weight.T
        expected = Features.of(z.reshape(1, -1, z.shape[-1]))
        assert record.features is not None
        torch.testing.assert_close(record.features.covariance, expected.covariance)
    assert not any("idle" in name for name in gradients(model, term))
    chosen, _ = run(model, adapters=("other",))
    assert {record.name for record in chosen} == {f"{FIRST}.other", f"{SECOND}.other"}
    with pytest.raises(ConfigError, match=r"no adapter 'oter' \(known: default, idle, other\)"):
        run(model, adapters=("oter",))


def test_adapters_are_compared_with_one_another_and_with_frozen_ones() -> None:
    model = adapted(target_modules=["first"])
    model.add_adapter("new", LoraConfig(target_modules=["first"], r=4))
    lively(model)
    model.set_adapter("new")
    settings: dict[str, Any] = {"measure_down": "overlap", "measure_up": "none"}
    found, term = run(model, across="tasks", **settings)
    layer = model.base_model.model.first
    old, new = (layer.lora_A[adapter].weight for adapter in ("default", "new"))
    torch.testing.assert_close(term, (old @ new.T).abs().sum())
    assert {name.split(".")[-2] for name in gradients(model, term)} == {"new"}
    model.base_model.set_adapter(["default", "new"])
    found, term = run(model, across="experts", **settings)
    assert len(found) == 1 and len(found[0].a) == 2
    torch.testing.assert_close(term, (old @ new.T).abs().sum())


def test_padding_is_not_seen() -> None:
    model = adapted()
    x, longer = tokens(), torch.cat([tokens(), tokens(seed=5)[:, :3]], dim=1)
    mask = torch.ones_like(longer)
    mask[:, 9:] = 0
    settings: dict[str, Any] = {"layers": "first"}  # what comes later sees its neighbours
    _, plain = run(model, x, **settings)
    _, masked = run(model, longer, mask, **settings)
    _, unmasked = run(model, longer, **settings)
    torch.testing.assert_close(masked, plain)
    assert not torch.isclose(unmasked, plain)


def test_the_gradient_of_what_was_read_can_be_cut() -> None:
    model = adapted()
    settings: dict[str, Any] = {"layers": "second", "measure_up": "none"}
    _, term = run(model, **settings)
    _, cut = run(model, detach_input=True, **settings)
    torch.testing.assert_close(cut, term)
    assert any("first" in name for name in gradients(model, term))
    assert not any("first" in name for name in gradients(model, cut))


class Blocks(nn.Module):
    """A Net whose first Linears run again in backward."""

    def __init__(self, model: Any, reentrant: bool) -> None:
        super().__init__()
        self.model, self.reentrant = model, reentrant

    def forward(self, x: Tensor) -> Tensor:
        base = self.model.base_model.model

        def block(x: Tensor) -> Tensor:
            return base.second(torch.relu(base.first(x)))  # type: ignore[no-any-return]

        x = base.embed(x).requires_grad_()
        return checkpoint(block, x, use_reentrant=self.reentrant)  # type: ignore[no-any-return]


def test_blocks_that_run_again_in_backward_change_nothing() -> None:
    def pulled(model: nn.Module, inner: Any, **settings: Any) -> dict[str, Tensor]:
        resora = Resora(ResoraConfig(**{**FEATURES, **settings}))
        with PeftRecords(model, resora) as records:
            with records.watching():
                loss = model(tokens()).pow(2).mean()
            found = records.collect()
            term, _ = resora.total(found, step=0, total_steps=1)
            return gradients(inner, loss + term)

    class Plain(Blocks):
        def forward(self, x: Tensor) -> Tensor:
            base = self.model.base_model.model
            return base.second(torch.relu(base.first(base.embed(x).requires_grad_())))  # type: ignore[no-any-return]

    for settings in ({}, {"detach_input": True}):
        plain, again = adapted(), adapted()
        torch.testing.assert_close(
            pulled(Blocks(again, False), again, **settings),
            pulled(Plain(plain, False), plain, **settings),
        )
    reentrant = adapted()
    with pytest.raises(ConfigError, match="use_reentrant=False"):
        pulled(Blocks(reentrant, True), reentrant)
    plain = adapted()
    torch.testing.assert_close(
        pulled(Blocks(reentrant, True), reentrant, detach_input=True),
        pulled(Plain(plain, False), plain, detach_input=True),
    )


def test_hooks_that_came_before_compiling_are_compiled_and_others_are_missed() -> None:
    resora = Resora(ResoraConfig(**FEATURES))
    plain = adapted(target_modules=["first", "second"])
    _, expected = run(plain)
    model = adapted(target_modules=["first", "second"])
    with PeftRecords(model, resora) as records:
        compiled: Any = torch.compile(model, backend="aot_eager")
        for _ in range(2):
            with records.watching():
                compiled(tokens())
            term, _ = resora.total(records.collect(), step=0, total_steps=1)
            torch.testing.assert_close(term, expected)
        torch.testing.assert_close(gradients(model, term), gradients(plain, expected))
    torch._dynamo.reset()
    late: Any = torch.compile(adapted(), backend="aot_eager")
    late(tokens())
    with PeftRecords(late, resora) as records:
        with records.watching():
            late(tokens())
        with pytest.raises(ConfigError, match="compiled before the hooks were there"):
            records.collect()
    torch._dynamo.reset()


def test_velora_bypasses_lora_a_and_is_named() -> None:
    from peft.tuners.lora.config import VeloraConfig

    velora = VeloraConfig(num_groups=4)
    model = adapted(LoraConfig(target_modules=["first"], r=4, velora_config=velora))
    with pytest.raises(ConfigError, match="it bypasses lora_A"):
        run(model)
    assert run(model, **WEIGHTS)[1].item() > 0


def test_a_layer_that_did_not_run_is_named() -> None:
    model = adapted()
    resora = Resora(ResoraConfig(**FEATURES))
    with PeftRecords(model, resora) as records:
        with records.watching():
            model.base_model.model.first(torch.randn(2, 12))
        with pytest.raises(ConfigError, match=r"'default' of base_model\.model\.second told no"):
            records.collect()


def test_passes_without_gradients_are_not_looked_at() -> None:
    model = adapted()
    resora = Resora(ResoraConfig(**FEATURES))
    with PeftRecords(model, resora) as records:
        with records.watching():
            model(tokens())
            with torch.no_grad():
                model(tokens(seed=9))
        model(tokens(seed=8))  # neither is what runs while nobody watches
        found = records.collect()
    wanted, _ = run(model)
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.features is not None and theirs.features is not None
        assert torch.equal(mine.features.covariance, theirs.features.covariance)


def test_without_weight_no_hook_is_put_anywhere() -> None:
    model = adapted()
    with PeftRecords(model, Resora(ResoraConfig(weight=0.0))):
        assert hooks(model) == 0
    with PeftRecords(model, Resora(ResoraConfig(**WEIGHTS))):
        assert hooks(model) == 0
    with PeftRecords(model, Resora(ResoraConfig(**FEATURES))):
        assert hooks(model) == 2
    assert hooks(model) == 0


def test_hooks_are_gone_before_a_model_is_copied_even_after_an_error() -> None:
    model = adapted(target_modules=["first", "second"])
    with (
        pytest.raises(ZeroDivisionError),
        PeftRecords(model, Resora(ResoraConfig(**FEATURES))) as records,
        records.watching(),
    ):
        model(tokens())
        raise ZeroDivisionError
    assert hooks(model) == 0
    expected = model(tokens())
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert hooks(again) == 0
        assert torch.equal(again(tokens()), expected)


def test_models_without_adapters_and_layers_that_nobody_has_are_refused() -> None:
    resora = Resora(ResoraConfig(**FEATURES))
    with pytest.raises(ConfigError, match="Net has none of PEFT's"):
        PeftRecords(Net(), resora)
    with pytest.raises(ConfigError, match=r"layers 'q_proj' selects none of base_model\.model"):
        PeftRecords(adapted(), Resora(ResoraConfig(layers="q_proj")))
    grouped = Net()
    grouped.conv = nn.Conv1d(12, 12, 3, padding=1, groups=2)  # type: ignore[assignment]
    model = get_peft_model(grouped, LoraConfig(target_modules=["conv"], r=4)).train()
    with pytest.raises(ConfigError, match="grouped convolution"):
        run(model, **WEIGHTS)


def test_merging_saving_and_loading_are_stock_peft_s(tmp_path: Path) -> None:
    model, x = adapted(), tokens()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    resora = Resora(ResoraConfig(**FEATURES))
    with PeftRecords(model, resora) as records:
        for _ in range(3):
            with records.watching():
                loss = model(x).pow(2).mean()
            term, _ = resora.total(records.collect(), step=0, total_steps=1)
            optimizer.zero_grad()
            (loss + term).backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        expected = model(x)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(Net(), tmp_path).eval()
    assert set(again.state_dict()) == set(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(again(x), expected)
        torch.testing.assert_close(model.merge_and_unload()(x), expected, rtol=1e-5, atol=1e-5)


def test_one_update_s_redundancy_is_that_of_its_factors() -> None:
    model = adapted(target_modules=["first"])
    (record,), term = run(model, **{**WEIGHTS, "measure_up": "none"})
    expected = redundancy("w_cos", "down", Update(record.a, record.b))
    torch.testing.assert_close(term, expected.squeeze())
