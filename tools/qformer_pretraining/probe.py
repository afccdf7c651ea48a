"""Whether the language model can be made to say a word: by soft tokens learnt for it alone.

What no soft prompt makes a frozen language model say, no Q-Former in front of it will.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from transformers import InstructBlipForConditionalGeneration, PreTrainedTokenizerFast

from evolora.randomness import derive_seed
from llava_pretraining.student import NO_ANSWER
from qformer_pretraining.asking import Asked
from qformer_pretraining.facts import all_answers
from qformer_pretraining.start import QUERIES
from qformer_pretraining.student import tokens_of

RATE = 0.03


def said_by_soft_tokens(
    model: InstructBlipForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    steps: int,
    seed: int,
) -> list[str]:
    """Returns answers that the language model does not say, greedy, behind learnt soft tokens."""
    inner: Any = model.eval().requires_grad_(False)
    asked = [Asked(question, answer) for question, answer in all_answers()]
    _, _, _, ids, _, labels, _ = tokens_of(tokenizer, asked, [1] * len(asked))
    torch.manual_seed(derive_seed(seed, "qformer-probe"))
    words = inner.get_input_embeddings()(ids[:, QUERIES:])
    soft = torch.randn(len(asked), QUERIES, words.shape[-1]) * words.std()
    soft.requires_grad_(True)
    optimizer = torch.optim.Adam([soft], lr=RATE)
    told = labels[:, 1:] != NO_ANSWER
    for _ in range(steps):
        logits = inner.language_model(inputs_embeds=torch.cat([soft, words], dim=1)).logits
        loss = F.cross_entropy(logits[:, :-1][told], labels[:, 1:][told])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    # greedy: each token follows from the right ones before it
    best = inner.language_model(inputs_embeds=torch.cat([soft, words], dim=1)).logits.argmax(-1)
    right = ((best[:, :-1] == labels[:, 1:]) | ~told).all(1)
    model.requires_grad_(True)
    return [one.answer for one, found in zip(asked, right.tolist(), strict=True) if not found]
