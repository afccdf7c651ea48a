"""Finding a backbone by name: embedded, in a folder, in the hub's cache, on the hub."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from socket import create_connection
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from torch import nn

from evolora.backbones.base import Backbone
from evolora.backbones.clip import DualEncoder
from evolora.backbones.families import FAMILIES
from evolora.backbones.processors import load_processor
from evolora.backbones.qformer import MODEL_TYPES
from evolora.errors import ConfigError, DataError, suggest
from evolora.registry import BACKBONES

HUB_SECONDS = 5.0
"""How long to wait for the hub to answer."""


WRITING = (*FAMILIES, *MODEL_TYPES)
"""``model_type`` of models that write."""
AUTO = "auto"
"""The type of a backbone that goes by its model: ViLT is "vilt", a model of
:mod:`evolora.backbones.families` "image-text", BLIP-2 or InstructBLIP a "qformer", all else a
"dual-encoder"."""


def load_dual_encoder(name_or_path: str, *, revision: str | None = None) -> DualEncoder:
    """Return a dual encoder, see :func:`load_backbone`."""
    backbone = load_backbone(name_or_path, revision=revision, type="dual-encoder")
    assert isinstance(backbone, DualEncoder)
    return backbone


def wrap_model(
    model: nn.Module,
    processor: Any | None = None,
    *,
    name: str = "",
    type: str = AUTO,
    text_length: int | None = None,
    modalities: Mapping[str, Any] | None = None,
) -> Backbone:
    """Return the backbone of a ``transformers`` model.

    Args:
        model: ``CLIPModel``, ``SiglipModel``, ``ViltModel``, a model that holds one, or one that
            writes (``InternVLForConditionalGeneration``).
        processor: its processor, or None where only shapes count.
        name: what the user called it.
        type: registered name (``evolora ls backbones``), or "auto".
        text_length: see :class:`evolora.backbones.vilt.Vilt` and
            :class:`evolora.backbones.image_text.ImageText`; other types have no such option.
        modalities: see :class:`evolora.backbones.qformer.QFormer`, which alone takes some.

    Raises:
        ConfigError: the type is unknown or not the model's, or has no such option.
    """
    if type == AUTO:
        inner: Any = getattr(model, "vilt", model)
        kind = getattr(getattr(inner, "config", None), "model_type", "")
        others = {"vilt": "vilt", **dict.fromkeys(MODEL_TYPES, "qformer")}
        writes = "image-text" if kind in FAMILIES else "dual-encoder"
        type = others.get(kind, writes)
    build = BACKBONES.get(type)
    options = {"text_length": text_length, "modalities": modalities or None}
    given = {name: value for name, value in options.items() if value is not None}
    for option in given:
        if option not in inspect.signature(build).parameters:
            raise ConfigError(f"{option}: a backbone of type {type!r} has no such option")
    backbone: Backbone = build(model, processor, name=name, **given)
    return backbone


def load_backbone(
    name_or_path: str,
    *,
    revision: str | None = None,
    type: str = AUTO,
    text_length: int | None = None,
    modalities: Mapping[str, Any] | None = None,
) -> Backbone:
    """Return a backbone from a hub name, a local folder or an embedded name.

    Embedded are "clip-tiny", "vilt-tiny", "llava-tiny" and "qformer-tiny".

    Args:
        name_or_path: where the model is.
        revision: hub revision.
        type: see :func:`wrap_model`.
        text_length: see :func:`wrap_model`.
        modalities: see :func:`wrap_model`.

    Raises:
        DataError: nothing loadable is there; says where it looked.
        ConfigError: the model is not of the type.
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
        first = (str(error).strip() or error.__class__.__name__).splitlines()[0]
        raise DataError(f"no backbone {name_or_path!r}: looked in {looked} ({first})") from error
    name = str(Path(name_or_path)) if Path(name_or_path).exists() else name_or_path
    return wrap_model(
        model, processor, name=name, type=type, text_length=text_length, modalities=modalities
    )


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
    from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

    kind = AutoConfig.from_pretrained(where, revision=revision).model_type
    load_model: Any = AutoModelForImageTextToText if kind in WRITING else AutoModel
    model, found = load_model.from_pretrained(
        where, revision=revision, dtype=torch.float32, output_loading_info=True
    )
    if found["missing_keys"]:
        first, count = sorted(found["missing_keys"])[0], len(found["missing_keys"])
        raise ValueError(f"its weights lack {first} and {count - 1} more, which would be random")
    return model, load_processor(kind, where, revision=revision)


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
