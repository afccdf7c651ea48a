"""What learning costs, measured on the real tensors: parameters, bytes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from evolora.routing.selector import AutoEncoderSelector

if TYPE_CHECKING:
    from evolora.methods.base import Method


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Cost of a method as it stands.

    Args:
        trainable_parameters: values that train in the current task.
        stored_parameters: floating-point values that must be kept to answer again.
        stored_bytes: their bytes.
    """

    trainable_parameters: int
    stored_parameters: int
    stored_bytes: int

    def to_json(self) -> dict[str, int]:
        """Return plain values."""
        return asdict(self)


def measure_cost(method: Method) -> Cost:
    """Return the cost of a method now; call it while a task is being trained."""
    kept = [tensor for tensor in method.stored().values() if tensor.is_floating_point()]
    trainable = sum(parameter.numel() for parameter in method.trainable().values())
    if isinstance(method.selector, AutoEncoderSelector):
        trainable += method.selector.bank.parameters_per_task()
    return Cost(
        trainable_parameters=trainable,
        stored_parameters=sum(tensor.numel() for tensor in kept),
        stored_bytes=sum(tensor.numel() * tensor.element_size() for tensor in kept),
    )
