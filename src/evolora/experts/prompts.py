"""Prompts: learned tokens inside a frozen transformer, put there and taken out again by hooks.

* ``input`` prompts are more tokens of a block's sequence; the mask is extended to show them. They
  stay in the sequence of the blocks above, beside those of other blocks or until these replace
  them, and are cut out after the last block.
* ``prefix`` prompts are more keys and values of one attention: the first half of the rows are keys,
  the second half values. A stock attention gives its keys the shape of its input, so the input gets
  as many rows at its beginning, whose keys and values are replaced and whose output is cut off.
  What is left is exactly attention over [prompts; tokens].

Prompts are of each sample: a :class:`PromptLayer` makes them from the route. All of a forward's
rows have prompts or none has: a sequence cannot be longer for some of its rows, and rows of the
base must be the untouched model's. Hooks keep nothing between blocks, so a block that is run again
in backward (gradient checkpointing) does the same again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evolora.errors import ConfigError
from evolora.experts.sites import SiteHost
from evolora.routing.route import Route

PromptKind = Literal["input", "prefix"]


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptSite:
    """One block that may get prompts.

    Args:
        tower: "vision", "text", or "multimodal" where one stream holds both.
        layer: index of the block, from 0.
        attention: module that makes queries, keys and values of its first argument, and takes the
            mask as its second.
        key, value: its Linears.
        width: of a token.
    """

    tower: str
    layer: int
    attention: nn.Module
    key: nn.Module
    value: nn.Module
    width: int

    def key_of(self, name: str = "prompts") -> str:
        """Return the name of a layer here as a key of a ModuleDict."""
        return f"{self.tower}/{self.layer}/{name}"


class PromptLayer(nn.Module):
    """What makes the prompts of one block.

    Args:
        site: the block.
        length: rows of prompts; of prefix prompts, half of them keys.
        kind: see the module docstring.
        stage: pass over the samples in which they are there (``Route.stage``).
    """

    def __init__(self, site: PromptSite, length: int, kind: PromptKind, *, stage: str = "") -> None:
        super().__init__()
        least, step = (2, 2) if kind == "prefix" else (1, 1)
        if length < least or length % step:
            wanted = "a positive even number (keys, values)" if step == 2 else "at least 1"
            raise ConfigError(f"{kind} prompts: the length must be {wanted}; got {length}")
        self.site, self.length, self.kind, self.stage = site, length, kind, stage
        self.carried = 1
        self.block_parameters = 0

    def forward(self, route: Route) -> Tensor:
        """Return the prompts (b, length, d) of each row; never called for rows of the base."""
        raise TypeError(f"{type(self).__name__} must define forward")

    def speaks(self, route: Route) -> bool:
        """Return whether there are prompts in this pass."""
        return route.stage == self.stage

    def flops(self, tokens: int) -> int:
        """Return about what the prompts add to a row of ``tokens`` tokens, less how they are made.

        Prefix: the tokens' attention to the rows, and the rows' own projections and attention,
        which are computed and cut off. Input: the rows' way through all blocks that carry them.
        """
        width = self.site.width
        if self.kind == "prefix":
            rows = self.length // 2
            return 4 * rows * width * (2 * tokens + rows) + 6 * rows * width**2
        attention = 4 * self.length * width * (2 * tokens + self.length)
        return self.carried * (2 * self.length * self.block_parameters + attention)


class InputPrompts:
    """The hooks that carry input prompts through the blocks of a tower.

    Args:
        host: hands over the route.
        blocks: of the tower, the lowest first.
        layers: what makes prompts, at most one per block.
        at: position they are put to: 0 is before all tokens, 1 after the first.
        replace: prompts take the place of those of earlier blocks.
    """

    def __init__(
        self,
        host: SiteHost,
        blocks: Sequence[nn.Module],
        layers: Sequence[PromptLayer],
        *,
        at: int = 0,
        replace: bool = False,
    ) -> None:
        self.host, self.at, self.replace = host, at, replace
        self.layers = {layer.site.layer: layer for layer in layers}
        self.tower = layers[0].site.tower
        indices = sorted(self.layers)
        for index, following in zip(indices, [*indices[1:], len(blocks)], strict=True):
            layer = self.layers[index]
            layer.carried = (following if replace else len(blocks)) - index
            layer.block_parameters = sum(p.numel() for p in blocks[index].parameters())
        for index in range(indices[0], len(blocks)):
            handle = blocks[index].register_forward_pre_hook(
                lambda _, args, kwargs, index=index: self._before(index, args, kwargs),
                with_kwargs=True,
            )
            host.hold(self.tower, index, handle)
        self.last = len(blocks) - 1
        host.hold(self.tower, self.last, blocks[-1].register_forward_hook(self._after))

    def held(self, index: int, route: Route) -> int:
        """Return how many prompts are in the sequence that enters block ``index``."""
        lengths = [
            self.layers[below].length
            for below in sorted(self.layers)
            if below < index and self.layers[below].speaks(route)
        ]
        return sum(lengths[-1:] if self.replace else lengths)

    def _before(
        self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        hidden, mask = _given(args, kwargs)
        route = self.host.route_at(self.tower, f"block {index}", hidden.shape[0])
        if route is None:
            return None
        layer = self.layers.get(index)
        if layer is not None and layer.speaks(route):
            prompts = layer(route).to(hidden.dtype)
            rest = self.at + (self.held(index, route) if self.replace else 0)
            hidden = torch.cat([hidden[:, : self.at], prompts, hidden[:, rest:]], dim=1)
        mask = extended(mask, self.held(index + 1, route), self.at)
        return _put(args, kwargs, hidden, mask)

    def _after(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        route = self.host.route_at(self.tower, f"block {self.last}", hidden.shape[0])
        if route is None:
            return None
        rest = self.at + self.held(self.last + 1, route)
        kept = torch.cat([hidden[:, : self.at], hidden[:, rest:]], dim=1)
        return (kept, *output[1:]) if isinstance(output, tuple) else kept


def insert_prefix(host: SiteHost, layer: PromptLayer) -> None:
    """Let the layer's prompts be keys and values of its block from the next forward on."""
    site, count = layer.site, layer.length // 2
    made: list[Tensor] = []

    def before(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        made.clear()  # an attention that broke off left its prompts
        hidden, mask = _given(args, kwargs)
        route = host.route_at(site.tower, f"attention {site.layer}", hidden.shape[0])
        if route is None or not layer.speaks(route):
            return None
        made.append(layer(route))
        return _put(args, kwargs, F.pad(hidden, (0, 0, count, 0)), extended(mask, count, 0))

    def rows(start: int) -> Any:
        def replaced(_: nn.Module, __: Any, out: Tensor) -> Tensor | None:
            if not made:
                return None
            own = made[0][:, start : start + count].to(out.dtype)
            return torch.cat([own, out[:, count:]], dim=1)

        return replaced

    def after(_: nn.Module, __: Any, output: Any) -> Any:
        if not made:
            return None
        made.clear()
        if isinstance(output, tuple):
            return (output[0][:, count:], *output[1:])
        return output[:, count:]

    for handle in (
        site.attention.register_forward_pre_hook(before, with_kwargs=True),
        site.key.register_forward_hook(rows(0)),
        site.value.register_forward_hook(rows(count)),
        site.attention.register_forward_hook(after),
    ):
        host.hold(site.tower, site.layer, handle)


def extended(mask: Tensor | None, count: int, at: int) -> Tensor | None:
    """Return an attention mask (b, 1, 1 or n, n) that shows ``count`` more positions to all.

    Args:
        mask: bool (True is seen), or added to scores (0 is seen); None shows everything.
        count: positions put in.
        at: where.
    """
    if mask is None or count == 0:
        return mask
    seen = mask.new_full((*mask.shape[:-1], count), mask.dtype == torch.bool)
    mask = torch.cat([mask[..., :at], seen, mask[..., at:]], dim=-1)
    if mask.shape[-2] == 1:
        return mask
    like_others = mask[..., :1, :].expand(*mask.shape[:-2], count, -1)
    return torch.cat([mask[..., :at, :], like_others, mask[..., at:, :]], dim=-2)


def _given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Return hidden states and mask, which models hand over by place or by name."""
    hidden = args[0] if args else kwargs["hidden_states"]
    return hidden, args[1] if len(args) > 1 else kwargs.get("attention_mask")


def _put(
    args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor, mask: Tensor | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments with other hidden states and mask, each where it was."""
    values = {"hidden_states": hidden, "attention_mask": mask}
    placed = tuple(values.values())[: min(len(args), 2)]
    named = {name: values.get(name, value) for name, value in kwargs.items()}
    return (*placed, *args[2:]), named
