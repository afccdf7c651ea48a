"""Models that write: stock logits, losses and texts on the base; prompts; sites; features."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.backbones.writers import FAMILIES, IMAGE, picture, samples, writer
from tests.conftest import toy_model
from torch import Tensor

from evolora.backbones.answer_tokens import NO_ANSWER
from evolora.backbones.base import Batch, check_labels
from evolora.backbones.dialogue import Dialogues
from evolora.backbones.families import family_of
from evolora.backbones.image_text import ImageText
from evolora.backbones.loading import load_backbone, wrap_model
from evolora.errors import ConfigError, DataError
from evolora.routing.route import BASE, Route
from evolora.streams.task import Example, LabelSpace


@pytest.fixture(params=FAMILIES)
def backbone(request: pytest.FixtureRequest) -> ImageText:
    return writer(request.param)


def base_route(batch: Batch) -> Route:
    return Route.of(BASE, len(batch))


def stock_inputs(backbone: ImageText, example: Example) -> dict[str, Any]:
    """Return what a user of ``transformers`` would hand to the model for one sample."""
    found = dict(backbone.dialogues.prompt(example))
    ids = found.pop("input_ids").long().unsqueeze(0)
    found = {name: found[name] for name in backbone.family.pixels if name in found}
    if backbone.family.packed and found:
        found["mm_token_type_ids"] = (ids == IMAGE).int()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **found}


def with_answer(inputs: dict[str, Any], answer: Tensor) -> dict[str, Any]:
    ids = torch.cat([inputs["input_ids"], answer.long().unsqueeze(0)], dim=1)
    types = {"mm_token_type_ids": (ids == IMAGE).int()} if "mm_token_type_ids" in inputs else {}
    return {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids), **types}


def test_base_logits_of_a_sample_are_the_stock_models_bit_for_bit(backbone: ImageText) -> None:
    for example in samples():
        batch = backbone.collate([example])
        with torch.no_grad():
            ours, answers = backbone.answer_logits(batch, base_route(batch))
            inputs = with_answer(stock_inputs(backbone, example), answers[0])
            kept = answers.shape[1] + 1
            stock = backbone.model(**inputs, use_cache=False, logits_to_keep=kept).logits
        assert torch.equal(ours, stock[:, :-1])


def test_loss_is_the_stock_loss_on_answer_tokens_whatever_the_batch(backbone: ImageText) -> None:
    batch = backbone.collate(samples())
    losses = backbone.answer_losses(batch, base_route(batch))
    for row, example in enumerate(samples()):
        prompt = stock_inputs(backbone, example)
        answer = backbone.dialogues.answer(example)
        assert answer is not None and answer[-1] == backbone.dialogues.end_token
        inputs = with_answer(prompt, answer)
        labels = inputs["input_ids"].clone()
        labels[:, : prompt["input_ids"].shape[1]] = NO_ANSWER
        with torch.no_grad():
            stock = backbone.model(**inputs, labels=labels, use_cache=False).loss
        torch.testing.assert_close(losses[row], stock, atol=2e-5, rtol=1e-5)


def test_base_texts_are_those_of_stock_generate(backbone: ImageText) -> None:
    batch = backbone.collate(samples())
    texts = backbone.write(batch, base_route(batch), 8)
    for text, example in zip(texts, samples(), strict=True):
        inputs = stock_inputs(backbone, example)
        tokens = backbone.model.generate(  # type: ignore[operator]
            **inputs, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=2
        )
        new = tokens[0, inputs["input_ids"].shape[1] :]
        assert text == backbone.processor.tokenizer.decode(new, skip_special_tokens=True).strip()
    assert any(texts)


def test_logits_do_not_depend_on_padding_on_the_left(backbone: ImageText) -> None:
    whole = backbone.collate(samples())
    with torch.no_grad():
        together, _ = backbone.answer_logits(whole, base_route(whole))
        for row, example in enumerate(samples()):
            alone = backbone.collate([example])
            own = backbone.answer_logits(alone, base_route(alone))[0][0]
            torch.testing.assert_close(together[row, : len(own)], own, atol=1e-4, rtol=1e-4)


def test_an_answer_longer_than_the_limit_is_cut(backbone: ImageText) -> None:
    batch = backbone.collate(samples())
    short = backbone.answer_losses(batch, base_route(batch), limit=1)
    with torch.no_grad():
        logits, answers = backbone.answer_logits(batch, base_route(batch), limit=1)
    assert torch.equal(answers, batch.inputs["answer_ids"][:, :1])
    expected = -logits[:, 0].log_softmax(dim=1).gather(1, answers)[:, 0]
    torch.testing.assert_close(short, expected)
    limits = [2, 1, 3, 9]
    each = backbone.answer_losses(batch, base_route(batch), limit=limits)
    for row, limit in enumerate(limits):
        whole = backbone.answer_losses(batch, base_route(batch), limit=limit)
        torch.testing.assert_close(each[row], whole[row], atol=1e-5, rtol=1e-5)
    assert not torch.equal(each, backbone.answer_losses(batch, base_route(batch)))
    texts = backbone.write(batch, base_route(batch), 2)
    assert all(len(text.split()) <= 2 for text in texts)


def all_features(backbone: ImageText, examples: list[Example]) -> dict[str, torch.Tensor]:
    batch = backbone.collate(examples)
    apart = backbone.base_results(batch, backbone.apart_features)
    return {**backbone.encode_base(batch).features, **apart}


def test_features_never_see_the_answer_and_miss_what_a_sample_lacks(backbone: ImageText) -> None:
    features = all_features(backbone, samples())
    widths = backbone.feature_widths()
    assert {name: value.shape[-1] for name, value in features.items()} == widths
    missing = features["modalities"].isnan().all(dim=2)
    assert missing.tolist() == [[False, False], [True, False], [False, False], [False, True]]
    lengths = features["modalities"].norm(dim=2)[~missing]
    torch.testing.assert_close(lengths, torch.ones_like(lengths))
    other = [replace(example, label="blue blue blue") for example in samples()]
    again = all_features(backbone, other)
    for name, value in features.items():
        torch.testing.assert_close(value, again[name], equal_nan=True, atol=1e-5, rtol=1e-4)
    for row, example in enumerate(samples()):
        alone = all_features(backbone, [example])
        for name, value in features.items():
            torch.testing.assert_close(
                value[row], alone[name][0], equal_nan=True, atol=1e-4, rtol=1e-3
            )


def test_sites_are_the_linears_of_every_tower(backbone: ImageText) -> None:
    every = backbone.sites("linear", target_modules=["all-linear"])
    assert [tower for tower in backbone.towers if any(s.tower == tower for s in every)] == list(
        backbone.towers
    )
    assert len({site.name for site in every}) == len(every)
    chosen = backbone.sites("linear", towers=["language"], layers=[1], target_modules=["q_proj"])
    assert [site.name for site in chosen] == ["language.1.q_proj"]
    with pytest.raises(ConfigError, match="unknown target module 'q_prj'; did you mean 'q_proj'"):
        backbone.sites("linear", target_modules=["q_prj"])
    with pytest.raises(ConfigError, match="unknown tower 'text'"):
        backbone.sites("linear", towers=["text"], target_modules=["q_proj"])
    with pytest.raises(ConfigError, match=r"as whole MLPs in the language tower; .* 'mlp'"):
        backbone.sites("mlp")
    whole = backbone.sites("ffn", layers=[-1])
    assert [(site.name, site.d_in, site.d_out) for site in whole] == [("language.1.ffn", 32, 32)]
    assert whole[0].mlp is not None and whole[0].mlp.gate is not None
    with pytest.raises(ConfigError, match=r"in the language tower; .* 'ffn' in .'vision'"):
        backbone.sites("ffn", towers=["vision"])


def test_llava_has_no_site_in_the_vision_block_that_is_never_read() -> None:
    backbone = writer("llava")
    assert len(backbone.blocks("vision")) == 2  # of three: the last but one is read


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_prompt_beyond_the_limit_is_refused_by_name(kind: str) -> None:
    backbone = writer(kind, text_length=6)
    with pytest.raises(DataError, match=r"'one' has a prompt of \d+ tokens .* the limit is 6"):
        backbone.collate(samples()[:1])


def test_images_and_markers_must_fit(backbone: ImageText) -> None:
    one_too_many = Example(
        inputs={"image": picture(0), "text": "<image> is <image> ?"}, label="no", key="row 7"
    )
    with pytest.raises(DataError, match="'row 7' has 1 images and 2 <image> markers"):
        backbone.collate([one_too_many])
    lacking = Example(inputs={"text": "<image> what is it ?"}, label="no", key="lacking")
    batch = backbone.collate([lacking])
    assert not batch.present["image"].any()
    assert not (batch.inputs["input_ids"] == IMAGE).any()


def test_an_image_that_cannot_be_read_is_named(backbone: ImageText, tmp_path: Path) -> None:
    file = tmp_path / "broken.png"
    file.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"sample 'k': .*broken\.png"):
        backbone.collate([Example(inputs={"image": str(file), "text": "?"}, label="a", key="k")])


def test_turns_are_rendered_by_the_template_or_the_plain_one() -> None:
    turns = ("what is <image> ?", "red", "is it dot ?")
    rendered = writer("llava").dialogues.render(turns, 1, "k")
    assert (
        rendered == "user : what is <image> ? assistant : red </s>user : is it dot ? assistant : "
    )
    plain = writer("llava", template=False).dialogues.render(turns, 1, "k")
    assert plain == "Question: what is <image> ?\nAnswer: red\nQuestion: is it dot ?\nAnswer:\n"
    two = Example(inputs={"text": ("a", "b")}, label="c", key="k")
    with pytest.raises(DataError, match="begin and end with the user's"):
        writer("llava").collate([two])


def test_the_most_frequent_answer_is_learned() -> None:
    backbone = writer("llava")
    answer = backbone.dialogues.answer(samples()[2])
    assert answer is not None
    assert backbone.dialogues.read(answer[:-1].tolist()) == "green bar ."


def test_an_answer_is_tokenized_as_the_word_that_follows_the_prompt() -> None:
    class Letters:
        """Splits into characters; a blank belongs to the word after it, as in byte-level BPE."""

        eos_token_id = 7

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [1000 + len(text)] if text[:1] == " " else [ord(c) for c in text]}

    class Processor:
        tokenizer, image_token = Letters(), "<image>"
        chat_template = "yes"

        def apply_chat_template(self, *_: Any, **__: Any) -> str:
            return "User: what? Assistant:"

    dialogues = Dialogues(Processor(), IMAGE, 100)
    answer = dialogues.answer(Example(inputs={"text": "?"}, label="red", key="k"))
    assert answer is not None and answer.tolist() == [*map(ord, " red"), 7]


def test_a_batch_without_answers_cannot_be_learned() -> None:
    backbone = writer("llava")
    batch = backbone.collate([Example(inputs={"text": "what ?"}, label=0, key="k")])
    with pytest.raises(DataError, match="needs an answer in every row"):
        backbone.answer_losses(batch, base_route(batch))


def test_other_models_are_refused_and_families_named() -> None:
    with pytest.raises(ConfigError, match="known: idefics3, internvl, llava"):
        family_of(toy_model())
    with pytest.raises(ConfigError, match="has no head that writes"):
        ImageText(writer("llava").model.model)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="the task has classes"):
        check_labels(writer("llava"), LabelSpace(classes=("a", "b")))


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_saved_model_is_found_again(kind: str, tmp_path: Path) -> None:
    backbone = writer(kind)
    backbone.model.save_pretrained(tmp_path)  # type: ignore[operator]
    backbone.processor.save_pretrained(tmp_path)
    loaded = load_backbone(str(tmp_path))
    assert isinstance(loaded, ImageText)
    assert loaded.fingerprint() == backbone.fingerprint()
    batch, again = backbone.collate(samples()), loaded.collate(samples())
    for name, value in batch.inputs.items():
        # transformers reads the toy tokenizer of a Qwen as a byte-level one: other words
        other = again.inputs[name]
        if kind in ("internvl", "qwen2_vl", "qwen2_5_vl") and name.endswith("_ids"):
            value, other = value == IMAGE, other == IMAGE
        assert torch.equal(value, other)
    assert isinstance(wrap_model(backbone.model, backbone.processor), ImageText)
