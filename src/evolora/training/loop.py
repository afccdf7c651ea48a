"""Train one task: a short loop on accelerate that can stop at any step and go on bit for bit."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from evolora.backbones.base import Backbone, Batch
from evolora.errors import EvoloraError
from evolora.methods.base import Method
from evolora.training.config import TrainingConfig, rate_of
from evolora.training.progress import Reporter
from evolora.training.regularised import OWN, Regularised

if TYPE_CHECKING:
    from accelerate import Accelerator

MOMENTS = ("exp_avg", "exp_avg_sq")
FUSED = ("cpu", "cuda")
"""Devices on which AdamW updates all of a parameter in one pass."""
Save = Callable[[int, Mapping[str, Tensor]], None]


class TrainingError(EvoloraError, RuntimeError):
    """Training cannot go on (the loss is not a number)."""


@dataclass(frozen=True, kw_only=True)
class TaskRun:
    """One task's training: what to train, on which batches, from which step.

    Args:
        method: the learner; its trainable parameters are trained.
        batches: from an optimizer step to its and all later micro-batches.
        config: schedule and optimizer.
        base_rate: peak learning rate of this task.
        title: shown in progress and logs.
        total_steps: optimizer steps.
        regularizers: settings of active regularizers, whose terms are added to the loss.
        seed: run seed.
    """

    method: Method
    batches: Callable[[int], Iterator[Batch]]
    config: TrainingConfig
    base_rate: float
    title: str
    total_steps: int
    regularizers: Sequence[Any] = ()
    seed: int = 0


def train_task(
    run: TaskRun,
    accelerator: Accelerator,
    reporter: Reporter,
    *,
    start: int = 0,
    moments: Mapping[str, Tensor] | None = None,
    save: Save | None = None,
) -> float | None:
    """Train to the end and return the last loss (None if nothing trains or nothing was left to do).

    Args:
        run: what to train.
        accelerator: the runtime.
        reporter: progress and log.
        start: optimizer steps already done.
        moments: optimizer state at ``start``, as ``save`` got it.
        save: called every ``save_steps`` steps with (steps done, optimizer state).
    """
    method, config = run.method, run.config
    parameters = method.trainable()
    if not parameters or start >= run.total_steps:
        return None
    regularised = None
    if run.regularizers:
        regularised = Regularised(
            method, run.regularizers, seed=run.seed, total_steps=run.total_steps
        )
        parameters = {**parameters, **regularised.own()}
    fused = all(parameter.device.type in FUSED for parameter in parameters.values())
    optimizer = torch.optim.AdamW(
        parameters.values(),
        lr=run.base_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.weight_decay,
        fused=fused,
    )
    _restore(optimizer, parameters, moments or {})
    model = distributed(regularised or method, accelerator)
    method.train()
    loss = None
    stream = run.batches(start)
    with reporter.bar(run.title, run.total_steps, start) as bar:
        for step in range(start, run.total_steps):
            rate = rate_of(config, step, base=run.base_rate, total=run.total_steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            if regularised is not None:
                regularised.step = step
            loss = _step(model, optimizer, stream, accelerator, config)
            if not torch.isfinite(torch.tensor(loss)):
                raise TrainingError(
                    f"the loss of {run.title} is {loss} at step {step}; "
                    f"try a learning_rate below {rate:.1e}"
                )
            done = step + 1
            bar.advance(1, f"loss {loss:.3f}")
            if done % config.logging_steps == 0 or done == run.total_steps:
                parts = {} if regularised is None else _numbers(regularised.seen)
                reporter.event(
                    "step", task=run.title, step=done, loss=loss, learning_rate=rate, **parts
                )
                named = {f"{run.title}/{name}": value for name, value in parts.items()}
                accelerator.log(
                    {f"{run.title}/loss": loss, "learning_rate": rate, **named}, step=done
                )
            if save and done % config.save_steps == 0 and done < run.total_steps:
                save(done, _moments(optimizer, parameters))
    method.eval()
    if accelerator.num_processes > 1:
        accelerator.free_memory()
    return loss


def distributed(method: torch.nn.Module, accelerator: Accelerator) -> torch.nn.Module:
    """Return the method, wrapped to average gradients where there are several processes."""
    if accelerator.num_processes == 1:
        return method
    with warnings.catch_warnings():
        # torch 2.13 deprecates broadcast_buffers but has no other way yet to leave the buffers of
        # each process (usage counts) alone when the method is wrapped.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        wrapped: torch.nn.Module = accelerator.prepare_model(method)
    return wrapped


def autocast(device: torch.device, config: TrainingConfig) -> AbstractContextManager[object]:
    """Return the context of a forward in the configured precision; weights stay in float32."""
    if config.mixed_precision == "no":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def _step(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    stream: Iterator[Batch],
    accelerator: Accelerator,
    config: TrainingConfig,
) -> float:
    """Take one optimizer step; return the loss averaged over micro-batches and processes."""
    optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), device=accelerator.device)
    micro_steps = config.gradient_accumulation_steps
    for micro in range(micro_steps):
        batch = next(stream)
        assert batch.random is not None
        torch.manual_seed(batch.random.seed)
        if accelerator.num_processes > 1:
            batch = _of_step(batch, accelerator.unwrap_model(model).backbone, accelerator)
        last = micro == micro_steps - 1
        with autocast(accelerator.device, config):
            if last:
                terms = model(batch)
            else:
                with accelerator.no_sync(model):
                    terms = model(batch)
        loss = terms["loss"] / micro_steps
        accelerator.backward(loss)
        total += loss.detach().to(total.device)
    if config.max_grad_norm is not None:
        accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
    optimizer.step()
    # Fused optimizers write past the version counters by which caches notice a change.
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    torch.autograd.graph.increment_version(trained)
    mean: Tensor = accelerator.reduce(total, reduction="mean")
    return float(mean)


def _numbers(values: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items()}


def _of_step(batch: Batch, backbone: Backbone, accelerator: Accelerator) -> Batch:
    """Return the batch, told of all processes' rows what its draws depend on."""
    sizes = backbone.row_sizes(batch)
    if sizes is not None:
        batch = replace(batch, step_sizes=accelerator.gather(sizes))
    if batch.labels.dim() == 1:
        batch = replace(batch, step_labels=accelerator.gather(batch.labels))
    return batch


def _moments(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.nn.Parameter]
) -> dict[str, Tensor]:
    saved: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        if name.startswith(OWN):  # no part of the method, whose state has the others' values
            saved[f"optimizer.value.{name}"] = parameter.detach()
        state = optimizer.state.get(parameter, {})
        for key in (*MOMENTS, "step"):
            if key in state:
                saved[f"optimizer.{key}.{name}"] = state[key]
    return saved


def _restore(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, torch.nn.Parameter],
    moments: Mapping[str, Tensor],
) -> None:
    for name, parameter in parameters.items():
        if (known := moments.get(f"optimizer.value.{name}")) is not None:
            parameter.data.copy_(known)
        keys = [key for key in (*MOMENTS, "step") if f"optimizer.{key}.{name}" in moments]
        for key in keys:
            value = moments[f"optimizer.{key}.{name}"].clone()
            stays = key == "step" and parameter.device.type not in FUSED
            optimizer.state[parameter][key] = value if stays else value.to(parameter.device)
