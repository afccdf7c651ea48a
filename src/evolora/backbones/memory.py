"""What a frozen model made of samples it has seen, known by their content.

Two kinds of results are kept: the base's passes (embedding and routing features, small) and
prefixes (activations entering the lowest block with an expert, large). Both are functions of the
frozen weights and the sample alone, so they hold for every task, epoch and evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evolora.storage.tensor_cache import TensorCache


class ForwardCache:
    """Results of a frozen model per sample.

    A value never depends on the samples it was first computed with: those that are missing run in
    forwards of a fixed number of rows, the last one filled up. So a run that was killed, whose
    cache is cold, goes on bit for bit.

    Args:
        kept: where results are kept.
        rows_per_forward: see above.
    """

    def __init__(self, kept: TensorCache, *, rows_per_forward: int = 16) -> None:
        self.kept, self.rows_per_forward = kept, rows_per_forward

    def fetch(
        self,
        names: Sequence[str],
        samples: Sequence[bytes],
        compute: Callable[[Tensor], Mapping[str, Tensor]],
        *,
        context: str = "",
    ) -> dict[str, Tensor]:
        """Return (b, ...) per name, on the CPU and in the type they are kept in.

        Args:
            names: results that are wanted.
            samples: content of each row.
            compute: from row numbers to the results of these rows, by name.
            context: all else that decides the results (weights, preprocessing, precision).
        """
        results: dict[int, list[Tensor]] = {}
        for row, sample in enumerate(samples):
            known = [self.kept.get((context, name, sample)) for name in names]
            values = [value for value in known if value is not None]
            if len(values) == len(names):
                # a mapped file gives the place of an evicted tensor to the next one
                results[row] = [v.clone() for v in values] if self.kept.file else values
        missing = [row for row in range(len(samples)) if row not in results]
        for start in range(0, len(missing), self.rows_per_forward):
            part = missing[start : start + self.rows_per_forward]
            filled = part + part[-1:] * (self.rows_per_forward - len(part))
            computed = compute(torch.tensor(filled))
            columns = [computed[name].detach().cpu() for name in names]
            for place, row in enumerate(part):
                results[row] = [
                    self.kept.put((context, name, samples[row]), column[place])
                    for name, column in zip(names, columns, strict=True)
                ]
        return {
            name: torch.stack([results[row][index] for row in range(len(samples))])
            for index, name in enumerate(names)
        }

    def keep(
        self, results: Mapping[str, Tensor], samples: Sequence[bytes], *, context: str = ""
    ) -> None:
        """Keep (b, ...) per name that a forward for something else met on its way.

        It must be a forward as those of :meth:`fetch`, of the same number of rows.
        """
        for name, values in results.items():
            for sample, value in zip(samples, values.cpu(), strict=True):
                self.kept.put((context, name, sample), value)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """The caches of one learner (or of several that share a backbone).

    Args:
        crops: (content of a sample, modality) -> its preprocessed pixels or tokens.
        passes: the base's results per sample.
        prefixes: activations below the experts per sample; None where they are not kept.
    """

    crops: TensorCache
    passes: ForwardCache
    prefixes: ForwardCache | None = None

    def new_generation(self) -> None:
        """A new task begins: what it does not use may make room for what it does."""
        self.crops.new_generation()
        self.passes.kept.new_generation()
        if self.prefixes is not None:
            self.prefixes.kept.new_generation()


@dataclass(frozen=True, kw_only=True)
class Known:
    """Says of a batch which samples it holds and where results on them are kept.

    Args:
        samples: (b) content of each row.
        memory: the caches.
    """

    samples: tuple[bytes, ...]
    memory: Memory

    def take(self, rows: Sequence[int]) -> Known:
        """Return the given rows."""
        return Known(samples=tuple(self.samples[row] for row in rows), memory=self.memory)
