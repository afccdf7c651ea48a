"""CIDEr-D and ROUGE-L of captions, on the words of :mod:`evolora.evaluation.answers.words`.

CIDEr-D of caption c with references r, with g(c) its counts of n-grams times their idf, n = 1..4:

    idf(w)  = log(N) - log(max(1, samples with w in a reference)),   N samples
    sim_n   = min(g(c), g(r)) . g(r) / (|g(c)| |g(r)|)
    CIDEr-D = 10 mean_r mean_n sim_n exp(-(length(c) - length(r))^2 / (2 * 6^2))

The minimum is taken per n-gram: repeating a word gains nothing. The document frequencies come from
the references that are judged: a score depends on the whole test set, and with one sample every
idf, so every score, is 0.

    ROUGE-L  = (1 + 1.2^2) P R / (R + 1.2^2 P)

P and R are the longest common subsequence over the length of the caption and of the reference, each
the best over references, which need not be the same one.

Sources: Vedantam et al., "CIDEr: Consensus-based Image Description Evaluation", CVPR 2015, arXiv
1411.5726; Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004. Same numbers as
pycocoevalcap 1.2 on the same words; like there, an empty caption is to ROUGE-L one empty word.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from evolora.evaluation.answers.contract import References, over_corpus, per_sample
from evolora.evaluation.answers.words import caption_words

LONGEST_GRAM = 4
SIGMA = 6.0
BETA = 1.2

Words = Sequence[str]
Gram = tuple[str, ...]


@dataclass(frozen=True)
class _Weighted:
    """A caption's n-grams: per n, counts times idf, their norm; and its length in words."""

    weights: tuple[dict[Gram, float], ...]
    norms: tuple[float, ...]
    length: int


@over_corpus("cider-d", summary="captions: n-grams that people agree on", largest=10.0)
def cider_d(predictions: Sequence[str], references: Sequence[References]) -> list[float]:
    """Return the CIDEr-D of each caption, from 0 to 10; papers print 100 times it."""
    return cider_d_of_words(
        [caption_words(text) for text in predictions],
        [[caption_words(text) for text in accepted] for accepted in references],
    )


@over_corpus("cider-d-share", summary="CIDEr-D as a share of its best, to average with accuracies")
def cider_d_share(predictions: Sequence[str], references: Sequence[References]) -> list[float]:
    """Return the CIDEr-D of each caption over 10, from 0 to 1."""
    return [score / 10.0 for score in cider_d(predictions, references)]


def cider_d_of_words(
    predictions: Sequence[Words], references: Sequence[Sequence[Words]]
) -> list[float]:
    """Return the CIDEr-D of each caption that was cut into words already."""
    counted = [[_grams(words) for words in accepted] for accepted in references]
    documents = Counter(gram for accepted in counted for gram in set().union(*accepted))
    most = math.log(len(references))
    idf = {gram: most - math.log(count) for gram, count in documents.items()}
    scores = []
    for words, accepted in zip(predictions, counted, strict=True):
        caption = _weighted(_grams(words), idf, most)
        similar = [_similarity(caption, _weighted(one, idf, most)) for one in accepted]
        scores.append(10.0 * math.fsum(similar) / len(similar))
    return scores


@per_sample("rouge-l", summary="captions: longest common subsequence with the references")
def rouge_l(prediction: str, references: References) -> float:
    """Return the ROUGE-L of a caption."""
    return rouge_l_of_words(caption_words(prediction), [caption_words(one) for one in references])


def rouge_l_of_words(prediction: Words, references: Sequence[Words]) -> float:
    """Return the ROUGE-L of a caption that was cut into words already."""
    given = list(prediction) or [""]
    accepted = [list(words) or [""] for words in references]
    common = [_longest_common(given, words) for words in accepted]
    precision = max(common) / len(given)
    recall = max(shared / len(words) for shared, words in zip(common, accepted, strict=True))
    if not precision:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def _grams(words: Words) -> Counter[Gram]:
    spans = ((i, n) for n in range(1, LONGEST_GRAM + 1) for i in range(len(words) - n + 1))
    return Counter(tuple(words[i : i + n]) for i, n in spans)


def _weighted(counts: Counter[Gram], idf: dict[Gram, float], unknown: float) -> _Weighted:
    weights: tuple[dict[Gram, float], ...] = tuple({} for _ in range(LONGEST_GRAM))
    for gram, count in counts.items():
        weights[len(gram) - 1][gram] = count * idf.get(gram, unknown)
    return _Weighted(
        weights=weights,
        norms=tuple(math.sqrt(math.fsum(x * x for x in part.values())) for part in weights),
        length=sum(count for gram, count in counts.items() if len(gram) == 1),
    )


def _similarity(caption: _Weighted, reference: _Weighted) -> float:
    """Return the mean over n of the clipped cosines, with the penalty on length."""
    total = 0.0
    for n in range(LONGEST_GRAM):
        given, accepted = caption.weights[n], reference.weights[n]
        norm = caption.norms[n] * reference.norms[n]
        if norm:
            shared = given.keys() & accepted.keys()
            total += math.fsum(min(given[g], accepted[g]) * accepted[g] for g in shared) / norm
    longer = caption.length - reference.length
    return total / LONGEST_GRAM * math.exp(-(longer**2) / (2 * SIGMA**2))


def _longest_common(one: Words, other: Words) -> int:
    row = [0] * (len(other) + 1)
    for word in one:
        before = 0  # the row above, one column to the left
        for column, another in enumerate(other, start=1):
            above = row[column]
            row[column] = before + 1 if word == another else max(above, row[column - 1])
            before = above
    return row[-1]
