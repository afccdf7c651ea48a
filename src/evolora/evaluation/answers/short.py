"""Short answers compared word for word: exact match and SQuAD's token F1."""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter

from evolora.evaluation.answers.contract import References, per_sample

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def plain(text: str) -> str:
    """Return a text in lower case, with single spaces, trimmed, and in Unicode's composed form."""
    return " ".join(unicodedata.normalize("NFC", text).lower().split())


def squad_words(text: str) -> list[str]:
    """Return SQuAD's tokens: lower case, ASCII punctuation deleted, then the words a, an, the.

    Source: evaluate-v2.0.py of SQuAD, Rajpurkar et al., ACL 2018, arXiv 1806.03822.
    """
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


@per_sample("exact-match", summary="the same text but for case and white space")
def exact_match(prediction: str, references: References) -> float:
    """Return 1 if the answer is one of the references after `plain`, else 0.

    Punctuation, articles and accents count, as in the evaluation of OCR-VQA and KVQA by InternVL
    and D-MoLE, which lower-cases and trims; single spaces and composed letters are ours.
    """
    return float(plain(prediction) in map(plain, references))


@per_sample("token-f1", summary="SQuAD's F1 of the words shared with the best reference")
def token_f1(prediction: str, references: References) -> float:
    """Return the best F1 over references of the bags of `squad_words`.

    P and R are the shared words (with multiplicity) over the words of the answer and of the
    reference; F1 = 2 P R / (P + R). References without any word are left out unless there is no
    other; then only an answer without words is right. Both are SQuAD 2.0's rules.
    """
    given = squad_words(prediction)
    accepted = [squad_words(one) for one in references]
    return max(_f1(given, one) for one in [words for words in accepted if words] or [[]])


def _f1(given: list[str], accepted: list[str]) -> float:
    if not given or not accepted:
        return float(given == accepted)
    shared = (Counter(given) & Counter(accepted)).total()
    return 2 * shared / (len(given) + len(accepted))
