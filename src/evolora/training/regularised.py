"""A method whose training loss has the terms of regularizers, whatever its own forward does.

The terms are computed inside one forward, together with the method's, so that gradients are
averaged over processes as always. Without regularizers a method is trained as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from evolora.backbones.base import Backbone, Batch
from evolora.methods.base import Method
from evolora.registry import REGULARIZERS
from evolora.regularizers.bank_records import BankRecords
from evolora.regularizers.resora import Resora

OWN = "regularizers/"
"""How names begin of what trains beside the method."""


class Regularised(nn.Module):
    """A method and the regularizers of one task.

    Args:
        method: the learner.
        configs: settings of active regularizers.
        seed: run seed.
        total_steps: optimizer steps of the task, from which schedules are counted.

    Attributes:
        step: optimizer steps done.
        seen: numbers of the forward that ran last, to log.

    Raises:
        ConfigError: the method has no experts that a regularizer could read.
    """

    def __init__(
        self, method: Method, configs: Sequence[Any], *, seed: int = 0, total_steps: int = 1
    ) -> None:
        super().__init__()
        self.method, self.total_steps, self.step = method, total_steps, 0
        self.seen: dict[str, Tensor] = {}
        self.parts: list[tuple[Resora, BankRecords]] = []
        for config in configs:
            resora: Resora = REGULARIZERS.get(config.type)(config, seed=seed)
            records = BankRecords(
                method.layers, method.backbone.host, resora, method=method.config.type
            )
            self.parts.append((resora, records))
        self.scales = nn.ParameterList(self.own().values()).to(method.backbone.device)

    @property
    def backbone(self) -> Backbone:
        """The method's."""
        return self.method.backbone

    def own(self) -> dict[str, nn.Parameter]:
        """Return what trains beside the method and is thrown away with the task, by name."""
        return {
            f"{OWN}{index}/{side}": scale
            for index, (resora, _) in enumerate(self.parts)
            for side, scale in resora.scales.items()
        }

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the method's terms, their loss with that of the regularizers added."""
        due = [part for part in self.parts if part[0].config.due(self.step)]
        with ExitStack() as stack:
            for _, records in due:
                stack.enter_context(records.watching())
            terms: dict[str, Tensor] = self.method(batch)
        self.seen = {"task_loss": terms["task"]}
        loss = terms["loss"]
        for resora, records in due:
            term, metrics = resora.total(
                records.collect(),
                step=self.step,
                total_steps=self.total_steps,
                task_loss=terms["task"],
            )
            loss = loss + term.to(loss.dtype)
            self.seen.update(metrics)
        return {**terms, **self.seen, "loss": loss}


def check_regularizers(method: Method, configs: Sequence[Any]) -> list[Any]:
    """Return the settings that are active; ConfigError where the method cannot have them."""
    active = [config for config in configs if config.active]
    Regularised(method, active)
    return active
