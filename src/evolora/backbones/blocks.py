"""Transformer blocks: where experts stand in them, what selectors read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evolora.errors import ConfigError, unknown_name
from evolora.experts.feed_forward import FeedForward
from evolora.experts.prompts import PromptSite
from evolora.experts.sites import Site, SiteKind

LINEARS = {
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "out_proj": "self_attn.out_proj",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}
"""Name of a Linear as users write it -> where it is in a block of CLIP or SigLIP."""
VILT_LINEARS = {
    "query": "attention.attention.query",
    "key": "attention.attention.key",
    "value": "attention.attention.value",
    "out_proj": "attention.output.dense",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
    # CLIP's names of the first three, and ViLT's of the fourth
    "q_proj": "attention.attention.query",
    "k_proj": "attention.attention.key",
    "v_proj": "attention.attention.value",
    "dense": "attention.output.dense",
}
"""The same for a block of ViLT. Of two names for one Linear, the first names its site."""

ALL_LINEAR = "all-linear"
"""Target module that stands for every Linear of a block."""
ACTIVATIONS = ("activation_fn", "intermediate_act_fn", "act_fn")
"""What an MLP calls its activation: CLIP and SigLIP, ViLT, decoders."""

ENTRIES = ("layernorm_before", "layer_norm1", "input_layernorm", "norm1")
"""What a block calls its first norm: ViLT and InternVL, CLIP and SigLIP, decoders, Qwen-VL."""


def block_indices(layers: Sequence[int] | None, depth: int, tower: str) -> list[int]:
    """Return ``layers_to_transform`` as ascending indices of a tower's blocks (None: of all).

    Raises:
        ConfigError: the list is empty, or an index is outside the tower.
    """
    if layers is None:
        return list(range(depth))
    if not layers:
        raise ConfigError("layers_to_transform must name at least one block; got none")
    wrong = [layer for layer in layers if not -depth <= layer < depth]
    if wrong:
        raise ConfigError(
            f"layers_to_transform: the {tower} tower has {depth} blocks; got {wrong[0]} "
            f"(allowed: {-depth} to {depth - 1}, negative from the top)"
        )
    return sorted({layer % depth for layer in layers})


def named_linears(targets: Sequence[str], linears: Mapping[str, str]) -> list[str]:
    """Return the names of the wanted Linears, of those that a block has.

    Raises:
        ConfigError: a name that it does not have.
    """
    for target in targets:
        if target not in linears and target != ALL_LINEAR:
            raise unknown_name("target module", target, (*linears, ALL_LINEAR))
    return list(linears if ALL_LINEAR in targets else targets)


def block_sites(
    block: nn.Module,
    kind: SiteKind,
    tower: str,
    index: int,
    *,
    linears: Mapping[str, str],
    targets: Sequence[str],
    mlp: tuple[str, str],
) -> list[Site]:
    """Return the sites of a block.

    Args:
        block: transformer block.
        kind: beside its MLP, in place of it, or at its Linears.
        tower: it is in.
        index: of the block.
        linears: name of a Linear -> where it is.
        targets: names of the wanted Linears.
        mlp: where the MLP is, whose output experts add to, and the LayerNorm before it.
    """
    if kind == "mlp":
        module, norm = (block.get_submodule(path) for path in mlp)
        width: int = norm.normalized_shape[0]  # type: ignore[index, assignment]
        name = f"{tower}.{index}.mlp"
        return [
            Site(
                tower=tower,
                layer=index,
                name=name,
                kind="mlp",
                module=module,
                norm=norm,
                d_in=width,
                d_out=width,
            )
        ]
    if kind == "ffn":
        up: Any = block.get_submodule(linears["fc1"])
        down: Any = block.get_submodule(linears["fc2"])
        owner = block.get_submodule(linears["fc1"].rpartition(".")[0])
        parts = FeedForward(up=up, down=down, activation=activation_of(owner))
        return [feed_forward_site(tower, index, parts)]
    found = []
    for path in dict.fromkeys(linears[target] for target in targets):
        linear: Any = block.get_submodule(path)
        name = next(known for known, where in linears.items() if where == path)
        found.append(linear_site(tower, index, name, linear))
    return found


def linear_site(tower: str, index: int, name: str, linear: nn.Linear) -> Site:
    """Return the site of a Linear in block ``index`` of a tower."""
    return Site(
        tower=tower,
        layer=index,
        name=f"{tower}.{index}.{name}",
        kind="linear",
        module=linear,
        d_in=linear.in_features,
        d_out=linear.out_features,
    )


def feed_forward_site(tower: str, index: int, parts: FeedForward) -> Site:
    """Return the site of experts that are whole MLPs in block ``index`` of a tower."""
    return Site(
        tower=tower,
        layer=index,
        name=f"{tower}.{index}.ffn",
        kind="ffn",
        module=parts.down,
        d_in=parts.up.in_features,
        d_out=parts.down.out_features,
        mlp=parts,
    )


def activation_of(mlp: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return the activation of an MLP."""
    found: Callable[[Tensor], Tensor] = next(
        getattr(mlp, name) for name in ACTIVATIONS if hasattr(mlp, name)
    )
    return found


def prompt_site(block: nn.Module, tower: str, index: int) -> PromptSite:
    """Return where prompts stand in a block of ViLT, CLIP or SigLIP."""
    is_vilt = "layernorm_before" in dict(block.named_children())
    linears = VILT_LINEARS if is_vilt else LINEARS
    key: Any = block.get_submodule(linears["k_proj"])
    return PromptSite(
        tower=tower,
        layer=index,
        attention=block.get_submodule(linears["k_proj"].rpartition(".")[0]),
        key=key,
        value=block.get_submodule(linears["v_proj"]),
        width=key.in_features,
    )


def entry_of(block: nn.Module) -> nn.Module:
    """Return the norm that takes what enters a block.

    A hook on the block itself would stay outside of what gradient checkpointing runs again.
    """
    modules = dict(block.named_children())
    return next(modules[name] for name in ENTRIES if name in modules)


def run_block(block: nn.Module, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Return the hidden states after a block; some wrap them in a tuple."""
    output = block(hidden, *args, **kwargs)
    result: Tensor = output[0] if isinstance(output, tuple) else output
    return result


@contextmanager
def outputs_of(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Give a list that the outputs of modules are put into, as they run."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handles = [module.register_forward_hook(keep) for module in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def layer_statistics(hidden: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
    """Return (b, f): mean and standard deviation over tokens at each given depth of a tower.

    Low layers tell the style of an image, high layers its content; a selector needs both. Each
    statistic is normalised over its width, so that no layer outweighs another.

    Args:
        hidden: (b, n, d) at each depth.
        mask: (b, n) bool, which tokens count; None counts all.
    """
    parts = []
    for tokens in (states.float() for states in hidden):
        if mask is None:
            mean, count = tokens.mean(dim=1), tokens.shape[1] - 1
            # Tensor.std takes six times as long over an axis that is not the last one.
            squares = (tokens - mean.unsqueeze(1)).square_().sum(dim=1)
            deviation = (squares / count).sqrt()
        else:
            counted = mask.unsqueeze(2).to(tokens.dtype)
            total = counted.sum(dim=1)
            mean = (tokens * counted).sum(dim=1) / total
            squares = ((tokens - mean.unsqueeze(1)) * counted).square_().sum(dim=1)
            deviation = (squares / (total - 1).clamp_min(1)).sqrt()
        parts += [F.layer_norm(values, tokens.shape[2:]) for values in (mean, deviation)]
    return torch.cat(parts, dim=1)


def statistic_layers(depth: int) -> list[int]:
    """Return four of ``depth`` tensors, the embeddings first and the last block last."""
    return sorted({round((depth - 1) * share / 3) for share in range(4)})
