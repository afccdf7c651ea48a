"""The published benchmarks of continual instruction tuning: tasks, order, files, metrics.

- CMIT: nine sets of D-MoLE (Ge et al., ICML 2025, arXiv 2506.11672), files as its released code
  (gcd19/D-MoLE) names them.
- CoIN: eight tasks (Chen et al., NeurIPS 2024, arXiv 2403.08350), the instructions published as
  Zacks-Chen/CoIN.
- UCIT: six tasks (HiDe-LLaVA, Guo et al., ACL 2025, arXiv 2503.12941), also in MCITlib
  (arXiv 2508.07307), the instructions published as HaiyangGuo/UCIT.

Metrics are the published ones but for: ImageNet of CoIN, where the released code takes an answer as
right that is part of the class's name or holds it (an empty one, too), is judged by exact match;
captions of UCIT, published as the mean of BLEU-1 to 4, METEOR, ROUGE-L and CIDEr, by CIDEr-D alone.
The released code makes captions of CMIT at least 8 tokens long; here they may be shorter.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from evolora.streams.instruction_files import TestKind
from evolora.streams.task import MAX_NEW_TOKENS

CAPTION = "Provide a one-sentence caption for the provided image."
SHORT = "Answer the question using a single word or phrase."
UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."
OPTION = "Answer with the option's letter from the given choices directly."
GROUNDING = (
    "Based on the knowledge {knowledge}.\nPlease provide the bounding box coordinate of the region "
    "this sentence describes: <ref>{phrase}</ref>"
)


@dataclass(frozen=True, kw_only=True)
class PublishedTask:
    """One task of a benchmark.

    Args:
        name: of the task.
        folder: its folder's names, the published one first; letter case, "-" and "_" do not matter.
        train, test: names of its files; the first that is there is read.
        kind: layout of the test file, see `evolora.streams.instruction_files`.
        metric: how answers are judged.
        request: what follows a question, where the test file has the bare question.
        max_new_tokens: longest answer.
        people: file of what several people answered, by question; needed where it is named.
        captions: file of the test images' captions, as COCO's; needed where it is named.
        rows, tests: published numbers of training and test rows; None where no source says.
        passes: how often the published training goes through the training rows.
    """

    name: str
    folder: tuple[str, ...]
    train: tuple[str, ...] = ("train.json",)
    test: tuple[str, ...] = ("test.json",)
    kind: TestKind = "instruction"
    metric: str = "exact-match"
    request: str = ""
    max_new_tokens: int = MAX_NEW_TOKENS
    people: str | None = None
    captions: str | None = None
    rows: int | None = None
    tests: int | None = None
    passes: int = 1

    def find(self, places: Sequence[Path]) -> Path | None:
        """Return the task's folder, in the first of the places that has one with training rows."""
        named = [
            folder
            for place in places
            for name in self.folder
            for folder in _folders(place)
            if _plain(folder.name) == _plain(name)
        ]
        held = (one for one in named if any((one / file).is_file() for file in self.train))
        return next(held, None)


@dataclass(frozen=True, kw_only=True)
class InstructionSet:
    """A benchmark.

    Args:
        name: of the stream.
        title: what its paper calls it.
        tasks: in the published order.
        inside: folders below the root that may hold the tasks' folders, tried in this order.
        images: folders below the root that image names may be relative to.
    """

    name: str
    title: str
    tasks: tuple[PublishedTask, ...]
    inside: tuple[str, ...] = ("",)
    images: tuple[str, ...] = ("", "..")

    def places(self, root: Path, instructions: str | None = None) -> list[Path]:
        """Return where the tasks' folders are looked for."""
        inside = self.inside if instructions is None else (instructions,)
        return [root / name for name in inside]


def _caption(name: str, test: str, rows: int, tests: int | None = None) -> PublishedTask:
    return PublishedTask(
        name=name,
        folder=(name,),
        train=("train.jsonl",),
        test=(test,),
        kind="captions",
        metric="cider-d",
        request=CAPTION,
        max_new_tokens=30,
        rows=rows,
        tests=tests,
    )


CMIT = InstructionSet(
    name="cmit",
    title="CMIT",
    tasks=(
        _caption("vizwiz-caption", "val.json", 117_155),
        PublishedTask(
            name="sk-vg",
            folder=("sk-vg",),
            train=("train.jsonl",),
            test=("test.jsonl",),
            kind="box",
            metric="iou-accuracy",
            request=GROUNDING,
            max_new_tokens=100,
            rows=23_404,
            passes=5,
        ),
        _caption("textcaps", "val.json", 109_765),
        PublishedTask(
            name="iconqa",
            folder=("iconqa",),
            train=("multi_text_choice_train.jsonl",),
            test=("multi_text_choice_test.jsonl",),
            kind="choice",
            metric="option-accuracy",
            request=OPTION,
            max_new_tokens=10,
            rows=18_946,
            passes=5,
        ),
        PublishedTask(
            name="ocrvqa",
            folder=("ocrvqa",),
            train=("train.jsonl",),
            test=("ocrvqa_val.jsonl",),
            kind="question",
            request=SHORT,
            max_new_tokens=100,
            rows=166_043,
        ),
        _caption("flickr30k", "flickr30k_test_karpathy.json", 145_000, 1_000),
        PublishedTask(
            name="vizwiz",
            folder=("vizwiz",),
            train=("train.jsonl",),
            test=("vizwiz_val.jsonl",),
            kind="question",
            metric="textvqa-accuracy",
            request=f"{UNANSWERABLE} {SHORT}",
            max_new_tokens=10,
            people="vizwiz_val_annotations.json",
            rows=20_523,
            passes=5,
        ),
        PublishedTask(
            name="kvqa",
            folder=("kvqa",),
            train=("train.jsonl",),
            test=("test.jsonl",),
            kind="question",
            request=SHORT,
            max_new_tokens=100,
            rows=146_408,
        ),
        PublishedTask(
            name="pmcvqa",
            folder=("pmcvqa",),
            train=("train.jsonl",),
            test=("test_clean.jsonl",),
            kind="choice",
            metric="option-accuracy",
            request=OPTION,
            max_new_tokens=10,
            rows=176_948,
        ),
    ),
)

COIN = InstructionSet(
    name="coin",
    title="CoIN",
    inside=("Instructions_Original", "Instruction_Type1", "instructions", ""),
    images=("", "cl_dataset", "datasets", ".."),
    tasks=(
        PublishedTask(name="ScienceQA", folder=("ScienceQA",), metric="option-accuracy"),
        PublishedTask(
            name="TextVQA",
            folder=("TextVQA",),
            test=("val.json", "test.json"),
            metric="textvqa-accuracy",
            people="TextVQA_0.5.1_val.json",
        ),
        PublishedTask(name="ImageNet", folder=("ImageNet",)),
        PublishedTask(name="GQA", folder=("GQA",)),
        PublishedTask(name="VizWiz", folder=("VizWiz",), test=("val.json", "test.json")),
        PublishedTask(
            name="Grounding", folder=("Grounding",), kind="instruction-box", metric="iou-accuracy"
        ),
        PublishedTask(name="VQAv2", folder=("VQAv2",), test=("val.json", "test.json")),
        PublishedTask(name="OCR-VQA", folder=("OCRVQA",), test=("test_1.json", "test.json")),
    ),
)


def _asked(
    name: str, *folders: str, train: str = "train.json", rows: int | None = None
) -> PublishedTask:
    return PublishedTask(
        name=name, folder=folders or (name,), train=(train,), test=("test_3000.json",), rows=rows,
        tests=3_000,
    )  # fmt: skip


def _described(
    name: str, *folders: str, train: str = "train.json", rows: int | None = None
) -> PublishedTask:
    return PublishedTask(
        name=name, folder=folders, train=(train,), test=("test_3000.json",), metric="cider-d",
        captions="val_coco_type_3000.json", rows=rows, tests=3_000,
    )  # fmt: skip


UCIT = InstructionSet(
    name="ucit",
    title="UCIT",
    inside=("instructions", ""),
    images=("datasets", "", ".."),
    tasks=(
        _asked("ImageNet-R"),
        _asked("ArxivQA", train="train_4w.json", rows=40_000),
        _described("VizWiz-caption", "VizWiz-caption", "VizWiz"),
        _asked("IconQA"),
        _asked("CLEVR-Math", "CLEVR-Math", "CLEVR", train="train_4w.json", rows=40_000),
        _described(
            "Flickr30k", "Flickr30k-cap", "Flickr30k", train="train_brief_4w.json", rows=40_000
        ),
    ),
)
SETS = {one.name: one for one in (CMIT, COIN, UCIT)}


def _plain(name: str) -> str:
    return re.sub(r"[-_ ]", "", name.lower())


def _folders(place: Path) -> list[Path]:
    if not place.is_dir():
        return []
    return [entry for entry in sorted(place.iterdir()) if entry.is_dir()]
