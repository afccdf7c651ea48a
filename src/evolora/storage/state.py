"""Method state <-> named tensors: growing ones are resized on load, names are checked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from evolora.allocation.allocator import Allocator
from evolora.errors import StorageError
from evolora.experts.bank import GrowingStack
from evolora.experts.usage import UsageCounter
from evolora.methods.reservoir import Reservoir
from evolora.regularizers.elastic import ElasticMemory
from evolora.routing.gates import TaskRouters

if TYPE_CHECKING:
    from evolora.methods.base import Method

GROWING = (GrowingStack, UsageCounter, TaskRouters, ElasticMemory, Reservoir, Allocator)
"""Modules whose tensors may have more rows (their first axis) than this method's have yet."""


def export_state(module: nn.Module) -> dict[str, Tensor]:
    """Return every tensor of a method, by name, detached."""
    return {name: tensor.detach() for name, tensor in module.state_dict().items()}


def load_state(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put saved tensors in place, growing what has grown.

    Raises:
        StorageError: a tensor is missing, unknown or of another shape.
    """
    wanted = set(module.state_dict())
    missing, unknown = sorted(wanted - set(tensors)), sorted(set(tensors) - wanted)
    if missing or unknown:
        problem = f"lacks {missing[0]!r}" if missing else f"has an unknown {unknown[0]!r}"
        raise StorageError(f"the saved state does not fit this method: it {problem}")
    _check_shapes(module, tensors)
    for name, submodule in module.named_modules():
        prefix = f"{name}." if name else ""
        for key, current in (*submodule._parameters.items(), *submodule._buffers.items()):
            if current is not None:
                _put(submodule, key, current, tensors[prefix + key])
    for submodule in module.modules():
        if isinstance(submodule, GrowingStack):
            submodule.shape = tuple(submodule.frozen.shape[1:])
    for submodule in module.modules():
        if isinstance(submodule, TaskRouters):
            submodule.experts = submodule.gate.shape[-1]


@contextmanager
def all_or_nothing(method: Method, *kept: list[Any]) -> Iterator[None]:
    """Put a method back to what it was if the block breaks off: half a task is none.

    Args:
        method: that learns in the block.
        kept: further lists that the block makes longer; they are cut again.
    """
    before = {name: value.clone() for name, value in export_state(method).items()}
    lists: list[list[Any]] = [method.task_names, method.labels, method.task_modalities, *kept]
    lengths = [len(one) for one in lists]
    try:
        yield
    except BaseException:
        load_state(method, before)
        for one, length in zip(lists, lengths, strict=True):
            del one[length:]
        method.eval()
        raise


def _check_shapes(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that do not fit before any is put in place: a refusal changes nothing."""
    wide = {
        f"{name}.{part}"
        for name, owner in module.named_modules()
        if isinstance(owner, TaskRouters)
        for part in ("gate", "noise")
    }
    for name, owner in module.named_modules():
        prefix = f"{name}." if name else ""
        for key, current in (*owner._parameters.items(), *owner._buffers.items()):
            if current is None:
                continue
            wanted, got = list(current.shape), list(tensors[prefix + key].shape)
            if isinstance(owner, GROWING):
                wanted[:1] = got[:1]  # rows grow with the tasks
                if name in wide and len(got) == len(wanted):
                    wanted[2:] = got[2:]  # routers also follow a growing pool
                if key == "ties" and len(got) == len(wanted):
                    wanted[1:] = got[1:]
            if wanted != got:
                raise StorageError(
                    f"the saved {prefix + key!r} has shape {tuple(got)}, "
                    f"this method's {tuple(current.shape)}"
                )
        if isinstance(owner, GrowingStack):
            _check_rows(prefix, tensors)


def _check_rows(prefix: str, tensors: Mapping[str, Tensor]) -> None:
    """Refuse a stack whose index does not list each of its rows once."""
    rows = len(tensors[f"{prefix}frozen"]) + len(tensors[f"{prefix}active"])
    if sorted(tensors[f"{prefix}slot"].tolist()) != list(range(rows)):
        raise StorageError(f"the saved '{prefix}slot' does not list {rows} rows once each")


def _put(owner: nn.Module, key: str, current: Tensor, saved: Tensor) -> None:
    grows = isinstance(owner, GROWING)
    value = saved.to(current.device, current.dtype).clone()
    if isinstance(current, nn.Parameter):
        wants = value.numel() > 0 if grows else current.requires_grad
        setattr(owner, key, nn.Parameter(value, requires_grad=wants))
    else:
        setattr(owner, key, value)
