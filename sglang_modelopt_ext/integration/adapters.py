"""LoRA adapters on quantized layers: SGLang's wrappers call a linear layer's method, and add the adapter's product to its output.

They multiply by the weight of a head themselves, and ask the method of experts for weights in SGLang's own forms: these are errors.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from typing import Any

import torch

from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.integration.hooks import Hook
from sglang_modelopt_ext.integration.linear_method import quantized_vocabularies
from sglang_modelopt_ext.integration.moe_method import ExtFusedMoEMethod

VOCABULARY_TARGETS = frozenset({"lm_head", "embed_tokens"})
"""The target modules that SGLang wraps with code of their own; a tied head is wrapped with the embedding's weight."""

EXPERT_TARGETS = frozenset({"gate_up_proj", "down_proj"})
"""The target modules that together make SGLang wrap layers of experts."""


def check_targets(model: torch.nn.Module, targets: Set[str]) -> None:
    """Raise ModelOptExtError for adapters of embeddings or heads where one is quantized, and of quantized experts.

    Args:
        model: the model that adapters are added to.
        targets: the names of the modules that may have adapters, as SGLang's classes call them.
    """
    vocabularies = sorted(targets & VOCABULARY_TARGETS)
    if vocabularies:
        for name, _ in quantized_vocabularies(model):
            raise _unsupported(f"no {' or '.join(vocabularies)} with a quantized {name}", ", ".join(vocabularies))
    if targets >= EXPERT_TARGETS:
        for name, module in model.named_modules():
            if isinstance(getattr(module, "quant_method", None), ExtFusedMoEMethod):
                some = sorted(EXPERT_TARGETS)
                raise _unsupported(f"not both of {' and '.join(some)} with quantized {name}", ", ".join(some))


def _unsupported(expected: str, got: str) -> ModelOptExtError:
    return ModelOptExtError.at("command line", "--lora-target-modules", expected, got)


def has_adapters(model: torch.nn.Module) -> bool:
    """Return whether layers of ``model`` are inside of SGLang's wrappers."""
    return any(hasattr(module, "base_layer") for module in model.modules())


def _init_lora_modules(original: Callable[..., None], self: Any) -> None:
    check_targets(self.base_model, self.target_modules)
    original(self)


HOOKS = (
    Hook(
        "sglang.srt.lora.lora_manager.LoRAManager.init_lora_modules",
        ("self",),
        "an adapter would be added to a product with the codes of a quantized head",
        _init_lora_modules,
    ),
)
