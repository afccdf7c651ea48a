"""Noticing that tensors have changed, without reading them."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Hashable, Iterable, Sequence

from torch import Tensor


def digest_of(text: str, tensors: Iterable[Tensor]) -> str:
    """Return a digest of a text and of the values of tensors."""
    digest = hashlib.blake2b(text.encode(), digest_size=16)
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


class TensorVersions:
    """Remembers tensors and their counts of in-place writes.

    Tensors are known by weak reference, not by address: an address is used again after a tensor is
    replaced. (A write through ``tensor.data`` is hidden from autograd, and from this.)
    """

    def __init__(self) -> None:
        self._seen: list[tuple[weakref.ref[Tensor], int, int]] | None = None

    def forget(self) -> None:
        """Take the next look as a change: fused optimizers write without counting."""
        self._seen = None

    def changed(self, tensors: Iterable[Tensor]) -> bool:
        """Return whether these are other tensors, or written to, since the last call."""
        now = [(tensor, tensor._version, tensor.data_ptr()) for tensor in tensors]
        seen = self._seen
        if seen is not None and len(now) == len(seen):
            pairs = zip(seen, now, strict=True)
            if all(known() is t and rest == of_t for (known, *rest), (t, *of_t) in pairs):
                return False
        self._seen = [(weakref.ref(t), version, address) for t, version, address in now]
        return True


class StateVersions(TensorVersions):
    """Numbers the states of a method's tensors, and keeps digests of parts of the newest one."""

    def __init__(self) -> None:
        super().__init__()
        self._number = 0
        self._digests: dict[Hashable, str | None] = {}

    def number(self, tensors: Iterable[Tensor], new: Callable[[], int]) -> int:
        """Return the number of the state that tensors are in; ``new`` gives one to another."""
        if self.changed(tensors):
            self._number = new()
            self._digests.clear()
        return self._number

    def digest(
        self, key: Hashable, text: str, parts: Callable[[], Sequence[Sequence[Tensor] | None]]
    ) -> str | None:
        """Return a digest of parts of the state that was numbered last; None where one is None."""
        if key not in self._digests:
            found = parts()
            tensors = [tensor for part in found if part is not None for tensor in part]
            whole = all(part is not None for part in found)
            self._digests[key] = digest_of(text, tensors) if whole else None
        return self._digests[key]
