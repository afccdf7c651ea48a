"""Tensors by key, bounded in bytes: in memory, or in a mapped file that the system may page out."""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from evolora.errors import DataError, StorageError

FILE_CHUNK = 64 * 2**20
"""Bytes by which a mapped file grows."""


class TensorCache:
    """Keeps tensors by key while there is room; what it cannot keep is computed again.

    A full cache makes room at the cost of the entry that was unused for longest. With ``scan`` it
    spares every entry used since :meth:`new_generation` and rather keeps nothing new: data read in
    turn, more than fits, would otherwise evict each entry just before it is wanted again.

    Args:
        limit_bytes: of all tensors together.
        dtype: floating-point tensors are kept in this type; None keeps their own.
        file: where they are kept; None is memory.
        scan: see above.
    """

    def __init__(
        self,
        limit_bytes: int,
        *,
        dtype: torch.dtype | None = None,
        file: MappedFile | None = None,
        scan: bool = False,
    ) -> None:
        self.limit_bytes, self.dtype, self.file, self.scan = limit_bytes, dtype, file, scan
        self.nbytes = 0
        self._entries: OrderedDict[Hashable, Tensor] = OrderedDict()
        self._used: dict[Hashable, int] = {}
        self._generation = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._entries

    def __iter__(self) -> Iterator[Hashable]:
        """Yield the keys as they are now, the longest unused first."""
        return iter(list(self._entries))

    def get(self, key: Hashable) -> Tensor | None:
        """Return the tensor as it is kept, or None. Copy it before anything else is put."""
        value = self._entries.get(key)
        if value is not None:
            self._entries.move_to_end(key)
            self._used[key] = self._generation
        return value

    def put(self, key: Hashable, value: Tensor) -> Tensor:
        """Keep a tensor if there is room, and return it as it would be kept (detached, rounded).

        Raises:
            DataError: a value is beyond the range of ``dtype``.
        """
        value = self._rounded(value.detach())
        if key in self._entries or not self._make_room(value.nbytes):
            return value
        with torch.inference_mode(False):  # what is kept may be used in training later
            kept = self._place(value)
            if kept is None:  # the disk is full
                return value
            self._entries[key] = kept.copy_(value)
        self._used[key] = self._generation
        self.nbytes += kept.nbytes
        return value

    def new_generation(self) -> None:
        """From here on, entries that are not used again may make room for others."""
        self._generation += 1

    def drop(self, key: Hashable) -> None:
        """Forget one entry."""
        gone = self._entries.pop(key)
        del self._used[key]
        self.nbytes -= gone.nbytes
        if self.file is not None:
            self.file.release(gone)

    def _place(self, value: Tensor) -> Tensor | None:
        if self.file is None:
            return torch.empty(value.shape, dtype=value.dtype, device=value.device)
        return self.file.empty(value.shape, value.dtype)

    def _make_room(self, size: int) -> bool:
        if size > self.limit_bytes:
            return False
        while self.nbytes + size > self.limit_bytes:
            oldest = next(iter(self._entries))
            if self.scan and self._used[oldest] == self._generation:
                return False
            self.drop(oldest)
        return True

    def _rounded(self, value: Tensor) -> Tensor:
        if self.dtype is None or not value.is_floating_point() or value.dtype == self.dtype:
            return value
        rounded = value.to(self.dtype)
        if rounded.isinf().any() and not value.isinf().any():
            raise DataError(
                f"activations up to {float(value.abs().max()):.3g} do not fit in {self.dtype}; "
                "use prefix_cache_dtype: float32"
            )
        return rounded


class MappedFile:
    """Room for tensors in a temporary file without a name: it ends with the process, however.

    The system keeps its pages in memory as long as nothing else needs it.

    Args:
        folder: where the file is made; None is the system's temporary folder.

    Raises:
        StorageError: no file can be made there.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        try:
            self._file = tempfile.TemporaryFile(dir=folder, prefix="evolora-")  # noqa: SIM115
        except OSError as error:
            where = folder or tempfile.gettempdir()
            reason = error.strerror or error
            raise StorageError(f"cannot make a cache file in {where}: {reason}") from error
        self._length = 0
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._free: dict[int, list[Tensor]] = {}

    def empty(self, shape: torch.Size, dtype: torch.dtype) -> Tensor | None:
        """Return room for a tensor, or None where the disk has none left."""
        size = math.prod(shape) * dtype.itemsize
        if self._free.get(size):
            place = self._free[size].pop()
        else:
            if len(self._chunk) < size and not self._grow(size):
                return None
            place, self._chunk = self._chunk[:size], self._chunk[size:]
        return place.view(dtype).view(shape)

    def release(self, tensor: Tensor) -> None:
        """Take room back; it goes to the next tensor of as many bytes."""
        self._free.setdefault(tensor.nbytes, []).append(tensor.flatten().view(torch.uint8))

    def _grow(self, size: int) -> bool:
        unit = mmap.ALLOCATIONGRANULARITY
        length = -(-max(size, FILE_CHUNK) // unit) * unit
        try:
            if hasattr(os, "posix_fallocate"):  # a sparse file would fail at the first write
                os.posix_fallocate(self._file.fileno(), self._length, length)
            else:
                self._file.truncate(self._length + length)
            chunk = mmap.mmap(self._file.fileno(), length, offset=self._length)
        except OSError:
            return False
        self._chunk = torch.frombuffer(chunk, dtype=torch.uint8)
        self._length += length
        return True
