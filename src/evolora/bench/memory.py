"""What a step keeps for its backward pass, and by how much it raises the process's peak."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
MAPPED_BYTES = 2**20
HEAP_BYTES = 2**25
"""The largest block that glibc keeps in its heap once a program has freed some of that size."""
_MMAP_THRESHOLD = -3  # mallopt(3)
_RESET_PEAK = "5"  # proc(5): resets VmHWM to the current resident size


def saved_bytes(run: Callable[[], Tensor]) -> int:
    """Return the bytes that one forward keeps for backward beyond what was there before it.

    Storages count once however many views of them are kept. Two graphs are built and held at the
    same time: a storage that both keep is a parameter, a buffer, a cached weight or the input.
    """
    with torch.enable_grad():
        first, graph = _saved_storages(run)
        second, _ = _saved_storages(run)
    del graph
    return sum(size for address, size in first.items() if address not in second)


def _saved_storages(run: Callable[[], Tensor]) -> tuple[dict[int, int], Tensor]:
    """Return {address: bytes} of the saved storages, and the output that keeps them alive."""
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    return found, out


def peak_rise(call: Callable[[], Any], device: torch.device) -> int | None:
    """Return by how many bytes a call raises the peak above what was in use before it.

    CUDA: the caching allocator's peak. CPU: the kernel's high-water mark of resident memory, which
    is reset first; None where the kernel offers none. Meanwhile blocks of a MiB and more are mapped
    one by one: in the heap, what earlier calls left there would move the reading by a third.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return int(torch.cuda.max_memory_allocated(device) - before)
    _map_blocks_from(MAPPED_BYTES)
    try:
        return_free_memory()
        _CLEAR_REFS.write_text(_RESET_PEAK)
        before = _resident("VmRSS")
        call()
        return max(0, _resident("VmHWM") - before)
    except OSError:
        return None
    finally:
        _map_blocks_from(HEAP_BYTES)


def _resident(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS} has no {field}")


def return_free_memory() -> None:
    """Give freed heap pages back to the system, where the C library can.

    Before a peak is read: a step that reuses them would not raise it. Between rounds: blocks freed
    by one variant may be of no use to the next, and a heap of gigabytes of them grows further.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _map_blocks_from(size: int) -> None:
    """Let the C library map larger blocks from the system, and give them back when freed."""
    option = getattr(ctypes.CDLL(None), "mallopt", None)
    if option is not None:
        option(_MMAP_THRESHOLD, size)
