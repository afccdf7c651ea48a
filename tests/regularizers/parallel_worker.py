"""Two processes on the CPU: what DDP and FSDP2 make of the regulariser's gradients.

Started by ``torch.distributed.run``; every check is against one process on the whole batch, which
each of them computes for itself.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from tests.regularizers.peft_models import adapted, tokens
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from evolora.regularizers.peft_records import PeftRecords
from evolora.regularizers.resora import Resora
from evolora.regularizers.settings import ResoraConfig

WEIGHTS = ResoraConfig(weight=1.0, warmup=0.0, measure_down="w_cos", measure_up="w_cos")
FEATURES = ResoraConfig(
    weight=1.0, warmup=0.0, min_tokens=4, measure_down="f_corr", measure_up="f_contrib"
)
ROWS = 4


class Whole(nn.Module):
    """The model, of which a batch may leave the second Linear out."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, skip: bool = False) -> Tensor:
        base = self.inner.base_model.model
        first = torch.relu(base.first(base.embed(x)))
        return first if skip else base.second(first)  # type: ignore[no-any-return]


def own(x: Tensor) -> Tensor:
    """The rows of this process."""
    half = len(x) // 2
    return x[dist.get_rank() * half :][:half]


def pulled(model: nn.Module, config: ResoraConfig, x: Tensor, **options: Any) -> dict[str, Tensor]:
    """Gradients of the loss and the term, by the names of the inner model."""
    resora = Resora(config)
    with PeftRecords(model, resora) as records:
        with records.watching():
            loss = model(x, **options).pow(2).mean()
        term, _ = resora.total(records.collect(), step=0, total_steps=1)
        (loss + 10.0 * term).backward()
    found = {}
    for name, parameter in model.named_parameters():
        gradient: Any = parameter.grad
        if gradient is not None:
            gradient = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
            found[name.removeprefix("module.")] = gradient
    return found


def alone(config: ResoraConfig, x: Tensor) -> dict[str, Tensor]:
    """What one process has; its correlations are its own tokens', which are all there are."""
    model = Whole(adapted())
    resora = Resora(ResoraConfig(**{**vars(config), "whole_batch": False}))
    with PeftRecords(model, resora) as records:
        with records.watching():
            loss = model(x).pow(2).mean()
        term, _ = resora.total(records.collect(), step=0, total_steps=1)
        (loss + 10.0 * term).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    x = tokens(ROWS)
    for config in (WEIGHTS, FEATURES):
        expected = alone(config, x)
        for unused in (False, True):
            model = DistributedDataParallel(Whole(adapted()), find_unused_parameters=unused)
            torch.testing.assert_close(pulled(model, config, own(x)), expected)
        sharded = Whole(adapted())
        base: Any = sharded.inner.base_model.model
        for layer in (base.first, base.second):
            fully_shard(layer)
        fully_shard(sharded)
        torch.testing.assert_close(pulled(sharded, config, own(x)), expected)
        if config is FEATURES:  # each process on its own: the mean of correlations is another one
            model = DistributedDataParallel(Whole(adapted()))
            apart = ResoraConfig(**{**vars(config), "whole_batch": False})
            other = pulled(model, apart, own(x))
            assert any(not torch.allclose(other[n], g, rtol=1e-3) for n, g in expected.items())
    model = DistributedDataParallel(Whole(adapted()), find_unused_parameters=True)
    found = pulled(model, WEIGHTS, own(x), skip=True)
    assert {name.split(".")[3] for name, g in found.items() if g.abs().sum() > 0} == {"first"}
    assert copy.deepcopy(list(found))  # hooks are gone, so that nothing of them is in the model
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
