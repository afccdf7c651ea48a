"""What the machine has and lacks, one finding per line."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

REQUIRED = (
    "torch",
    "transformers",
    "accelerate",
    "safetensors",
    "numpy",
    "pydantic",
    "typer",
    "rich",
)
OPTIONAL = {
    "peft": "interchange with PEFT folders: pip install 'evolora[peft]'",
    "datasets": "streams from the hub: pip install 'evolora[data]'",
    "scipy": "the .mat files of Flowers102 and Stanford Cars: pip install 'evolora[data]'",
    "resvg_py": "evolora data build: pip install 'evolora[data]'",
    "tensorboard": "training.report_to=[tensorboard]: pip install 'evolora[track]'",
}


def examine() -> list[dict[str, Any]]:
    """Return findings: name, ok, optional, detail."""
    findings = [_package(name) for name in REQUIRED]
    findings += [_optional(name, use) for name, use in OPTIONAL.items()]
    findings += [_images(), _devices(), _threads(), _assets(), _instructions(), _disk(Path.cwd())]
    return findings


def _finding(name: str, ok: bool, detail: str, *, optional: bool = False) -> dict[str, Any]:
    return {"name": name, "ok": ok, "optional": optional, "detail": detail}


def _package(name: str) -> dict[str, Any]:
    try:
        return _finding(name, True, version(name))
    except PackageNotFoundError:
        return _finding(name, False, f"not installed; pip install {name}")


def _optional(name: str, use: str) -> dict[str, Any]:
    found = importlib.util.find_spec(name) is not None
    return _finding(
        name, found, "installed" if found else f"not installed, needed for {use}", optional=True
    )


def _images() -> dict[str, Any]:
    from evolora.streams import decoding

    library = decoding.jpeg_library()
    if library is not None:
        detail = f"JPEG by simplejpeg {version('simplejpeg')}, resize by torch"
    else:
        detail = (
            "JPEG by PIL, resize by torch; the same pixels sooner: "
            "pip install 'evolora[fast-images]'"
        )
    return _finding("image loading", library is not None, detail, optional=True)


def _devices() -> dict[str, Any]:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return _finding("device", True, "CUDA: " + ", ".join(names))
    return _finding("device", True, f"CPU only ({platform.processor() or platform.machine()})")


def _threads() -> dict[str, Any]:
    import torch

    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    advice = "; for small models one thread per process is fastest: OMP_NUM_THREADS=1"
    return _finding(
        "threads", True, f"torch uses {threads} of {cores} cores" + advice * (threads > 1)
    )


def _assets() -> dict[str, Any]:
    from evolora.assets import ROOT, embedded_backbones

    backbones = embedded_backbones()
    streams = {name: ROOT / "mosaic" / f"{name}.safetensors" for name in ("domains", "missing")}
    lost = [f"mosaic/{name}" for name, file in streams.items() if not file.exists()]
    found = ", ".join(f"mosaic/{name}" for name, file in streams.items() if file.exists())
    detail = f"backbones {', '.join(backbones) or 'none'}; streams {found or 'none'}"
    ok = bool(backbones) and not lost
    return _finding("embedded assets", ok, detail if ok else detail + "; reinstall evolora")


def _instructions() -> dict[str, Any]:
    """Return how many tasks of published instruction sets are where they are looked for first."""
    from evolora.streams.instruction_sets import SETS
    from evolora.streams.published_instructions import DEFAULT_ROOT

    found = {
        name: sum(task.find(one.places(DEFAULT_ROOT)) is not None for task in one.tasks)
        for name, one in SETS.items()
    }
    parts = [f"{name} {count} of {len(SETS[name].tasks)} tasks" for name, count in found.items()]
    detail = f"below {DEFAULT_ROOT}/: {', '.join(parts)}"
    advice = "; docs/streams.md says where they come from"
    return _finding("published instructions", True, detail + advice * (not any(found.values())))


def _disk(folder: Path) -> dict[str, Any]:
    free = shutil.disk_usage(folder).free / 2**30
    return _finding("disk", free > 1.0, f"{free:.1f} GiB free in {folder}")
