"""Queries of ModelOpt's quantizers in a model: active roundings, the KV cache's recipe, the size of the export."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch

from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.workflow.quantize.record import KVCache
from sglang_modelopt_kernels.formats.kv_cache import KV_RECIPES

EXPERT_WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")
"""Parameters of fused experts in transformers; ModelOpt names their quantizers after these."""

_KV_FORMATS = {(4, 3): "fp8", (2, 1): "nvfp4"}


def quantized_linears(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield every linear layer and embedding whose weight is quantized, with its name."""
    for name, module in model.named_modules():
        if getattr(module, "weight", None) is not None and is_on(getattr(module, "weight_quantizer", None)):
            yield name, module


def fused_experts(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield every module that holds stacked weights of a layer's experts, ``[experts, ..., ...]``, with its name."""
    for name, module in model.named_modules():
        if any(
            key in EXPERT_WEIGHTS and parameter is not None and parameter.dim() == 3
            for key, parameter in module._parameters.items()
        ):
            yield name, module


def is_packed(module: Any) -> bool:
    """Return whether ModelOpt exports a module's experts packed: it then has one weight quantizer for all of them."""
    return any(hasattr(module, f"{key}_weight_quantizer") for key in EXPERT_WEIGHTS)


def _weight_quantizers(module: Any, key: str) -> Any:
    """Return the weight quantizers of a projection of experts: several, or one for all; None without any."""
    several = getattr(module, f"{key}_weight_quantizers", None)
    return several if several is not None else getattr(module, f"{key}_weight_quantizer", None)


def projections_of_expert(module: Any) -> Iterator[torch.nn.Module]:
    """Yield each quantized projection of one of a module's experts as a linear layer: without values, with its quantizers."""
    for key in EXPERT_WEIGHTS:
        weight, found = module._parameters.get(key), _weight_quantizers(module, key)
        if weight is None or not is_on(found):
            continue
        one = torch.nn.Module()
        empty = torch.empty(weight.shape[1:], dtype=weight.dtype, device="meta")
        one.weight = torch.nn.Parameter(empty, requires_grad=False)
        one.weight_quantizer = found[0] if isinstance(found, torch.nn.ModuleList) else found
        one.input_quantizer = getattr(module, f"{key}_input_quantizer")
        yield one


def is_on(quantizer: Any) -> bool:
    """Return whether a quantizer, or any of several, is enabled."""
    if isinstance(quantizer, torch.nn.Sequential | torch.nn.ModuleList):
        return any(is_on(part) for part in quantizer)
    return bool(getattr(quantizer, "is_enabled", False))


def can_skip_logits(model: Any) -> bool:
    """Return whether a forward pass without the logits reaches every quantizer, and the model has one.

    transformers' models compute the logits of the last ``logits_to_keep`` tokens only.
    """
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return False
    head = model.get_output_embeddings()
    return head is not None and not any(
        is_on(module) for name, module in head.named_modules() if name.endswith("_quantizer")
    )


def rounds_activations(model: torch.nn.Module) -> bool:
    """Return whether inputs are rounded: those of MXFP4 layers, whose export does not say it, else of any layer.

    Call it before the export, which removes quantizers.

    Raises:
        ModelOptExtError: some MXFP4 layers round their inputs and others do not, which the export cannot express.
    """
    pairs = list(_quantizer_pairs(model))
    in_doubt = {
        is_on(inputs): name
        for name, weights, inputs in pairs
        if _is_mxfp4(weights) and (_is_mxfp4(inputs) or not is_on(inputs))
    }
    if len(in_doubt) > 1:
        expected = "MXFP4 layers that all round their inputs or none: the export does not say which do"
        raise ModelOptExtError.at("model", f"{in_doubt[True]}, {in_doubt[False]}", expected, "one of each")
    return next(iter(in_doubt)) if in_doubt else any(is_on(inputs) for _, _, inputs in pairs)


def _quantizer_pairs(model: torch.nn.Module) -> Iterator[tuple[str, Any, Any]]:
    """Yield the name and the quantizers of weight and input of every quantized linear layer and product of experts."""
    for name, module in quantized_linears(model):
        yield name, module.weight_quantizer, getattr(module, "input_quantizer", None)
    for name, module in fused_experts(model):
        for key in EXPERT_WEIGHTS:
            weights = _weight_quantizers(module, key)
            if is_on(weights):
                yield f"{name}.{key}", weights, getattr(module, f"{key}_input_quantizer", None)


def _is_mxfp4(quantizer: Any) -> bool:
    """Return whether an enabled quantizer, or the first of several, rounds to E2M1 under powers of two."""
    if isinstance(quantizer, torch.nn.Sequential | torch.nn.ModuleList):
        quantizer = quantizer[0] if len(quantizer) else None
    return is_on(quantizer) and quantizer.num_bits == (2, 1) and bool(quantizer.is_mx_format)


def kv_cache(model: torch.nn.Module) -> tuple[str | None, KVCache | None]:
    """Return the recipe of the KV cache (a name of ``KV_RECIPES``) and its parts; two None without one.

    Raises:
        ModelOptExtError: keys and values quantized in different formats, or in one this package has no recipe for.
    """
    found: dict[tuple[str, KVCache], str] = {}
    for name, module in model.named_modules():
        key, value = getattr(module, "k_bmm_quantizer", None), getattr(module, "v_bmm_quantizer", None)
        if not is_on(key) and not is_on(value):
            continue
        bits = {str(getattr(side, "num_bits", None)) if is_on(side) else "none" for side in (key, value)}
        number = _KV_FORMATS.get(getattr(key, "num_bits", None))  # type: ignore[arg-type]
        if len(bits) > 1 or number is None:
            raise ModelOptExtError.at(
                name, "KV cache", "keys and values in FP8 or in NVFP4", " and ".join(sorted(bits))
            )
        cache = KVCache(
            rotate=bool(getattr(key, "rotate_is_enabled", False)),
            affine=getattr(key, "bias", None) is not None,
            calibrated=not getattr(key, "_use_constant_amax", False),
        )
        found[number, cache] = name
    if not found:
        return None, None
    if len(found) > 1:
        raise ModelOptExtError.at(
            " and ".join(found.values()), "KV cache", "one recipe for every attention layer", "several"
        )
    ((number, cache),) = found
    recipe = number + ("_affine" if cache.affine else "") + ("_rotate" if cache.rotate else "")
    if recipe not in KV_RECIPES:
        raise ModelOptExtError.at("model", "KV cache", f"one of {', '.join(KV_RECIPES)}", recipe)
    return recipe, cache


def expected_bytes(model: torch.nn.Module) -> int:
    """Return the approximate bytes of the export of a model with quantizers, on the high side."""
    total = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    for _, module in quantized_linears(model):
        weight = module.weight
        if weight.element_size() > 1:
            total -= int(weight.numel() * (weight.element_size() - _stored_bits(module.weight_quantizer) / 8))
    return total


def _stored_bits(quantizer: Any) -> float:
    """Return stored bits per weight, block scales included; of several quantizers the first one decides."""
    first: Any = quantizer[0] if isinstance(quantizer, torch.nn.Sequential) else quantizer
    bits = first.num_bits
    width = bits if isinstance(bits, int) else 1 + sum(bits)
    blocks = [size for size in (first.block_sizes or {}).values() if isinstance(size, int)]
    scale = 32 if isinstance(bits, int) else 8  # integer formats store float32 scales
    return width + (scale / min(blocks) if blocks else 0.0)


def count_packed(model: torch.nn.Module) -> int:
    """Return the number of the model's weights that a running export has already packed."""
    packed = 0
    for module in list(model.modules()):
        weight = module._parameters.get("weight")
        packed += weight is not None and weight.element_size() == 1
    return packed
