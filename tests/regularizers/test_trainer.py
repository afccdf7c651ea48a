"""Fine-tuning by the Hugging Face Trainer: accumulation, evaluation, checkpointing, precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("peft")

from peft import PeftModel
from safetensors.torch import load_file
from tests.regularizers.peft_models import sentences, tiny_llama
from transformers import Trainer, TrainingArguments

from evolora.errors import ConfigError
from evolora.regularizers.settings import ResoraConfig
from evolora.regularizers.trainer import ResoraTrainerMixin

WEIGHTS = ResoraConfig(weight=1.0, warmup=0.0, measure_down="w_cos", measure_up="w_cos")
FEATURES = ResoraConfig(weight=1.0, warmup=0.0, measure_down="f_corr", measure_up="f_contrib")


class RegularisedTrainer(ResoraTrainerMixin, Trainer):
    """The mixin as a user has it."""


class KeepsGradients(RegularisedTrainer):
    """Notes the gradients of each optimizer step, and the hooks of the last forward."""

    def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        self.hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
        return super().compute_loss(model, *args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        optimizer = super().create_optimizer(*args, **kwargs)
        self.pulled: list[dict[str, Tensor]] = []

        def note(*_: Any) -> None:
            assert self.model is not None
            found = {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}
            self.pulled.append({name: gradient.clone() for name, gradient in found.items()})

        optimizer.register_step_pre_hook(note)
        return optimizer


def trainer(
    folder: Path, config: ResoraConfig, model: Any = None, kind: Any = KeepsGradients, **args: Any
) -> Any:
    given: dict[str, Any] = {
        "per_device_train_batch_size": 4, "max_steps": 1, "learning_rate": 1e-2, "seed": 1,
        "report_to": [], "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True,
        "use_cpu": True, "max_grad_norm": 0.0, "remove_unused_columns": False, **args,
    }  # fmt: skip
    return kind(
        model=tiny_llama() if model is None else model,
        args=TrainingArguments(output_dir=str(folder), **given),
        train_dataset=sentences(4),  # type: ignore[arg-type]
        eval_dataset=sentences(4),
        resora=config,
    )


def pulled(folder: Path, config: ResoraConfig, **args: Any) -> dict[str, Tensor]:
    """Gradients of one optimizer step on the four sentences."""
    made = trainer(folder, config, **args)
    made.train()
    return dict(made.pulled[0])


def difference(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: mine[name] - theirs[name] for name in theirs}


OFF = ResoraConfig(weight=0.0)


def by_function(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """A loss of the user's own, over the tokens of all forwards of a step."""
    logits = outputs["logits"][:, :-1].flatten(0, 1)
    found = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
    return found / num_items_in_batch


@pytest.mark.parametrize("scaled", ["by items", "by steps", "by a function", "smoothed"])
def test_one_step_of_four_equals_four_forwards_of_one(tmp_path: Path, scaled: str) -> None:
    """Whoever makes the loss and divides it by the accumulation steps: Trainer, model or user."""

    class Declared(KeepsGradients):
        loss_is_scaled_for_ga = False if scaled == "by steps" else None

        def __init__(self, **kwargs: Any) -> None:
            given = {"compute_loss_func": by_function} if scaled == "by a function" else {}
            super().__init__(**kwargs, **given)
            self.model_accepts_loss_kwargs &= scaled != "by a function"  # as many models do not

    own: dict[str, Any] = {"kind": Declared}
    if scaled == "smoothed":  # the model's own loss is not asked for
        own["label_smoothing_factor"] = 0.1
    whole, plain = pulled(tmp_path, WEIGHTS, **own), pulled(tmp_path, OFF, **own)
    cut = {**own, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    parts, plain_parts = pulled(tmp_path, WEIGHTS, **cut), pulled(tmp_path, OFF, **cut)
    term = difference(whole, plain)
    assert max(float(gradient.abs().max()) for gradient in term.values()) > 1e-3
    torch.testing.assert_close(difference(parts, plain_parts), term, rtol=1e-3, atol=1e-6)


def test_losses_of_evaluation_are_the_plain_trainer_s(tmp_path: Path) -> None:
    mine = trainer(tmp_path, FEATURES).evaluate()["eval_loss"]
    plain = Trainer(
        model=tiny_llama(), args=trainer(tmp_path, OFF).args, eval_dataset=sentences(4)
    ).evaluate()["eval_loss"]
    assert mine == plain
    during = trainer(tmp_path, FEATURES, eval_strategy="steps", eval_steps=1, learning_rate=0.0)
    during.train()
    found = [entry["eval_loss"] for entry in during.state.log_history if "eval_loss" in entry]
    assert found == [pytest.approx(plain, abs=1e-6)]


def test_the_parts_of_the_loss_are_logged_beside_it(tmp_path: Path) -> None:
    cut: dict[str, Any] = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    made = trainer(tmp_path, FEATURES, **cut)
    made.train()
    (entry,) = [e for e in made.state.log_history if "loss" in e]
    assert entry["resora"] == pytest.approx(entry["redundancy_down"] + entry["redundancy_up"])
    assert entry["loss"] == pytest.approx(entry["task_loss"] + entry["resora"], rel=0.05)
    assert entry["resora"] > 0


@pytest.mark.parametrize("config", [FEATURES, WEIGHTS], ids=["features", "weights"])
def test_gradient_checkpointing_changes_nothing(tmp_path: Path, config: ResoraConfig) -> None:
    plain = pulled(tmp_path, config)
    again = pulled(
        tmp_path,
        config,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    torch.testing.assert_close(again, plain, rtol=1e-4, atol=1e-6)
    free = pulled(tmp_path, OFF)
    assert any(not torch.allclose(again[name], free[name]) for name in free)


def test_reentrant_checkpointing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="use_reentrant=False"):
        pulled(
            tmp_path,
            FEATURES,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": True},
        )


def test_without_weight_gradients_are_bit_for_bit_those_of_the_plain_trainer(
    tmp_path: Path,
) -> None:
    class Plain(KeepsGradients):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return Trainer.compute_loss(self, *args, **kwargs)

    off, plain = pulled(tmp_path, OFF), pulled(tmp_path, OFF, kind=Plain)
    assert all(torch.equal(off[name], gradient) for name, gradient in plain.items())
    made = {name: trainer(tmp_path, config) for name, config in (("off", OFF), ("on", FEATURES))}
    for one in made.values():
        one.train()
    assert any(not torch.equal(made["on"].pulled[0][name], plain[name]) for name in plain)
    assert made["off"].hooks == 0 < made["on"].hooks


def test_bf16_forwards_are_measured_in_float32(tmp_path: Path) -> None:
    full = difference(pulled(tmp_path, WEIGHTS), pulled(tmp_path, OFF))
    half = difference(pulled(tmp_path, WEIGHTS, bf16=True), pulled(tmp_path, OFF, bf16=True))
    torch.testing.assert_close(half, full, rtol=1e-2, atol=1e-4)
    assert all(torch.isfinite(g).all() for g in pulled(tmp_path, FEATURES, bf16=True).values())


@pytest.mark.slow
def test_a_compiled_model_is_regularised(tmp_path: Path) -> None:
    plain = pulled(tmp_path, FEATURES)
    compiled = pulled(tmp_path, FEATURES, torch_compile=True, torch_compile_backend="aot_eager")
    torch._dynamo.reset()
    torch.testing.assert_close(compiled, plain, rtol=1e-3, atol=1e-5)


def test_the_model_that_is_left_is_a_stock_one(tmp_path: Path) -> None:
    model = tiny_llama()
    keys = set(model.state_dict())
    made = trainer(tmp_path, FEATURES, model, max_steps=3)
    made.train()
    assert set(model.state_dict()) == keys
    assert not any(module._forward_hooks for module in model.modules())
    made.save_model(str(tmp_path / "adapter"))
    free = trainer(tmp_path, OFF, max_steps=3)
    free.train()
    free.save_model(str(tmp_path / "free"))
    files = [tmp_path / name for name in ("adapter", "free")]
    assert len({(one / "adapter_config.json").read_text() for one in files}) == 1
    mine, plain = (load_file(one / "adapter_model.safetensors") for one in files)
    assert {n: t.shape for n, t in mine.items()} == {n: t.shape for n, t in plain.items()}
    assert any(not torch.equal(mine[name], plain[name]) for name in plain)
    batch = {k: torch.stack([s[k] for s in sentences(4)]) for k in ("input_ids", "attention_mask")}
    model.eval()
    again = PeftModel.from_pretrained(tiny_llama().unload(), tmp_path / "adapter").eval()
    with torch.no_grad():
        expected = model(**batch).logits
        torch.testing.assert_close(again(**batch).logits, expected)
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(**batch).logits, expected, rtol=1e-5, atol=1e-5)


def test_redundancy_falls(tmp_path: Path) -> None:
    found = {}
    for name, config in (("free", ResoraConfig(weight=1e-12, warmup=0.0)), ("held", FEATURES)):
        made = trainer(tmp_path, config, max_steps=15)
        made.train()
        found[name] = made.state.log_history[-2]["redundancy_down"]
    assert found["held"] < 0.6 * found["free"]


def test_learned_scales_are_trained_beside_the_model_and_are_no_part_of_it(tmp_path: Path) -> None:
    config = ResoraConfig(weight=1.0, warmup=0.0, adaptivity="learned")
    model = tiny_llama()
    keys = set(model.state_dict())
    made = trainer(tmp_path, config, model, max_steps=4)
    made.train()
    scales = {side: scale.item() for side, scale in made.resora.scales.items()}
    # Adam moves by the rate (linearly falling) where the sign of the gradient stays.
    assert all(-0.026 < scale < -0.02 for scale in scales.values())
    assert all(scale.grad is None for scale in made.resora.scales.values())
    assert set(model.state_dict()) == keys


def test_padding_is_not_seen(tmp_path: Path) -> None:
    """The mask that goes to the model goes to the regulariser."""

    class Longer(KeepsGradients):
        """Pads the batch by tokens that the plain one does not have."""

        def _prepare_inputs(self, inputs: Any) -> Any:
            given = super()._prepare_inputs(inputs)
            return {
                name: torch.nn.functional.pad(value, (0, 4), value=-100 if name == "labels" else 0)
                for name, value in given.items()
            }

    plain, longer = pulled(tmp_path, FEATURES), pulled(tmp_path, FEATURES, kind=Longer)
    torch.testing.assert_close(longer, plain, rtol=1e-3, atol=1e-6)


def test_several_gpus_of_one_process_are_refused(tmp_path: Path) -> None:
    args = trainer(tmp_path, OFF).args
    args._n_gpu = 2
    with pytest.raises(ConfigError, match=r"one process drives 2 GPUs.*torchrun"):
        RegularisedTrainer(model=tiny_llama(), args=args, resora=FEATURES)


def test_a_model_without_adapters_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="LlamaForCausalLM has none of PEFT's"):
        trainer(tmp_path, FEATURES, tiny_llama().unload())
