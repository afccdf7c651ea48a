"""The machine a measurement was taken on: without it, no number means anything."""

from __future__ import annotations

import datetime
import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from evolora.bench.settings import Settings
from evolora.bench.timing import clock_for

PACKAGES = ("torch", "transformers", "peft", "numpy", "pillow", "simplejpeg")
FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8", "asimd")
"""CPU features that decide which matrix kernels run."""


def describe(settings: Settings) -> dict[str, Any]:
    """Return versions, processor, load and how fast it multiplies and copies (JSON values)."""
    device = torch.device(settings.device)
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "processor": _processor(),
        "cpu_flags": _flags(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "load_average": _load(),
        "clock": _clock_name(device, settings),
        "dtype": settings.dtype,
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["cuda"] = torch.version.cuda
    return {**found, **calibrate(device, settings)}


def calibrate(device: torch.device, settings: Settings) -> dict[str, Any]:
    """Return GFLOP/s of (1576, 768) x (768, n) products and GB/s of a copy (read and write)."""
    clock, dtype = clock_for(device, wall=settings.wall), settings.torch_dtype
    x = torch.randn(1576, 768, device=device, dtype=dtype)
    rates = {}
    for columns in (16, 768, 3072):
        weight = torch.randn(768, columns, device=device, dtype=dtype)
        flops = 2 * x.numel() * columns
        rates[str(columns)] = round(flops / _fastest(clock.seconds, x.matmul, weight) / 1e9, 1)
    source = torch.randn(16 << 20, device=device)
    target = torch.empty_like(source)
    moved = 2 * source.numel() * source.element_size()
    copy = moved / _fastest(clock.seconds, target.copy_, source) / 1e9
    return {"gemm_gflops": rates, "copy_gb_per_s": round(copy, 1)}


def _fastest(
    seconds: Callable[[Callable[[], Any]], float], function: Callable[[Any], Any], value: Any
) -> float:
    function(value)
    stop = time.perf_counter() + 0.3
    times: list[float] = []
    while not times or time.perf_counter() < stop:
        times.append(seconds(lambda: function(value)))
    return min(times)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _clock_name(device: torch.device, settings: Settings) -> str:
    if device.type == "cuda":
        return "CUDA events"
    return "wall clock" if settings.wall else "process CPU time"


def _cpuinfo(*fields: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(fields)), "")


def _processor() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _flags() -> list[str]:
    present = _cpuinfo("flags", "Features").split()
    return [flag for flag in FLAGS if flag in present]


def _load() -> list[float] | None:
    return [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None
