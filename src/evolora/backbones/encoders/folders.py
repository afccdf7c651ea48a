"""Where the weights of an encoder are: embedded, or in a local folder."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from evolora.assets import ROOT, embedded_encoders
from evolora.errors import DataError, suggest
from evolora.storage.files import read_tensors
from evolora.streams.sampling import user_path


def encoder_folder(weights: str) -> Path:
    """Return the folder of an embedded encoder's name, or a local folder that has a config.json.

    Raises:
        DataError: there is neither.
    """
    known = embedded_encoders()
    if weights in known:
        return ROOT / weights
    folder = user_path(weights)
    if not (folder / "config.json").is_file():
        raise DataError(
            f"no encoder {weights!r}{suggest(weights, known)} (embedded: {', '.join(known)}; or a "
            "local folder with config.json and model.safetensors)"
        )
    return folder


def encoder_tensors(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a folder's safetensors files, in float32.

    Raises:
        DataError: there is none.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise DataError(f"{folder} has no .safetensors file; other formats are not read")
    return {name: value.float() for file in files for name, value in read_tensors(file).items()}
