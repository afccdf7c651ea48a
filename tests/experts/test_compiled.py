"""Sites under ``torch.compile``: one graph, the same answers, nothing of the moment baked in."""

from __future__ import annotations

import pytest
import torch
from tests.experts.builders import Block, assert_agree, randomize
from torch import Tensor

from evolora.experts.bank import ExpertBank
from evolora.experts.layers import SumLayer
from evolora.experts.sites import ExpertLayer, SiteHost
from evolora.methods.lora import LoRAConfig, LoRALayer
from evolora.methods.moe_adapters import MoEAdaptersConfig, MoELayer
from evolora.routing.route import BASE, Route

D, ROWS, TOKENS = 8, 4, 20


def layer_of(name: str, block: Block) -> ExpertLayer:
    if name == "moe":
        layer = MoELayer(block.site("mlp"), MoEAdaptersConfig(num_experts=4, r=4), "cpu")
        for task in range(2):
            layer.begin_task(torch.Generator().manual_seed(task))
            layer.bank.freeze([task])
        with torch.no_grad():
            for stack in (layer.routers.gate, layer.routers.noise):
                stack.frozen.normal_(generator=torch.Generator().manual_seed(1))
                stack.active.normal_(generator=torch.Generator().manual_seed(2))
    else:
        linear = block.site("linear")
        lora = LoRALayer(linear, LoRAConfig(r=2), torch.device("cpu"))
        layer = lora if name == "lora" else SumLayer(ExpertBank(D, D, 2))
        layer.bank.grow(3)
        layer.bank.freeze([0, 2])
    randomize(layer.bank)
    return layer


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora", "sum", "moe"])
@pytest.mark.parametrize("mixed", [False, True])
def test_compiled_equals_eager(name: str, mixed: bool) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    block = Block(D)
    layer = layer_of(name, block)
    host = SiteHost()
    host.insert(block.site("mlp" if name == "moe" else "linear"), layer)
    route = Route(torch.tensor([0, 1, BASE, 1])) if mixed else Route.of(1, ROWS)
    assert route.of_active.rows > 0  # which rows are active is read before the graph, once
    host.set_route("vision", route)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)

    def results(function) -> list[Tensor]:
        x = torch.randn(ROWS, TOKENS, D, generator=torch.Generator().manual_seed(3))
        x.requires_grad_()
        layer.zero_grad()
        out = function(x)
        out.square().sum().backward()
        return [out.detach(), x.grad, layer.bank.A.active.grad, layer.bank.B.active.grad]

    for got, expected in zip(results(compiled), results(block), strict=True):
        assert_agree(got, expected)
    layer.bank.freeze([1])  # rows move: what was compiled must not remember where they stood
    with torch.no_grad():
        layer.bank.A.frozen.mul_(2.0)
        x = torch.randn(ROWS, TOKENS, D)
        assert_agree(compiled(x), block(x))
