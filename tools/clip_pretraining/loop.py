"""The training loop that both towers share."""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evolora.training.progress import Reporter, terminal_progress

LOG = logging.getLogger("pretrain_clip")


def add_loop_options(parser: argparse.ArgumentParser) -> None:
    """Adds what :class:`Loop` and :func:`start_processes` read."""
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--decay", type=float, default=0.1)
    parser.add_argument("--warmup", type=int, default=100, help="steps")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=10.0)
    length.add_argument("--steps", type=int, help="train so many steps, however long they take")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ranks", type=int, default=1, help="processes that share the work")
    parser.add_argument("--rank", type=int, default=0, help="this process's number")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--log-every", type=int, default=50, help="steps")
    parser.add_argument("--save-every", type=float, default=60.0, help="seconds")
    parser.add_argument("--eval-every", type=float, default=300.0, help="seconds")
    parser.add_argument("--seed", type=int, default=0)


def start_processes(args: argparse.Namespace) -> None:
    """Sets the number of threads and meets the other processes of the run."""
    torch.set_num_threads(args.threads)
    if args.ranks > 1:
        store = f"file://{args.work.resolve()}/rendezvous-{args.name}"
        torch.distributed.init_process_group("gloo", store, rank=args.rank, world_size=args.ranks)


class Loop:
    """Cosine schedule with warm-up over time or steps, atomic checkpoints, a log line per N steps.

    A batch is a function of the step's number, so a run of a given number of steps and processes is
    repeatable to the bit, stopped and resumed or not. A run over time ends where the machine gets.
    """

    def __init__(
        self,
        module: nn.Module,
        args: argparse.Namespace,
        path: Path,
        shares: Mapping[str, float] | None = None,
    ) -> None:
        """Resumes where the checkpoint is.

        Args:
            module: what is trained.
            args: the options.
            path: of the checkpoint.
            shares: beginning of parameters' names -> which share of the rate they have.
        """
        self.module, self.args, self.path = module, args, path
        groups = _groups(module, args.decay, shares or {})
        self.shares = [group.pop("share") for group in groups]  # of this run, not the checkpoint's
        self.optimizer = torch.optim.AdamW(
            groups, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True
        )
        self.spent, self.step, self.loss = 0.0, 0, math.nan
        self.mark = time.monotonic()
        if path.is_file():
            saved = torch.load(path, weights_only=True)
            module.load_state_dict(saved["module"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.spent, self.step = saved["spent"], saved["step"]
            LOG.info("resumed %s at step %d, %.0f s", path, self.step, self.spent)

    def steps(self) -> Iterator[int]:
        """Yields step numbers until the planned steps are made or the planned minutes spent.

        On a terminal, a bar shows which part of the run, in thousandths, is over.
        """
        watched = sys.stderr.isatty() and self.args.rank == 0
        with terminal_progress(watched) as display, Reporter(display).bar("train", 1000) as bar:
            shown = 0
            for step in self._steps():
                yield step
                now = int(1000 * min(self._progress(), 1.0))
                bar.advance(now - shown, note=f"loss {self.loss:.3f}")
                shown = now

    def _steps(self) -> Iterator[int]:
        saved = self.mark = time.monotonic()
        while (progress := self._progress()) < 1:
            warm = min(1.0, (self.step + 1) / self.args.warmup)
            cosine = 0.5 * (1 + math.cos(math.pi * progress))
            for group, share in zip(self.optimizer.param_groups, self.shares, strict=True):
                group["lr"] = self.args.lr * share * warm * max(cosine, 0.01)
            yield self.step
            self.step += 1
            if self.args.rank > 0:
                continue
            if self.step % self.args.log_every == 0:
                rate = self.step * self.args.batch * self.args.ranks / self.spent
                LOG.info(
                    "step %d, %.0f s, loss %.3f, %.0f/s", self.step, self.spent, self.loss, rate
                )
            if time.monotonic() - saved > self.args.save_every:
                self.save()
                saved = time.monotonic()
        if self.args.rank == 0:
            self.save()

    def _progress(self) -> float:
        """Returns which share of the run is over."""
        if self.args.steps is not None:
            done, planned = float(self.step), float(self.args.steps)
        else:
            done, planned = self.spent, 60 * self.args.minutes
        return done / planned if planned > 0 else 1.0

    def update(self, loss: Tensor) -> None:
        """Takes one optimizer step."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        now = time.monotonic()
        self.spent, self.mark = self.spent + now - self.mark, now
        if self.args.ranks > 1:
            self._average()
        nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        # exponential mean, for the log only
        value = float(loss.detach())
        self.loss = value if math.isnan(self.loss) else 0.98 * self.loss + 0.02 * value

    def _average(self) -> None:
        """Averages gradients, and the clock that ends a timed run, over the processes."""
        grads = [p.grad for p in self.module.parameters() if p.grad is not None]
        flat = torch.cat([*(g.flatten() for g in grads), torch.tensor([self.spent])])
        torch.distributed.all_reduce(flat)
        flat /= self.args.ranks
        self.spent = float(flat[-1])
        start = 0
        for grad in grads:
            grad.copy_(flat[start : start + grad.numel()].view_as(grad))
            start += grad.numel()

    def save(self) -> None:
        """Writes the checkpoint by temp + rename."""
        state = {
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "spent": self.spent,
            "step": self.step,
        }
        temporary = self.path.with_suffix(".tmp")
        torch.save(state, temporary)
        os.replace(temporary, self.path)


def _groups(module: nn.Module, decay: float, shares: Mapping[str, float]) -> list[dict[str, Any]]:
    """Returns the optimizer's groups: by share of the rate, matrices with decay, the rest without.

    Parameters without a share have all of the rate and come first.
    """
    of = {
        parameter: next((shares[start] for start in shares if name.startswith(start)), 1.0)
        for name, parameter in module.named_parameters()
    }
    groups = []
    for share in dict.fromkeys([1.0, *shares.values()]):
        own = [parameter for parameter, found in of.items() if found == share]
        decayed, plain = ([p for p in own if (p.ndim >= 2) is matrix] for matrix in (True, False))
        groups += [
            {"params": decayed, "share": share, "weight_decay": decay},
            {"params": plain, "share": share},
        ]
    return [group for group in groups if group["params"]]
