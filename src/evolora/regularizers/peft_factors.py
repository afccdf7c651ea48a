"""The two factors of an adapter in any of PEFT's layers, as matrices of ranks."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from evolora.errors import ConfigError

PREFIXES = ("lora_embedding", "lora", "hira", "delora")
"""How the names of factors begin: ``lora_A``, ``lora_B`` ..."""


def factors_of(layer: Any, adapter: str, name: str) -> tuple[Tensor, Tensor]:
    """Return A (e, r, d_in) and the columns of B (e, r, d_out) of an adapter, whole.

    Args:
        layer: a PEFT layer with one of the prefixes.
        adapter: one that it has.
        name: of the layer, for messages.
    """
    down, up = (getattr(layer, f"{prefix_of(layer)}_{side}")[adapter] for side in ("A", "B"))
    a, b = whole(weight_of(down)), whole(weight_of(up))
    if not (_is_there(a) and _is_there(b)) or getattr(up, "groups", 1) != 1:
        raise ConfigError(
            f"resora: the factors of {name} are {tuple(a.shape)} and {tuple(b.shape)} here: in "
            "parts (FSDP1, ZeRO-3), or those of a grouped convolution; leave it out by layers="
        )
    return as_ranks(a, b, name, experts=getattr(layer, "num_experts", 1))


def as_ranks(a: Tensor, b: Tensor, name: str, *, experts: int = 1) -> tuple[Tensor, Tensor]:
    """Return A (e, r, d_in) and the columns of B (e, r, d_out) of weights as PEFT keeps them.

    Args:
        a: (r, d_in, ...), or (e r, d_in) of a mixture's ``target_parameters``.
        b: (d_out, r, ...), or (d_out, r e): there the expert is the inner index.
        name: of the layer, for messages.
        experts: e.
    """
    a, b = a.flatten(1), b.flatten(1)
    if a.shape[0] != b.shape[1] or a.shape[0] % experts:
        raise ConfigError(
            f"resora: the factors of {name} are {tuple(a.shape)} and {tuple(b.shape)}, which do "
            "not stand in pairs of ranks; leave it out by layers="
        )
    rank = a.shape[0] // experts
    return a.reshape(experts, rank, -1), b.reshape(len(b), rank, experts).permute(2, 1, 0)


def weight_of(factor: Any) -> Tensor:
    """Return the weight of a factor, which is a module or the weight itself."""
    weight: Any = factor.weight if isinstance(factor, nn.Module) else factor
    found: Tensor = weight
    return found


def whole(weight: Tensor) -> Tensor:
    """Return a weight gathered from all processes, if it is in parts (FSDP2).

    Its gradient is the mean of the processes', as data parallelism has it: what they make of it may
    differ.
    """
    gather = getattr(weight, "full_tensor", None)
    if gather is None:
        return weight
    from torch.distributed.tensor import Partial

    mesh: Any = weight.device_mesh  # type: ignore[attr-defined]
    found: Tensor = gather(grad_placements=[Partial()] * mesh.ndim)
    mean: Tensor = found.detach() + (found - found.detach()) / mesh.size()
    return mean


def _is_there(weight: Tensor) -> bool:
    """Return whether a process holds a matrix, and not a part of it, or its shape alone."""
    return weight.dim() >= 2 and weight.numel() > 0 and weight.untyped_storage().nbytes() > 0


def prefix_of(layer: Any) -> str | None:
    """Return how the names of a layer's factors begin; None of a layer without factors."""
    for prefix in PREFIXES:
        if len(getattr(layer, f"{prefix}_A", ())) > 0:
            return prefix
    return None


def trains(layer: Any, adapter: str) -> bool:
    """Return whether a layer has an adapter and trains it."""
    sides = [getattr(layer, f"{prefix_of(layer)}_{side}") for side in ("A", "B")]
    return any(adapter in side and weight_of(side[adapter]).requires_grad for side in sides)
