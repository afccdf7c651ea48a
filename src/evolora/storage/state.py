"""Method state <-> named tensors. Growing tensors are resized on load, names are checked strictly."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from evolora.errors import StorageError
from evolora.experts.bank import GrowingStack
from evolora.experts.usage import UsageCounter
from evolora.routing.gates import TaskRouters


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
    for name, submodule in module.named_modules():
        prefix = f"{name}." if name else ""
        for key, current in (*submodule._parameters.items(), *submodule._buffers.items()):
            if current is not None:
                _put(submodule, key, current, tensors[prefix + key], prefix + key)
    for submodule in module.modules():
        if isinstance(submodule, GrowingStack):
            submodule.shape = tuple(submodule.frozen.shape[1:])
    for submodule in module.modules():
        if isinstance(submodule, TaskRouters):
            submodule.experts = submodule.gate.shape[-1]


def _put(owner: nn.Module, key: str, current: Tensor, saved: Tensor, name: str) -> None:
    grows = isinstance(owner, GrowingStack | UsageCounter | TaskRouters)
    if not grows and current.shape != saved.shape:
        raise StorageError(
            f"the saved {name!r} has shape {tuple(saved.shape)}, this method's {tuple(current.shape)}"
        )
    value = saved.to(current.device, current.dtype).clone()
    if isinstance(current, nn.Parameter):
        wants = value.numel() > 0 if grows else current.requires_grad
        setattr(owner, key, nn.Parameter(value, requires_grad=wants))
    else:
        setattr(owner, key, value)
