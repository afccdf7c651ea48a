"""PathWeave: a modality after the other gets a path of adapters woven from the ones before it.

    y = W x + sum_{i<t} g_i Â_i^t(x) + g_t A_t(x)          at q, k, v and output of each attention
    A_i(x)   = s_i (U_i (D_i x + b_i) + c_i)               uni-modal adapter, frozen once learned
    Â_i^t(x) = s_i (U_i F_i^t(D_i x + b_i) + c_i)          cross-modal: with an in-adapter, r -> r
    g = softmax(x W_g + eps (softplus(x W_n) + 0.01))      per token; eps ~ N(0, I) in training
    P x + sum_{i<=t} A_i(x)                                at the projection to the language model

The path of modality t also has a norm behind its encoder, query tokens, and where the encoder is
of another width a projection. The model's own modality (image) is the bare model. The input's
modality picks the path, nobody's task number does; inputs of several modalities are several soft
prompts, each on its own path. A finished path is never touched again, so what it answers is not.

symbol -> code: A_i -> WovenLayer.bank ; F -> InAdapters ; W_g, W_n -> PathGates ; norm, queries,
projection -> Entry ; t -> index of the path, in the order in which modalities were learned.

Source: Yu et al., "LLMs Can Evolve Continually on Modality for X-Modal Reasoning", NeurIPS 2024,
arXiv 2410.20178 (code JiazuoYu/PathWeave). The gate and all sizes are the code's.

Departures from the authors' code (their behaviour is the option in brackets):
- A new adapter adds nothing at the start, and an in-adapter starts as the identity, so that an
  earlier adapter is reused as it is (``init: bert_normal``, both normal of deviation 0.02).
- Every pair (path, source) has its own in-adapter and every path its own gate; theirs share one
  in-adapter per source and keep the newest gate (``in_adapter_slots: source``).
- Projection adapters of all modalities train (``dead_projection: [video, audio]``); one rule for
  all: the sum of all up to the path's own.
- Cross-attention's value adapters act on every path (``dead_cross_value: [pc]``), and those of
  self-attention have in-adapters of their own (``value_by_key: [pc]``).
- Noise is drawn in training alone; a norm is copied from the newest modality of the same width,
  not only from the last one. Order and number of modalities are free.
- ``branch_scale``, ``top_k``, ``reuse``, ``mixture`` and ``in_adapter: none`` are for ablation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from evolora.backbones.base import Backbone, Batch, Encoded
from evolora.backbones.families import PROJECTION
from evolora.backbones.modalities import ModalitySpec
from evolora.backbones.qformer import QFormer
from evolora.backbones.qformer_parts import QFORMER
from evolora.errors import ConfigError
from evolora.experts.bank import GrowingStack
from evolora.experts.in_adapters import InAdapterKind, InAdapters, InAdapterStart
from evolora.experts.sites import Site
from evolora.experts.woven import Mixture, WovenLayer
from evolora.methods.base import Method
from evolora.methods.entries import new_in, newest_stage, stages, the_new_one
from evolora.randomness import generator
from evolora.registry import METHODS
from evolora.routing.path_gates import PathGates
from evolora.routing.route import Route
from evolora.routing.selection import Chosen, Selection
from evolora.routing.selector import Selector

TARGETS = ("query", "key", "value", "dense")
BERT_STD = 0.02


@dataclass(frozen=True, kw_only=True)
class PathWeaveConfig:
    """Settings of PathWeave.

    Args:
        type: "pathweave".
        r: rank of an adapter (8).
        activation: between the halves of an adapter: "relu", or None as in the released code.
        init: "identity": a new adapter adds nothing, in-adapters start as ``in_adapter_start``;
            "bert_normal": both halves and in-adapters normal of deviation 0.02, as released.
        reuse: whether a path has the adapters of earlier ones, at the projection too; without, it
            is one adapter per modality and depends on no other.
        in_adapter: "linear" (r -> r), "mlp", "two-linear", or "none": reused as they are.
        in_adapter_start: of a linear one: "identity", "zero", or "normal".
        in_adapter_slots: one for each "pair" (path, source), or for each "source" (released code:
            later paths then change what earlier ones answer).
        mixture: a "gate" weighs the experts, or all count alike ("mean").
        gate_noise: whether the gate is noisy in training.
        top_k: experts of a token; None takes all, as released.
        branch_scale: a factor on all experts of a path but the first, zero at the start: every path
            then starts as the base exactly.
        adapt_projection: whether the projection to the language model has adapters too.
        layers_to_transform: blocks of the Q-Former with adapters; None takes all.
        dead_projection, dead_cross_value, value_by_key: modalities with a fault of the released
            code, see the module docstring.
    """

    type: Literal["pathweave"] = "pathweave"
    r: int = 8
    activation: Literal["relu"] | None = None
    init: Literal["identity", "bert_normal"] = "identity"
    reuse: bool = True
    in_adapter: InAdapterKind | Literal["none"] = "linear"
    in_adapter_start: InAdapterStart = "identity"
    in_adapter_slots: Literal["pair", "source"] = "pair"
    mixture: Literal["gate", "mean"] = "gate"
    gate_noise: bool = True
    top_k: int | None = None
    branch_scale: bool = False
    adapt_projection: bool = True
    layers_to_transform: tuple[int, ...] | None = None
    dead_projection: tuple[str, ...] = ()
    dead_cross_value: tuple[str, ...] = ()
    value_by_key: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ConfigError(f"r must be at least 1; got {self.r}")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k must be at least 1, or null for all; got {self.top_k}")


@METHODS.register("pathweave", summary="PathWeave: each modality a path of woven adapters")
class PathWeave(Method):
    """The method; see the module docstring."""

    config_class: ClassVar[Any] = PathWeaveConfig
    config: PathWeaveConfig
    routing = "task-free"
    writes = True
    needs_modalities = True
    counted_as: Mapping[str, str] = {
        "layers.projection/": "projection_adapters",
        ".inner.": "in_adapters",
        ".gates.": "gates_and_noise",
        ".scale.": "experts",
        ".branch.": "experts",
    }
    backbone: QFormer

    def __init__(self, config: PathWeaveConfig, backbone: Backbone, *, seed: int = 0) -> None:
        super().__init__(config, backbone, seed=seed)
        self.selector = Selector()  # nobody is recognised: the data say the modality
        blocks = config.layers_to_transform
        for site in backbone.sites(
            "linear", towers=[QFORMER], layers=blocks, target_modules=TARGETS
        ):
            self.insert(site, self._woven(site, config.mixture))
        if config.adapt_projection:
            for site in backbone.sites("linear", towers=[PROJECTION], target_modules=[PROJECTION]):
                self.insert(site, self._woven(site, "sum"))

    # -- learning --------------------------------------------------------------------------------

    @property
    def paths(self) -> list[str]:
        """The learned modalities, in the order of their paths."""
        return list(stages(self.task_modalities[: len(self.labels)]))

    def expand(self, spec: ModalitySpec) -> None:
        """Plug in a modality that the backbone did not know; the next task may bring it."""
        assert self.entries is not None
        self.entries.expand(spec)

    def allocate(self, task: int) -> None:
        """Make the path of the task's new modality; the model's own needs none.

        Raises:
            ConfigError: the task has none that is new, more than one, or one without an encoder.
        """
        if the_new_one(self.task_modalities, task, self.task_names[task]) is None:
            return
        config = self.config
        normal = BERT_STD if config.init == "bert_normal" else None
        for key, layer in self.layers.items():
            assert isinstance(layer, WovenLayer)
            draw = generator(self.seed, key, task)
            bert = normal if layer.mixture != "sum" else None  # those stand outside of BERT
            path = layer.grow(draw, std=bert, up_std=bert)
            if layer.inner is not None:
                start = "normal" if normal else config.in_adapter_start
                layer.inner.grow(path, draw, start=start, std=BERT_STD)
        self._set_faults()

    def sources(self, task: int) -> tuple[str, ...]:
        """Return the modalities whose adapters the gate of a task's path mixes, its own last."""
        new = new_in(self.task_modalities, task)
        known = self.paths[: self.paths.index(new[0]) + 1] if new else []
        mixed = self.config.reuse and self.config.mixture == "gate" and len(known) > 1
        return tuple(known) if mixed else ()

    def finish_task(self) -> None:
        """Freeze the path for good, but for in-adapters that paths share."""
        shared = {id(stack) for stack in self._shared_stacks()}
        for module in self.modules():
            if isinstance(module, GrowingStack) and id(module) not in shared:
                module.freeze(range(len(module)))

    # -- who answers -----------------------------------------------------------------------------

    @torch.no_grad()
    def route(self, batch: Batch, oracle: int | None = None) -> tuple[Encoded | None, Selection]:
        """Return the stage that taught each row's newest modality, or the base."""
        tasks = self.task_modalities[: len(self.labels)]
        return None, Selection(tasks=newest_stage(tasks, batch, self.backbone.device))

    def told(self, batch: Batch, experts: int) -> tuple[Encoded | None, Selection]:
        """Return what :meth:`route` does: the modality is known from the input."""
        return self.route(batch)

    def make_route(self, tasks: Chosen, batch: Batch, encoded: Encoded | None = None) -> Route:
        """Return a route that sends each modality to its own path."""
        paths = {modality: path for path, modality in enumerate(self.paths)}
        return replace(super().make_route(tasks, batch, encoded), paths=paths)

    def remove(self) -> None:
        """Take all adapters and entries out of the backbone again."""
        super().remove()
        assert self.entries is not None
        self.entries.leave()

    # -- inside ----------------------------------------------------------------------------------

    def _woven(self, site: Site, mixture: Mixture) -> WovenLayer:
        config, device = self.config, self.backbone.device
        inner = gates = None
        plain = mixture == "sum"
        if config.reuse and config.in_adapter != "none" and not plain:
            shared = config.in_adapter_slots == "source"
            inner = InAdapters(config.r, config.in_adapter, shared=shared, device=device)
        if config.reuse and mixture == "gate":
            gates = PathGates(site.d_in, noise=config.gate_noise, top_k=config.top_k, device=device)
        return WovenLayer(
            site,
            config.r,
            activation=config.activation,
            reuse=config.reuse,
            mixture=mixture,
            inner=inner,
            gates=gates,
            branch_scale=config.branch_scale and not plain,
            device=device,
        )

    def _values_and_keys(self) -> list[tuple[WovenLayer, WovenLayer]]:
        """Return the value site and the key site of each self-attention."""
        found = []
        for name, layer in self.layers.items():
            if name.endswith("/attention/value"):
                key = self.layers[name.removesuffix("value") + "key"]
                assert isinstance(layer, WovenLayer) and isinstance(key, WovenLayer)
                found.append((layer, key))
        return found

    def _set_faults(self) -> None:
        """Tell the layers which paths have a fault of the released code."""
        paths, config = self.paths, self.config

        def indices(names: Sequence[str]) -> list[int]:
            return [paths.index(name) for name in names if name in paths]

        for key, layer in self.layers.items():
            assert isinstance(layer, WovenLayer)
            if layer.mixture == "sum":
                layer.silent = indices(config.dead_projection)
            elif key.endswith("/crossattention/value"):
                layer.silent = indices(config.dead_cross_value)
        for layer, key_layer in self._values_and_keys():
            layer.borrow(key_layer, indices(config.value_by_key))

    def _shared_stacks(self) -> list[nn.Module]:
        """Return in-adapters that go on learning on later paths."""
        inner = [layer.inner for layer in self.layers.values() if isinstance(layer, WovenLayer)]
        return [
            stack for part in inner if part is not None and part.shared for stack in part.modules()
        ]
