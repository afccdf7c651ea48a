"""Sentences that name pictures, MiniLM's embeddings of them, and the tokenizer learnt from them."""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, CLIPTokenizer

from clip_pretraining.config import POSITIONS, TEACHER_WIDTH
from evolora.errors import DataError
from evolora.streams.mosaic.domains import load as load_domains
from evolora.streams.task import LabelSpace

LOG = logging.getLogger("pretrain_clip")
TEMPLATES = {
    "emoji": ("{}", "an emoji of a {}", "a drawing of a {}", "a smiley: {}"),
    "icons": ("{}", "an icon of {}", "a black icon: {}", "a user interface symbol for {}"),
    "flags": ("{}", "the flag of {}", "a drawing of the flag of {}", "the national flag: {}"),
    "scripts": ("{}", "text in the {} script", "letters of the {} alphabet", "{} writing"),
}


@dataclass(frozen=True)
class Prompts:
    """The sentences of a run and the teacher's embeddings of them.

    Args:
        sentences: the corpus's by name and template, the suite's by domain, class and template,
            then further ones for the text tower only.
        vectors: half precision [sentences, 384], unit length.
        names: number of names of the corpus.
        templates: prompts per name.
        suite: label space of each domain of the suite.
    """

    sentences: list[str]
    vectors: Tensor
    names: int
    templates: int
    suite: tuple[LabelSpace, ...]

    @property
    def named(self) -> int:
        """How many sentences are the corpus's or the suite's; they come first."""
        return self._corpus_size + sum(map(_prompt_count, self.suite))

    @property
    def _corpus_size(self) -> int:
        return self.names * self.templates

    def of_corpus(self) -> Tensor:
        """Returns embeddings [names, templates, 384]."""
        vectors = self.vectors[: self._corpus_size].float()
        return vectors.view(self.names, self.templates, -1)

    def of_suite(self) -> list[Tensor]:
        """Returns embeddings [classes, templates, 384] of each domain."""
        counts = [_prompt_count(labels) for labels in self.suite]
        parts = self.vectors[self._corpus_size : self.named].float().split(counts)
        return [
            part.view(len(labels.classes), len(labels.templates), -1)
            for part, labels in zip(parts, self.suite, strict=True)
        ]


def _prompt_count(labels: LabelSpace) -> int:
    return len(labels.classes) * len(labels.templates)


def label_spaces(domains: Path) -> tuple[LabelSpace, ...]:
    """Returns the classes and templates of each domain of the suite."""
    return tuple(task.labels for task in load_domains(root=domains))


def suite_prompts(suite: Sequence[LabelSpace]) -> list[str]:
    return [
        template.format(name)
        for labels in suite
        for name in labels.classes
        for template in labels.templates
    ]


def corpus_prompts(corpus: Path) -> list[list[str]]:
    """Returns four prompts per corpus name, in the templates of the name's most frequent group."""
    head = json.loads((corpus / "corpus.json").read_text())
    labels = np.load(corpus / "labels.npz")
    counts = np.zeros((len(head["names"]), len(head["groups"])), dtype=np.int64)
    np.add.at(counts, (labels["name"], labels["group"]), 1)
    # emoji decide where a name is both emoji and icon: the icons' prompts differ less
    counts[:, head["groups"].index("emoji")] *= 20
    groups = [head["groups"][g] for g in counts.argmax(axis=1)]
    return [
        [template.format(name) for template in TEMPLATES[group]]
        for name, group in zip(head["names"], groups, strict=True)
    ]


def load_prompts(work: Path, domains: Path, corpus: Path | None = None) -> Prompts:
    """Returns what `stage_prompts` wrote, once it is known to be of this suite and corpus.

    Raises:
        DataError: a file is missing or is not the other's, or prompts have changed since.
    """
    try:
        sentences = json.loads((work / "prompts.json").read_text())
        with np.load(work / "prompts.npz") as saved:
            vectors = torch.from_numpy(saved["vectors"])
            names, templates = (int(count) for count in saved["corpus"])
    except FileNotFoundError as error:
        raise DataError(f"{error.filename} is missing: run the stage 'prompts' first") from None
    if len(sentences) != len(vectors):
        raise DataError(
            f"{work}: prompts.json has {len(sentences)} sentences, prompts.npz {len(vectors)} "
            "embeddings: run the stage 'prompts' again, with --refresh to keep the tokenizer"
        )
    prompts = Prompts(sentences, vectors, names, templates, label_spaces(domains))
    start = names * templates
    if corpus is not None:
        _check(sentences[:start], [p for name in corpus_prompts(corpus) for p in name], corpus)
    _check(sentences[start : prompts.named], suite_prompts(prompts.suite), domains)
    return prompts


def _check(embedded: list[str], wanted: list[str], origin: Path) -> None:
    stale = [pair for pair in zip_longest(wanted, embedded) if pair[0] != pair[1]]
    if not stale:
        return
    now, then = stale[0]
    raise DataError(
        f"{len(stale)} of the {len(wanted)} prompts of {origin} are not those that were embedded "
        f"(the first is {now!r}, embedded was {then!r}): run the stage 'prompts' again, with "
        "--refresh to keep the tokenizer"
    )


@torch.no_grad()
def minilm_embed(folder: Path, sentences: list[str], batch: int = 128) -> NDArray[np.float32]:
    """Returns unit-length MiniLM embeddings [n, 384]."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    model.eval()
    out = np.zeros((len(sentences), TEACHER_WIDTH), dtype=np.float32)
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
    for start in range(0, len(order), batch):
        ids = order[start : start + batch]
        inputs = tokenizer([sentences[i] for i in ids], padding=True, return_tensors="pt")
        hidden = model(**inputs).last_hidden_state
        mask = inputs["attention_mask"][:, :, None].float()
        out[ids] = F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1).numpy()
        if start // batch % 50 == 0:
            LOG.info("embedded %d of %d sentences", start, len(order))
    return out


def train_tokenizer(sentences: list[str], vocabulary: int, out: Path) -> None:
    """Writes a CLIP tokenizer with its own byte-level BPE vocabulary."""
    backend = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    blank = CLIPTokenizer()
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    backend.pre_tokenizer = blank.backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - 2 - 256,
        end_of_word_suffix="</w>",
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(sentences, trainer)
    learnt = json.loads(backend.to_str())["model"]
    tokens = sorted(learnt["vocab"], key=learnt["vocab"].__getitem__)
    # every byte also as a word's last letter, so that no text is unknown
    tokens += [f"{b}</w>" for b in sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    merges = [tuple(pair) for pair in learnt["merges"]]
    tokenizer = CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=merges,
        model_max_length=POSITIONS,
    )
    tokenizer.save_pretrained(out)


def stage_prompts(args: argparse.Namespace) -> None:
    """Embeds all prompts with MiniLM and trains the tokenizer; or embeds only what has changed."""
    corpus = corpus_prompts(args.corpus)
    extra = json.loads(args.extra_names.read_text()) if args.extra_names else []
    rng = np.random.default_rng(0)
    general = [t for group in TEMPLATES.values() for t in group]
    sentences = [p for prompts in corpus for p in prompts]
    sentences += suite_prompts(label_spaces(args.domains))
    sentences += [name for name in extra]
    sentences += [general[rng.integers(len(general))].format(name) for name in extra]
    args.work.mkdir(parents=True, exist_ok=True)
    known: dict[str, NDArray[np.float16]] = {}
    if args.refresh:
        old = json.loads((args.work / "prompts.json").read_text())
        with np.load(args.work / "prompts.npz") as saved:
            known = dict(zip(old, saved["vectors"], strict=True))
    else:
        train_tokenizer(sentences, args.vocabulary, args.work / "tokenizer")
    new = [sentence for sentence in dict.fromkeys(sentences) if sentence not in known]
    known.update(zip(new, minilm_embed(args.minilm, new).astype(np.float16), strict=True))
    vectors = np.stack([known[sentence] for sentence in sentences])
    np.savez(args.work / ".prompts.npz", vectors=vectors, corpus=[len(corpus), len(corpus[0])])
    (args.work / ".prompts.json").write_text(json.dumps(sentences))
    os.replace(args.work / ".prompts.json", args.work / "prompts.json")
    os.replace(args.work / ".prompts.npz", args.work / "prompts.npz")
    LOG.info("%d sentences, %d newly embedded", len(sentences), len(new))
