"""On a GPU: the routed forward never makes the host wait, and can be captured in a CUDA graph."""

from __future__ import annotations

import pytest
import torch
from tests.experts.builders import Block, assert_agree, make_bank, randomize
from torch import nn

from evolora.experts.bank import ExpertBank
from evolora.experts.layers import SumLayer
from evolora.experts.mixing import mix
from evolora.experts.sites import SiteHost
from evolora.methods.lora import LoRAConfig, LoRALayer
from evolora.methods.moe_adapters import MoEAdaptersConfig, MoELayer
from evolora.randomness import StepRandom
from evolora.routing.route import Route

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
D, ROWS, TOKENS = 64, 4, 20


def hosted(name: str) -> tuple[Block, SiteHost, nn.Module]:
    torch.manual_seed(0)
    block = Block(D)
    site = block.site("mlp" if name == "moe" else "linear")
    if name == "moe":
        layer: nn.Module = MoELayer(
            site, MoEAdaptersConfig(num_experts=6, r=8), torch.device("cpu")
        )
        for task in range(3):
            layer.begin_task(torch.Generator().manual_seed(task))
            layer.bank.freeze([task])
    else:
        lora = LoRALayer(site, LoRAConfig(r=8), torch.device("cpu"))
        layer = lora if name == "lora" else SumLayer(ExpertBank(D, D, 8), gates=(1.0, 0.5, 2.0))
        layer.bank.grow(3)
        layer.bank.freeze([0, 2])
    randomize(layer.bank)
    host = SiteHost()
    host.insert(site, layer)
    return block.cuda(), host, layer.cuda()


@pytest.fixture
def no_sync():
    """Raise where the host waits for the device."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["lora", "sum", "moe"])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_a_routed_step_never_waits(name: str, mixed: bool, training: bool, no_sync) -> None:
    block, host, _ = hosted(name)
    random = StepRandom(0) if training else None
    tasks = torch.tensor([0, 1, 2, 1], device="cuda")
    route = (
        Route(tasks, random=random) if mixed else Route.of(1, ROWS, device="cuda", random=random)
    )
    host.set_route("vision", route)
    x = torch.randn(ROWS, TOKENS, D, device="cuda", requires_grad=training)
    for last in (False, True):  # the first pass reads indices that have changed, once
        if last:
            no_sync()
        with torch.set_grad_enabled(training):
            out = block(x)
            if training:
                out.backward(torch.ones_like(out))


@pytest.mark.parametrize("name", ["lora", "sum", "moe"])
def test_a_routed_forward_can_be_captured(name: str) -> None:
    block, host, _ = hosted(name)
    host.set_route("vision", Route.of(1, ROWS, device="cuda"))
    x = torch.randn(ROWS, TOKENS, D, device="cuda")
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            block(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = block(x)
        x.copy_(torch.randn_like(x))
        graph.replay()
        host.merging = False
        assert_agree(out, block(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grain", ["sample", "token"])
@pytest.mark.parametrize("formulation", ["gather", "stacked", "grouped", "segments"])
def test_formulations_agree_with_the_cpu(formulation: str, grain: str, dtype: torch.dtype) -> None:
    bank = make_bank(True, 6, [4, 1], dtype=dtype, shape=(D, D, 4))
    sizes = (ROWS,) if grain == "sample" else (ROWS, TOKENS)
    draw = torch.Generator().manual_seed(0)
    ids = torch.rand(*sizes, 6, generator=draw).topk(2, dim=-1).indices
    gates = torch.rand(*sizes, 2, generator=draw).to(dtype)
    x, out = (torch.randn(ROWS, TOKENS, D, generator=draw).to(dtype) for _ in range(2))
    found = []
    for device in ("cpu", "cuda"):
        bank.to(device)
        bank.zero_grad()
        given = x.to(device).requires_grad_()
        chosen, weights = ids.to(device), gates.to(device)
        result = mix(out.to(device), given, bank, chosen, weights, formulation=formulation)
        result.backward(torch.ones_like(result))
        gradients = [stack.active.grad for stack in bank.stacks()]
        found.append([value.cpu().float() for value in (result.detach(), given.grad, *gradients)])
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    for got, expected in zip(*reversed(found), strict=True):
        assert_agree(got, expected, tolerance)
