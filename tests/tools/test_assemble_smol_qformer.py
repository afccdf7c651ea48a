"""The assembly of a Q-Former with another language model: a toy one behind `qformer-tiny`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tools.test_assemble_smol_vlm import toy_tokenizer
from tests.tools.test_pretrain_clip import state
from torch import Tensor
from transformers import InstructBlipForConditionalGeneration, LlamaConfig, LlamaForCausalLM

from assemble_smol_qformer import main
from evolora.assets import embedded_backbone
from evolora.backbones.loading import load_backbone
from evolora.config import load_stream
from evolora.errors import DataError
from evolora.streams.task import Task
from smol_assembly import qformer_bridge, qformer_export
from smol_assembly.bridge import BRIDGE, WORDS
from smol_assembly.qformer import load_parts
from smol_assembly.qformer_bridge import gathered, losses_of

EYES = embedded_backbone("qformer-tiny")
assert EYES is not None


def few(tested: int | None = None) -> Task:
    return load_stream("mosaic/modalities", order=["image"], limit=12, test_limit=4).tasks[0]


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A work folder with a toy language model, as the first stage leaves it; few pictures."""
    torch.manual_seed(0)
    tokenizer = toy_tokenizer()
    llm = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, bos_token_id=1, eos_token_id=2,
        pad_token_id=2, tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(llm).save_pretrained(tmp_path / "work/llm")
    tokenizer.save_pretrained(tmp_path / "work/llm")
    for module in (qformer_bridge, qformer_export):
        monkeypatch.setattr(module, "pictures", few)
    return tmp_path / "work"


@pytest.fixture
def stage(work: Path) -> Callable[..., None]:
    """Run a stage as the command line would."""

    def run(name: str, *options: Any, folder: str = "work") -> None:
        main([
            name, "--work", str(work.parent / folder), "--out", str(work.parent / "out"),
            "--eyes", str(EYES), "--word-steps", "20", "--batch", "4", "--warmup", "1",
            *map(str, options),
        ])  # fmt: skip

    return run


def test_a_question_is_the_users_turn_and_all_parts_are_those_of_the_folders(work: Path) -> None:
    backbone = load_parts(work, EYES, 0)
    tokenizer: Any = backbone.instructions.tokenizer
    ids = tokenizer("What is it?")["input_ids"]
    assert tokenizer.decode(ids) == (
        "<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(backbone.instructions.plain("What is it?")) == "What is it?"
    model: Any = backbone.model
    eyes = InstructBlipForConditionalGeneration.from_pretrained(EYES, dtype=torch.float32)
    llm = LlamaForCausalLM.from_pretrained(work / "llm")
    for name in ("vision_model", "qformer"):
        ours, theirs = getattr(model, name).state_dict(), getattr(eyes, name).state_dict()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name
    rows = model.language_model.get_input_embeddings().weight
    assert torch.equal(rows[: llm.config.vocab_size], llm.get_input_embeddings().weight)
    assert rows is model.language_model.lm_head.weight and len(rows) == len(tokenizer)
    assert model.language_projection.weight.shape == (32, 128)


def test_words_and_bridge_make_answers_likelier(work: Path, stage: Callable[..., None]) -> None:
    backbone = load_parts(work, EYES, 0)
    projection = backbone.model.get_submodule("language_projection")
    examples = list(few().train)
    assert gathered(backbone, examples[:5]).shape == (5, 8, 128)

    def cost(file: str) -> float:
        saved = torch.load(work / file.format("main"), weights_only=True)
        projection.load_state_dict(saved["module"])
        with torch.no_grad():
            return float(losses_of(backbone, examples).mean())

    stage("words")
    stage("bridge", "--steps", 30, "--lr", 0.01)
    assert cost(BRIDGE) < cost(WORDS) - 0.2


def test_a_run_is_repeatable_resumed_and_exported(
    work: Path, stage: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage("words")
    for copy in ("again", "killed"):
        shutil.copytree(work, work.parent / copy)
    plan = ("--steps", 4, "--save-every", 0, "--bf16")
    stage("bridge", *plan)
    stage("bridge", *plan, folder="again")
    calls: list[int] = []

    def killed(*arguments: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 2 + 3:  # what answers cost at first takes two calls
            raise KeyboardInterrupt
        return losses_of(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(qformer_bridge, "losses_of", killed)
        with pytest.raises(KeyboardInterrupt):
            stage("bridge", *plan, folder="killed")
    file = BRIDGE.format("main")
    assert int(torch.load(work.parent / "killed" / file, weights_only=True)["step"]) == 2
    stage("bridge", *plan, folder="killed")
    whole = state(work / file)
    for other in ("again", "killed"):
        values = state(work.parent / other / file)
        assert all(torch.equal(values[key], whole[key]) for key in whole), other
    stage("export")
    read: Any = load_backbone(str(work.parent / "out"))
    assert torch.equal(read.model.language_projection.weight, whole["weight"].half().float())
    made: Any = load_parts(work, EYES, 0)
    text = "Is it a chair?"
    assert read.instructions.tokenizer.encode(text) == made.instructions.tokenizer.encode(text)


def test_stages_out_of_order_are_one_error(work: Path, stage: Callable[..., None]) -> None:
    with pytest.raises(DataError, match="run the stage 'words' first"):
        stage("bridge", "--steps", 1)
    shutil.rmtree(work / "llm")
    with pytest.raises(DataError, match="run the stage 'llm' first"):
        stage("words")
