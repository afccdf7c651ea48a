"""The regulariser in a fine-tuning by Hugging Face's ``Trainer`` of a PEFT model.

    class RegularisedTrainer(ResoraTrainerMixin, Trainer): ...
    RegularisedTrainer(model=peft_model, args=args, resora=ResoraConfig(), ...).train()

The term is added to the loss that the Trainer (or a subclass of it) computes, in training alone:
losses of evaluations are those of the plain Trainer. Before and after ``train`` the model is as it
was: no hook, no key of its state dict, the same merged weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from evolora.errors import ConfigError
from evolora.regularizers.peft_records import PeftRecords
from evolora.regularizers.resora import Resora
from evolora.regularizers.settings import ResoraConfig

if TYPE_CHECKING:
    from transformers import Trainer

    _Trainer = Trainer
else:
    _Trainer = object


class ResoraTrainerMixin(_Trainer):
    """Adds the term to the loss of the ``Trainer`` that stands behind it.

    Args:
        resora: the settings; what else is given is the Trainer's own.

    Raises:
        ConfigError: the model has no adapter that is selected, some cannot tell what is measured,
            or one process drives several GPUs (DataParallel copies the model for each step).
    """

    def __init__(self, *args: Any, resora: ResoraConfig | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.resora = Resora(resora or ResoraConfig(), seed=self.args.seed)
        self._records: PeftRecords | None = None
        self._shown: dict[str, Tensor] = {}
        self._forwards = 0
        if self.resora.config.active:
            if self.args.n_gpu > 1:
                raise ConfigError(
                    f"resora: one process drives {self.args.n_gpu} GPUs (DataParallel); start one "
                    "process per GPU (torchrun or accelerate launch)"
                )
            assert self.model is not None
            self._records = PeftRecords(self.model, self.resora)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, with hooks in place from before the model is wrapped or compiled."""
        if self._records is None:
            return super().train(*args, **kwargs)
        with self._records:
            return super().train(*args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Let the optimizer train learned scales beside the model."""
        optimizer = super().create_optimizer(*args, **kwargs)
        scales = list(self.resora.scales.values())
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if scales and id(scales[0]) not in known:
            for scale in scales:
                scale.data = scale.data.to(self.args.device)
            optimizer.add_param_group({"params": scales, "weight_decay": 0.0})
            # The Trainer clears the gradients of its model's parameters alone.
            optimizer.register_step_post_hook(lambda *_: _clear(scales))
        return optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return the Trainer's loss; in training, with the term."""
        records, step = self._records, self.state.global_step
        if num_items_in_batch is not None:
            kwargs["num_items_in_batch"] = num_items_in_batch
        if records is None or not model.training or not self.resora.config.due(step):
            return super().compute_loss(model, inputs, return_outputs, **kwargs)
        mask = inputs.get("attention_mask")
        with records.watching(mask if isinstance(mask, Tensor) else None):
            result: Any = super().compute_loss(model, inputs, return_outputs, **kwargs)
        loss: Tensor = result[0] if return_outputs else result
        steps = self._steps_it_is_divided_by(num_items_in_batch)
        task = loss.detach() * steps  # of this process's rows
        term, metrics = self.resora.total(
            records.collect(), step=step, total_steps=self.state.max_steps, task_loss=task
        )
        self._show({"task_loss": task, **metrics})
        total = loss + term.to(loss) / steps
        return (total, result[1]) if return_outputs else total

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the parts of the loss beside it: means over the forwards since the last time."""
        if "loss" in logs and self._forwards:
            for name, value in self._shown.items():
                logs[name] = float(value) / self._forwards
            self._shown, self._forwards = {}, 0
        super().log(logs, *args, **kwargs)

    def _show(self, metrics: Mapping[str, Tensor]) -> None:
        for name, value in metrics.items():
            self._shown[name] = self._shown.get(name, torch.zeros_like(value)) + value
        self._forwards += 1

    def _steps_it_is_divided_by(self, items: Tensor | int | None) -> int:
        """Return by how many forwards a step's loss was divided before it came here.

        As ``Trainer.training_step`` decides it, which divides the loss itself otherwise.
        """
        scaled = getattr(self, "loss_is_scaled_for_ga", None)
        if scaled is None:
            by_model = self.model_accepts_loss_kwargs and items is not None
            scaled = by_model or self.compute_loss_func is not None
        return int(self.current_gradient_accumulation_steps) if scaled else 1


def _clear(parameters: Sequence[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None
