"""The tokenizer: byte-level BPE learnt on what the model is asked and answers, and its template."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from pathlib import Path
from random import Random

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from clip_pretraining.corpus import Corpus
from clip_pretraining.prompts import load_prompts
from evolora.errors import DataError
from evolora.randomness import derive_seed
from evolora.storage.files import read_json, write_json
from llava_pretraining.asking import turns
from llava_pretraining.scenes import draw_scene
from llava_pretraining.subjects import Subjects

WORDS, COMMON_FILE = "llava-words", "common.json"
LOG = logging.getLogger("pretrain_llava")
SPECIAL = ("<pad>", "<s>", "</s>", "<image>", "<answer>")
PAD, BEGIN, END, IMAGE, ANSWER = range(len(SPECIAL))  # their ids
POSITIONS = 256  # longest dialogue, in tokens
SAMPLES = 40_000  # subjects whose turns the vocabulary is learnt from
COMMON = 6_000  # of MiniLM's whole words, each said so often:
TIMES = 3
PIECES = r" ?\d| ?\p{L}+| ?[^\s\p{L}\d]+|\s+(?!\S)|\s+"
"""What BPE works in: words, single digits, signs, each with the blank before it."""
TEMPLATE = (
    "<s>{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{% for c in m['content'] %}{{ c['text'] }}{% endfor %}</s>"
    "{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}<answer>"
    "{% endif %}{% endfor %}"
)
"""A user's turn ends in "<answer>", an assistant's in "</s>"."""


def common_words(vocabulary: dict[str, int]) -> list[str]:
    """Returns the most frequent whole words of MiniLM's vocabulary."""
    words = (word for word in vocabulary if word.isascii() and word.isalpha() and len(word) > 1)
    return sorted(words, key=vocabulary.__getitem__)[:COMMON]


def learnt_tokenizer(texts: Iterator[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Returns a tokenizer that can write any text; digits stand alone."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Prepend(" "), normalizers.Replace(Regex("^ +"), " ")]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
        pad_token=SPECIAL[PAD],
        bos_token=SPECIAL[BEGIN],
        eos_token=SPECIAL[END],
        additional_special_tokens=[SPECIAL[IMAGE], SPECIAL[ANSWER]],
        extra_special_tokens={"image_token": SPECIAL[IMAGE]},
    )


def _texts(subjects: Subjects, seed: int) -> Iterator[str]:
    draw = Random(derive_seed(seed, "llava-words"))
    for _ in range(SAMPLES):
        for about in (subjects.any_thing(draw), draw_scene(draw), subjects.words(draw)):
            for turn in turns(about, 2, draw):
                yield from turn
    for word in subjects.common:
        yield from [word] * TIMES


def stage_words(args: argparse.Namespace) -> None:
    """Writes the tokenizer."""
    prompts = load_prompts(args.work, args.domains, args.corpus)
    common = common_words(AutoTokenizer.from_pretrained(args.minilm).get_vocab())
    subjects = Subjects(Corpus(args.corpus, prompts), prompts, common)
    tokenizer = learnt_tokenizer(_texts(subjects, args.seed), args.vocabulary)
    tokenizer.save_pretrained(args.work / WORDS)
    write_json(args.work / WORDS / COMMON_FILE, {"format_version": 1, "words": common})
    LOG.info("%d tokens", len(tokenizer))


def load_words(work: Path) -> tuple[PreTrainedTokenizerFast, list[str]]:
    """Returns the tokenizer and the common words that `stage_words` wrote.

    Raises:
        DataError: it has not run.
    """
    folder = work / WORDS
    if not (folder / COMMON_FILE).is_file():
        raise DataError(f"{folder} is missing: run the stage 'words' first")
    common = read_json(folder / COMMON_FILE, kind="list of words")["words"]
    return PreTrainedTokenizerFast.from_pretrained(folder), common
