"""PEFT's LoRA in a bench tower, with the weights of one of the library's methods."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from evolora.backbones.clip import DualEncoder
from evolora.bench.towers import linear_sites, twin
from evolora.methods.base import Method


def peft_installed() -> bool:
    """Return whether the optional package is there."""
    return importlib.util.find_spec("peft") is not None


def peft_tower(backbone: DualEncoder, method: Method) -> nn.Module:
    """Return the vision tower under PEFT; each expert of the method is an adapter "0", "1" ...

    Args:
        backbone: without experts; its weights are shared.
        method: linear experts at :func:`evolora.bench.towers.linear_sites`.
    """
    from peft import LoraConfig, get_peft_model

    other = twin(backbone)
    tower = other.model.get_submodule("vision_model")
    names = {module: name for name, module in tower.named_modules()}
    sites = linear_sites(other)
    targets = [names[site.module] for site in sites]
    banks: list[Any] = [method.layers[site.key].bank for site in sites]
    scaled = banks[0].scale * banks[0].r
    config = LoraConfig(r=banks[0].r, lora_alpha=scaled, target_modules=targets)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT reads a name transformers renamed
        model: Any = get_peft_model(tower, config, adapter_name="0")
    for adapter in range(1, len(banks[0])):
        model.add_adapter(str(adapter), config)
    with torch.no_grad():
        for bank, target in zip(banks, targets, strict=True):
            adapted: Any = tower.get_submodule(target)
            for adapter, (a, b) in enumerate(zip(bank.A.all(), bank.B.all(), strict=True)):
                adapted.lora_A[str(adapter)].weight.copy_(a)
                adapted.lora_B[str(adapter)].weight.copy_(b.T)
    made: nn.Module = model.eval()
    return made


def peft_hidden(model: Any, tasks: Sequence[int] | None = None) -> Callable[[Tensor], Tensor]:
    """Return a function from pixels to hidden states; ``tasks`` names each row's adapter."""
    mixed = {} if tasks is None else {"adapter_names": [str(task) for task in tasks]}

    def run(x: Tensor) -> Tensor:
        out: Tensor = model(pixel_values=x, **mixed).last_hidden_state
        return out

    return run


def peft_one_pass_each(model: Any, tasks: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the same function, computed adapter after adapter on its own rows."""
    rows = {str(task): torch.nonzero(tasks == task)[:, 0] for task in set(tasks.tolist())}
    run_one = peft_hidden(model)

    def run(x: Tensor) -> Tensor:
        parts = []
        for name, mine in rows.items():
            model.set_adapter(name)
            parts.append(run_one(x[mine]))
        out = parts[0].new_empty(len(x), *parts[0].shape[1:])
        for mine, part in zip(rows.values(), parts, strict=True):
            out[mine] = part
        return out

    return run
