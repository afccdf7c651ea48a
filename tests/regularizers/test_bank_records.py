"""What experts told of tokens, in every form in which they are mixed, against one look at each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tests.experts.builders import D_IN, D_OUT, TOKENS, R, make_bank, per_token
from tests.experts.test_woven import grown
from tests.experts.test_woven import layer as woven
from torch import Tensor, nn

from evolora.errors import ConfigError
from evolora.experts.bank import ExpertBank
from evolora.experts.factor_pool import FactorConfig, FactorPool
from evolora.experts.mixing import mix
from evolora.experts.sites import SiteHost
from evolora.regularizers.bank_records import BankRecords
from evolora.regularizers.resora import Record, Resora
from evolora.regularizers.settings import ResoraConfig
from evolora.routing.route import Route

ROWS, EXPERTS = 5, 4
FROZEN = (2,)


class Holder(nn.Module):
    """A layer that has a bank."""

    def __init__(self, bank: nn.Module) -> None:
        super().__init__()
        self.bank = bank


def records_of(bank: nn.Module, lengths: Sequence[int] | None = None, **settings: Any) -> Any:
    """Records of one site, whose route says how many tokens of each row are its own."""
    host = SiteHost()
    summary: Any = "first" if lengths is None else torch.tensor(lengths) - 1
    host.set_route("vision", Route.of(0, ROWS, summary=summary))
    layers = nn.ModuleDict({"vision/0/fc1": Holder(bank)})
    chosen = {"measure_down": "f_corr", "measure_up": "f_contrib", **settings}
    return BankRecords(layers, host, Resora(ResoraConfig(**chosen)))


def expected(
    bank: ExpertBank, x: Tensor, ids: Tensor, gates: Tensor | None, lengths: Sequence[int] | None
) -> dict[int, tuple[int, Tensor]]:
    """(tokens, covariance) of every expert, from its own tokens one by one."""
    a = bank.A.all()
    down = None if bank.down_bias is None else bank.down_bias.all()
    found = {}
    for expert in range(len(bank)):
        seen = []
        for row in range(ROWS):
            for token in range(TOKENS if lengths is None else lengths[row]):
                for position, chosen in enumerate(ids[row, token].tolist()):
                    if chosen == expert and (gates is None or gates[row, token, position] != 0):
                        z = a[expert] @ x[row, token]
                        if down is not None:
                            z = torch.relu(z + down[expert])
                        seen.append(z)
        covariance = torch.zeros(R, R, dtype=x.dtype)
        if seen:
            z = torch.stack(seen)
            z = z - z.mean(dim=0)
            covariance = z.T @ z / len(z)
        found[expert] = len(seen), covariance
    return found


def assert_told(
    record: Record, bank: ExpertBank, wanted: dict[int, tuple[int, Tensor]], places: Sequence[int]
) -> None:
    assert record.features is not None and len(record.a) == len(places)
    for index, expert in enumerate(places):
        count, covariance = wanted[expert]
        assert int(record.features.count[index]) == count
        torch.testing.assert_close(record.features.covariance[index].double(), covariance.detach())
        torch.testing.assert_close(record.a[index], bank.A.all()[expert])


FORMS = ["gather", "stacked", "segments", "grouped"]


@pytest.mark.parametrize("detach_input", [False, True])
@pytest.mark.parametrize("lengths", [None, (6, 1, 3, 5, 2)], ids=["whole", "padded"])
@pytest.mark.parametrize("bottleneck", [False, True], ids=["lora", "bottleneck"])
@pytest.mark.parametrize("form", [*FORMS, "shared", "listed"])
def test_every_form_tells_what_each_expert_made_of_its_tokens(
    form: str, bottleneck: bool, lengths: Sequence[int] | None, detach_input: bool
) -> None:
    bank = make_bank(bottleneck, EXPERTS, FROZEN)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, TOKENS, D_IN, generator=draw, dtype=torch.float64, requires_grad=True)
    out = torch.zeros(ROWS, TOKENS, D_OUT, dtype=torch.float64)
    ids = torch.stack([torch.randperm(EXPERTS, generator=draw)[:2] for _ in range(ROWS)])
    gates = torch.rand(ROWS, 2, generator=draw, dtype=torch.float64)
    gates[1, 0] = gates[3, 1] = 0.0
    given: Any = ids
    if form in ("shared", "listed"):
        ids, gates = torch.tensor([[3, 0]]), gates[:1].clamp_min(0.1)
        given = ids if form == "shared" else (3, 0)
    records = records_of(bank, lengths, measure_up="none", detach_input=detach_input)
    plain = mix(out, x, bank, given, gates, formulation=form if form != "listed" else "auto")  # type: ignore[arg-type]
    with records.watching():
        told = mix(out, x, bank, given, gates, formulation=form if form != "listed" else "auto")  # type: ignore[arg-type]
        with torch.no_grad():  # a pass that does not train is not looked at
            mix(out, 5.0 * x, bank, given, gates)
    assert torch.equal(told, plain)
    assert bank.recorder is None
    (record,) = records.collect()
    wanted = expected(
        bank, x, per_token(ids, ROWS, TOKENS), per_token(gates, ROWS, TOKENS), lengths
    )
    assert_told(record, bank, wanted, [0, 1, 3])
    assert record.features is not None
    record.features.covariance.sum().backward()
    assert bank.A.active.grad is not None and bank.A.active.grad.abs().sum() > 0
    assert (x.grad is None) == detach_input


@pytest.mark.parametrize("form", ["auto", "dense", *FORMS])
def test_tokens_with_their_own_experts(form: Any) -> None:
    bank = make_bank(False, EXPERTS, FROZEN)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, TOKENS, D_IN, generator=draw, dtype=torch.float64)
    out = torch.zeros(ROWS, TOKENS, D_OUT, dtype=torch.float64)
    lengths = (6, 1, 3, 5, 2)
    records = records_of(bank, lengths)
    gates = torch.rand(ROWS, TOKENS, 2, generator=draw, dtype=torch.float64)
    ids = torch.randint(0, 2, (ROWS, TOKENS, 2), generator=draw) + torch.tensor([0, 2])
    given: Any = ids
    if form == "dense":  # all experts weighed per token, some silenced
        gates = torch.rand(ROWS, TOKENS, EXPERTS, generator=draw, dtype=torch.float64)
        gates = gates * (gates > 0.4)
        ids = torch.arange(EXPERTS).expand(ROWS, TOKENS, EXPERTS)
        given = range(EXPERTS)
    with records.watching():
        mix(out, x, bank, given, gates, formulation="auto" if form == "dense" else form)
    (record,) = records.collect()
    assert_told(record, bank, expected(bank, x, ids, gates, lengths), [0, 1, 3])


@pytest.mark.parametrize("detach_input", [False, True])
def test_a_path_of_woven_adapters_tells_what_its_own_adapter_reads(detach_input: bool) -> None:
    made = grown(woven(D_IN, D_OUT, R, activation="relu"), 2)
    draw, lengths = torch.Generator().manual_seed(0), torch.tensor([6, 1, 3, 5, 2])
    path = made.grow(draw)
    assert made.inner is not None
    made.inner.grow(path, draw, start="identity", std=0.02)
    host = SiteHost()
    host.set_route("qformer", Route.of(path, ROWS, summary=lengths - 1))
    resora = Resora(
        ResoraConfig(detach_input=detach_input, measure_down="f_corr", measure_up="f_contrib")
    )
    records = BankRecords(nn.ModuleDict({"qformer/0/query": made}), host, resora)
    x = torch.randn(ROWS, TOKENS, D_IN, generator=draw, requires_grad=True)
    with records.watching():
        made(x, torch.zeros(ROWS, TOKENS, D_OUT), host.route_of("qformer"))
    (record,) = records.collect()
    assert record.name == "qformer.0.query" and record.a.shape == (1, R, D_IN)
    bank = made.bank
    assert bank.down_bias is not None
    z = torch.relu(x @ bank.A.active[0].T + bank.down_bias.active[0])
    seen = torch.cat([row[:length] for row, length in zip(z, lengths.tolist(), strict=True)])
    assert record.features is not None and record.features.count.tolist() == [len(seen)]
    wanted = torch.cov(seen.T, correction=0).unsqueeze(0)
    torch.testing.assert_close(record.features.covariance, wanted)
    record.features.covariance.sum().backward()
    assert bank.A.active.grad is not None and bank.A.active.grad.abs().sum() > 0
    assert (x.grad is None) == detach_input


def test_two_groups_of_experts_are_told_apart_and_means_of_tokens_are_no_tokens() -> None:
    bank = make_bank(False, 2)
    x = torch.randn(ROWS, TOKENS, D_IN, dtype=torch.float64)
    out = torch.zeros(ROWS, TOKENS, D_OUT, dtype=torch.float64)
    records = records_of(bank)
    with records.watching():
        mix(out, x, bank, (0,))
        mix(out, 2 * x, bank, (1,))
        mix(out[:, :1], x.mean(dim=1, keepdim=True), bank, (0,))
    (record,) = records.collect()
    ids = torch.zeros(ROWS, TOKENS, 1, dtype=torch.long)
    wanted = {
        0: expected(bank, x, ids, None, None)[0],
        1: expected(bank, 2 * x, ids + 1, None, None)[1],
    }
    assert_told(record, bank, wanted, [0, 1])


def test_two_who_watch_are_both_told() -> None:
    bank = make_bank(False, 1)
    x = torch.randn(ROWS, TOKENS, D_IN, dtype=torch.float64)
    first, second = records_of(bank), records_of(bank)
    with first.watching(), second.watching():
        mix(torch.zeros(ROWS, TOKENS, D_OUT, dtype=torch.float64), x, bank, (0,))
    assert bank.recorder is None
    for records in (first, second):
        (record,) = records.collect()
        assert int(record.features.count[0]) == ROWS * TOKENS


def test_nobody_is_told_where_only_weights_are_read() -> None:
    bank = make_bank(False, 2)
    records = records_of(bank, measure_down="w_cos", measure_up="w_cos")
    with records.watching():
        assert bank.recorder is None
    (record,) = records.collect()
    assert record.features is None and record.name == "vision.0.fc1"


def test_what_cannot_be_read_is_refused() -> None:
    bank = make_bank(False, 2)
    with pytest.raises(ConfigError, match=r"none of vision\.0\.fc1"):
        records_of(bank, layers="q_proj")
    with pytest.raises(ConfigError, match="has none at any site"):
        records_of(nn.Linear(2, 2))
    pool = FactorPool(D_IN, D_OUT, D_IN, FactorConfig(num_factors=4, r=2))
    with pytest.raises(ConfigError, match=r"composed anew for each input.*use w_cos"):
        records_of(pool)
    with pytest.raises(ConfigError, match="no expert told its activations"):
        records_of(bank).collect()
    records = records_of(make_bank(False, 2), measure_down="f_dist", measure_up="none")
    x = torch.randn(ROWS, TOKENS, D_IN, dtype=torch.float64)
    out = torch.zeros(ROWS, TOKENS, D_OUT, dtype=torch.float64)
    with records.watching():
        ids = torch.zeros(ROWS, 1, dtype=torch.long)
        mix(out, x, records.sources[0].bank, ids, formulation="gather")
    with pytest.raises(ConfigError, match="not all tokens have the same experts"):
        records.collect()


def test_a_pool_of_factors_is_an_update_of_each_task() -> None:
    pool = FactorPool(D_IN, D_OUT, D_IN, FactorConfig(num_factors=4, r=2))
    for task in range(3):
        pool.grow(torch.Generator().manual_seed(task))
    records = records_of(pool, measure_down="w_cos", measure_up="none", across="tasks")
    (record,) = records.collect()
    assert record.a.shape == (1, 4, D_IN) and record.b.shape == (1, 4, D_OUT)
    assert [part.shape[0] for part, _ in record.older] == [2]
