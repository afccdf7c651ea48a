"""Woven adapters: the numbers of the specification, closed forms, and a plain loop over experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from evolora.backbones.blocks import linear_site
from evolora.experts.bank import GrowingStack
from evolora.experts.in_adapters import InAdapters
from evolora.experts.woven import WovenLayer
from evolora.randomness import StepRandom, generator
from evolora.routing.path_gates import PathGates
from evolora.routing.route import Route


def layer(
    d_in: int, d_out: int, r: int, *, kind: str = "linear", gate: bool = True, **options: Any
) -> WovenLayer:
    site = linear_site("qformer", 0, "attention.query", nn.Linear(d_in, d_out))
    inner = None if kind == "none" else InAdapters(r, kind)  # type: ignore[arg-type]
    gates = PathGates(d_in, noise=options.pop("noise", True), top_k=options.pop("top_k", None))
    return WovenLayer(site, r, inner=inner, gates=gates if gate else None, **options)


def grown(made: WovenLayer, paths: int, *, seed: int = 0) -> WovenLayer:
    """Add paths and give every value a random one."""
    for path in range(paths):
        draw = generator(seed, path)
        made.grow(draw)
        if made.inner is not None:
            made.inner.grow(path, draw, start="identity", std=0.02)
        for stack in (m for m in made.modules() if isinstance(m, GrowingStack)):
            if stack.active.numel():
                with torch.no_grad():
                    stack.active.copy_(torch.randn(stack.active.shape, generator=draw) * 0.5)
            stack.freeze(range(len(stack)))
    return made


def fill(stack: GrowingStack, values: Any) -> None:
    """Replace all rows of a stack."""
    rows = torch.tensor(values, dtype=torch.float32)
    with torch.no_grad():
        stack.active.copy_(rows.view_as(stack.active))


def by_loop(made: WovenLayer, x: Tensor, out: Tensor, path: int) -> Tensor:
    """The same, expert by expert and token by token."""
    bank, result = made.bank, out.clone()
    a, b, down, up = (s.all() for s in bank.stacks())
    for row in range(x.shape[0]):
        for place in range(x.shape[1]):
            token = x[row, place]
            logits = torch.zeros(path + 1)
            if made.gates is not None and path:
                first = path * (path + 1) // 2 - 1
                logits = made.gates.weight.all()[first : first + path + 1] @ token
            gates = logits.softmax(0) if made.mixture == "gate" else torch.ones(path + 1)
            for expert in range(path + 1):
                hidden = a[expert] @ token + down[expert]
                if bank.activation == "relu":
                    hidden = hidden.relu()
                if made.inner is not None and expert < path:
                    at = path * (path - 1) // 2 + expert
                    layers = list(zip(made.inner.weights, made.inner.biases, strict=True))
                    for depth, (weight, bias) in enumerate(layers):
                        hidden = weight.all()[at] @ hidden + bias.all()[at]
                        if made.inner.kind == "mlp":
                            hidden = hidden.sigmoid() if depth == 2 else hidden.relu()
                expert_out = made.scale.all()[expert, 0] * (b[expert].T @ hidden + up[expert])
                result[row, place] += gates[expert] * expert_out
    return result


def test_the_adapter_the_in_adapter_and_the_mixture_of_the_specification() -> None:
    made = layer(2, 2, 1)
    made.grow(generator(0))
    made.inner.grow(0, generator(0), start="identity", std=0.02)
    fill(made.bank.A, [[[1.0, -1.0]]])
    fill(made.bank.down_bias, [[0.5]])
    fill(made.bank.B, [[[2.0, 1.0]]])
    fill(made.bank.up_bias, [[0.0, 1.0]])
    fill(made.scale, [[0.5]])
    x, zero = torch.tensor([[[3.0, 1.0]]]), torch.zeros(1, 1, 2)
    one = made(x, zero.clone(), Route.of(0, 1))
    torch.testing.assert_close(one, torch.tensor([[[2.5, 1.75]]]))

    for stack in (m for m in made.modules() if isinstance(m, GrowingStack)):
        stack.freeze(range(len(stack)))
    made.grow(generator(1))
    made.inner.grow(1, generator(1), start="identity", std=0.02)
    fill(made.inner.weights[0], [[[2.0]]])
    fill(made.inner.biases[0], [[-1.0]])
    fill(made.bank.A, [[[1.0, -1.0]]])  # the new one computes what the old one does
    fill(made.bank.down_bias, [[0.5]])
    fill(made.bank.B, [[[2.0, 1.0]]])
    fill(made.bank.up_bias, [[0.0, 1.0]])
    fill(made.scale, [[0.5]])
    gate = torch.tensor([0.25, 0.75]).log()  # on x = (3, 1), from its second entry alone
    fill(made.gates.weight, torch.stack([torch.zeros(2), gate], dim=1).tolist())
    mixed = made(x, zero.clone(), Route.of(1, 1))
    torch.testing.assert_close(mixed, torch.tensor([[[2.875, 1.9375]]]))


@pytest.mark.parametrize("kind", ["linear", "mlp", "two-linear", "none"])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_one_product_equals_a_loop_over_experts(kind: str, activation: str | None) -> None:
    made = grown(layer(6, 5, 3, kind=kind, activation=activation), 3)
    draw = torch.Generator().manual_seed(3)
    x, out = torch.randn(2, 4, 6, generator=draw), torch.randn(2, 4, 5, generator=draw)
    for path in range(3):
        expected = by_loop(made, x, out, path)
        found = made(x, out.clone(), Route.of(path, 2))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    mixed = made(x, out.clone(), Route(torch.tensor([2, 1])))
    torch.testing.assert_close(mixed[1], by_loop(made, x, out, 1)[1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mixed[0], by_loop(made, x, out, 2)[0], atol=1e-5, rtol=1e-5)


def test_a_sum_has_every_adapter_up_to_the_paths_own() -> None:
    made = grown(layer(4, 3, 2, kind="none", gate=False, mixture="sum"), 3)
    x, out = torch.randn(1, 2, 4), torch.zeros(1, 2, 3)
    for path in range(3):
        found = made(x, out.clone(), Route.of(path, 1))
        torch.testing.assert_close(found, by_loop(made, x, out, path), atol=1e-5, rtol=1e-5)


def test_a_mean_counts_every_adapter_alike() -> None:
    made = grown(layer(4, 3, 2, kind="none", gate=False, mixture="mean"), 3)
    x, out = torch.randn(1, 2, 4), torch.randn(1, 2, 3)
    for path in range(3):
        added = by_loop(made, x, out, path) - out
        found = made(x, out.clone(), Route.of(path, 1))
        torch.testing.assert_close(found, out + added / (path + 1), atol=1e-5, rtol=1e-5)


def test_start_of_a_path_in_closed_form() -> None:
    """Identity: base + 1/t sum A_i(x). Zero: base + 1/t sum s_i c_i. With a factor: the base."""
    x, out = torch.randn(1, 3, 6), torch.randn(1, 3, 5)
    for start, scaled in (("identity", False), ("zero", False), ("identity", True)):
        made = grown(layer(6, 5, 3, branch_scale=scaled), 2)
        made.grow(generator(9))
        made.inner.grow(2, generator(9), start=start, std=0.02)
        plain = WovenLayer.forward(made, x, out.clone(), Route.of(2, 1))
        up, down, bias = (s.all() for s in (made.bank.B, made.bank.A, made.bank.down_bias))
        each = [up[i].T @ (down[i] @ x[0].T + bias[i][:, None]) for i in range(2)]
        offsets = [made.bank.up_bias.all()[i][:, None] for i in range(2)]
        scales = [made.scale.all()[i, 0] for i in range(2)]
        parts = [
            s * ((e if start == "identity" else 0.0 * e) + o)
            for s, e, o in zip(scales, each, offsets, strict=True)
        ]
        expected = out if scaled else out + (sum(parts) / 3).T[None]
        torch.testing.assert_close(plain, expected, atol=1e-5, rtol=1e-5)


def test_an_in_adapter_that_is_the_identity_reuses_an_adapter_as_it_is() -> None:
    made = grown(layer(6, 5, 3, gate=False, mixture="sum"), 2)
    x, zero = torch.randn(1, 3, 6), torch.zeros(1, 3, 5)
    alone = made(x, zero.clone(), Route.of(0, 1))
    bare = grown(layer(6, 5, 3, gate=False, mixture="sum", reuse=False), 2)
    own = bare(x, zero.clone(), Route.of(1, 1))
    made.inner.weights[0].frozen.copy_(torch.eye(3)[None])
    made.inner.biases[0].frozen.zero_()
    both = made(x, zero.clone(), Route.of(1, 1))
    torch.testing.assert_close(both - alone, by_loop(made, x, zero, 1) - by_loop(made, x, zero, 0))
    assert not torch.allclose(own, both)


def test_experts_and_columns_of_the_gate_may_be_permuted_together() -> None:
    made = grown(layer(6, 5, 3, kind="none"), 3)
    x, out = torch.randn(2, 4, 6), torch.randn(2, 4, 5)
    before = made(x, out.clone(), Route.of(2, 2))
    order = torch.tensor([1, 0, 2])
    for stack in (*made.bank.stacks(), made.scale):
        stack.frozen.copy_(stack.frozen[order])
    made.gates.weight.frozen[2:].copy_(made.gates.weight.frozen[2:][order])
    torch.testing.assert_close(made(x, out.clone(), Route.of(2, 2)), before, atol=1e-6, rtol=1e-6)


def test_the_first_path_may_be_folded_into_the_weight() -> None:
    made, linear = grown(layer(6, 5, 3), 1), nn.Linear(6, 5)
    x, bank, s = torch.randn(2, 4, 6), made.bank, made.scale.all()[0, 0]
    found = made(x, linear(x).detach(), Route.of(0, 2))
    up, down = bank.B.all()[0].T, bank.A.all()[0]
    weight = linear.weight + s * up @ down
    bias = linear.bias + s * (up @ bank.down_bias.all()[0] + bank.up_bias.all()[0])
    torch.testing.assert_close(found, nn.functional.linear(x, weight, bias), atol=1e-5, rtol=1e-5)


def test_gradients_at_the_start_reach_the_upper_half_alone() -> None:
    made = grown(layer(6, 5, 3), 1)
    made.grow(generator(5))
    made.inner.grow(1, generator(5), start="identity", std=0.02)
    x, out = torch.randn(2, 4, 6), torch.randn(2, 4, 5)
    made(x, out, Route.of(1, 2)).square().sum().backward()
    bank = made.bank
    assert not bank.A.active.grad.any() and not bank.down_bias.active.grad.any()
    assert bank.B.active.grad.any() and bank.up_bias.active.grad.any()
    assert made.gates.weight.active.grad.any() and made.inner.weights[0].active.grad.any()
    assert bank.A.active.shape[0] == 1 and bank.A.frozen.grad is None


def test_the_gate_of_the_specification() -> None:
    gates = PathGates(2)
    gates.grow(0)
    assert len(gates.weight) == 0
    gates.grow(1)
    gates.grow(2)
    x = torch.tensor([[[1.0, 2.0], [0.0, -1.0]]])
    torch.testing.assert_close(gates(x, 2), torch.full((1, 2, 3), 1 / 3))
    columns = torch.tensor([[0.5, 0.25], [0.0, 0.5], [-0.5, 0.0]])
    with torch.no_grad():
        gates.weight.active[2:].copy_(columns)
    expected = torch.tensor([[[0.4498, 0.4498, 0.1004], [0.3265, 0.2543, 0.4192]]])
    torch.testing.assert_close(gates(x, 2), expected, atol=5e-5, rtol=0)
    assert torch.equal(gates(x, 2), gates(x, 2))


def test_noise_is_drawn_in_training_with_the_deviation_of_the_specification() -> None:
    gates = PathGates(2)
    gates.grow(1)
    x = torch.zeros(1, 20000, 2)
    noisy = gates(x, 1, random=StepRandom(3), key="site").log()
    spread = (noisy[..., 0] - noisy[..., 1]) / 2**0.5  # the difference of two draws
    assert float(spread.detach().std()) == pytest.approx(0.70315, abs=0.01)
    drawn = StepRandom(3).normal("site/gate", tuple(noisy.shape), noisy)
    torch.testing.assert_close(
        noisy.exp(), torch.softmax(0.70315 * drawn, dim=-1), atol=2e-5, rtol=0
    )
    assert torch.equal(gates(x, 1, random=StepRandom(3), key="site").log(), noisy)
    torch.testing.assert_close(noisy.exp().sum(-1), torch.ones(1, 20000))
    quiet = PathGates(2, noise=False)
    quiet.grow(1)
    assert torch.equal(quiet(x, 1, random=StepRandom(3), key="site"), torch.full_like(noisy, 0.5))


def test_top_k_silences_the_others() -> None:
    gates = PathGates(2, top_k=1)
    gates.grow(1)
    with torch.no_grad():
        gates.weight.active.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    x = torch.tensor([[[2.0, 1.0], [1.0, 3.0]]])
    assert gates(x, 1).tolist() == [[[1.0, 0.0], [0.0, 1.0]]]


def test_shared_in_adapters_have_one_slot_per_source() -> None:
    own, shared = InAdapters(2), InAdapters(2, shared=True)
    for path in range(4):
        for one in (own, shared):
            one.grow(path, generator(path), start="normal", std=0.02)
    assert [len(one.weights[0]) for one in (own, shared)] == [6, 3]
    assert list(own.rows(3)) == [3, 4, 5] and list(shared.rows(3)) == [0, 1, 2]
    assert own.weights[0].all().std() < 0.05
