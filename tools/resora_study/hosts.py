"""The four kinds of adapters that the study puts a regulariser on, behind one face.

LoRA, DoRA and AdaLoRA are PEFT's, at queries, keys, values and outputs of attention; the bottleneck
adapter is Evolora's expert with a ReLU, beside each MLP. AdaLoRA stands without its own term for
orthogonality: that is the condition "w_orth".
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from evolora.experts.bank import ExpertBank
from evolora.experts.mixing import mix
from evolora.experts.sites import SiteHost
from evolora.randomness import generator
from evolora.regularizers.bank_records import BankRecords
from evolora.regularizers.peft_records import PeftRecords
from evolora.regularizers.resora import Record, Resora
from evolora.routing.route import Route
from resora_study.data import Split
from resora_study.model import Top

HOSTS = ("lora", "bottleneck", "dora", "adalora")
RANK = 16
ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")


class Host:
    """A model with adapters that train.

    Args:
        model: with adapters.
        scale: what cosines are multiplied by before a softmax.
        pairs: names of the parameters A and B of every update.
        rank_axis: axis of B that is the rank.
    """

    def __init__(
        self, model: nn.Module, scale: float, pairs: Sequence[tuple[str, str]], rank_axis: int
    ) -> None:
        self.model, self.scale, self.pairs, self.rank_axis = model, scale, pairs, rank_axis

    def parameters(self) -> list[nn.Parameter]:
        """Returns what trains."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def embed(self, batch: Split) -> tuple[Tensor, ...]:
        """Returns the embeddings of a batch's sides."""
        found: tuple[Tensor, ...] = self.model(batch)
        return found

    def embed_without_some_ranks(
        self, batch: Split, share: float, draw: torch.Generator
    ) -> tuple[Tensor, ...]:
        """Returns embeddings where each rank is silent with a probability, others are louder.

        DropLoRA (2508.17337): one mask m over the ranks of each update and step, B diag(m) A.
        """
        parameters = dict(self.model.named_parameters())
        masked = {}
        for _, name in self.pairs:
            b = parameters[name]
            shape = [1] * b.dim()
            shape[self.rank_axis] = b.shape[self.rank_axis]
            kept = torch.rand(shape, generator=draw) >= share
            masked[name] = b * kept / (1.0 - share)
        found: tuple[Tensor, ...] = torch.func.functional_call(self.model, masked, (batch,))
        return found

    def factors(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields A (r, d_in) and the columns of B (r, d_out) of every update."""
        parameters = dict(self.model.named_parameters())
        for a, b in self.pairs:
            up = parameters[b].movedim(self.rank_axis, -2)
            yield parameters[a].flatten(0, -2), up.flatten(0, -2)

    @contextmanager
    def records(self, resora: Resora) -> Iterator[Any]:
        """Opens the reader of the adapters' records."""
        if not resora.config.active:
            yield None
            return
        with PeftRecords(self.model, resora) as found:
            yield found

    def mask_of(self, batch: Split) -> Tensor | None:
        """Returns which tokens of the texts are no padding."""
        text = batch.text
        if text is None:
            return None
        return torch.arange(text.hidden.shape[1]) <= text.summary.unsqueeze(1)

    def stepped(self, step: int) -> None:
        """Does what the adapters do after each step, while gradients are there."""


class AdaLoRAHost(Host):
    """PEFT's AdaLoRA, which takes ranks away as it goes."""

    def stepped(self, step: int) -> None:
        """Counts importance, and takes ranks away when it is time."""
        model: Any = self.model
        model.base_model.update_and_allocate(step)


class BottleneckHost(Host):
    """Evolora's experts with a ReLU beside the MLPs."""

    def __init__(self, model: nn.Module, scale: float, layers: nn.ModuleDict) -> None:
        names = [f"adapters.{key}.bank" for key in layers]
        pairs = [(f"{name}.A.active", f"{name}.B.active") for name in names]
        super().__init__(model, scale, pairs, rank_axis=1)
        self.layers, self.site_host = layers, SiteHost()

    def embed(self, batch: Split) -> tuple[Tensor, ...]:
        """Returns the embeddings of a batch's sides."""
        self._route(batch)
        return super().embed(batch)

    def _route(self, batch: Split) -> None:
        self.site_host.set_route("vision", Route.of(0, len(batch)))
        if batch.text is not None:
            route = Route.of(0, len(batch), summary=batch.text.summary)
            self.site_host.set_route("text", route)

    @contextmanager
    def records(self, resora: Resora) -> Iterator[Any]:
        """Opens the reader of the adapters' records."""
        yield _BankReader(BankRecords(self.layers, self.site_host, resora))


class _BankReader:
    """Padding is known from the route, so that no mask is read."""

    def __init__(self, records: BankRecords) -> None:
        self._records = records

    def watching(self, mask: Tensor | None) -> AbstractContextManager[None]:
        return self._records.watching()

    def collect(self) -> Sequence[Record]:
        return self._records.collect()


class Adapter(nn.Module):
    """One bottleneck expert."""

    def __init__(self, width: int, seed: int, key: str) -> None:
        super().__init__()
        self.bank = ExpertBank(width, width, RANK, bias=True, activation="relu")
        self.bank.grow(1, generator(seed, "study adapter", key))


def host_of(kind: str, top: Top, seed: int, steps: int) -> Host:
    """Returns a host on a frozen top.

    Args:
        kind: one of HOSTS.
        top: the model.
        seed: of fresh adapters.
        steps: of the training, from which AdaLoRA counts its budget.
    """
    if kind == "bottleneck":
        return _bottleneck(top, seed)
    from peft import AdaLoraConfig, LoraConfig, get_peft_model

    common: dict[str, Any] = {"lora_alpha": RANK, "target_modules": list(ATTENTION)}
    if kind == "adalora":
        config: Any = AdaLoraConfig(
            init_r=RANK, target_r=RANK // 2, total_step=steps, tinit=steps // 5,
            tfinal=steps // 4, deltaT=5, **common,
        )  # fmt: skip
    else:
        config = LoraConfig(r=RANK, use_dora=kind == "dora", **common)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        model: Any = get_peft_model(top, config)
    downs = [name for name, _ in model.named_parameters() if ".lora_A." in name]
    pairs = [(name, name.replace(".lora_A.", ".lora_B.")) for name in downs]
    return (AdaLoRAHost if kind == "adalora" else Host)(model, top.scale, pairs, rank_axis=1)


def _bottleneck(top: Top, seed: int) -> Host:
    layers = nn.ModuleDict()
    for tower, name in (("vision", "image"), ("text", "text")):
        part: Any = getattr(top, name, None)
        for index, block in enumerate(part.layers if part is not None else ()):
            key = f"{tower}/{index}/mlp"
            layers[key] = Adapter(block.layer_norm2.normalized_shape[0], seed, key)
            block.mlp.register_forward_hook(_beside(layers[key]))
    top.adapters = layers
    return BottleneckHost(top, top.scale, layers)


def _beside(adapter: Any) -> Callable[..., Tensor]:
    def hook(_: nn.Module, args: tuple[Tensor], out: Tensor) -> Tensor:
        return mix(out, args[0], adapter.bank, (0,))

    return hook
