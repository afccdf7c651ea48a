"""The vocabulary: the part of MiniLM's that is needed, and its embeddings in fewer dimensions."""

from __future__ import annotations

import argparse
import logging
import string
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer, BertTokenizer

from clip_pretraining.prompts import load_prompts
from evolora.errors import DataError
from evolora.storage.files import read_tensors, write_tensors

LOG = logging.getLogger("pretrain_vilt")
POSITIONS = 40  # longest text, in tokens, as in ViLT
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CLS, SEP = SPECIAL.index("[CLS]"), SPECIAL.index("[SEP]")  # their ids
START = "start.safetensors"


def chosen_tokens(vocabulary: dict[str, int], used: Counter[str], size: int) -> list[str]:
    """Returns the tokens to keep, in MiniLM's order behind the special ones.

    Special ones, characters (so that nothing is unknown), those of the sentences by frequency, then
    MiniLM's most frequent whole words.
    """
    letters = string.ascii_lowercase + string.digits + string.punctuation
    characters = [c for letter in letters for c in (letter, f"##{letter}") if c in vocabulary]
    whole = (t for t in vocabulary if t.isascii() and t.isalpha() and len(t) > 1)
    order = [
        *characters,
        *(token for token, _ in used.most_common()),
        *sorted(whole, key=vocabulary.__getitem__),
    ]
    kept = [token for token in dict.fromkeys(order) if token not in SPECIAL]
    kept = kept[: size - len(SPECIAL)]
    return [*SPECIAL, *sorted(kept, key=vocabulary.__getitem__)]


def projected(tables: dict[str, Tensor], width: int) -> dict[str, Tensor]:
    """Returns embedding tables in the ``width`` directions in which the words differ most."""
    words = tables["words"].double()
    _, _, directions = torch.linalg.svd(words - words.mean(0), full_matrices=False)
    basis = directions[:width].T
    return {name: (table.double() @ basis).float() for name, table in tables.items()}


def stage_words(args: argparse.Namespace) -> None:
    """Writes the tokenizer and what the text embeddings start from."""
    sentences = load_prompts(args.work, args.domains).sentences
    tokenizer = AutoTokenizer.from_pretrained(args.minilm)
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    used: Counter[str] = Counter()
    for sentence in sentences:
        used.update(tokenizer.tokenize(sentence))
    tokens = chosen_tokens(vocabulary, used, args.vocabulary)
    embeddings = AutoModel.from_pretrained(args.minilm).embeddings
    rows = torch.tensor([vocabulary[token] for token in tokens])
    with torch.no_grad():
        tables = projected(
            {
                "words": embeddings.word_embeddings.weight[rows],
                "positions": embeddings.position_embeddings.weight[:POSITIONS],
                "kinds": embeddings.token_type_embeddings.weight,
            },
            AutoConfig.from_pretrained(args.clip).vision_config.hidden_size,
        )
    kept = BertTokenizer(
        vocab={token: row for row, token in enumerate(tokens)}, model_max_length=POSITIONS
    )
    kept.save_pretrained(args.work / "words")
    write_tensors(args.work / START, tables, {"format": "pt"})
    share = sum(used[token] for token in tokens) / max(sum(used.values()), 1)
    LOG.info("%d tokens, %.2f %% of those in the sentences", len(tokens), 100 * share)


def load_words(work: Path) -> tuple[BertTokenizer, dict[str, Tensor]]:
    """Returns what `stage_words` wrote.

    Raises:
        DataError: it has not run.
    """
    if not (work / START).is_file():
        raise DataError(f"{work / START} is missing: run the stage 'words' first")
    return BertTokenizer.from_pretrained(work / "words"), read_tensors(work / START)


def tokenized(tokenizer: BertTokenizer, sentences: Sequence[str]) -> Tensor:
    """Returns token ids [n, 40], padded."""
    return tokenizer(
        list(sentences),
        padding="max_length",
        truncation=True,
        max_length=POSITIONS,
        return_tensors="pt",
    )["input_ids"]
