"""Records of the adapters of any PEFT model, for regularisers that compare low-rank updates.

    with PeftRecords(model, resora) as records:
        with records.watching(mask=batch["attention_mask"]):
            loss = model(**batch).loss
        term, metrics = resora.total(records.collect(), step=step, total_steps=steps)

Nothing of PEFT's is changed: weights are read from the layers, and activations by forward hooks on
``lora_A`` that are there inside the ``with`` alone (take them away before merging, pickling or
copying the model). What a hook sees is only kept; a second run of the forward inside backward
(gradient checkpointing) finds nobody watching.

| layer | what it tells |
|---|---|
| lora.Linear, convolutions | weights and activations |
| DoRA | the same; of its two calls of lora_A the later one, which is on tokens |
| nn.MultiheadAttention, ``target_parameters``, Embedding, AdaLoRA, HiRA, DeLoRA | weights only |
| disabled, merged, or another adapter is active | nothing |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from evolora.errors import ConfigError
from evolora.regularizers.features import Features
from evolora.regularizers.peft_factors import factors_of, prefix_of, trains, weight_of, whole
from evolora.regularizers.resora import Record, Resora

Key = tuple[str, str]
"""Name of a layer, name of an adapter."""


class PeftRecords:
    """Reads the adapters of a model that a regulariser is about.

    Args:
        model: with PEFT layers; wrapped (DDP, FSDP2, torch.compile) or not. Hooks must be there
            before it is compiled.
        resora: the regulariser.

    Raises:
        ConfigError: PEFT is not installed, the model has no adapter that is selected, or some layer
            cannot tell its activations where these are read.
    """

    def __init__(self, model: nn.Module, resora: Resora) -> None:
        base = _base_layer_class()
        self.resora, self.config = resora, resora.config
        every = {
            _plain(name): module
            for name, module in model.named_modules()
            if isinstance(module, base) and prefix_of(module) is not None
        }
        if not every:
            raise ConfigError(
                f"resora compares low-rank adapters, and {type(model).__name__} has none of PEFT's"
            )
        self.layers: dict[str, Any] = {
            name: layer for name, layer in every.items() if self.config.selects(name)
        }
        if not self.layers:
            some = ", ".join(list(every)[:4])
            raise ConfigError(f"resora: layers {self.config.layers!r} selects none of {some} ...")
        self._check_names()
        for name, layer in self.layers.items() if self.config.reads_features else ():
            self._check_tells(name, layer)
        self._open = False
        self._blind = False  # something was seen without a gradient
        self._ran: set[str] | None = None
        self._seen: dict[Key, Tensor] = {}  # what lora_A gave; where input is detached, what it got
        self._mask: Tensor | None = None
        self._handles: list[RemovableHandle] = []

    # -- watching --------------------------------------------------------------------------------

    def __enter__(self) -> PeftRecords:
        """Put the hooks in place."""
        if self._handles:
            return self
        if self.config.active and self.config.reads_features:
            for name, layer in self.layers.items():
                for adapter, module in layer.lora_A.items():
                    hook = self._hook((name, adapter))
                    self._handles.append(module.register_forward_hook(hook))
        if self.config.active and _in_parallel():
            self._ran = set()
            for name, layer in self.layers.items():
                self._handles.append(layer.register_forward_pre_hook(self._note(name)))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._seen.clear()
        self._ran = None

    @contextmanager
    def watching(self, mask: Tensor | None = None) -> Iterator[None]:
        """Keep what the layers read in the training forward that runs inside.

        Args:
            mask: (b, n) of 1 and 0: which tokens are no padding. It holds for layers whose
                activations are (b, n, r), or (b n, r); others (pooled or of another tower) have
                none.
        """
        self._seen.clear()
        if self._ran is not None:
            self._ran.clear()
        self._mask = mask.bool() if mask is not None and mask.dim() == 2 else None
        self._open, self._blind = True, False
        try:
            yield
        finally:
            self._open = False

    def _hook(self, key: Key) -> Callable[..., None]:
        detached = self.config.detach_input

        def hook(_: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
            if not self._open:
                return
            if detached:
                self._seen[key] = args[0].detach()
            elif torch.is_grad_enabled():
                self._seen[key] = out
            else:
                self._blind = True

        return hook

    def _note(self, name: str) -> Callable[..., None]:
        def note(*_: Any) -> None:
            if self._open and self._ran is not None:
                self._ran.add(name)

        return note

    # -- reading ---------------------------------------------------------------------------------

    def collect(self) -> list[Record]:
        """Return a record of every selected adapter that is active and trains.

        Raises:
            ConfigError: activations were asked for, and a layer told none.
        """
        keys, reads = self._keys(), self.config.reads_features
        if not reads:
            keys = [key for key in keys if self._runs(key[0])]
        factors = [factors_of(self.layers[name], adapter, name) for name, adapter in keys]
        features = self._features(keys) if reads else [None] * len(keys)
        self._seen.clear()
        records = []
        for (name, adapter), (a, b), known in zip(keys, factors, features, strict=True):
            older = tuple(self._older(name)) if self.config.across == "tasks" else ()
            records.append(Record(f"{name}.{adapter}", a, b, known, older))
        if self.config.across == "experts":
            return _joined(records)
        return records

    def _features(self, keys: Sequence[Key]) -> Sequence[Features | None]:
        wanted: list[tuple[Tensor, Tensor | None]] = []
        known: Tensor | None = None if self._mask is None else self._mask.flatten()
        for key in keys:
            if key not in self._seen:
                raise ConfigError(self._silence(key))
            module = self.layers[key[0]].lora_A[key[1]]
            z = self._seen[key]
            if self.config.detach_input:
                z = _again(module, z)
            if not z.requires_grad and weight_of(module).requires_grad:
                raise ConfigError(self._silence(key))
            if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
                z = z.movedim(1, -1)
            real = known if self._mask is not None and _fits(z, self._mask) else None
            wanted.append(
                (z.reshape(1, -1, z.shape[-1]), None if real is None else real.to(z.device))
            )
        return self.resora.features_of(wanted)

    def _silence(self, key: Key) -> str:
        why = (
            "the forward did not run it, or it bypasses lora_A; or the model was compiled before "
            "the hooks were there (enter PeftRecords first)"
        )
        if self._blind or key in self._seen:
            why = (
                "it ran without gradients, as reentrant gradient checkpointing does "
                "(use_reentrant=False, or detach_input)"
            )
        return (
            f"resora: adapter {key[1]!r} of {key[0]} told no activations in this step: {why}. "
            "Weights alone are measured by w_cos, w_orth or gor; layers= leaves layers out"
        )

    def _keys(self) -> list[Key]:
        """Return the adapters that act and train now."""
        return [
            (name, adapter)
            for name, layer in self.layers.items()
            if not layer.disable_adapters and not layer.merged
            for adapter in layer.active_adapters
            if self._chosen(adapter) and trains(layer, adapter)
        ]

    def _chosen(self, adapter: str) -> bool:
        return self.config.adapters is None or adapter in self.config.adapters

    def _runs(self, name: str) -> bool:
        """Return whether a layer was part of the forward: others must have no loss under DDP."""
        if self._ran is None:
            return True
        return name in self._ran or name.removesuffix(".base_layer.out_proj") in self._ran

    def _older(self, name: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the factors of a layer's adapters that do not train."""
        layer = self.layers[name]
        for adapter in getattr(layer, f"{prefix_of(layer)}_A"):
            if not trains(layer, adapter):
                a, b = factors_of(layer, adapter, name)
                yield a.detach(), b.detach()

    def _check_names(self) -> None:
        known = {
            adapter
            for layer in self.layers.values()
            for adapter in getattr(layer, f"{prefix_of(layer)}_A")
        }
        for adapter in self.config.adapters or ():
            if adapter not in known:
                raise ConfigError(
                    f"resora: no adapter {adapter!r} (known: {', '.join(sorted(known))})"
                )

    @staticmethod
    def _check_tells(name: str, layer: Any) -> None:
        silent = ("MultiheadAttention", "ParamWrapper", "Embedding")
        modules = prefix_of(layer) == "lora" and isinstance(layer.lora_A, nn.ModuleDict)
        inside = name.endswith(".base_layer.out_proj")  # its weights are merged in every forward
        if type(layer).__name__ in silent or not modules or inside:
            raise ConfigError(
                f"resora: {name} ({type(layer).__name__}) has no activations to read: its factors "
                "act on weights. Use w_cos, w_orth or gor, or leave it out by layers="
            )


def _joined(records: Sequence[Record]) -> list[Record]:
    """Return one record of each layer, with all the adapters that train there."""
    layers: dict[tuple[str, torch.Size], list[Record]] = {}
    for record in records:
        layer = record.name.rpartition(".")[0]
        layers.setdefault((layer, record.a.shape[1:]), []).append(record)
    return [
        Record(name, torch.cat([r.a for r in own]), torch.cat([r.b for r in own]))
        for (name, _), own in layers.items()
    ]


def _fits(z: Tensor, mask: Tensor) -> bool:
    """Return whether activations (..., r) are those of the tokens of a mask (b, n)."""
    return z.shape[:-1] == mask.shape or (z.dim() == 2 and z.shape[0] == mask.numel())


def _again(module: nn.Module, x: Tensor) -> Tensor:
    """Return what lora_A makes of x outside the forward, where its weight may be in parts."""
    weight = whole(weight_of(module))
    out: Tensor = torch.func.functional_call(module, {"weight": weight}, (x.to(weight.dtype),))
    return out


def _plain(name: str) -> str:
    """Return a layer's name without what wrappers put before it."""
    for wrapper in ("_orig_mod.", "module."):
        name = name.removeprefix(wrapper)
    return name.replace("._orig_mod", "").replace("_fsdp_wrapped_module.", "")


def _in_parallel() -> bool:
    available = torch.distributed.is_available() and torch.distributed.is_initialized()
    return available and torch.distributed.get_world_size() > 1


def _base_layer_class() -> Any:
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError as error:
        raise ConfigError(
            "PEFT is needed to read its adapters: pip install 'evolora[peft]'"
        ) from error
    return BaseTunerLayer
