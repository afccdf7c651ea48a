"""Finding a dual encoder by name: embedded, in a folder, in the hub's cache, on the hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import create_connection
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from torch import nn

from evolora.backbones.clip import DualEncoder
from evolora.errors import DataError, suggest

HUB_SECONDS = 5.0
"""How long to wait for the hub to answer."""


def load_dual_encoder(name_or_path: str, *, revision: str | None = None) -> DualEncoder:
    """Return a backbone from a hub name, a local folder or an embedded name ("clip-tiny").

    Raises:
        DataError: nothing loadable is there; says where it looked.
    """
    from evolora.assets import embedded_backbone, embedded_backbones

    folder = embedded_backbone(name_or_path)
    where = str(folder or name_or_path)
    if not folder and "/" not in name_or_path and not Path(name_or_path).is_dir():
        # Hub names have an owner; a bare word is a misspelt embedded name or folder, not worth a
        # minute of connection attempts where there is no network.
        known = embedded_backbones()
        raise DataError(
            f"no backbone {name_or_path!r}{suggest(name_or_path, known)} (embedded: "
            f"{', '.join(known)}; a local folder or a hub name such as "
            "'openai/clip-vit-base-patch16' will do too)"
        )
    try:
        with _quiet_transformers():
            model, processor = _load(where, revision)
    except (OSError, ValueError, KeyError) as error:
        looked = "the embedded backbones, the local file system and the hub cache"
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"no backbone {name_or_path!r}: looked in {looked} ({first})") from error
    is_path = Path(name_or_path).exists()
    return DualEncoder(model, processor, name=str(Path(name_or_path)) if is_path else name_or_path)


def _load(where: str, revision: str | None) -> tuple[nn.Module, Any]:
    """Return model and processor; a hub name that is in the cache needs no network."""
    from huggingface_hub import snapshot_download

    if Path(where).is_dir():
        return _from_pretrained(where, revision)
    try:
        cached = snapshot_download(where, revision=revision, local_files_only=True)
        return _from_pretrained(cached, None)
    except OSError:
        pass  # not in the cache, or only a part of it
    if not _hub_answers():
        raise OSError("it is not in the hub cache, and the hub cannot be reached")
    return _from_pretrained(where, revision)


def _from_pretrained(where: str, revision: str | None) -> tuple[nn.Module, Any]:
    from transformers import AutoModel, AutoProcessor

    load_processor: Any = AutoProcessor.from_pretrained
    model = AutoModel.from_pretrained(where, revision=revision, dtype=torch.float32)
    return model, load_processor(where, revision=revision)


def _hub_answers() -> bool:
    """Return whether the hub can be reached at all; its client would try for most of a minute."""
    from huggingface_hub.constants import ENDPOINT

    if getproxies():
        return True
    address = urlsplit(ENDPOINT)
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        create_connection((address.hostname or "", port), timeout=HUB_SECONDS).close()
    except OSError:
        return False
    return True


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Hide the loading bar and the advice to install torchvision, which is not used here."""
    from transformers.utils import logging as untyped

    logging: Any = untyped
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()
