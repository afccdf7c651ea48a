"""The router of tokens: what it computes, how it starts, in which type."""

from __future__ import annotations

import torch

from evolora.randomness import generator
from evolora.routing.token_router import TokenRouter


def test_weights_are_the_softmax_of_a_linear() -> None:
    router = TokenRouter(5, 3)
    router.grow(generator(0, "a"))
    x = torch.randn(2, 4, 5, generator=generator(1))
    linear = torch.nn.Linear(5, 3, bias=False)
    with torch.no_grad():
        linear.weight.copy_(router.weight.all()[0])
    torch.testing.assert_close(router(x), linear(x).softmax(dim=-1))
    assert router.flops(7) == 2 * 7 * 5 * 3


def test_it_starts_as_a_linear_does() -> None:
    router = TokenRouter(400, 50)
    router.grow(generator(0, "a"))
    weight = router.weight.all().detach()
    assert float(weight.abs().max()) <= 1 / 20
    assert abs(float(weight.std()) - 1 / 20 / 3**0.5) < 1e-3
    again = TokenRouter(400, 50)
    again.grow(generator(0, "a"))
    assert torch.equal(weight, again.weight.all())


def test_it_weighs_in_its_own_type() -> None:
    router = TokenRouter(4, 3)
    router.grow(generator(0))
    found = router(torch.ones(1, 2, 4, dtype=torch.bfloat16))
    assert found.dtype == torch.float32
    found[0, 0, 0].backward()
    assert bool(router.weight.active.grad.abs().sum() > 0)


def test_on_shapes_it_draws_nothing() -> None:
    router = TokenRouter(4, 3, device="meta")
    router.grow(generator(0))
    assert router.weight.active.is_meta and router.weight.active.numel() == 12
