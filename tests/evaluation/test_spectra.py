"""Effective rank, stable rank and likeness of ranks: by hand, of runs and of PEFT adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import toy_task
from tests.contract.cases import make
from torch import Tensor

from evolora.cli import main
from evolora.errors import ConfigError, StorageError
from evolora.evaluation.spectra import (
    effective_rank,
    spectra_of,
    spread_of,
    stable_rank,
    update_values,
)
from evolora.experts.bank import ExpertBank
from evolora.report.spectra import place_of, places_of, share_map, write_spectra


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


@pytest.mark.parametrize("method", ["sequential-lora", "branch-lora", "moe-cl"])
def test_banks_of_every_kind_are_found(method: str, tmp_path: Path) -> None:
    learner = make(method)
    learner.learn(toy_task(0, 12))
    learner.save_pretrained(tmp_path)
    found = spectra_of(tmp_path)
    assert {place_of(update.layer)[1] for update in found.updates} == {"0", "1"}
    assert all(update.spreads["A"].effective_rank > 1.5 for update in found.updates)
    assert "nan" not in share_map(found, "update")


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
    delta = first.get_delta_weight("default").detach().double()
    values = torch.linalg.svdvals(delta)[:4]
    assert found["first"].spreads["update"].effective_rank == pytest.approx(
        effective_rank(values), rel=1e-5
    )


def test_adalora_s_values_and_a_mixture_s_experts_are_in_the_update(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from peft import AdaLoraConfig, LoraConfig

    config = AdaLoraConfig(target_modules=["first"], init_r=4, total_step=10)
    model = peft_folder(tmp_path / "ada", config)
    (update,) = spectra_of(tmp_path / "ada").updates
    delta = model.base_model.model.first.get_delta_weight("default").detach().double()
    assert update.spreads["update"].stable_rank == pytest.approx(
        stable_rank(torch.linalg.svdvals(delta)), rel=1e-5
    )
    mixture = LoraConfig(target_modules=[], target_parameters=["experts.weight"], r=4)
    model = peft_folder(tmp_path / "moe", mixture)
    updates = spectra_of(tmp_path / "moe").updates
    deltas = model.base_model.model.experts.get_delta_weight("default").detach().double()
    assert [update.expert for update in updates] == [0, 1, 2]
    for update, own in zip(updates, deltas, strict=True):
        expected = effective_rank(torch.linalg.svdvals(own)[:4])
        assert update.spreads["update"].effective_rank == pytest.approx(expected, rel=1e-5)


def test_damaged_adapters_are_named(tmp_path: Path) -> None:
    peft_folder(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(StorageError, match=r"cannot read .*adapter_config\.json"):
        spectra_of(tmp_path)


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
