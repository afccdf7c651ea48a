"""Evolora: teach a frozen, pretrained multimodal model task after task with low-rank experts."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from evolora.allocation.settings import GradientAllocationConfig as GradientAllocation
    from evolora.allocation.value import Allocation
    from evolora.answering import Answer
    from evolora.evaluation.tally import Evaluation
    from evolora.learner import Learner
    from evolora.methods.branch_lora import BranchLoRAConfig as BranchLoRA
    from evolora.methods.coda_prompt import CodaPromptConfig as CodaPrompt
    from evolora.methods.d_mole import DMoLEConfig as DMoLE
    from evolora.methods.delo import DeLoConfig as DeLo
    from evolora.methods.dyn_mole import DynMoLEConfig as DynMoLE
    from evolora.methods.er import ERConfig as ER
    from evolora.methods.evolora import EvoloraConfig as Evolora
    from evolora.methods.ewc import EWCConfig as EWC
    from evolora.methods.full_finetuning import FullFinetuningConfig as FullFinetuning
    from evolora.methods.l2p import L2PConfig as L2P
    from evolora.methods.linear_probe import LinearProbeConfig as LinearProbe
    from evolora.methods.lora import JointLoRAConfig as JointLoRA
    from evolora.methods.lora import LoRAPerTaskConfig as LoRAPerTask
    from evolora.methods.lora import SequentialLoRAConfig as SequentialLoRA
    from evolora.methods.map import MapConfig as Map
    from evolora.methods.moe_adapters import MoEAdaptersConfig as MoEAdapters
    from evolora.methods.moe_cl import MoECLConfig as MoECL
    from evolora.methods.moe_lora import MoELoRAConfig as MoELoRA
    from evolora.methods.pathweave import PathWeaveConfig as PathWeave
    from evolora.methods.rebq import RebQConfig as RebQ
    from evolora.methods.recipe import RecipeConfig as Recipe
    from evolora.methods.zero_shot import ZeroShotConfig as ZeroShot
    from evolora.regularizers.settings import ResoraConfig
    from evolora.training.config import TrainingConfig

_PUBLIC = {
    "Allocation": ("evolora.allocation.value", "Allocation"),
    "Answer": ("evolora.answering", "Answer"),
    "Evaluation": ("evolora.evaluation.tally", "Evaluation"),
    "BranchLoRA": ("evolora.methods.branch_lora", "BranchLoRAConfig"),
    "CodaPrompt": ("evolora.methods.coda_prompt", "CodaPromptConfig"),
    "DMoLE": ("evolora.methods.d_mole", "DMoLEConfig"),
    "DeLo": ("evolora.methods.delo", "DeLoConfig"),
    "PathWeave": ("evolora.methods.pathweave", "PathWeaveConfig"),
    "DynMoLE": ("evolora.methods.dyn_mole", "DynMoLEConfig"),
    "ER": ("evolora.methods.er", "ERConfig"),
    "EWC": ("evolora.methods.ewc", "EWCConfig"),
    "Evolora": ("evolora.methods.evolora", "EvoloraConfig"),
    "FullFinetuning": ("evolora.methods.full_finetuning", "FullFinetuningConfig"),
    "GradientAllocation": ("evolora.allocation.settings", "GradientAllocationConfig"),
    "JointLoRA": ("evolora.methods.lora", "JointLoRAConfig"),
    "L2P": ("evolora.methods.l2p", "L2PConfig"),
    "Learner": ("evolora.learner", "Learner"),
    "LinearProbe": ("evolora.methods.linear_probe", "LinearProbeConfig"),
    "LoRAPerTask": ("evolora.methods.lora", "LoRAPerTaskConfig"),
    "Map": ("evolora.methods.map", "MapConfig"),
    "MoEAdapters": ("evolora.methods.moe_adapters", "MoEAdaptersConfig"),
    "MoECL": ("evolora.methods.moe_cl", "MoECLConfig"),
    "MoELoRA": ("evolora.methods.moe_lora", "MoELoRAConfig"),
    "RebQ": ("evolora.methods.rebq", "RebQConfig"),
    "Recipe": ("evolora.methods.recipe", "RecipeConfig"),
    "ResoraConfig": ("evolora.regularizers.settings", "ResoraConfig"),
    "SequentialLoRA": ("evolora.methods.lora", "SequentialLoRAConfig"),
    "TrainingConfig": ("evolora.training.config", "TrainingConfig"),
    "ZeroShot": ("evolora.methods.zero_shot", "ZeroShotConfig"),
    "load_stream": ("evolora.config", "load_stream"),
}

__all__ = [
    "ER",
    "EWC",
    "L2P",
    "Allocation",
    "Answer",
    "BranchLoRA",
    "CodaPrompt",
    "DMoLE",
    "DeLo",
    "DynMoLE",
    "Evaluation",
    "Evolora",
    "FullFinetuning",
    "GradientAllocation",
    "JointLoRA",
    "Learner",
    "LinearProbe",
    "LoRAPerTask",
    "Map",
    "MoEAdapters",
    "MoECL",
    "MoELoRA",
    "PathWeave",
    "RebQ",
    "Recipe",
    "ResoraConfig",
    "SequentialLoRA",
    "TrainingConfig",
    "ZeroShot",
    "__version__",
    "load_stream",
]


def __getattr__(name: str) -> Any:
    """Import the public names on first use, so that ``import evolora`` does not import torch."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'evolora' has no attribute {name!r}")
    module, attribute = _PUBLIC[name]
    return getattr(import_module(module), attribute)
