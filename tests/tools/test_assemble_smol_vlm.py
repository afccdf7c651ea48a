"""The assembly of a small model that reads pictures, on toy parts and a toy corpus."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tests.tools.test_pretrain_clip import NAMES, state, write_corpus
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    Dinov2Config,
    Dinov2Model,
    InternVLVisionConfig,
    InternVLVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from assemble_smol_vlm import main
from evolora.backbones.loading import load_backbone
from evolora.errors import DataError
from evolora.routing.route import BASE, Route
from evolora.streams.task import Example
from smol_assembly import bridge
from smol_assembly.bridge import BRIDGE, Names, Reader, load_projection
from smol_assembly.language import IMAGE_TOKENS
from smol_assembly.model import Speech, encoded, load_parts
from smol_assembly.pairs import HELD_OUT, choose, load_features, pictures, seen
from smol_assembly.vision import TABLE, as_internvl, onnx_weights

OLD = {  # names that an exported file has, by the model's own
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
}
CHATML = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def dino() -> Dinov2Model:
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=56
    )
    model = Dinov2Model(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def stored(name: str, value: Tensor) -> Any:
    raw = value.detach().contiguous().numpy().tobytes()
    return SimpleNamespace(name=name, dims=list(value.shape), raw_data=raw)


def exported(model: Dinov2Model) -> Any:
    """Return what an ONNX file keeps of a model: Linears transposed, without names, used once."""
    initializer, node = [], []
    for name, value in model.state_dict().items():
        for new, old in OLD.items():
            name = name.replace(new, old)
        if name == TABLE:
            initializer += [stored("fold_1", value[:, 1:]), stored("fold_2", value[:, :1])]
        elif value.dim() == 2 and name.endswith(".weight"):
            key, bias = f"fold_{name.replace('.', '_')}", f"backbone.{name[:-6]}bias"
            initializer.append(stored(key, value.T))
            product = SimpleNamespace(op_type="MatMul", input=["x", key], output=[f"{key}_out"])
            inputs = [bias, f"{key}_out"] if len(node) % 4 else [f"{key}_out", bias]
            node += [product, SimpleNamespace(op_type="Add", input=inputs, output=["y"])]
        else:
            initializer.append(stored(f"backbone.{name}", value))
    return SimpleNamespace(initializer=initializer, node=node)


@pytest.mark.parametrize("side", [56, 28])
def test_the_encoder_is_the_one_in_the_file(side: int) -> None:
    model = dino()
    pixels = torch.randn(2, 3, side, side)
    with torch.no_grad():
        ours = as_internvl(onnx_weights(exported(model)), side)(pixel_values=pixels)
        theirs = model(pixel_values=pixels)
    torch.testing.assert_close(ours.last_hidden_state, theirs.last_hidden_state)


def test_a_file_without_a_known_table_and_a_bad_size_are_refused() -> None:
    graph = exported(dino())
    with pytest.raises(DataError, match="multiple of 28 pixels; got 40"):
        as_internvl(onnx_weights(graph), 40)
    graph.initializer = [one for one in graph.initializer if one.name != "fold_1"]
    with pytest.raises(DataError, match="no table of positions"):
        onnx_weights(graph)


def toy_tokenizer() -> PreTrainedTokenizerFast:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({token: i for i, token in enumerate([*special, *letters])}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, chat_template=CHATML,
        unk_token=special[0], bos_token=special[1], eos_token=special[2], pad_token=special[2],
    )  # fmt: skip


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A work folder with toy parts, as the first two stages leave them, and a toy corpus."""
    torch.manual_seed(0)
    tokenizer = toy_tokenizer()
    llm = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, bos_token_id=1, eos_token_id=2,
        pad_token_id=2, tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(llm).save_pretrained(tmp_path / "work/llm")
    tokenizer.save_pretrained(tmp_path / "work/llm")
    vision = InternVLVisionConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=1, intermediate_size=64,
        attention_bias=True, use_mean_pooling=False, image_size=56, patch_size=14,
    )  # fmt: skip
    InternVLVisionModel(vision).save_pretrained(tmp_path / "work/vision")
    write_corpus(tmp_path / "corpus", NAMES)
    return tmp_path / "work"


@pytest.fixture
def stage(work: Path) -> Callable[..., None]:
    """Run a stage as the command line would."""

    def run(name: str, *options: Any, folder: str = "work") -> None:
        main([
            name, "--work", str(work.parent / folder), "--corpus", str(work.parent / "corpus"),
            "--out", str(work.parent / "out"), "--word-steps", "30", "--word-batch", "8",
            "--batch", "4", "--warmup", "1", "--pictures", "30", "--tested", "4",
            *map(str, options),
        ])  # fmt: skip

    return run


def options(work: Path) -> Any:
    corpus = work.parent / "corpus"
    return SimpleNamespace(work=work, corpus=corpus, pictures=30, seed=0, name="main")


def test_the_processor_speaks_the_language_model_s_format(work: Path) -> None:
    model, processor = load_parts(work)
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ]
    plain: Any = toy_tokenizer()
    for more in (True, False):
        chat = {"tokenize": False, "add_generation_prompt": more}
        assert processor.apply_chat_template(turns, **chat) == plain.apply_chat_template(
            turns, **chat
        )
    tokens = Speech(processor).question("What?")
    assert int((tokens == model.config.image_token_id).sum()) == model.config.image_seq_length == 4
    assert processor.tokenizer.decode(tokens) == (
        "<|im_start|>user\n<img><image><image><image><image></img>\n"
        "What?<|im_end|>\n<|im_start|>assistant\n"
    )
    rows = model.get_input_embeddings().weight
    assert rows is model.lm_head.weight and len(rows) == len(plain) + len(IMAGE_TOKENS)
    torch.testing.assert_close(rows[len(plain)], rows[: len(plain)].mean(dim=0))


def test_a_name_drawn_by_one_hand_is_on_one_side_and_every_name_is_trained(work: Path) -> None:
    pairs = choose(work.parent / "corpus", 32, seed=0)
    with np.load(work.parent / "corpus/labels.npz") as labels:
        families = labels["family"][pairs.rows]
    sides: dict[tuple[int, int], set[bool]] = {}
    for name, family, held in zip(pairs.names, families, pairs.held_out, strict=True):
        sides.setdefault((int(name), int(family)), set()).add(bool(held))
    assert all(len(side) == 1 for side in sides.values())
    assert 0 < pairs.held_out.mean() <= HELD_OUT
    assert set(pairs.tested(99)) == set(np.flatnonzero(pairs.held_out))
    assert set(pairs.names[~pairs.held_out]) == set(range(len(NAMES)))


def test_features_are_what_the_model_projects(work: Path, stage: Callable[..., None]) -> None:
    stage("features")
    model, processor = load_parts(work)
    pairs, features = load_features(options(work))
    images = pictures(work.parent / "corpus", pairs.rows[:5])
    pixels = seen(processor, images)
    with torch.no_grad():
        ours = model.model.multi_modal_projector(features[:5].float())
        theirs = model.get_image_features(pixel_values=pixels).pooler_output
    assert pixels.shape == (5, 3, 56, 56)
    torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(encoded(model, pixels), features[:5].float(), atol=2e-3, rtol=2e-3)


def test_words_teach_images_to_point_at_their_names(work: Path, stage: Callable[..., None]) -> None:
    stage("features")
    stage("words", "--word-steps", 300)
    model, processor = load_parts(work)
    pairs, features = load_features(options(work))
    speech = Speech(processor)
    told = [speech.answer(texts[0])[:-1] for texts in pairs.texts]
    names = Names(model.get_input_embeddings().weight, told)
    projection = bridge.fresh(model, 0)
    wanted = torch.from_numpy(pairs.names)
    with torch.no_grad():
        before = names.loss(projection(features.float()), wanted)
        load_projection(projection, options(work), bridge.WORDS)
        after = names.loss(projection(features.float()), wanted)
        hits = names.hits(projection(features.float()), wanted)
    assert after < before - 0.5 and hits > 0.5


def test_a_run_is_repeatable_resumed_and_exported(
    work: Path, stage: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage("features")
    stage("words")
    for copy in ("again", "killed"):
        shutil.copytree(work, work.parent / copy)
    plan = ("--steps", 4, "--save-every", 0)
    stage("bridge", *plan)
    stage("bridge", *plan, folder="again")
    original, calls = Reader.losses, []

    def killed(*arguments: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 2 + 3:  # what names cost at first takes two calls
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Reader, "losses", killed)
        with pytest.raises(KeyboardInterrupt):
            stage("bridge", *plan, folder="killed")
    file = BRIDGE.format("main")
    assert int(state(work.parent / "killed" / file)["step"]) == 2
    stage("bridge", *plan, folder="killed")
    whole = state(work / file)
    for other in ("again", "killed"):
        values = state(work.parent / other / file)
        assert values.keys() == whole.keys()
        assert all(torch.equal(values[key], whole[key]) for key in whole), other
    stage("export")
    backbone: Any = load_backbone(str(work.parent / "out"))
    trained = backbone.model.model.multi_modal_projector.linear_2.weight
    torch.testing.assert_close(
        trained, whole["linear_2.weight"].bfloat16().float(), atol=0.0, rtol=0.0
    )


def test_the_library_says_the_same_loss_as_the_training(
    work: Path, stage: Callable[..., None]
) -> None:
    stage("features")
    stage("words")
    stage("bridge", "--steps", 1)
    stage("export")
    backbone: Any = load_backbone(str(work.parent / "out"))
    asked, told = ["What is this?", "Name it, please."], ["red square", "blue"]
    images = pictures(work.parent / "corpus", np.array([0, 5]))
    pixels = seen(backbone.processor, images)
    with torch.no_grad():
        projected = backbone.model.model.multi_modal_projector(encoded(backbone.model, pixels))
        ours = Reader(backbone.model, Speech(backbone.processor)).losses(projected, asked, told)
        batch = backbone.collate([
            Example(
                inputs={"image": torch.from_numpy(image).permute(2, 0, 1), "text": question},
                label=answer, key=answer,
            )
            for image, question, answer in zip(images, asked, told, strict=True)
        ])  # fmt: skip
        theirs = backbone.answer_losses(batch, Route.of(BASE, 2, device=backbone.device))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_stages_out_of_order_are_one_error(work: Path, stage: Callable[..., None]) -> None:
    with pytest.raises(DataError, match="run the stage 'features' first"):
        stage("words")
    stage("features")
    with pytest.raises(DataError, match="run the stage 'words' first"):
        stage("bridge", "--steps", 1)
    shutil.rmtree(work / "llm")
    with pytest.raises(DataError, match="run the stage 'llm' first"):
        stage("words")
