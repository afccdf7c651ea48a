"""Whisper out of CTranslate2's format: every tensor comes back; what does not fit is refused."""

from __future__ import annotations

import struct
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import WhisperConfig, WhisperForConditionalGeneration

from convert_whisper import model_of, read_variables, renamed
from evolora.errors import DataError

SETTINGS: dict[str, Any] = {
    "suppress_ids": [3], "suppress_ids_begin": [4], "alignment_heads": [[0, 1]],
}  # fmt: skip


def stock() -> Any:
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=50_400, num_mel_bins=8, d_model=8, encoder_layers=2, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=12,
        decoder_ffn_dim=12, max_source_positions=10, max_target_positions=6,
        decoder_start_token_id=50257, bos_token_id=50256, eos_token_id=50256, pad_token_id=50256,
    )  # fmt: skip
    return WhisperForConditionalGeneration(config).half()


def variables(model: Any) -> dict[str, Tensor]:
    """Return a model's tensors as CTranslate2 names and fuses them."""
    found: dict[str, Tensor] = {}
    for side in ("encoder", "decoder"):
        part = getattr(model.model, side)
        found[f"{side}/num_heads"] = torch.tensor(2, dtype=torch.int16)
        found[f"{side}/position_encodings/encodings"] = part.embed_positions.weight
        found |= norm(f"{side}/layer_norm", part.layer_norm)
        for index, layer in enumerate(part.layers):
            head = f"{side}/layer_{index}"
            found |= norm(f"{head}/self_attention/layer_norm", layer.self_attn_layer_norm)
            own = layer.self_attn
            found |= fused(f"{head}/self_attention/linear_0", own.q_proj, own.k_proj, own.v_proj)
            found |= fused(f"{head}/self_attention/linear_1", own.out_proj)
            found |= norm(f"{head}/ffn/layer_norm", layer.final_layer_norm)
            found |= fused(f"{head}/ffn/linear_0", layer.fc1)
            found |= fused(f"{head}/ffn/linear_1", layer.fc2)
            if side == "decoder":
                cross = layer.encoder_attn
                found |= norm(f"{head}/attention/layer_norm", layer.encoder_attn_layer_norm)
                found |= fused(f"{head}/attention/linear_0", cross.q_proj)
                found |= fused(f"{head}/attention/linear_1", cross.k_proj, cross.v_proj)
                found |= fused(f"{head}/attention/linear_2", cross.out_proj)
    for name in ("conv1", "conv2"):
        found |= fused(f"encoder/{name}", getattr(model.model.encoder, name))
    found["decoder/embeddings/weight"] = model.model.decoder.embed_tokens.weight
    found["decoder/alignment_layer"] = torch.tensor(1, dtype=torch.int16)
    return {name: value.detach() for name, value in found.items()}


def norm(name: str, layer: Any) -> dict[str, Tensor]:
    return {f"{name}/gamma": layer.weight, f"{name}/beta": layer.bias}


def fused(name: str, *layers: Any) -> dict[str, Tensor]:
    biases = [torch.zeros_like(one.weight[:, 0]) if one.bias is None else one.bias
              for one in layers]  # fmt: skip
    return {
        f"{name}/weight": torch.cat([one.weight for one in layers]),
        f"{name}/bias": torch.cat(biases),
    }


def packed(tensors: dict[str, Tensor], version: int = 6) -> bytes:
    def word(text: str) -> bytes:
        return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"

    found = struct.pack("<I", version) + word("WhisperSpec") + struct.pack("<II", 3, len(tensors))
    for name, value in tensors.items():
        body = value.contiguous().numpy().tobytes()
        kind = {torch.float16: 4, torch.int16: 2}[value.dtype]
        found += word(name) + struct.pack("<B", value.dim())
        found += struct.pack(f"<{value.dim()}I", *value.shape)
        found += struct.pack("<BI", kind, len(body)) + body
    return found + struct.pack("<I", 0)


def test_every_tensor_comes_back() -> None:
    model = stock()
    found = model_of(read_variables(packed(variables(model))), SETTINGS)
    expected = model.float().state_dict()
    assert found.state_dict().keys() == expected.keys()
    for name, value in found.state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert found.config.encoder_layers == 2 and found.config.decoder_layers == 1
    assert found.generation_config.begin_suppress_tokens == [4]


def test_what_does_not_fit_is_refused() -> None:
    tensors = variables(stock())
    content = packed(tensors)
    with pytest.raises(DataError, match="no readable CTranslate2 file"):
        read_variables(content[: len(content) // 2])
    with pytest.raises(DataError, match="version 7 of 'WhisperSpec'"):
        read_variables(packed(tensors, version=7))
    with pytest.raises(DataError, match="unknown variable 'encoder/extra/weight'"):
        list(renamed({"encoder/extra/weight": torch.zeros(2)}))
    tensors["encoder/layer_0/self_attention/linear_0/bias"] = torch.ones(24)
    with pytest.raises(DataError, match="the key has a bias"):
        list(renamed(tensors))
