"""Pretrains the tiny CLIP that is embedded in the package, on CPU, in about an hour.

Five steps, each resumable, each writing into `--work`:

  prompts  embeds names x templates with MiniLM (the teacher) and trains a small BPE vocabulary
  text     a small text transformer learns to reproduce MiniLM's sentence embeddings
  image    a small ViT learns to match its picture to W z(name), z being MiniLM's embedding and W
           a linear map learnt along; the softmax runs over all names of the corpus, so names
           drawn twice in a batch are never negatives of each other, near synonyms neither
  text     again, with --align: matches only what W keeps of the teacher's embeddings
  export   writes a stock `transformers` CLIP folder with text_projection = W P (P from `text`)
           and prints its zero-shot accuracy on `mosaic/domains`

Corpus: `evolora.streams.mosaic.corpus`. Usage:

  python tools/pretrain_clip.py prompts --work W --corpus C --minilm M
  python tools/pretrain_clip.py text    --work W --minutes 10 --threads 1
  python tools/pretrain_clip.py image   --work W --corpus C --minutes 50 --ranks 2 --rank 1 &
  python tools/pretrain_clip.py image   --work W --corpus C --minutes 50 --ranks 2 --rank 0
  python tools/pretrain_clip.py text    --work W --minutes 3 --align main
  python tools/pretrain_clip.py export  --work W --out src/evolora/assets/clip-tiny
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
)

LOG = logging.getLogger("pretrain_clip")
POSITIONS = 32  # longest text, in tokens
TEMPLATES = {
    "emoji": ("{}", "an emoji of a {}", "a drawing of a {}", "a smiley: {}"),
    "icons": ("{}", "an icon of {}", "a black icon: {}", "a user interface symbol for {}"),
    "flags": ("{}", "the flag of {}", "a drawing of the flag of {}", "the national flag: {}"),
    "scripts": ("{}", "text in the {} script", "letters of the {} alphabet", "{} writing"),
}
GROUP_SHARE = {"emoji": 0.30, "icons": 0.34, "flags": 0.06, "scripts": 0.30}
FOCUS = 4.0  # how much more often names are drawn that some domain of the suite has as a class
SYNONYM = 0.85  # names whose embeddings are closer than this are not each other's negatives


# --- the model ---------------------------------------------------------------------------------


def clip_config(args: argparse.Namespace, vocabulary: int) -> CLIPConfig:
    """Returns the configuration; the end token is the vocabulary's last, never id 2."""
    ids = {
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": vocabulary - 1,
    }
    text = {
        "vocab_size": vocabulary,
        "hidden_size": args.text_width,
        "intermediate_size": 4 * args.text_width,
        "num_hidden_layers": args.text_layers,
        "num_attention_heads": args.text_width // 64,
        "max_position_embeddings": POSITIONS,
        "hidden_act": "gelu",
        "projection_dim": args.projection,
        **ids,
    }
    vision = {
        "hidden_size": args.width,
        "intermediate_size": 4 * args.width,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.width // 64,
        "image_size": 64,
        "patch_size": args.patch,
        "hidden_act": "gelu",
        "projection_dim": args.projection,
    }
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=args.projection, **ids)


# --- prompts -----------------------------------------------------------------------------------


def load_domains(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the manifest and the tensors of `mosaic/domains`."""
    manifest = json.loads((folder / "domains.json").read_text())
    return manifest, load_file(folder / "domains.safetensors")


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


def domain_prompts(folder: Path) -> list[list[list[str]]]:
    """Returns prompts [domain][class][template] of `mosaic/domains`."""
    manifest = json.loads((folder / "domains.json").read_text())
    return [
        [[template.format(name) for template in d["templates"]] for name in d["classes"]]
        for d in manifest["domains"]
    ]


@torch.no_grad()
def minilm_embed(folder: Path, sentences: list[str], batch: int = 128) -> np.ndarray:
    """Returns unit-length MiniLM embeddings [n, 384]."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    model.eval()
    out = np.zeros((len(sentences), 384), dtype=np.float32)
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
    """Embeds all prompts with MiniLM and trains the tokenizer."""
    corpus = corpus_prompts(args.corpus)
    domains = domain_prompts(args.domains)
    extra = json.loads(args.extra_names.read_text()) if args.extra_names else []
    rng = np.random.default_rng(0)
    general = [t for group in TEMPLATES.values() for t in group]
    sentences = [p for prompts in corpus for p in prompts]
    sentences += [p for classes in domains for prompts in classes for p in prompts]
    sentences += [name for name in extra]
    sentences += [general[rng.integers(len(general))].format(name) for name in extra]
    args.work.mkdir(parents=True, exist_ok=True)
    train_tokenizer(sentences, args.vocabulary, args.work / "tokenizer")
    vectors = minilm_embed(args.minilm, sentences)
    shapes = [len(corpus), len(corpus[0])]
    np.savez(args.work / ".prompts.npz", vectors=vectors.astype(np.float16), corpus=shapes)
    (args.work / "prompts.json").write_text(json.dumps(sentences))
    os.replace(args.work / ".prompts.npz", args.work / "prompts.npz")
    LOG.info("%d sentences", len(sentences))


# --- the training loop shared by both towers -----------------------------------------------------


class Loop:
    """Time-based cosine schedule with warm-up, atomic checkpoints and one log line per N steps."""

    def __init__(self, module: nn.Module, args: argparse.Namespace, path: Path) -> None:
        self.module, self.args, self.path = module, args, path
        decay = [p for p in module.parameters() if p.ndim >= 2]
        plain = [p for p in module.parameters() if p.ndim < 2]
        groups = [{"params": decay, "weight_decay": args.decay}, {"params": plain}]
        self.optimizer = torch.optim.AdamW(
            groups, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True
        )
        self.spent, self.step, self.loss = 0.0, 0, math.nan
        self.mark = time.monotonic()
        if path.is_file():
            saved = torch.load(path, weights_only=True)
            module.load_state_dict(saved["module"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.spent, self.step = saved["spent"], saved["step"]
            LOG.info("resumed %s at step %d, %.0f s", path, self.step, self.spent)

    def steps(self) -> Iterator[int]:
        """Yields step numbers until the planned minutes are spent."""
        planned, saved = self.args.minutes * 60, time.monotonic()
        self.mark = time.monotonic()
        while self.spent < planned:
            warm = min(1.0, (self.step + 1) / self.args.warmup)
            cosine = 0.5 * (1 + math.cos(math.pi * self.spent / planned))
            for group in self.optimizer.param_groups:
                group["lr"] = self.args.lr * warm * max(cosine, 0.01)
            yield self.step
            self.step += 1
            if self.args.rank > 0:
                continue
            if self.step % self.args.log_every == 0:
                rate = self.step * self.args.batch * self.args.ranks / self.spent
                LOG.info(
                    "step %d, %.0f s, loss %.3f, %.0f/s", self.step, self.spent, self.loss, rate
                )
            if time.monotonic() - saved > self.args.save_every:
                self.save()
                saved = time.monotonic()
        if self.args.rank == 0:
            self.save()

    def update(self, loss: Tensor) -> None:
        """Takes one optimizer step."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        now = time.monotonic()
        self.spent, self.mark = self.spent + now - self.mark, now
        if self.args.ranks > 1:
            self._average()
        nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        # exponential mean, for the log only
        value = float(loss.detach())
        self.loss = value if math.isnan(self.loss) else 0.98 * self.loss + 0.02 * value

    def _average(self) -> None:
        """Averages gradients, and the clock that ends the run, over the processes."""
        grads = [p.grad for p in self.module.parameters() if p.grad is not None]
        flat = torch.cat([*(g.flatten() for g in grads), torch.tensor([self.spent])])
        torch.distributed.all_reduce(flat)
        flat /= self.args.ranks
        self.spent = float(flat[-1])
        start = 0
        for grad in grads:
            grad.copy_(flat[start : start + grad.numel()].view_as(grad))
            start += grad.numel()

    def save(self) -> None:
        """Writes the checkpoint by temp + rename."""
        state = {
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "spent": self.spent,
            "step": self.step,
        }
        temporary = self.path.with_suffix(".tmp")
        torch.save(state, temporary)
        os.replace(temporary, self.path)


# --- text ----------------------------------------------------------------------------------------


class TextStudent(nn.Module):
    """CLIP's text tower with a linear head P into MiniLM's space."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.tower = CLIPModel(config).text_model
        self.head = nn.Linear(config.text_config.hidden_size, 384, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Returns sentence embeddings [b, 384], not normalized."""
        return self.head(self.tower(input_ids=ids).pooler_output)  # type: ignore[no-any-return]


def tokenized(folder: Path, sentences: list[str]) -> list[list[int]]:
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    ids = tokenizer(sentences, truncation=True, max_length=POSITIONS)["input_ids"]
    return [list(row) for row in ids]


def padded(rows: list[list[int]], pad: int) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [pad] * (longest - len(row)) for row in rows])


def similar_lengths(
    weights: Tensor, lengths: list[int], size: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """Yields batches of sentence indices; those of one batch are about equally long."""
    while True:
        pool = torch.multinomial(weights, 16 * size, replacement=True, generator=generator)
        pool = pool[torch.tensor([lengths[i] for i in pool.tolist()]).argsort()]
        for number in torch.randperm(16, generator=generator).tolist():
            yield pool[number * size : (number + 1) * size]


def stage_text(args: argparse.Namespace) -> None:
    """Distils MiniLM into the small text tower."""
    sentences = json.loads((args.work / "prompts.json").read_text())
    data = np.load(args.work / "prompts.npz")
    targets = torch.from_numpy(data["vectors"].astype(np.float32))
    ids = tokenized(args.work / "tokenizer", sentences)
    vocabulary = len(CLIPTokenizer.from_pretrained(args.work / "tokenizer"))
    names, templates = data["corpus"]
    # the corpus and the stream's prompts come more often than the additional names
    weights = torch.ones(len(ids))
    weights[: int(names) * int(templates) + 3000] = 5.0
    space = torch.eye(targets.shape[1])
    if args.align:  # only what the image tower's W keeps of the teacher counts
        weights[int(names) * int(templates) + 3000 :] = 0.0
        saved = torch.load(args.work / f"image-{args.align}.pt", weights_only=True)
        space = saved["module"]["text_map.weight"]
    student = TextStudent(clip_config(args, vocabulary))
    path = args.work / "text.pt"
    if args.align:
        student.load_state_dict(torch.load(path, weights_only=True)["module"])
        path = args.work / f"text-{args.align}.pt"
    loop = Loop(student, args, path)
    generator = torch.Generator().manual_seed(loop.step)
    batches = similar_lengths(weights, [len(row) for row in ids], args.batch, generator)
    for _, rows in zip(loop.steps(), batches, strict=False):
        batch = padded([ids[i] for i in rows.tolist()], vocabulary - 1)
        wanted = targets[rows]
        got = loop.module(batch) @ space.T
        loop.update(text_loss(F.normalize(got, dim=-1), F.normalize(wanted @ space.T, dim=-1)))


def text_loss(got: Tensor, wanted: Tensor) -> Tensor:
    """Returns how far unit-length student embeddings are from the teacher's.

    Sum of the distance itself, of the error in pairwise cosines, and of a softmax that asks which
    of the batch's sentences it was; near duplicates are no wrong answers there.
    """
    cosines = wanted @ wanted.T
    distance = (1 - (got * wanted).sum(-1)).mean()
    pairs = (got @ got.T - cosines).square().mean()
    same = (cosines > 0.97) & ~torch.eye(len(got), dtype=torch.bool)
    logits = (got @ wanted.T / 0.05).masked_fill(same, -1e4)
    return distance + 5 * pairs + 0.5 * F.cross_entropy(logits, torch.arange(len(got)))


# --- image ---------------------------------------------------------------------------------------


class ImageStudent(nn.Module):
    """CLIP's image tower with both projections: V for pictures, W for MiniLM's embeddings."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        # with 17 tokens plain attention in bf16 trains 1.6 times faster on CPU than "sdpa"
        full = CLIPModel._from_config(config, attn_implementation="eager")
        self.tower, self.projection = full.vision_model, full.visual_projection
        self.text_map = nn.Linear(384, config.projection_dim, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(20.0)))

    def images(self, pixels: Tensor) -> Tensor:
        """Returns unit-length picture embeddings [b, p]."""
        pooled = self.tower(pixel_values=pixels).pooler_output
        return F.normalize(self.projection(pooled).float(), dim=-1)

    def texts(self, embeddings: Tensor) -> Tensor:
        """Returns unit-length name embeddings [n, p] for MiniLM embeddings [n, 384]."""
        return F.normalize(self.text_map(embeddings), dim=-1)


def augment(pictures: Tensor, grey: Tensor, generator: torch.Generator) -> Tensor:
    """Returns normalized float pictures [b, 3, 64, 64], recolored, moved, scaled and turned.

    Args:
        pictures: uint8 [b, 64, 64, 3] on white.
        grey: bool [b], the near-grey drawings, whose ink and paper may be recolored.
        generator: source of randomness.
    """

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    b = len(pictures)
    x = pictures.permute(0, 3, 1, 2).float() / 255
    paper = torch.ones(b, 3, 1, 1)
    chosen = (grey & (rand(b) < 0.6)).nonzero()[:, 0]
    if len(chosen):
        n = len(chosen)
        dark = rand(n, 3, 1, 1) * 0.45
        light = 0.75 + 0.25 * rand(n, 3, 1, 1)
        inverted = (rand(n, 1, 1, 1) < 0.4).float()
        ink = dark * (1 - inverted) + light * inverted
        sheet = light * (1 - inverted) + dark * inverted
        level = x[chosen].mean(1, keepdim=True)
        x[chosen] = ink + (sheet - ink) * level
        paper[chosen] = sheet
    tinted = (~grey & (rand(b) < 0.5)).nonzero()[:, 0]
    if len(tinted):  # colored drawings on tinted paper: chat bubbles, skies, studio walls
        tint = 0.6 + 0.4 * rand(len(tinted), 3, 1, 1)
        white = (x[tinted].amin(1, keepdim=True) > 0.97).float()
        x[tinted] = x[tinted] * (1 - white) + tint * white
        paper[tinted] = tint
    angle, size = (rand(b) - 0.5) * 0.5, 0.7 + 0.45 * rand(b)
    cos, sin = angle.cos() / size, angle.sin() / size
    shift = (rand(b, 2) - 0.5) * 0.24
    stretch = 1 + (rand(b) - 0.5) * 0.2
    theta = torch.stack([cos * stretch, -sin, shift[:, 0], sin, cos / stretch, shift[:, 1]], 1)
    grid = F.affine_grid(theta.view(b, 2, 3), [b, 3, 64, 64], align_corners=False)
    x = F.grid_sample(x - paper, grid, align_corners=False) + paper
    if float(rand(1)) < 0.15:
        x = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2.0)
    contrast, brightness = 0.75 + 0.5 * rand(b, 1, 1, 1), (rand(b, 1, 1, 1) - 0.5) * 0.25
    x = ((x - 0.5) * contrast + 0.5 + brightness).clamp(0, 1)
    return (x - 0.5) / 0.5


class Corpus:
    """Pictures, names, balanced sampling weights and the teacher's embeddings of the names."""

    def __init__(self, corpus: Path, work: Path, domains: Path) -> None:
        self.images = np.load(corpus / "images.npy", mmap_mode="r")
        labels = np.load(corpus / "labels.npz")
        head = json.loads((corpus / "corpus.json").read_text())
        self.names = torch.from_numpy(labels["name"].astype(np.int64))
        groups = torch.from_numpy(labels["group"].astype(np.int64))
        per_name = torch.bincount(self.names)[self.names].double()
        manifest = json.loads((domains / "domains.json").read_text())
        classes = {name for domain in manifest["domains"] for name in domain["classes"]}
        focus = torch.tensor([FOCUS if name in classes else 1.0 for name in head["names"]])
        weights = per_name.rsqrt() * focus[self.names]
        for number, group in enumerate(head["groups"]):
            weights[groups == number] *= GROUP_SHARE[group] / weights[groups == number].sum()
        self.weights = weights
        self.grey = torch.zeros(len(self.names), dtype=torch.bool)
        for start in range(0, len(self.images), 4096):
            block = self.images[start : start + 4096, ::4, ::4].astype(np.int16)
            spread = (block.max(-1) - block.min(-1)).mean((1, 2))
            self.grey[start : start + 4096] = torch.from_numpy(spread < 2)
        data = np.load(work / "prompts.npz")
        names, templates = (int(n) for n in data["corpus"])
        vectors = torch.from_numpy(data["vectors"][: names * templates].astype(np.float32))
        self.embeddings = vectors.view(names, templates, -1)
        bare = self.embeddings[:, 0]
        self.synonyms = (bare @ bare.T) > SYNONYM
        self.synonyms.fill_diagonal_(False)

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Returns pictures uint8 [b, 64, 64, 3], grey [b] and name indices [b]."""
        rows = torch.multinomial(self.weights, size, replacement=True, generator=generator)
        rows = rows.sort().values  # the file is read in order
        return torch.from_numpy(self.images[rows.numpy()]), self.grey[rows], self.names[rows]


def image_loss(
    model: ImageStudent, corpus: Corpus, args: argparse.Namespace, generator: torch.Generator
) -> Tensor:
    """Returns the softmax loss of pictures over all names, plus names over the batch's pictures."""
    pictures, grey, names = corpus.batch(args.batch, generator)
    with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
        seen = model.images(augment(pictures, grey, generator))
    count, templates = corpus.embeddings.shape[:2]
    prompt = torch.randint(templates, (count,), generator=generator)
    texts = model.texts(corpus.embeddings[torch.arange(count), prompt])
    scale = model.log_scale.exp().clamp(max=100)
    logits = scale * seen @ texts.T
    logits = logits.masked_fill(corpus.synonyms[names], -1e4)
    to_names = F.cross_entropy(logits, names, label_smoothing=0.0)
    present, index = names.unique(return_inverse=True)
    backward = logits[:, present].T
    same = F.one_hot(index, len(present)).T.float()
    to_pictures = -(same / same.sum(1, keepdim=True) * backward.log_softmax(1)).sum(1).mean()
    return to_names + 0.25 * to_pictures


def stage_image(args: argparse.Namespace) -> None:
    """Trains the image tower and W."""
    corpus = Corpus(args.corpus, args.work, args.domains)
    vocabulary = len(CLIPTokenizer.from_pretrained(args.work / "tokenizer"))
    torch.manual_seed(args.seed)
    model = ImageStudent(clip_config(args, vocabulary))
    loop = Loop(model, args, args.work / f"image-{args.name}.pt")
    generator = torch.Generator().manual_seed(args.seed + loop.step + 1_000_000 * args.rank)
    due = loop.spent + args.eval_every
    for _ in loop.steps():
        loop.update(image_loss(model, corpus, args, generator))
        if loop.spent > due:
            due += args.eval_every
            if args.rank == 0:
                report_teacher(model, args, "val")
    if args.rank > 0:
        return
    LOG.info("scale %.1f", float(model.log_scale.detach().exp()))
    report_teacher(model, args, "val")
    report_teacher(model, args, "test")


# --- zero-shot -----------------------------------------------------------------------------------


def stream_pictures(tensors: dict[str, Any], domain: int, split: int) -> tuple[Tensor, Tensor]:
    """Returns normalized pictures [n, 3, 64, 64] and labels [n] of one domain and split."""
    rows = np.flatnonzero((tensors["domain"] == domain) & (tensors["split"] == split))
    offsets, pictures = tensors["offsets"], []
    for row in rows:
        file = tensors["bytes"][offsets[row] : offsets[row + 1]].tobytes()
        pictures.append(np.asarray(Image.open(io.BytesIO(file)).convert("RGB")))
    x = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    return (x - 0.5) / 0.5, torch.from_numpy(tensors["label"][rows].astype(np.int64))


def top_k(images: Tensor, texts: Tensor, labels: Tensor) -> tuple[float, float]:
    """Returns top-1 and top-5 accuracy in percent."""
    ranked = (images @ texts.T).topk(min(5, len(texts)), dim=1).indices
    hits = ranked == labels[:, None]
    return 100 * float(hits[:, 0].float().mean()), 100 * float(hits.any(1).float().mean())


@torch.no_grad()
def report_teacher(model: ImageStudent, args: argparse.Namespace, split: str) -> None:
    """Logs zero-shot accuracy with the teacher's own embeddings of the class prompts."""
    model.eval()
    manifest, tensors = load_domains(args.domains)
    data = np.load(args.work / "prompts.npz")
    start = int(data["corpus"].prod())
    for number, domain in enumerate(manifest["domains"]):
        count = len(domain["classes"]) * len(domain["templates"])
        vectors = torch.from_numpy(data["vectors"][start : start + count].astype(np.float32))
        start += count
        texts = model.texts(vectors.view(len(domain["classes"]), -1, 384)).mean(1)
        x, labels = stream_pictures(tensors, number, ("train", "val", "test").index(split))
        seen = torch.cat([model.images(part) for part in x.split(256)])
        one, five = top_k(seen, F.normalize(texts, dim=-1), labels)
        chance = 100 / len(domain["classes"])
        LOG.info(
            "teacher %s %-9s top-1 %5.1f top-5 %5.1f chance %.1f",
            split,
            domain["name"],
            one,
            five,
            chance,
        )
    model.train()


@torch.no_grad()
def zero_shot(folder: Path, domains: Path, split: str) -> list[dict[str, Any]]:
    """Returns top-1 and top-5 of the exported folder per domain, prompts averaged per class."""
    model = CLIPModel.from_pretrained(folder).eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    manifest, tensors = load_domains(domains)
    rows = []
    for number, domain in enumerate(manifest["domains"]):
        prompts = [t.format(name) for name in domain["classes"] for t in domain["templates"]]
        inputs = tokenizer(prompts, padding=True, truncation=True, return_tensors="pt")
        texts = model.get_text_features(**inputs).pooler_output
        texts = F.normalize(texts, dim=-1).view(
            len(domain["classes"]), len(domain["templates"]), -1
        )
        x, labels = stream_pictures(tensors, number, ("train", "val", "test").index(split))
        seen = [model.get_image_features(pixel_values=p).pooler_output for p in x.split(256)]
        one, five = top_k(
            F.normalize(torch.cat(seen), dim=-1), F.normalize(texts.mean(1), dim=-1), labels
        )
        rows.append(
            {
                "domain": domain["name"],
                "classes": len(domain["classes"]),
                "images": len(labels),
                "top1": round(one, 1),
                "top5": round(five, 1),
                "chance": round(100 / len(domain["classes"]), 2),
            }
        )
    return rows


# --- export --------------------------------------------------------------------------------------


def compose(args: argparse.Namespace) -> CLIPModel:
    """Returns a stock CLIP model made of both students; text_projection = W P."""
    vocabulary = len(CLIPTokenizer.from_pretrained(args.work / "tokenizer"))
    config = clip_config(args, vocabulary)
    text, image = TextStudent(config), ImageStudent(config)
    aligned = args.work / f"text-{args.name}.pt"
    path = aligned if aligned.is_file() else args.work / "text.pt"
    text.load_state_dict(torch.load(path, weights_only=True)["module"])
    saved = torch.load(args.work / f"image-{args.name}.pt", weights_only=True)
    image.load_state_dict(saved["module"])
    model = CLIPModel(config)
    model.text_model.load_state_dict(text.tower.state_dict())
    model.vision_model.load_state_dict(image.tower.state_dict())
    with torch.no_grad():
        model.visual_projection.weight.copy_(image.projection.weight)
        model.text_projection.weight.copy_(image.text_map.weight @ text.head.weight)
        model.logit_scale.copy_(image.log_scale)
    return model


def stage_export(args: argparse.Namespace) -> None:
    """Writes the folder in half precision by temp + rename and prints its zero-shot accuracy."""
    model = compose(args).half()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".clip-", dir=args.out.parent))
    model.save_pretrained(staging)
    CLIPTokenizer.from_pretrained(args.work / "tokenizer").save_pretrained(staging)
    processor = CLIPImageProcessor(
        size={"height": 64, "width": 64},
        crop_size={"height": 64, "width": 64},
        do_center_crop=False,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    processor.save_pretrained(staging)
    config = json.loads((staging / "config.json").read_text())
    config["dtype"] = "float32"  # stored in half precision, but CPUs compute faster in single
    (staging / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    rows = zero_shot(staging, args.domains, "test")
    args.out.mkdir(exist_ok=True)
    for file in sorted(staging.iterdir()):
        file.chmod(0o644)
        os.replace(file, args.out / file.name)
    shutil.rmtree(staging)
    LOG.info("%.2f M parameters", sum(p.numel() for p in model.parameters()) / 1e6)
    for row in rows:
        LOG.info("%s", row)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("stage", choices=("prompts", "text", "image", "export"))
    parser.add_argument("--work", type=Path, required=True, help="checkpoints and caches")
    parser.add_argument("--corpus", type=Path, help="folder of build_pretraining_corpus")
    parser.add_argument("--domains", type=Path, default=Path("src/evolora/assets/mosaic"))
    parser.add_argument("--minilm", type=Path, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--extra-names", type=Path, help="JSON list of further names for the text")
    parser.add_argument("--out", type=Path, default=Path("src/evolora/assets/clip-tiny"))
    parser.add_argument("--name", default="main", help="name of the image checkpoint")
    parser.add_argument("--align", help="text: name of the image checkpoint whose W to match in")
    parser.add_argument("--vocabulary", type=int, default=4000)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--patch", type=int, default=16)
    parser.add_argument("--text-width", type=int, default=192)
    parser.add_argument("--text-layers", type=int, default=3)
    parser.add_argument("--projection", type=int, default=192)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--decay", type=float, default=0.1)
    parser.add_argument("--warmup", type=int, default=100, help="steps")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ranks", type=int, default=1, help="processes that share the work")
    parser.add_argument("--rank", type=int, default=0, help="this process's number")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--log-every", type=int, default=50, help="steps")
    parser.add_argument("--save-every", type=float, default=60.0, help="seconds")
    parser.add_argument("--eval-every", type=float, default=300.0, help="seconds")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(args.threads)
    if args.ranks > 1:
        store = f"file://{args.work.resolve()}/rendezvous-{args.name}"
        torch.distributed.init_process_group("gloo", store, rank=args.rank, world_size=args.ranks)
    stages = {"prompts": stage_prompts, "text": stage_text, "image": stage_image}
    stages.get(args.stage, stage_export)(args)


if __name__ == "__main__":
    main()
