"""The tokenizer that Q-Former and language model share: llava's recipe, with its own end of a text.

A text is encoded as "<s> text <answer>", an answer without special tokens and "</s>" behind it.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from pathlib import Path
from random import Random

from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from clip_pretraining.corpus import Corpus
from clip_pretraining.prompts import load_prompts
from evolora.errors import DataError
from evolora.randomness import derive_seed
from evolora.storage.files import read_json, write_json
from llava_pretraining.scenes import draw_scene
from llava_pretraining.subjects import Subjects
from llava_pretraining.words import (
    ANSWER,
    BEGIN,
    END,
    IMAGE,
    PAD,
    SPECIAL,
    common_words,
    learnt_tokenizer,
)
from qformer_pretraining.asking import about_fact, about_picture, about_text
from qformer_pretraining.start import POSITIONS

WORDS, COMMON_FILE = "qformer-words", "common.json"
LOG = logging.getLogger("pretrain_qformer")
SAMPLES = 20_000  # subjects whose questions the vocabulary is learnt from
COMMON = 3_000  # of MiniLM's whole words


def framed(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Returns the tokenizer with "<s>" before each text and "<answer>" behind it.

    It has no `image_token` of its own: InstructBLIP's processor brings one.
    """
    first, last = SPECIAL[BEGIN], SPECIAL[ANSWER]
    backend = tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing(
        single=f"{first} $A {last}", special_tokens=[(first, BEGIN), (last, ANSWER)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
        pad_token=SPECIAL[PAD],
        bos_token=first,
        eos_token=SPECIAL[END],
        additional_special_tokens=[SPECIAL[IMAGE], last],
    )


def _texts(subjects: Subjects, seed: int) -> Iterator[str]:
    draw = Random(derive_seed(seed, "qformer-words"))
    for _ in range(SAMPLES):
        thing, scene = subjects.any_thing(draw), draw_scene(draw)
        asked = [*about_picture(thing, 2, draw), *about_picture(scene, 2, draw)]
        for one in (*asked, about_fact(draw), about_text(subjects, draw)):
            yield from (one.question, one.answer, *([one.told] if one.told else []))
    yield from subjects.common


def stage_words(args: argparse.Namespace) -> None:
    """Writes the tokenizer."""
    prompts = load_prompts(args.work, args.domains, args.corpus)
    common = common_words(AutoTokenizer.from_pretrained(args.minilm).get_vocab())[:COMMON]
    subjects = Subjects(Corpus(args.corpus, prompts), prompts, common)
    tokenizer = framed(learnt_tokenizer(_texts(subjects, args.seed), args.vocabulary))
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
