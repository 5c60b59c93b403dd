"""Checks of a recipe on a model before calibration: settings that ModelOpt or a server would ignore raise an error."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from sglang_modelopt_ext.checkpoint.names import FUSED_SHARDS, is_vocabulary, matches
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.schemes.table import FP8, SCHEMES
from sglang_modelopt_ext.workflow.quantize import packed_experts, quantizers, smoothquant
from sglang_modelopt_ext.workflow.quantize.recipes import FP8_SMOOTHQUANT, SMOOTHQUANT
from sglang_modelopt_ext.workflow.quantize.record import Selection
from sglang_modelopt_kernels.formats import ACTIVATION_FORMATS
from sglang_modelopt_kernels.formats.base import BlockScale, Element

_QUANTIZERS = ("weight_quantizer", "input_quantizer", "output_quantizer")
_MLP_PARTS = frozenset({"mlp", "feed_forward", "ffn", "block_sparse_moe"})

# The algorithm that each of ModelOpt's format names, as its exporter finds them in a layer, is exported as.
_ALGOS = {
    "fp8": "FP8",
    "fp8_pc_pt": "FP8_PER_CHANNEL_PER_TOKEN",
    "fp8_pb_wo": "FP8_PB_WO",
    "int8_sq": "W8A8_SQ_PER_CHANNEL",
    "int8_wo": "W8A16",
    "int4_awq": "W4A16_AWQ",
    "w4a8_awq": "W4A8_AWQ",
    "nvfp4": "NVFP4",
    "nvfp4_awq": "NVFP4_AWQ",
    "nvfp4_svdquant": "NVFP4_SVD",
    "w4a16_nvfp4": "W4A16_NVFP4",
    "w4a8_nvfp4_fp8": "W4A8_NVFP4_FP8",
    "w4a8_mxfp4_fp8": "W4A8_MXFP4_FP8",
    "mxfp4": "MXFP4",
    "mxfp8": "MXFP8",
}
EXPERTS = (
    "FP8",
    "FP8_PER_CHANNEL_PER_TOKEN",
    "FP8_PB_WO",
    "MXFP4",
    "MXFP8",
    "NVFP4",
    "W4A16_NVFP4",
    "W4A8_NVFP4_FP8",
    "W4A8_MXFP4_FP8",
    "W8A8_SQ_PER_CHANNEL",
    "W8A16",
)
"""The algorithms in which ModelOpt 0.47 exports experts that it stores one by one."""

PACKED_EXPERTS = (*packed_experts.BY_MODELOPT, *packed_experts.TRANSPOSED)
"""The algorithms in which experts that are stored packed (gpt-oss, Llama 4) are exported."""

EXPERT_METHODS = ("max", "mse", "local_hessian", "nvfp4_act_headroom")
"""The calibration algorithms that reach experts; the others smooth or change linear layers only."""

_FP4 = frozenset({"NVFP4", "W4A16_NVFP4", "W4A8_NVFP4_FP8", "MXFP4", "W4A8_MXFP4_FP8"})
_AFTER = {"awq_lite": "NVFP4_AWQ", "awq_full": "NVFP4_AWQ", "svdquant": "NVFP4_SVD"}
"""The exporter's name for any FP4 format after these algorithms, whether or not it is that format."""

# ModelOpt's settings of a quantizer for elements (num_bits) and for block scales (scale_bits).
_NUM_BITS: dict[Element, Any] = {"e2m1": (2, 1), "e4m3": (4, 3), "int4": 4, "int8": 8}
_SCALE_BITS: dict[BlockScale | None, Any] = {None: None, "e4m3": (4, 3), "ue8m0": (8, 0), "float32": None}


def selection_entries(model: torch.nn.Module, selection: Selection) -> list[dict[str, Any]]:
    """Return entries for the end of a ``quant_cfg`` that disable the quantizers of layers the user left out.

    Raises:
        ModelOptExtError: a pattern that matches no linear layer, or no layers under ``mlp`` for ``--mlp-only``.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear | torch.nn.Embedding)]
    experts = {name for name, _ in quantizers.fused_experts(model)}
    names += sorted(experts)
    left_out: list[str] = []
    for pattern in selection.exclude:
        found = [name for name in names if matches(pattern, name)]
        if not found:
            raise ModelOptExtError.at(
                "command line", "--exclude", f"a pattern that names a layer of the model, such as {names[-1]}", pattern
            )
        left_out += found
    if selection.mlp_only:
        others = [name for name in names if not _MLP_PARTS & set(name.split("."))]
        if len(others) == len(names):
            raise ModelOptExtError.at("command line", "--mlp-only", "a model with layers under 'mlp'", names[0])
        left_out += others
    return [
        {"quantizer_name": f"{name}.{pattern}", "enable": False}
        for name in dict.fromkeys(left_out)
        for pattern in (["*quantizer*"] if name in experts else _QUANTIZERS)
    ]


def exported_algo(name: str, module: Any, methods: Iterable[str] = ()) -> str:
    """Return the algorithm that a linear layer will be exported as, after calibration by ``methods``.

    Args:
        name: of the layer in the model.
        module: the layer, with quantizers.
        methods: the calibration algorithms, in order.

    Raises:
        ModelOptExtError: a format that ModelOpt cannot export or this package does not serve.
    """
    weights = module.weight_quantizer
    try:
        found = _format(module)
    except (NotImplementedError, AssertionError) as error:
        raise _unserved(f"weights of num_bits {getattr(weights, 'num_bits', None)}: {error}") from error
    # ModelOpt 0.47 exports integers in blocks under scales of their own as plain INT8.
    if found in ("int8_sq", "int8_wo") and weights.block_sizes:
        raise _unserved(f"INT8 weights in blocks {dict(weights.block_sizes)}")
    algo = _ALGOS.get(found)
    if algo is None or algo not in SCHEMES:
        raise _unserved(found)
    for method in methods:
        algo = _AFTER.get(method, algo) if algo in _FP4 else algo
    _check_group(module, algo)
    if algo != FP8 or not is_vocabulary(name) or quantizers.is_on(module.input_quantizer):  # else weight-only
        _check_input(module, algo)
    return algo


def _format(module: Any) -> str:
    from modelopt.torch.export.quant_utils import get_quantization_format

    return str(get_quantization_format(module))


def _unserved(got: str) -> ModelOptExtError:
    return ModelOptExtError.at("recipe", "format", f"one that can be served: {', '.join(SCHEMES)}", got)


def group_size(module: Any) -> int:
    """Return the number of K elements under one block scale of the weight, 0 without blocks."""
    blocks: Any = _first(module.weight_quantizer).block_sizes or {}
    return int(blocks.get(-1) or 0)


def _check_group(module: Any, algo: str) -> None:
    sizes = SCHEMES[algo].group_sizes
    found = group_size(module)
    if any(sizes) and found not in sizes:
        raise _unserved(f"{algo} in blocks of {found} (served: {' or '.join(map(str, sizes))})")


def _check_input(module: Any, algo: str) -> None:
    """Raise unless the input is rounded as ``algo`` says: the exporter sometimes names it by the weight alone."""
    quantizer: Any = module.input_quantizer
    scheme = SCHEMES[algo]
    enabled = quantizers.is_on(quantizer)
    if scheme.activation is None or (scheme.activation_in_doubt and not enabled):
        if enabled:
            raise _unserved(f"{algo}, which rounds no activations, with activations of num_bits {quantizer.num_bits}")
        return
    types = [ACTIVATION_FORMATS[name].number_type for name in scheme.activations]
    expected = {(_NUM_BITS[number.element], _SCALE_BITS[number.block_scale]) for number in types}
    blocks: Any = quantizer.block_sizes or {}
    found = (quantizer.num_bits, blocks.get("scale_bits")) if enabled else None
    if found not in expected:
        got = f"num_bits {found[0]}, scale_bits {found[1]}" if found else "activations that are not rounded"
        raise _unserved(f"{algo}, whose activations are {' or '.join(scheme.activations)}, with {got}")


def check_model(model: torch.nn.Module, recipe: str, methods: Sequence[str]) -> dict[str, str]:
    """Return the algorithm of every quantized linear layer of a model with quantizers, by name.

    Experts have the name of their module.

    Raises:
        ModelOptExtError: nothing is quantized, a layer or experts cannot be exported or served, or shards of a fused layer differ.
    """
    algos: dict[str, str] = {}
    for name, module in quantizers.quantized_linears(model):
        try:
            algos[name] = exported_algo(name, module, methods)
        except ModelOptExtError as error:
            raise ModelOptExtError(f"{recipe}: {name}: {error}") from error
        if quantizers.is_on(getattr(module, "output_quantizer", None)):
            expected = "no quantized output of a layer, which no server has"
            raise ModelOptExtError.at(recipe, name, expected, "a quantized output")
    cache, _ = quantizers.kv_cache(model)
    experts = {
        name: _algo_of_experts(name, module, recipe, methods) for name, module in quantizers.fused_experts(model)
    }
    if not algos and not any(experts.values()) and cache is None:
        raise ModelOptExtError.at(recipe, "model", "a layer or a KV cache to quantize", "none that the recipe names")
    _check_fused(model, algos)
    quantizers.rounds_activations(model)  # raises before anything is calibrated
    return algos | {name: algo for name, algo in experts.items() if algo is not None}


def _algo_of_experts(name: str, module: Any, recipe: str, methods: Sequence[str]) -> str | None:
    """Return the algorithm that a module's experts will be exported as; None where they are not quantized.

    Raises:
        ModelOptExtError: a format or a calibration in which ModelOpt does not export experts, or exports them wrongly.
    """
    algos = set()
    for one in quantizers.projections_of_expert(module):
        try:
            algos.add(exported_algo(name, one, methods))
        except ModelOptExtError as error:
            raise ModelOptExtError(f"{recipe}: {name}: {error}") from error
    if not algos:
        return None
    if len(algos) > 1:
        raise ModelOptExtError.at(recipe, name, "one format of all projections of experts", " and ".join(sorted(algos)))
    (algo,) = algos
    supported: tuple[str, ...] = EXPERTS
    expected = "experts in a format that ModelOpt exports"
    if quantizers.is_packed(module):
        supported, expected = PACKED_EXPERTS, "packed experts in a format that is exported with blocks along K"
    if algo not in supported:
        raise ModelOptExtError.at(recipe, name, f"{expected}: {', '.join(supported)} (or --exclude them)", algo)
    skipping = [method for method in methods if method not in EXPERT_METHODS]
    if skipping:
        expected = f"a calibration that reaches experts: {', '.join(EXPERT_METHODS)} (or --exclude them)"
        raise ModelOptExtError.at(recipe, name, expected, skipping[0])
    return algo


def _check_fused(model: torch.nn.Module, algos: Mapping[str, str]) -> None:
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    for shards in FUSED_SHARDS.values():
        for first in (name for name in names if name.endswith(f".{shards[0]}")):
            owner = first.removesuffix(shards[0])
            group = {
                owner + shard: algos.get(owner + shard, "unquantized") for shard in shards if owner + shard in names
            }
            if len(set(group.values())) > 1:
                found = ", ".join(f"{name.removeprefix(owner)} {algo}" for name, algo in group.items())
                raise ModelOptExtError.at(
                    owner.rstrip("."), " and ".join(shards), "one format: SGLang fuses them into one layer", found
                )


def resolve_steps(model: torch.nn.Module, steps: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the calibration steps, with ``smoothquant`` of FP8 layers replaced by this package's own."""
    linears = [module for _, module in quantizers.quantized_linears(model)]
    resolved = []
    for step in steps:
        own = step["method"] == SMOOTHQUANT and any(smoothquant.takes(module) for module in linears)
        resolved.append({**step, "method": FP8_SMOOTHQUANT} if own else dict(step))
    return resolved


def _int8(module: Any) -> bool:
    return all(
        quantizers.is_on(quantizer) and getattr(quantizer, "num_bits", None) == 8 and not quantizer.block_sizes
        for quantizer in (module.weight_quantizer, module.input_quantizer)
    )


def _searches_mse(step: Mapping[str, Any]) -> Callable[[Any], bool]:
    def takes(module: Any) -> bool:
        weights = module.weight_quantizer
        if isinstance(weights, torch.nn.Sequential) or weights._dynamic or weights.is_mx_format:
            return False
        return bool(weights.is_nvfp4_static) if step.get("fp8_scale_sweep") else True

    return takes


def _first(quantizer: Any) -> Any:
    """Return the quantizer, or the first of several, which decides the stored scales."""
    return quantizer[0] if isinstance(quantizer, torch.nn.Sequential) else quantizer


def _takes_clip(module: Any) -> bool:
    """Return whether a weight has blocks along K under stored scales, with one largest magnitude to clip."""
    weights = _first(module.weight_quantizer)
    blocks = weights.block_sizes or {}
    return bool(blocks.get(-1)) and not blocks.get(-2) and not weights.is_mx_format and not weights.is_nvfp4_static


def _takes_scaling(module: Any) -> bool:
    """Return whether weights can be rounded again for every scale tried, and inputs have a maximum per channel."""
    inputs, weights = module.input_quantizer, _first(module.weight_quantizer)
    by_token = quantizers.is_on(inputs) and -1 in (inputs.block_sizes or {}) and inputs.block_sizes[-1] is None
    return not by_token and not weights.is_nvfp4_static and not (weights.block_sizes or {}).get(-2)


def step_takes(step: Mapping[str, Any]) -> tuple[Callable[[Any], bool], str]:
    """Return a predicate of the layers that a calibration step is right for, and its requirement in words."""
    method = step["method"]
    if method == SMOOTHQUANT:
        return _int8, "INT8 or static FP8 weights and activations"
    if method == FP8_SMOOTHQUANT:
        return smoothquant.takes, "INT8 or static FP8 weights and activations"
    if method in ("mse", "local_hessian"):
        sweep = "static NVFP4 weights, or algorithm.fp8_scale_sweep=false"
        return _searches_mse(step), sweep if step.get("fp8_scale_sweep") else "weights under static scales"
    if method == "awq_clip":
        return _takes_clip, "weights in one-dimensional blocks under dynamic NVFP4 or integer scales"
    if method == "awq_full":
        return (
            lambda module: _takes_clip(module) and _takes_scaling(module),
            "weights in one-dimensional blocks under dynamic NVFP4 or integer scales",
        )
    if method == "svdquant":
        return (
            lambda module: _ALGOS.get(_format(module)) in _FP4 and _takes_scaling(module),
            "dynamic NVFP4 weights and activations",
        )
    if method == "awq_lite":
        return _takes_scaling, "weights without static NVFP4 or two-dimensional blocks, activations not scaled by token"
    return (lambda module: True), "quantized linear layers"
