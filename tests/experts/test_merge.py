"""Folding: a merged weight answers as the experts do, is never stale, and leaves no trace."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from tests.experts.builders import assert_agree, randomize
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from evolora.experts import sites
from evolora.experts.bank import ExpertBank
from evolora.experts.dispatch import Thresholds
from evolora.experts.layers import SumLayer
from evolora.experts.merge import AlwaysOn, merged
from evolora.experts.sites import Site, SiteHost
from evolora.methods.lora import LoRAConfig, LoRALayer
from evolora.randomness import StepRandom
from evolora.routing.route import BASE, Route
from evolora.storage.state import load_state

D_IN, D_OUT, R, ROWS, TOKENS = 12, 8, 3, 4, 5


class Watched(nn.Linear):
    """A Linear that remembers whether its weight was a folded one, and can break off."""

    folded = False
    broken: type[BaseException] | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.folded = self.weight is not self._parameters["weight"]
        if self.broken is not None:
            raise self.broken
        return super().forward(x)


def setup(
    layer: SumLayer, *, max_routes: int = 2, dtype: torch.dtype = torch.float32
) -> tuple[Watched, SiteHost]:
    torch.manual_seed(0)
    linear = Watched(D_IN, D_OUT).requires_grad_(False).to(dtype)
    host = SiteHost(max_routes=max_routes)
    host.insert(site_of(linear), layer)
    host.set_route("vision", Route.of(0, ROWS))
    return linear, host


def site_of(linear: nn.Module) -> Site:
    return Site(
        tower="vision", layer=0, name="q", kind="linear", module=linear, d_in=D_IN, d_out=D_OUT
    )


def sum_layer(experts: int = 5, frozen: tuple[int, ...] = (3, 0, 4), **options) -> SumLayer:
    bank = ExpertBank(D_IN, D_OUT, R, scale=0.5)
    bank.grow(experts)
    bank.freeze(frozen)
    randomize(bank)
    return SumLayer(bank, name="q", **options)


def lora_layer(tasks: int = 3, **options) -> LoRALayer:
    layer = LoRALayer(site_of(nn.Identity()), LoRAConfig(r=R, **options), torch.device("cpu"))
    layer.bank.grow(tasks)
    layer.bank.freeze(range(tasks - 1))
    randomize(layer.bank)
    return layer


@pytest.fixture(autouse=True)
def at_once(monkeypatch) -> None:
    """Fold at the first forward, however few its tokens are."""
    limits = Thresholds(fold_min_tokens=0)
    monkeypatch.setattr(sites, "thresholds_for", lambda _: limits)


def inputs(seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(ROWS, TOKENS, D_IN, generator=draw).to(dtype)


def both_ways(linear: Watched, host: SiteHost, x: Tensor) -> tuple[Tensor, Tensor]:
    """The output with and without folding; checks that folding happened."""
    folded = linear(x)
    assert linear.folded
    host.merging = False
    plain = linear(x)
    assert not linear.folded
    host.merging = True
    return folded, plain


@pytest.mark.parametrize("gates", [None, (0.5, -1.0, 2.0, 0.0, 1.5)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_folded_equals_unfolded_at_inference(gates, dtype, tolerance) -> None:
    linear, host = setup(sum_layer(gates=gates), dtype=dtype)
    with torch.no_grad():
        folded, plain = both_ways(linear, host, inputs(dtype=dtype))
    error = (folded - plain).abs().max() / plain.abs().max()
    assert 0 <= error.item() <= tolerance
    assert linear.weight is linear._parameters["weight"]


@pytest.mark.parametrize("gates", [None, (0.5, -1.0, 2.0, 0.0, 1.5)])
def test_folded_equals_unfolded_in_training(gates) -> None:
    """Frozen experts fold, trainable ones stay beside; gradients of both and of x agree."""
    layer = sum_layer(gates=gates)
    linear, host = setup(layer)
    found = []
    for merging in (True, False):
        host.merging = merging
        x = inputs().requires_grad_()
        layer.zero_grad()
        out = linear(x)
        assert linear.folded == merging
        (out * out.detach().sin()).sum().backward()
        found.append([out.detach(), x.grad, layer.bank.A.active.grad, layer.bank.B.active.grad])
    for folded, plain in zip(*found, strict=True):
        assert_agree(folded, plain)
    assert found[0][2].abs().sum() > 0


def test_the_gradient_of_a_folded_weight_is_exact() -> None:
    layer = sum_layer()
    linear, _ = setup(layer)
    linear.double()
    layer.double()

    def function(x, a, b):
        return torch.func.functional_call(layer_and(linear, layer), {
            "layer.bank.A.active": a, "layer.bank.B.active": b
        }, (x,))  # fmt: skip

    x = inputs().double().requires_grad_()
    values = [layer.bank.A.active.detach(), layer.bank.B.active.detach()]
    assert torch.autograd.gradcheck(function, (x, *[v.requires_grad_() for v in values]))
    assert linear.folded


def layer_and(linear: nn.Module, layer: nn.Module) -> nn.Module:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.layer = linear, layer

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x)

    return Both()


def test_a_uniform_lora_route_folds_and_a_mixed_one_does_not() -> None:
    layer = lora_layer()
    linear, host = setup(layer)
    x = inputs()
    with torch.no_grad():
        per_task = []
        for task in range(3):
            host.set_route("vision", Route.of(task, ROWS))
            folded, plain = both_ways(linear, host, x)
            assert_agree(folded, plain)
            per_task.append(plain)
        tasks = torch.tensor([2, BASE, 0, 1])
        host.set_route("vision", Route(tasks))
        mixed = linear(x)
        assert not linear.folded
        with host.disabled():
            base = linear(x)
    assert torch.equal(mixed[1], base[1])
    for row in (0, 2, 3):
        torch.testing.assert_close(mixed[row], per_task[tasks[row]][row])


def test_base_and_disabled_never_see_a_folded_weight() -> None:
    linear, host = setup(sum_layer())
    x = inputs()
    with torch.no_grad():
        untouched = nn.functional.linear(x, linear.weight, linear.bias)
        linear(x)
        assert linear.folded
        with host.disabled():
            assert torch.equal(linear(x), untouched) and not linear.folded
        host.set_route("vision", Route.of(BASE, ROWS))
        assert torch.equal(linear(x), untouched) and not linear.folded


def test_dropout_in_training_keeps_experts_apart() -> None:
    layer = lora_layer(lora_dropout=0.5)
    linear, host = setup(layer)
    host.set_route("vision", Route.of(0, ROWS, random=StepRandom(1)))
    linear(inputs())
    assert not linear.folded
    host.set_route("vision", Route.of(0, ROWS))
    linear(inputs())
    assert linear.folded


def doubled(layer: SumLayer) -> dict[str, Tensor]:
    """Other values, in other tensors, in other places."""
    state = layer.state_dict()
    order = state["bank.A.slot"].flip(0)
    return {k: order if k.endswith("slot") else 2 * v for k, v in state.items()}


CHANGES = {
    "in place": lambda layer, linear: layer.bank.B.frozen.mul_(1.5),
    "trained": lambda layer, linear: layer.bank.A.active.add_(0.1),
    "loaded": lambda layer, linear: load_state(layer, doubled(layer)),
    "frozen": lambda layer, linear: (layer.bank.freeze([1]), layer.bank.B.frozen[-1].zero_()),
    "base": lambda layer, linear: linear._parameters["weight"].mul_(0.5),
    "new base": lambda layer, linear: setattr(
        linear, "weight", nn.Parameter(linear.weight * 3, requires_grad=False)
    ),
    "dtype": lambda layer, linear: (linear.double(), layer.double()),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("training", [False, True])
def test_every_change_makes_a_new_weight(change: str, training: bool) -> None:
    layer = sum_layer()
    linear, host = setup(layer)
    with torch.set_grad_enabled(training):
        both_ways(linear, host, inputs())
        with torch.no_grad():
            CHANGES[change](layer, linear)
        x = inputs().to(linear.weight.dtype)
        folded, plain = both_ways(linear, host, x)
    assert_agree(folded, plain)


def test_what_does_not_change_is_folded_once(monkeypatch) -> None:
    """A training step changes what trains, not what is folded."""
    layer = sum_layer()
    linear, _ = setup(layer)
    calls = count_merges(monkeypatch)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    for step in range(3):
        linear(inputs(step)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(calls) == 1


def count_merges(monkeypatch) -> list[tuple[int, ...]]:
    calls: list[tuple[int, ...]] = []

    def counted(base, bank, ids, gates=None):
        calls.append(ids)
        return merged(base, bank, ids, gates)

    monkeypatch.setattr("evolora.experts.merge.merged", counted)
    return calls


def test_a_write_that_no_version_counter_sees_is_forgotten_by_training() -> None:
    """Some optimizers write through ``.data``."""
    layer = sum_layer(frozen=())
    linear, host = setup(layer)
    with torch.no_grad():
        both_ways(linear, host, inputs())
    linear(inputs()).sum().backward()
    layer.bank.B.active.data.add_(layer.bank.B.active.grad, alpha=0.1)
    with torch.no_grad():
        folded, plain = both_ways(linear, host, inputs())
    assert_agree(folded, plain)


def test_the_cache_is_bounded_and_training_empties_it(monkeypatch) -> None:
    layer = lora_layer(tasks=4)
    linear, host = setup(layer, max_routes=2)
    calls = count_merges(monkeypatch)
    size = linear.weight.nbytes
    with torch.no_grad():
        for task, merges, held in [
            (0, 1, 1),
            (1, 2, 2),
            (0, 2, 2),
            (2, 3, 2),
            (0, 3, 2),
            (1, 4, 2),
        ]:
            host.set_route("vision", Route.of(task, ROWS))
            linear(inputs())
            assert (len(calls), host.folded_bytes) == (merges, held * size)
    host.set_route("vision", Route.of(3, ROWS))  # the trainable one
    linear(inputs())
    assert host.folded_bytes == 0


def test_a_route_folds_when_it_has_served_enough_tokens(monkeypatch) -> None:
    layer = lora_layer()
    linear, host = setup(layer)
    limits = Thresholds(fold_min_tokens=3 * ROWS * TOKENS)
    monkeypatch.setattr(sites, "thresholds_for", lambda _: limits)
    seen = []
    with torch.no_grad():
        for task in (0, 1, 0, 1, 0, 0, 1):
            host.set_route("vision", Route.of(task, ROWS))
            linear(inputs())
            seen.append(linear.folded)
    assert seen == [False, False, False, False, True, True, True]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_forward_that_breaks_off_leaves_the_pristine_weight(error) -> None:
    linear, host = setup(sum_layer())
    pristine = linear.weight
    x = inputs()
    with torch.no_grad():
        expected = linear(x)
        linear.broken = error
        with pytest.raises(error):
            linear(x)
        linear.broken = None
        if error is ValueError:  # torch runs no hook after an interrupt; the next forward mends it
            assert linear.weight is pristine
        with host.disabled():
            assert torch.equal(linear(x), nn.functional.linear(x, pristine, linear.bias))
        assert torch.equal(linear(x), expected)
        linear.broken = error
        with pytest.raises(error):
            linear(x)
    host.remove_all()
    assert linear.weight is pristine and "weight" not in linear.__dict__


def test_nothing_of_the_model_changes() -> None:
    linear, host = setup(sum_layer())
    before = {name: value.clone() for name, value in linear.state_dict().items()}
    seen = {}
    hook = linear.register_forward_hook(lambda m, _, __: seen.update(m.state_dict()), prepend=True)
    with torch.no_grad():
        linear(inputs())
    hook.remove()
    assert linear.folded
    for state in (seen, linear.state_dict()):
        assert list(state) == list(before)
        assert all(torch.equal(state[name], before[name]) for name in before)
    host.remove_all()
    assert not linear._forward_hooks and not linear._forward_pre_hooks
    assert not linear._forward_hooks_always_called
    assert copy.deepcopy(linear).weight.requires_grad is False


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_recomputes_the_same(reentrant: bool) -> None:
    layer = sum_layer()
    linear, _ = setup(layer)
    found = []
    for recompute in (False, True):
        x = inputs().requires_grad_()
        layer.zero_grad()
        out = checkpoint(linear, x, use_reentrant=reentrant) if recompute else linear(x)
        out.square().sum().backward()
        found.append([out.detach(), x.grad, layer.bank.A.active.grad, layer.bank.B.active.grad])
    for got, expected in zip(*found, strict=True):
        assert_agree(got, expected)


def test_a_weight_folded_in_inference_mode_serves_training() -> None:
    layer = sum_layer(frozen=(0, 1, 2, 3, 4))
    linear, _ = setup(layer)
    with torch.inference_mode():
        linear(inputs())
    assert linear.folded
    x = inputs().requires_grad_()
    linear(x).sum().backward()
    assert linear.folded and x.grad is not None


def test_two_layers_at_one_linear_both_act() -> None:
    first, second = sum_layer(), sum_layer(frozen=(1, 2))
    linear, host = setup(first)
    host.insert(site_of(linear), second)
    with torch.no_grad():
        folded, plain = both_ways(linear, host, inputs())
    assert_agree(folded, plain)


def test_a_weight_that_trains_or_is_packed_is_left_alone() -> None:
    layer = sum_layer()
    linear, _ = setup(layer)
    linear.weight.requires_grad_(True)
    linear(inputs()).sum().backward()
    assert not linear.folded and linear.weight.grad is not None
    with torch.no_grad():
        linear(inputs())
        assert linear.folded
    identity = nn.Identity()
    host = SiteHost()
    bank = ExpertBank(D_IN, D_IN, R)
    bank.grow(1)
    host.insert(site_of(identity), SumLayer(bank))
    host.set_route("vision", Route.of(0, ROWS))
    x = inputs()
    kept = x.clone()
    randomize(bank)
    assert not torch.equal(identity(x), kept) and torch.equal(x, kept)


def test_bottleneck_experts_sum_but_never_fold() -> None:
    bank = ExpertBank(D_IN, D_OUT, R, bias=True, activation="relu")
    bank.grow(3)
    bank.freeze([0, 1])
    randomize(bank)
    layer = SumLayer(bank)
    linear, _ = setup(layer)
    x = inputs()
    with torch.no_grad():
        got = linear(x)
        assert not linear.folded
        expected = nn.functional.linear(x, linear.weight, linear.bias)
        for expert in range(3):
            a, b, down, up = (stack.all()[expert] for stack in bank.stacks())
            expected = expected + (x @ a.T + down).relu() @ b + up
    assert_agree(got, expected)


def test_merging_rounds_once_and_drifts_never() -> None:
    """Merged in bf16 a thousand times, the weight is what it was after the first."""
    bank = sum_layer().bank
    base = torch.randn(D_OUT, D_IN).bfloat16()
    kept = base.clone()
    exact = base.double()
    for expert in (1, 3):
        a, b = bank.A.all()[expert].double(), bank.B.all()[expert].double()
        exact = exact + 0.5 * b.T @ a
    results = [merged(base, bank, (1, 3)) for _ in range(1000)]
    assert torch.equal(base, kept) and torch.equal(results[0], results[-1])
    assert torch.equal(results[0], exact.to(torch.bfloat16)) or torch.allclose(
        results[0].double(), exact, rtol=2**-8
    )


def test_without_keeps_gates_beside_their_experts() -> None:
    experts = AlwaysOn((4, 1, 3), (0.1, 0.2, 0.3))
    assert experts.without(frozenset({1})) == AlwaysOn((4, 3), (0.1, 0.3))
    assert AlwaysOn((4, 1)).without(frozenset({4})) == AlwaysOn((1,))
    for ids in itertools.permutations((4, 1, 3)):
        assert AlwaysOn(ids).without(frozenset(ids)).ids == ()
