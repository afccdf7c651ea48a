"""Effective rank, stable rank and likeness of ranks: by hand, of runs and of PEFT adapters."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import toy_task
from tests.contract.cases import make
from torch import Tensor

from evolora.cli import main
from evolora.errors import ConfigError, StorageError
from evolora.evaluation.spectra import (
    Spectra,
    UpdateSpread,
    effective_rank,
    spectra_of,
    spread_of,
    stable_rank,
    update_values,
)
from evolora.experts.bank import ExpertBank
from evolora.experts.factor_pool import FactorPool
from evolora.report.spectra import place_of, places_of, rows_of, share_map, write_spectra


def test_ranks_by_hand() -> None:
    assert effective_rank(torch.tensor([2.0, 2.0, 2.0])) == pytest.approx(3.0)
    assert effective_rank(torch.tensor([5.0, 0.0])) == pytest.approx(1.0)
    assert effective_rank(torch.tensor([3.0, 1.0])) == pytest.approx(4 / 3**0.75)
    assert stable_rank(torch.tensor([2.0, 2.0, 1.0])) == pytest.approx(2.25)
    assert effective_rank(torch.zeros(2)) == stable_rank(torch.zeros(2)) == 0.0


def test_the_update_s_values_come_from_a_small_product() -> None:
    a = torch.randn(4, 30, dtype=torch.float64)
    b = torch.randn(4, 20, dtype=torch.float64)
    expected = torch.linalg.svdvals(b.T @ a)[:4]
    torch.testing.assert_close(update_values(a, b), expected)
    tall = torch.randn(8, 3, dtype=torch.float64), torch.randn(8, 5, dtype=torch.float64)
    torch.testing.assert_close(update_values(*tall), torch.linalg.svdvals(tall[1].T @ tall[0])[:3])


def test_orthogonal_ranks_of_unequal_length_use_little_of_them() -> None:
    lengths = torch.tensor([1.0, 1e-2, 1e-3, 1e-4]).unsqueeze(1)
    found = spread_of(lengths * torch.eye(4, 9), torch.eye(4, 7))
    assert found["A"].correlation == 0.0
    assert found["A"].effective_rank == pytest.approx(1.07, abs=0.01)
    assert found["B"].effective_rank == found["B"].stable_rank == pytest.approx(4.0)
    alike = spread_of(torch.ones(2, 3), torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    assert alike["A"].correlation == pytest.approx(1.0)
    assert alike["B"].correlation == pytest.approx(0.5**0.5) == alike["update"].correlation
    assert alike["update"].effective_rank == pytest.approx(1.0, abs=1e-6)


def test_a_run_s_experts_are_found(tmp_path: Path) -> None:
    learner = make("moe-adapters")
    for task in range(2):
        learner.learn(toy_task(task, 12))
    learner.save_pretrained(tmp_path)
    found = spectra_of(tmp_path)
    banks = {
        key.replace("/", "."): layer.bank
        for key, layer in learner.method.layers.items()
        if isinstance(layer.bank, ExpertBank)
    }
    assert set(found.by_layer()) == set(banks)
    for layer, own in found.by_layer().items():
        bank = banks[layer]
        assert [update.expert for update in own] == list(range(len(bank)))
        a, b = bank.A.all().detach(), bank.B.all().detach()
        for update in own:
            assert update.expert is not None and update.rank == bank.r
            assert update.spreads == spread_of(a[update.expert], b[update.expert])
            assert_dense(update, b[update.expert].T @ a[update.expert])


def assert_dense(update: UpdateSpread, delta: Tensor) -> None:
    """Its numbers are those of the whole matrix's singular values."""
    values = torch.linalg.svdvals(delta.detach().double())[: update.rank]
    shown = update.spreads["update"]
    assert shown.effective_rank == pytest.approx(effective_rank(values), rel=1e-4)
    assert shown.stable_rank == pytest.approx(stable_rank(values), rel=1e-4)


@pytest.mark.parametrize("method", ["sequential-lora", "branch-lora", "moe-cl"])
def test_banks_of_every_kind_are_found(method: str, tmp_path: Path) -> None:
    learner = make(method)
    learner.learn(toy_task(0, 12))
    learner.save_pretrained(tmp_path)
    found = spectra_of(tmp_path)
    assert {place_of(update.layer)[1] for update in found.updates} == {"0", "1"}
    assert all(update.spreads["A"].effective_rank > 1.5 for update in found.updates)
    assert "nan" not in share_map(found, "update")


def test_experts_that_write_nothing_yet_do_not_count_beside_others() -> None:
    def update(b: Tensor) -> UpdateSpread:
        return UpdateSpread(layer="l", expert=0, rank=2, spreads=spread_of(torch.eye(2, 5), b))

    busy, idle = update(torch.eye(2, 4)), update(torch.zeros(2, 4))
    assert idle.idle and not busy.idle
    for own, effective, size in (
        ([busy, idle, idle], 2.0, "2 x 3, 2 idle"),
        ([idle], 0.0, "2, 1 idle"),
        ([busy], 2.0, "2"),
    ):
        ((_, shown, numbers),) = rows_of(Spectra(source="run", updates=tuple(own)))
        assert shown == size and numbers[0] == pytest.approx(2.0)
        assert numbers[3] == numbers[6] == pytest.approx(effective)


def test_pools_have_factors_and_no_one_update(tmp_path: Path) -> None:
    """DeLo pairs its factors anew for each input, so that only they have a spectrum."""
    learner = make("delo")
    for task in range(2):
        learner.learn(toy_task(task, 12))
    learner.save_pretrained(tmp_path)
    found = spectra_of(tmp_path)
    pools = {
        name.removeprefix("layers.").replace("/", "."): module
        for name, module in learner.method.named_modules()
        if isinstance(module, FactorPool)
    }
    assert pools and set(found.by_layer()) == set(pools)
    for layer, own in found.by_layer().items():
        a, b = (torch.cat(both) for both in zip(
            pools[layer].pairs(frozen=True), pools[layer].pairs(), strict=True
        ))  # fmt: skip
        assert [update.expert for update in own] == [0, 1] and own[0].rank == 4
        for update, down, up in zip(own, a.detach(), b.detach(), strict=True):
            expected = spread_of(down, up)
            del expected["update"]
            assert update.spreads == expected
    assert rows_of(found)[0][2][6:] == [None, None, None]
    assert share_map(found, "update").count('class="none"') == len(pools)
    html = write_spectra(found, tmp_path / "page.html").read_text()
    assert html.count('<td data-value="">-</td>') == 3 * len(pools)
    assert html.count("<svg") == 5  # maps of A and of B, and their scale


def test_folders_that_hold_no_pairs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no finished run, artefact or PEFT adapter"):
        spectra_of(tmp_path)
    make("zero-shot").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="no low-rank updates that stand in pairs"):
        spectra_of(tmp_path)


def peft_folder(folder: Path, config: Any = None, **settings: Any) -> Any:
    pytest.importorskip("peft")
    from tests.regularizers.peft_models import adapted

    model = adapted(config, **settings)
    model.save_pretrained(folder)
    return model


def test_an_adapter_of_peft_is_read(tmp_path: Path) -> None:
    model = peft_folder(tmp_path, target_modules=["first", "conv", "embed"], r=4)
    found = {update.layer: update for update in spectra_of(tmp_path).updates}
    assert set(found) == {"first", "conv", "embed"}
    base = model.base_model.model

    def of(a: Tensor, b: Tensor) -> Any:
        return spread_of(a.detach().flatten(1), b.detach().flatten(1).T)

    first, embed = base.first, base.embed
    factors = (first.lora_A["default"].weight, first.lora_B["default"].weight)
    assert found["first"].spreads == of(*factors)
    assert found["embed"].spreads == of(
        embed.lora_embedding_A["default"], embed.lora_embedding_B["default"]
    )
    assert_dense(found["first"], first.get_delta_weight("default"))
    assert_dense(found["embed"], embed.get_delta_weight("default"))


@pytest.mark.parametrize("kind", ["adalora", "kasa", "delora"])
def test_what_peft_puts_between_the_factors_is_in_the_update(kind: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from peft.tuners.lora.config import KasaConfig as kasa

    first: dict[str, Any] = {"target_modules": ["first"]}
    config = {
        "adalora": lambda: peft.AdaLoraConfig(init_r=4, total_step=10, **first),
        "kasa": lambda: peft.LoraConfig(r=4, kasa_config=kasa(), **first),
        "delora": lambda: peft.DeloraConfig(r=4, **first),
    }[kind]()
    from tests.regularizers.peft_models import adapted

    model = adapted(config)
    layer = model.base_model.model.first
    with torch.no_grad():
        if kind == "kasa":
            layer.lora_diag["default"].copy_(torch.tensor([3.0, 1.0, 0.3, 0.1]))
        if kind == "delora":
            layer.delora_A["default"].mul_(torch.tensor([[9.0], [3.0], [1.0], [0.3]]))
            layer.delora_w_norm["default"].copy_(torch.linspace(0.2, 3.0, 12))
    model.save_pretrained(tmp_path)
    (update,) = spectra_of(tmp_path).updates
    if kind == "kasa":
        parts = (layer.lora_B["default"].weight, layer.lora_diag["default"].diag())
        assert_dense(update, parts[0] @ parts[1] @ layer.lora_A["default"].weight)
    else:
        assert_dense(update, layer.get_delta_weight("default"))


def test_experts_of_a_mixture_are_updates_and_a_wider_linear_is_one(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from peft import LoraConfig

    mixture = LoraConfig(
        target_modules=["first"], target_parameters=["experts.weight"], r=4,
        rank_pattern={"first": 8},
    )  # fmt: skip
    model = peft_folder(tmp_path, mixture)
    layers = spectra_of(tmp_path).by_layer()
    deltas = model.base_model.model.experts.get_delta_weight("default")
    assert [update.expert for update in layers["experts"]] == [0, 1, 2]
    for update, own in zip(layers["experts"], deltas, strict=True):
        assert_dense(update, own)
    (wide,) = layers["first"]
    assert wide.rank == 8
    assert_dense(wide, model.base_model.model.first.get_delta_weight("default"))


def test_damaged_adapters_are_named(tmp_path: Path) -> None:
    peft_folder(tmp_path)
    config = tmp_path / "adapter_config.json"
    for content, message in (("{", "Expecting"), ("[]", "it holds no settings")):
        whole, _ = config.read_text(), config.write_text(content)
        with pytest.raises(StorageError, match=rf"cannot read .*adapter_config\.json: {message}"):
            spectra_of(tmp_path)
        config.write_text(whole)
    weights = tmp_path / "adapter_model.safetensors"
    tensors = load_file(weights)
    name = next(name for name in tensors if "lora_B" in name)
    save_file({**tensors, name: tensors[name] * float("nan")}, weights)
    with pytest.raises(ConfigError, match=r"factors of \w+ hold values that are not finite"):
        spectra_of(tmp_path)
    save_file({n: t for n, t in tensors.items() if n != name}, weights)
    with pytest.raises(StorageError, match="no other factor beside it"):
        spectra_of(tmp_path)
    save_file(tensors, weights)
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(StorageError, match="is not a readable safetensors file"):
        spectra_of(tmp_path)
    weights.unlink()
    with pytest.raises(StorageError, match=r"cannot read .*adapter_model\.safetensors: No such"):
        spectra_of(tmp_path)


def test_damaged_artefacts_are_named(tmp_path: Path) -> None:
    make("sequential-lora").save_pretrained(tmp_path)
    index = json.loads((tmp_path / "evolora.json").read_text())
    (tmp_path / "evolora.json").write_text(json.dumps({**index, "tensors": {}}))
    with pytest.raises(StorageError, match=r"evolora\.json is corrupt: it names no tensors"):
        spectra_of(tmp_path)


def test_layers_whose_ranks_stand_in_no_pairs_are_left_out_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peft = pytest.importorskip("peft")
    from tests.regularizers.peft_models import Net

    model = Net()
    model.conv = torch.nn.Conv1d(12, 12, 3, padding=1, groups=2)  # type: ignore[assignment]
    config = peft.LoraConfig(target_modules=["conv", "first"], r=4)
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    found = spectra_of(tmp_path / "adapter")
    assert found.left_out == ("conv",) and set(found.by_layer()) == {"first"}
    page = tmp_path / "page.html"
    with pytest.raises(SystemExit):
        main(["inspect", str(tmp_path / "adapter"), "--redundancy", "--figure", str(page)])
    said = "no factors that stand in pairs of ranks: conv"
    assert said in capsys.readouterr().err and said in page.read_text()


def test_the_command_prints_a_table_json_and_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def inspect(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main(["inspect", *words])
        shown = capsys.readouterr()
        return int(end.value.code or 0), shown.out, shown.err

    adapter, page = str(tmp_path / "adapter"), tmp_path / "page.html"
    peft_folder(Path(adapter))
    code, out, err = inspect(adapter, "--redundancy", "--figure", str(page))
    assert code == 0 and "figure: " in err
    assert "erank update" in out and "second" in out
    html = page.read_text()
    assert html.count("<svg") == 7 and "|cos| A" in html  # six maps and their scale
    assert "src=" not in html and "https:" not in html
    code, out, _ = inspect(adapter, "--redundancy", "--json")
    assert code == 0 and json.loads(out)["updates"][0]["spreads"]["A"]["effective_rank"] > 1
    for words in (["--figure", str(page)], ["--redundancy", "--tasks", "2"]):
        code, _, err = inspect(adapter, *words)
        assert code == 2 and "--redundancy goes with a folder" in err
    code, _, err = inspect("nowhere", "--redundancy")
    assert code == 2 and "reads the folder of a run or adapter; got nowhere" in err
    code, _, err = inspect("long" * 99, "--redundancy")
    assert code == 2 and err.endswith("long: File name too long\n")
    code, out, err = inspect(adapter, "--redundancy", "--figure", adapter)
    assert code == 2 and f"cannot write {adapter}: Is a directory" in err and out == ""


@pytest.mark.skipif(os.geteuid() == 0, reason="root may look into every folder")
def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0)
    try:
        with pytest.raises(StorageError, match=r"cannot read .*: Permission denied"):
            spectra_of(tmp_path)
    finally:
        tmp_path.chmod(0o700)


def test_layers_are_placed_by_kind_and_block(tmp_path: Path) -> None:
    assert place_of("vision.3.q_proj") == ("vision q_proj", "3")
    assert place_of("model.layers.11.self_attn.v_proj") == ("v_proj", "11")
    assert place_of("classifier") == ("classifier", "-")
    peft_folder(tmp_path)
    path = write_spectra(spectra_of(tmp_path), tmp_path / "page.html")
    assert "first" in path.read_text()


def test_kinds_of_which_a_block_has_several_are_kept_apart() -> None:
    found = places_of(["q.0.attention.value", "q.0.crossattention.value", "q.1.attention.value"])
    assert found == {
        "q.0.attention.value": ("attention.value", "0"),
        "q.0.crossattention.value": ("crossattention.value", "0"),
        "q.1.attention.value": ("attention.value", "1"),
    }
    assert places_of(["q.0.self_attn.v_proj"]) == {"q.0.self_attn.v_proj": ("v_proj", "0")}


def test_layers_stand_in_the_order_of_their_blocks(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from peft import LoraConfig, get_peft_model

    model = torch.nn.Sequential(*(torch.nn.Linear(5, 5) for _ in range(12)))
    names = [str(index) for index in range(12)]
    get_peft_model(model, LoraConfig(target_modules=names, r=2)).save_pretrained(tmp_path)
    assert list(spectra_of(tmp_path).by_layer()) == names
