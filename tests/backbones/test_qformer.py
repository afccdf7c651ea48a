"""Q-Formers: what the stock model does with an image, and what plugged modalities add to it."""

from __future__ import annotations

import pytest
import torch
from tests.backbones.qformers import KINDS, QUERIES, audio, qformer, sample, samples, sound
from tests.backbones.writers import picture

from evolora.backbones.base import Batch
from evolora.backbones.encoders.vision import Frames
from evolora.backbones.modalities import ModalitySpec
from evolora.backbones.qformer import QFormer
from evolora.backbones.soft_tokens import prompts, soft_tokens
from evolora.errors import ConfigError, DataError
from evolora.routing.route import BASE, Route


def base(batch: Batch) -> Route:
    return Route.of(BASE, len(batch))


def pixels(backbone: QFormer, *seeds: int) -> torch.Tensor:
    frames = backbone.encoders["image"]
    assert isinstance(frames, Frames)
    images = torch.stack([picture(seed, 8, 8) for seed in seeds])
    return (images.float() / 255.0 - frames.mean) / frames.deviation


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_answered_as_by_the_stock_model(kind: str) -> None:
    backbone = qformer(kind)
    model = backbone.model
    batch = backbone.collate([sample("image", seed=seed) for seed in (0, 1)])
    asked = {
        "qformer_input_ids": batch.inputs["asked_ids"],
        "qformer_attention_mask": batch.inputs["asked_mask"],
    }
    asked = asked if backbone.asks else {}
    with torch.no_grad():
        soft = soft_tokens(backbone, batch, "image", torch.arange(2), base(batch))
        stock = model.get_image_features(pixels(backbone, 0, 1), **asked).pooler_output
        assert torch.equal(soft, stock)
        logits, answers = backbone.answer_logits(batch, base(batch))
        images = torch.full((2, QUERIES), 4)
        ids = torch.cat([images, batch.inputs["input_ids"]], dim=1)
        more = {}
        if backbone.decodes:
            ids = torch.cat([ids, answers], dim=1)
        else:
            more = {"decoder_input_ids": torch.cat([torch.zeros(2, 1).long(), answers[:, :-1]], 1)}
        whole = model(pixel_values=pixels(backbone, 0, 1), input_ids=ids, **asked, **more).logits
    width = answers.shape[1]
    expected = whole[:, -width - 1 : -1] if backbone.decodes else whole
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_depends_on_batch_mates_or_padding(kind: str) -> None:
    backbone = qformer(kind)
    batch = backbone.collate(samples())
    with torch.no_grad():
        losses = backbone.answer_losses(batch, base(batch))
    texts = backbone.write(batch, base(batch), 4)
    features = backbone.encode_base(batch)
    for row, one in enumerate(samples()):
        alone = backbone.collate([one])
        with torch.no_grad():
            loss = backbone.answer_losses(alone, base(alone))[0]
        torch.testing.assert_close(loss, losses[row], atol=1e-5, rtol=1e-5)
        assert backbone.write(alone, base(alone), 4) == texts[row : row + 1]
        own = backbone.encode_base(alone)
        torch.testing.assert_close(own.embedding[0], features.embedding[row], atol=1e-5, rtol=1e-5)
        for name, value in own.features.items():
            assert value.shape[-1] == backbone.feature_widths()[name]
            expected = features.features[name][row]
            torch.testing.assert_close(value[0], expected, atol=1e-5, rtol=1e-4, equal_nan=True)


def test_each_frame_is_seen_with_its_own_samples_instruction() -> None:
    """Released code tiles instructions batch-major, so that a frame meets another's (B8)."""
    backbone = qformer("instructblip")
    pair = [sample("video", "what is it ?", 1), sample("video", "is it this or red ?", 2)]
    batch = backbone.collate(pair)
    with torch.no_grad():
        soft = soft_tokens(backbone, batch, "video", torch.arange(2), base(batch))
        assert soft is not None and soft.shape[1] == 3 * QUERIES
        for row, one in enumerate(pair):
            alone = backbone.collate([one])
            own = soft_tokens(backbone, alone, "video", torch.arange(1), base(alone))
            torch.testing.assert_close(own[0], soft[row], atol=1e-5, rtol=1e-5)
        other = backbone.collate([sample("video", pair[1].inputs["text"], 1)])
        told = soft_tokens(backbone, other, "video", torch.arange(1), base(other))
        assert not torch.allclose(told[0], soft[0], atol=1e-3)


def test_masked_words_do_not_change_what_the_queries_gather() -> None:
    backbone = qformer("instructblip")
    batch = backbone.collate(
        [sample("image", "is it red ?"), sample("image", "is it ? what is this ?")]
    )
    inputs = dict(batch.inputs)
    mask = inputs["asked_mask"]
    assert not mask.bool().all()
    changed = {**inputs, "asked_ids": torch.where(mask.bool(), inputs["asked_ids"], 7)}
    with torch.no_grad():
        first, second = (
            soft_tokens(backbone, 
                Batch(inputs=one, labels=batch.labels, keys=batch.keys, present=batch.present),
                "image", torch.arange(2), base(batch),
            )
            for one in (inputs, changed)
        )  # fmt: skip
    torch.testing.assert_close(first, second, atol=1e-6, rtol=0)


def test_a_prompt_is_a_cue_and_soft_tokens_of_each_modality_and_then_the_text() -> None:
    backbone = qformer("blip2-opt")
    batch = backbone.collate([sample("image video", "where ?"), sample("image", "is it red ?")])
    with torch.no_grad():
        embeds, spans = prompts(backbone, batch, base(batch))
        cue = backbone.embed(torch.tensor(backbone.instructions.plain("this is")))
        soft = soft_tokens(backbone, batch, "image", torch.arange(2), base(batch))
    n = embeds.shape[1]
    assert n == QUERIES + 2 + 3 * QUERIES + 2
    assert spans.mask[0].all() and spans.mask[1].sum() == QUERIES + 4
    torch.testing.assert_close(embeds[0, :QUERIES], soft[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(embeds[0, QUERIES : QUERIES + 2], cue)
    torch.testing.assert_close(embeds[1, -4 - QUERIES : -4], soft[1], atol=1e-5, rtol=1e-5)
    assert spans.of["video"].sum(dim=1).tolist() == [3 * QUERIES, 0]
    assert spans.of["text"].sum(dim=1).tolist() == [4, 4]


def test_a_modality_of_another_width_is_not_seen_before_it_is_learned() -> None:
    backbone = qformer("blip2-opt")
    first, second = (
        backbone.collate([sample("audio", seed=seed), sample("", seed=seed)]) for seed in (0, 1)
    )
    with torch.no_grad():
        losses = [backbone.answer_losses(batch, base(batch)) for batch in (first, second)]
    assert torch.allclose(losses[0], losses[1]) and torch.allclose(losses[0][0], losses[0][1])


def test_sites_are_found_by_walking_and_named_by_what_they_are() -> None:
    backbone = qformer("instructblip", layers=3)
    attention = ("query", "key", "value", "dense")
    sites = backbone.sites("linear", towers=["qformer"], target_modules=attention)
    assert len(sites) == 4 * (3 + 2)
    by_name = {site.name: site for site in sites}
    assert by_name["qformer.2.crossattention.key"].d_in == 24
    assert by_name["qformer.2.attention.key"].d_in == 32
    assert "qformer.1.crossattention.key" not in by_name
    only = backbone.sites("linear", towers=["qformer"], target_modules=("crossattention.dense",))
    assert [site.name for site in only] == [
        "qformer.0.crossattention.dense",
        "qformer.2.crossattention.dense",
    ]
    (projection,) = backbone.sites("linear", towers=["projection"], target_modules=("all-linear",))
    assert (projection.name, projection.d_in, projection.d_out) == (
        "projection.0.projection",
        32,
        32,
    )
    with pytest.raises(ConfigError, match="did you mean 'query'"):
        backbone.sites("linear", target_modules=("qurey",))


def test_wrong_modalities_are_refused() -> None:
    backbone = qformer("blip2-opt")
    with pytest.raises(ConfigError, match="there is a modality 'audio' already"):
        backbone.add_modality(audio())
    wrong = ModalitySpec(
        name="smell", encoder=torch.nn.Identity(), width=5, read=lambda v: v, needs_projection=False
    )
    with pytest.raises(
        ConfigError, match="5 wide and the Q-Former reads 24; it needs a projection"
    ):
        backbone.add_modality(wrong)
    flat = ModalitySpec(name="flat", encoder=torch.nn.Identity(), width=20, read=lambda v: v)
    with pytest.raises(ConfigError, match=r"must give \(b, 1, n, 20\); got \(2, 20\)"):
        flat.tokens(torch.zeros(2, 20))
    with pytest.raises(DataError, match="has no image or video or audio or pc or text"):
        backbone.collate([sample("", "")])
    with pytest.raises(ConfigError, match="unknown encoder 'visoin'; did you mean 'vision'"):
        QFormer(backbone.model, modalities={"video": {"encoder": "visoin"}})
    with pytest.raises(ConfigError, match="needs an encoder"):
        QFormer(backbone.model, modalities={"video": {}})
    assert sound(0).dtype == torch.int8
