"""What there is to ask about: the corpus's names with their neighbors in meaning, further words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from random import Random

from torch import Tensor

from clip_pretraining.corpus import Corpus
from clip_pretraining.prompts import Prompts
from llava_pretraining.about_texts import Words
from llava_pretraining.about_things import Thing

NEAR = 24  # neighbors that a name has
OTHERS = 8  # other names that a question may use
COMMON = 0.3  # of the texts are of common words


def plain(name: str) -> str:
    """Returns a name without the number of its variant."""
    return re.sub(r" \d+$", "", name)


class Subjects:
    """Names of the corpus with neighbors, and common words.

    Args:
        corpus: of the pictures.
        prompts: what the pictures' names mean.
        common: words for texts without pictures.
    """

    def __init__(self, corpus: Corpus, prompts: Prompts, common: Sequence[str]) -> None:
        bare = prompts.sentences[: prompts.names * prompts.templates : prompts.templates]
        self.names = [plain(name) for name in bare]
        self.groups, self.rows, self.common = corpus.groups, corpus.names.tolist(), common
        vectors = corpus.embeddings[:, 0]
        close = (vectors @ vectors.T).masked_fill(corpus.synonyms, -1).fill_diagonal_(-1)
        nearest = close.topk(min(2 * NEAR, len(close) - 1)).indices
        self.near = [self._apart(row, name) for row, name in zip(nearest, self.names, strict=True)]

    def _apart(self, rows: Tensor, name: str) -> list[str]:
        found = dict.fromkeys(self.names[row] for row in rows.tolist())
        found.pop(name, None)
        return list(found)[:NEAR]

    def thing(self, row: int, draw: Random) -> Thing:
        """Returns what a row's picture shows, with other names of its group where there are."""
        name, group = self.rows[row], self.groups[row]
        others: list[str] = []
        for _ in range(4 * OTHERS):
            other = draw.randrange(len(self.rows))
            if self.groups[other] == group and self.names[self.rows[other]] != self.names[name]:
                others.append(self.names[self.rows[other]])
            if len(others) == OTHERS:
                break
        return Thing(self.names[name], group, self.near[name], others or self.near[name])

    def any_thing(self, draw: Random) -> Thing:
        """Returns what any picture shows."""
        return self.thing(draw.randrange(len(self.rows)), draw)

    def words(self, draw: Random) -> Words:
        """Returns a name or a common word, with other ones; common words have no neighbors."""
        row = draw.randrange(len(self.names))
        common = draw.random() < COMMON
        name, near = (draw.choice(self.common), []) if common else (self.names[row], self.near[row])
        pool = self.common if draw.random() < COMMON else self.names
        found = dict.fromkeys(draw.choice(pool) for _ in range(OTHERS))
        found.pop(name, None)
        return Words(name, near, list(found) or self.common)
