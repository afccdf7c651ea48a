"""The texts of the pairs: sentences with a picture's name, lists of words about it, and others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BertTokenizer

from clip_pretraining.prompts import Prompts
from vilt_pretraining.words import tokenized

LISTS = 4  # lists of words per name
NEAR = 24  # a list's words are among so many names that MiniLM has close to the picture's
LONGEST = 3  # names in a list
NAMED = 0.7  # of the lists hold the name itself


@dataclass(frozen=True)
class Texts:
    """Args:
    ids: token ids [texts, 40], padded; those of a name stand together, the names come first.
    vectors: the teacher's embeddings [texts, 384], unit length.
    per_name: how many texts a name has.
    """

    ids: Tensor
    vectors: Tensor
    per_name: int

    def of_names(self, names: Tensor, draw: torch.Generator) -> Tensor:
        """Returns the row [b] of one text of each name."""
        return names * self.per_name + torch.randint(self.per_name, (len(names),), generator=draw)

    def any(self, count: int, draw: torch.Generator) -> Tensor:
        """Returns rows [b] of texts, whatever they name."""
        return torch.randint(len(self.ids), (count,), generator=draw)


def load_texts(prompts: Prompts, tokenizer: BertTokenizer, seed: int) -> Texts:
    """Returns the texts of all names of the corpus, and the further ones; none of the suite's."""
    own = prompts.sentences[: prompts.names * prompts.templates]
    others = prompts.sentences[prompts.named :]
    vectors = prompts.of_corpus()
    far = prompts.vectors[prompts.named :].float()
    half = len(others) // 2  # bare names, then the same in templates
    lists, meant = word_lists(
        [*own[:: prompts.templates], *others[:half]],
        torch.cat([vectors[:, 0], far[:half]]),
        prompts.names,
        torch.Generator().manual_seed(seed),
    )
    texts = [
        text
        for name in range(prompts.names)
        for text in (
            *own[name * prompts.templates : (name + 1) * prompts.templates],
            *lists[name * LISTS : (name + 1) * LISTS],
        )
    ]
    named = torch.cat([vectors, meant.view(prompts.names, LISTS, -1)], dim=1)
    return Texts(
        tokenized(tokenizer, [*texts, *others]),
        torch.cat([named.flatten(0, 1), far]),
        prompts.templates + LISTS,
    )


def word_lists(
    bare: list[str], vectors: Tensor, names: int, draw: torch.Generator
) -> tuple[list[str], Tensor]:
    """Returns lists of words about each of the first ``names``, and what they mean.

    Sources of pictures give keywords like these: "owl animal wise".

    Args:
        bare: names [n].
        vectors: their embeddings [n, 384].
        names: how many of them get lists.
        draw: source of randomness.

    Returns:
        ``LISTS`` texts per name, and the unit-length means [names * LISTS, 384] of their names'
        embeddings.
    """
    near = (vectors[:names] @ vectors.T).fill_diagonal_(-1)
    near = near.topk(min(NEAR, len(bare) - 1), dim=1).indices
    lists, meant = [], []
    for name in range(names):
        for _ in range(LISTS):
            count = 1 + int(torch.randint(LONGEST, (1,), generator=draw))
            rows = near[name, torch.randperm(near.shape[1], generator=draw)[:count]]
            if float(torch.rand(1, generator=draw)) < NAMED:
                rows[int(torch.randint(len(rows), (1,), generator=draw))] = name
            lists.append(" ".join(bare[row] for row in rows.tolist()))
            meant.append(vectors[rows].mean(dim=0))
    return lists, F.normalize(torch.stack(meant), dim=-1)
