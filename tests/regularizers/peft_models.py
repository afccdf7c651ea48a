"""Small models with PEFT adapters whose B is no longer zero."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

WIDTH = 12
ZERO_AT_FIRST = ("lora_B", "embedding_A", "hira_B", "delora_B", "lora_E")


class Net(nn.Module):
    """An embedding, two Linears, a convolution, attention and a mixture's weights; tiny."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, WIDTH)
        self.first = nn.Linear(WIDTH, 16)
        self.second = nn.Linear(16, WIDTH)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.experts = Experts()

    def forward(self, tokens: Tensor) -> Tensor:
        """Return (b, n, WIDTH)."""
        x = self.embed(tokens)
        x = x + self.second(torch.relu(self.first(x)))
        x = x + self.conv(x.mT).mT
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return x + self.experts(x)  # type: ignore[no-any-return]


class Experts(nn.Module):
    """Three experts that all answer, their weights in one parameter (e, out, in)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bnd,eod->bno", x, self.weight)


def tokens(rows: int = 4, length: int = 9, seed: int = 0) -> Tensor:
    return torch.randint(0, 11, (rows, length), generator=torch.Generator().manual_seed(seed))


def adapted(config: Any = None, *, seed: int = 0, **settings: Any) -> Any:
    """A PEFT model of :class:`Net`."""
    torch.manual_seed(seed)
    if config is None:
        given: dict[str, Any] = {"target_modules": ["first", "second"], "r": 4, **settings}
        config = LoraConfig(**given)
    return lively(get_peft_model(Net(), config).train())


def lively(model: Any) -> Any:
    """Give every adapter a B that is not zero."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(
                mark in name for mark in ("lora_B", "embedding_A", "hira_B", "delora_B", "lora_E")
            ):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draw))
    return model


def tiny_llama(*, seed: int = 0, **settings: Any) -> Any:
    """A causal language model of two small blocks, with a LoRA at queries and values."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=24, max_position_embeddings=32, pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    ))  # fmt: skip
    given: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], "r": 4, **settings}
    return lively(get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **given)))


def sentences(count: int = 8, length: int = 10, *, padded: bool = True) -> list[dict[str, Tensor]]:
    """Token sequences, the later ones shorter, with padding on the right."""
    draw = torch.Generator().manual_seed(2)
    found = []
    for row in range(count):
        ids = torch.randint(3, 24, (length,), generator=draw)
        real = torch.ones(length, dtype=torch.long)
        if padded and row % 2:
            real[length - 3 :] = 0
            ids[length - 3 :] = 0
        labels = ids.masked_fill(real == 0, -100)
        found.append({"input_ids": ids, "attention_mask": real, "labels": labels})
    return found
