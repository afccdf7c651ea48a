"""Reservoir: which samples of earlier tasks are remembered; the samples stay where they are.

Every training sample seen so far is as likely to be in it as any other (Vitter's algorithm R,
1985). An entry is (task, row of its training set, digest of the sample's key), so what a method
saves holds no data; the rows are read again, with whatever modality they lack, and the digest
tells whether they are still the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from evolora.errors import ConfigError
from evolora.randomness import derive_seed, generator


class Reservoir(nn.Module):
    """At most ``capacity`` entries, chosen evenly among all samples of the tasks so far.

    Args:
        capacity: samples remembered, of all tasks together.
        share: of every training batch that they make up, in (0, 1).
    """

    entries: Tensor
    seen: Tensor

    def __init__(self, capacity: int, share: float) -> None:
        super().__init__()
        self.capacity, self.share = capacity, share
        self.register_buffer("entries", torch.empty(0, 3, dtype=torch.long, device="cpu"))
        self.register_buffer("seen", torch.zeros(1, dtype=torch.long, device="cpu"))

    def __len__(self) -> int:
        return int(self.entries.shape[0])

    def take_in(
        self, task: int, rows: int, keys: Callable[[Sequence[int]], Sequence[str]], seed: int
    ) -> None:
        """Let every row of a task's training set replace an entry, or none, by chance.

        Args:
            task: index of the task.
            rows: of its training set.
            keys: from rows to the keys of their samples; asked for those that stay.
            seed: run seed.
        """
        entries: list[list[int]] = self.entries.tolist()
        draw, seen = generator(seed, "reservoir", task), int(self.seen)
        chances = torch.rand(rows, generator=draw, dtype=torch.float64).tolist()
        for row, chance in enumerate(chances):
            seen += 1
            if len(entries) < self.capacity:
                entries.append([task, row, 0])
            elif (place := int(chance * seen)) < self.capacity:
                entries[place] = [task, row, 0]
        mine = [place for place, entry in enumerate(entries) if entry[0] == task]
        for place, key in zip(mine, keys([entries[place][1] for place in mine]), strict=True):
            entries[place][2] = derive_seed(key)
        device = self.entries.device
        self.entries = torch.tensor(entries, dtype=torch.long, device=device).view(-1, 3)
        self.seen = torch.tensor([seen], device=self.seen.device)

    def of_task(self, task: int) -> tuple[list[int], list[int]]:
        """Return the remembered rows of a task, and the digests of their keys."""
        mine = self.entries[self.entries[:, 0] == task].tolist()
        return [row for _, row, _ in mine], [digest for *_, digest in mine]


def check_reservoir(capacity: int, share: float) -> None:
    """Refuse settings that no reservoir can have."""
    if capacity < 1:
        raise ConfigError(f"capacity must be at least 1; got {capacity}")
    if not 0.0 < share < 1.0:
        raise ConfigError(f"share must be in (0, 1); got {share}")
