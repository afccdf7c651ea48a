"""Random vision towers of CLIP's sizes, and methods standing in them, for the benches.

Speed does not depend on the weights' values, so nothing is downloaded. All variants of a comparison
share one set of frozen weights: copies have their own modules and hooks, not their own memory.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from evolora.backbones.base import Backbone
from evolora.backbones.clip import DualEncoder
from evolora.bench.settings import Settings
from evolora.experts.sites import ExpertLayer, Site
from evolora.methods.base import Method
from evolora.randomness import generator
from evolora.routing.route import Route
from evolora.streams.task import LabelSpace

IMAGE = 224
TARGETS = ("q_proj", "v_proj", "fc1", "fc2")
"""Linears that get a LoRA."""
WIDTH, MLP, HEADS = 768, 3072, 12
END_TOKEN = 1023
LABELS = LabelSpace(classes=("a", "b"))
FindSites = Callable[[Backbone], list[Site]]


def linear_sites(backbone: Backbone) -> list[Site]:
    """Return the vision tower's Linears that get a LoRA."""
    return backbone.sites("linear", towers=("vision",), target_modules=TARGETS)


def mlp_sites(backbone: Backbone) -> list[Site]:
    """Return the places beside the vision tower's MLPs."""
    return backbone.sites("mlp", towers=("vision",))


def build(settings: Settings, layers: int, *, patch: int = 16, text_layers: int = 1) -> DualEncoder:
    """Return a frozen dual encoder: ViT-B-wide vision tower, CLIP-B-wide text tower.

    Args:
        settings: device, dtype, seed.
        layers: transformer blocks of the vision tower.
        patch: side of a patch in pixels; 16 makes 197 tokens, 32 makes 50.
        text_layers: transformer blocks of the text tower.
    """
    from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig(
        vision_config={
            "hidden_size": WIDTH,
            "intermediate_size": MLP,
            "num_attention_heads": HEADS,
            "num_hidden_layers": layers,
            "image_size": IMAGE,
            "patch_size": patch,
        },
        text_config={
            "num_hidden_layers": text_layers,
            "vocab_size": 1024,
            "bos_token_id": 1022,
            "eos_token_id": END_TOKEN,
        },
    )
    torch.manual_seed(settings.seed)
    model: Any = CLIPModel(config)
    model.to(settings.device, settings.torch_dtype)
    return DualEncoder(model, name="random")


def pixels(settings: Settings, batch: int) -> Tensor:
    """Return normalised images (b, 3, 224, 224)."""
    draw = torch.randn(batch, 3, IMAGE, IMAGE, generator=generator(settings.seed, "pixels"))
    return draw.to(settings.device, settings.torch_dtype)


def twin(backbone: DualEncoder) -> DualEncoder:
    """Return a backbone with modules and hooks of its own, over the same tensors."""
    return DualEncoder(twin_of(backbone.model), name=backbone.name)


def twin_of(model: nn.Module) -> nn.Module:
    """Return a copy of a model's modules, without hooks, over the same tensors."""
    tensors = [*model.parameters(), *model.buffers()]
    memo: dict[int, Any] = {id(tensor): tensor for tensor in tensors}
    return copy.deepcopy(model, memo)


def in_float64(backbone: DualEncoder) -> DualEncoder:
    """Return a copy in double precision, without experts."""
    return DualEncoder(copy.deepcopy(backbone.model).double(), name=backbone.name)


def hidden(backbone: Backbone) -> Callable[[Tensor], Tensor]:
    """Return a function from pixels to the vision tower's last hidden states (b, n, d)."""
    tower: Any = backbone.model.get_submodule("vision_model")

    def run(x: Tensor) -> Tensor:
        out: Tensor = tower(pixel_values=x).last_hidden_state
        return out

    return run


def routed(backbone: Backbone, task: int | Tensor = 0) -> Callable[[Tensor], Tensor]:
    """Return :func:`hidden` under a route: one task for all rows, or a task per row (b,)."""
    run = hidden(backbone)

    def run_routed(x: Tensor) -> Tensor:
        if isinstance(task, Tensor):
            backbone.host.set_route("vision", Route(task))
        else:
            backbone.host.set_route("vision", Route.of(task, len(x), device=x.device))
        return run(x)

    return run_routed


def learner(method: type[Method], config: Any, backbone: DualEncoder, tasks: int = 1) -> Method:
    """Return a method after so many tasks, the last one still training, in a twin of the backbone.

    All that it learns is drawn at random: fresh experts give zero, which would hide mistakes.
    """
    return taught(method, config, twin(backbone), tasks)


def taught(method: type[Method], config: Any, backbone: Backbone, tasks: int = 1) -> Method:
    """Return :func:`learner` in this very backbone."""
    made = method(config, backbone)
    for task in range(tasks):
        made.begin_task(f"task {task}", LABELS)
        randomise(made)
        if task < tasks - 1:
            made.finish_task()
    return made.to(backbone.device, next(backbone.model.parameters()).dtype)


def randomise(module: nn.Module) -> None:
    """Fill the trainable parameters with small random numbers."""
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            drawn = torch.randn(parameter.shape, generator=generator("weights", name))
            parameter.copy_(0.02 * drawn)


def insert_copies(
    backbone: DualEncoder,
    method: Method,
    sites: FindSites,
    make: Callable[[nn.Module], ExpertLayer],
) -> nn.ModuleList:
    """Let what ``make`` makes of the method's layers act in a backbone; return these layers."""
    layers = nn.ModuleList()
    for site in sites(backbone):
        weight = next(backbone.model.parameters())
        layer = make(method.layers[site.key]).to(weight.device, weight.dtype)
        backbone.host.insert(site, layer)
        layers.append(layer)
    return layers


def floor(backbone: DualEncoder, sites: FindSites) -> Callable[[Tensor], Tensor]:
    """Return the least that training at these sites can cost: no experts, but their gradient.

    The activation gradient reaches the outputs of the lowest layer's sites and goes no further.
    """
    other = twin(backbone)
    begin_gradient(sites(other))
    return hidden(other)


def begin_gradient(sites: Sequence[Site]) -> None:
    """Let the gradient reach the outputs of the lowest layer's sites and go no further."""
    lowest = min(site.layer for site in sites)

    def start(_: nn.Module, __: Any, out: Tensor) -> Tensor:
        return out if out.requires_grad or not torch.is_grad_enabled() else out.requires_grad_()

    for site in sites:
        if site.layer == lowest:
            site.module.register_forward_hook(start)


def expected(
    backbone: DualEncoder,
    method: Method,
    sites: FindSites,
    make: Callable[[nn.Module], ExpertLayer],
    x: Tensor,
    task: int | Tensor = 0,
) -> Tensor:
    """Return what the method's function gives in double precision, computed by naive loops."""
    exact = in_float64(backbone)
    insert_copies(exact, method, sites, make)
    with torch.no_grad():
        return routed(exact, task)(x.double())
