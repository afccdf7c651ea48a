"""The naive loops compute what the library computes, so that only time tells them apart."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from evolora.bench.references import LoopLoRALayer, LoopMoELayer, RoutedLoopLayer, loop_over_experts
from evolora.bench.towers import linear_sites, mlp_sites
from evolora.experts.bank import ExpertBank
from evolora.experts.mixing import mix
from evolora.methods.lora import LoRAPerTask, LoRAPerTaskConfig
from evolora.methods.moe_adapters import MoEAdapters, MoEAdaptersConfig
from evolora.routing.route import Route
from evolora.routing.selector import OracleSelectorConfig


def bank(experts: int, frozen: int = 0) -> ExpertBank:
    made = ExpertBank(6, 5, 3, scale=0.7)
    made.grow(experts, torch.Generator().manual_seed(0))
    with torch.no_grad():
        made.B.active.normal_(generator=torch.Generator().manual_seed(1))
    made.freeze(range(frozen))
    return made.double()


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


class Holder(nn.Module):
    def __init__(self, held: ExpertBank) -> None:
        super().__init__()
        self.bank = held


def test_the_lora_loop_adds_every_expert_and_trains_the_unfrozen_ones() -> None:
    held = bank(4, frozen=3)
    x, out = normal(2, 7, 6), normal(2, 7, 5)
    loop = LoopLoRALayer(Holder(held))
    theirs = loop(x, out, Route.of(0, 2))
    ours = mix(out, x, held, torch.arange(4)[None], torch.ones(1, 4, dtype=torch.float64))
    torch.testing.assert_close(theirs, ours)
    assert sum(p.requires_grad for p in loop.parameters()) == 2


@pytest.mark.parametrize("hit_only", [False, True])
@pytest.mark.parametrize("per_token", [False, True])
def test_the_loop_over_a_bank_equals_the_definition(hit_only: bool, per_token: bool) -> None:
    held = bank(4)
    x, out = normal(3, 7, 6), normal(3, 7, 5)
    draw = torch.Generator().manual_seed(3)
    rows = 21 if per_token else 3
    ids = torch.multinomial(torch.ones(rows, 4), 2, generator=draw)
    gates = torch.rand(rows, 2, dtype=torch.float64, generator=draw)
    shape = (3, 7, 2) if per_token else (3, 2)
    got = loop_over_experts(out, x, held, ids.view(shape), gates.view(shape), hit_only=hit_only)
    wide = (3, 7, 2) if per_token else (3, 1, 2)
    a, b = held.A.all()[ids.view(wide)], held.B.all()[ids.view(wide)]
    hidden = torch.einsum("bnd,bmkrd->bnkr" if not per_token else "bnd,bnkrd->bnkr", x, a)
    up = "bnkr,bmkrd,bmk->bnd" if not per_token else "bnkr,bnkrd,bnk->bnd"
    torch.testing.assert_close(got, out + 0.7 * torch.einsum(up, hidden, b, gates.view(wide)))


def test_the_routed_loop_gives_each_row_its_task(tiny_tower) -> None:
    config = LoRAPerTaskConfig(r=2, towers=("vision",))
    method = tiny_tower.learn(LoRAPerTask, config, tasks=3)
    tasks = torch.tensor([2, 0, 2, 1])
    ours, theirs = tiny_tower.both(method, linear_sites, RoutedLoopLayer, tasks)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_moe_loop_in_the_authors_shape_equals_the_method(tiny_tower) -> None:
    config = MoEAdaptersConfig(
        num_experts=5, r=4, dropout=0.0, towers=("vision",), selector=OracleSelectorConfig()
    )
    method = tiny_tower.learn(MoEAdapters, config)
    ours, theirs = tiny_tower.both(method, mlp_sites, LoopMoELayer, 0)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    base = tiny_tower.base()
    assert (ours - base).abs().max() > 1e-3  # the experts say something
