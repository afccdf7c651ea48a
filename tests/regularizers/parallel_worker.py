"""Two processes on the CPU: what DDP and FSDP2 make of the regulariser's gradients.

Started by ``torch.distributed.run``; every check is against one process on the whole batch, which
each of them computes for itself.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tests.regularizers.peft_models import adapted, sentences, tiny_llama, tokens
from tests.regularizers.test_trainer import OFF, difference, trainer
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy
from torch.nn.parallel import DistributedDataParallel

from evolora.errors import ConfigError
from evolora.regularizers.peft_records import PeftRecords
from evolora.regularizers.resora import Resora
from evolora.regularizers.settings import ResoraConfig

WEIGHTS = ResoraConfig(weight=1.0, warmup=0.0, measure_down="w_cos", measure_up="w_cos")
FEATURES = ResoraConfig(
    weight=1.0, warmup=0.0, min_tokens=4, measure_down="f_corr", measure_up="f_contrib"
)
CUT = replace(FEATURES, detach_input=True)
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


def sharded(*, leaves: bool = False) -> nn.Module:
    """The model by FSDP2; a unit is a layer with its adapter, or every factor of its own."""
    model = Whole(adapted())
    base: Any = model.inner.base_model.model
    for layer in (base.first, base.second):
        for part in [*layer.lora_A.values(), *layer.lora_B.values()] if leaves else []:
            fully_shard(part)
        fully_shard(layer)
    fully_shard(model)
    return model


def trains_alone(module: nn.Module) -> bool:
    """Whether PEFT's own policy makes it a unit: a trainable leaf."""
    weight: Any = getattr(module, "weight", None)
    return not list(module.children()) and weight is not None and weight.requires_grad


def refused_in_parts(config: ResoraConfig, x: Tensor) -> None:
    """FSDP1 has an adapter's weights in parts, or their shapes alone, outside of a forward."""
    for whole_names in (True, False):
        model = FullyShardedDataParallel(
            Whole(adapted()),
            use_orig_params=whole_names,
            auto_wrap_policy=partial(lambda_auto_wrap_policy, lambda_fn=trains_alone),
            device_id=torch.device("cpu"),
        )
        try:
            pulled(model, config, x)
        except ConfigError as error:
            assert "in parts (FSDP1" in str(error), error
        else:
            raise AssertionError("FSDP1 was not refused")


def alone(config: ResoraConfig, x: Tensor) -> dict[str, Tensor]:
    """What one process has; its correlations are its own tokens', which are all there are."""
    model = Whole(adapted())
    resora = Resora(replace(config, whole_batch=False))
    with PeftRecords(model, resora) as records:
        with records.watching():
            loss = model(x).pow(2).mean()
        term, _ = resora.total(records.collect(), step=0, total_steps=1)
        (loss + 10.0 * term).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def term_alone(config: ResoraConfig) -> dict[str, Tensor]:
    """Gradients of the term of all sentences on one process."""
    model, rows = tiny_llama().train(), sentences(ROWS)
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    resora = Resora(replace(config, whole_batch=False))
    with PeftRecords(model, resora) as records:
        with records.watching(batch["attention_mask"]):
            loss = model(**batch).loss
        term, _ = resora.total(records.collect(), step=0, total_steps=1, task_loss=loss)
        term.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def by_trainer(folder: Path) -> None:
    """The Trainer over both processes: the term's gradient is that of one, and so is what it logs.

    The processes' rows have unequally many tokens, and the Trainer scales their losses for it.
    """
    made: dict[ResoraConfig, Any] = {}
    shared = replace(FEATURES, adaptivity="ratio")
    for config in (OFF, WEIGHTS, FEATURES, shared):
        made[config] = trainer(folder, config, per_device_train_batch_size=ROWS // 2)
        made[config].train()
        if config is OFF:
            continue
        (entry,) = [entry for entry in made[config].state.log_history if "loss" in entry]
        parts = torch.tensor([entry["task_loss"], entry["resora"]])
        dist.all_reduce(parts)
        task, term = (parts / 2).tolist()
        assert abs(task + term - entry["loss"]) < 0.01, (task, term, entry["loss"])
        found = difference(made[config].pulled[0], made[OFF].pulled[0])
        # A share of the task's loss is one of each process's own, whose mean is by rows.
        close = {"rtol": 0.05, "atol": 1e-3} if config is shared else {"rtol": 1e-3, "atol": 1e-5}
        torch.testing.assert_close(found, term_alone(config), **close)


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    x = tokens(ROWS)
    for config in (WEIGHTS, FEATURES, CUT):
        expected = alone(config, x)
        for unused in (False, True):
            model = DistributedDataParallel(Whole(adapted()), find_unused_parameters=unused)
            torch.testing.assert_close(pulled(model, config, own(x)), expected)
        for leaves in (False, True):
            torch.testing.assert_close(pulled(sharded(leaves=leaves), config, own(x)), expected)
    apart = replace(FEATURES, whole_batch=False)  # the mean of processes' correlations is another
    other = pulled(DistributedDataParallel(Whole(adapted())), apart, own(x))
    expected = alone(FEATURES, x)
    assert any(not torch.allclose(other[n], g, rtol=1e-3) for n, g in expected.items())
    torch.testing.assert_close(pulled(sharded(), apart, own(x)), other)
    for config in (WEIGHTS, FEATURES, CUT):
        refused_in_parts(config, own(x))
    for skip, ran in ((True, {"first"}), (dist.get_rank() == 0, {"first", "second"})):
        model = DistributedDataParallel(Whole(adapted()), find_unused_parameters=True)
        found = pulled(model, WEIGHTS, own(x), skip=skip)
        assert {name.split(".")[3] for name, g in found.items() if g.abs().sum() > 0} == ran
    by_trainer(Path(sys.argv[1]))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
