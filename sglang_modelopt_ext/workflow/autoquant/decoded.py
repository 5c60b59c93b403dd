"""Layers computed from what their export stores, in the place of ModelOpt's simulation of it.

ModelOpt's own exporter packs a copy of each weight, with the scales that fused layers share; the number formats decode it, and
round the input as the target's kernels do. ModelOpt's quantizers of the layer then return these values while a block runs, so
that its searchers score, and perplexity is measured of, what is served.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from sglang_modelopt_ext.backends.base import ShardWeight
from sglang_modelopt_ext.backends.select import served_scheme
from sglang_modelopt_ext.checkpoint.names import FUSED_SHARDS
from sglang_modelopt_ext.device import Device
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.schemes.base import LayerScheme
from sglang_modelopt_ext.schemes.table import math_of
from sglang_modelopt_ext.workflow.autoquant.formats import Candidate
from sglang_modelopt_ext.workflow.autoquant.rules import BASELINE
from sglang_modelopt_ext.workflow.autoquant.state import Group
from sglang_modelopt_ext.workflow.quantize.calibrate import modelopt_messages


@dataclass(frozen=True)
class Quantized:
    """A linear layer with the quantizers of one format.

    Attributes:
        name: the module's.
        module: the layer.
        quantizers: ModelOpt's, by name of the attribute.
    """

    name: str
    module: Any
    quantizers: Mapping[str, Any]


def check_decodable(formats: Iterable[Candidate], groups: Iterable[Group]) -> None:
    """Raise ModelOptExtError for a search whose layers cannot be decoded one by one before they are exported."""
    for candidate in formats:
        if candidate.scheme.smoothing:
            expected = (
                "formats without smoothing, whose scales ModelOpt folds only when a search is over (or simulation)"
            )
            raise ModelOptExtError.at("--scored-as", candidate.name, expected, str(candidate.algorithm["method"]))
    for group in groups:
        if BASELINE in group.candidates:
            expected = "simulation beside a recipe with a baseline, whose layers have no candidates to decode"
            raise ModelOptExtError.at("--scored-as", group.name, expected, "export")
        if group.is_searched and group.layers[0].experts:
            expected = "simulation in a mixture, whose experts are packed only by the export"
            raise ModelOptExtError.at("--scored-as", group.name, expected, "export")


def quantized(name: str, module: Any) -> Quantized:
    """Return a linear layer of a quantized model with the quantizers that it has."""
    names = ("weight_quantizer", "input_quantizer", "output_quantizer")
    return Quantized(name, module, {each: getattr(module, each) for each in names})


@contextmanager
def decoded_choice(
    model: Any, groups: Iterable[Group], formats: Mapping[str, str], schemes: Mapping[str, LayerScheme], target: Device
) -> Iterator[None]:
    """Compute the layers of a model as its export will store them while the block runs.

    Args:
        model: quantized as was chosen.
        groups: its groups.
        formats: the format of each group by name.
        schemes: of each format by name; groups of other formats stay as they are.
        target: the device that is to serve them.
    """
    modules = dict(model.named_modules())
    with contextlib.ExitStack() as stack:
        for group in groups:
            scheme = schemes.get(formats[group.name])
            if scheme is not None:
                layers = [quantized(name, modules[name]) for name in group.modules]
                stack.enter_context(decoded(layers, scheme, target))
        yield


@contextmanager
def decoded(layers: Sequence[Quantized], scheme: LayerScheme, target: Device) -> Iterator[None]:
    """Make the quantizers of some layers in one format return what the export stores while the block runs.

    Args:
        layers: those of one group.
        scheme: the format.
        target: the device that is to serve them, which decides whether FP4 activations are rounded.
    """
    patched = []
    try:
        for fused in _fused(layers):
            for layer, stored in zip(fused, _exported(fused), strict=True):
                weight = _weight(layer, scheme, stored)
                layer.quantizers["weight_quantizer"].forward = _constant(weight)
                patched.append(layer.quantizers["weight_quantizer"])
                layer.quantizers["input_quantizer"].forward = _rounding(scheme, target, stored.get("input_scale"))
                patched.append(layer.quantizers["input_quantizer"])
        yield
    finally:
        for quantizer in patched:
            vars(quantizer).pop("forward", None)


def _fused(layers: Sequence[Quantized]) -> list[list[Quantized]]:
    """Return the layers in lists of those whose scales the export makes one."""
    found: dict[str, list[Quantized]] = {}
    for layer in layers:
        parent, _, leaf = layer.name.rpartition(".")
        fused = next((name for name, shards in FUSED_SHARDS.items() if leaf in shards), None)
        found.setdefault(layer.name if fused is None else f"{parent}.{fused}", []).append(layer)
    return list(found.values())


def _exported(layers: Sequence[Quantized]) -> list[dict[str, torch.Tensor]]:
    """Return the tensors that ModelOpt's export stores of fused layers, by name; the layers stay as they are."""
    from modelopt.torch.export.model_config import QUANTIZATION_FP8, QUANTIZATION_FP8_PB_REAL
    from modelopt.torch.export.quant_utils import get_quantization_format, preprocess_linear_fusion
    from modelopt.torch.export.unified_export_hf import _export_quantized_weight

    copies = []
    for layer in layers:
        weight = layer.module.weight
        linear: Any = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = torch.nn.Parameter(weight.detach().clone(), requires_grad=False)
        for name, quantizer in layer.quantizers.items():
            setattr(linear, name, copy.deepcopy(quantizer))
        copies.append(linear)
    with modelopt_messages(), torch.no_grad():
        # The formats that ModelOpt's exporter leaves with a scale of their own in each shard.
        apart = (QUANTIZATION_FP8, QUANTIZATION_FP8_PB_REAL)
        if len(copies) > 1 and get_quantization_format(copies[0]) not in apart:
            preprocess_linear_fusion(copies)
        for linear in copies:
            _export_quantized_weight(linear, linear.weight.dtype)
    found = []
    for linear in copies:
        tensors = {**dict(linear.named_parameters(recurse=False)), **dict(linear.named_buffers(recurse=False))}
        found.append({name: tensor.detach() for name, tensor in tensors.items()})
    return found


def _weight(layer: Quantized, scheme: LayerScheme, stored: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the decoded weight ``[N, K]`` in the type of the model."""
    parts = {}
    for spec in scheme.weight.tensors:
        if spec.name not in stored:
            raise ModelOptExtError.at(layer.name, spec.name, "a tensor of the export", "none")
        parts[spec.name] = stored[spec.name]
    whole = ShardWeight(scheme.weight, parts, math_of(scheme)).decode().dequantize()
    return whole.to(layer.module.weight.dtype)


def _constant(value: torch.Tensor) -> Any:
    return lambda weight: value


def _rounding(scheme: LayerScheme, target: Device, scale: torch.Tensor | None) -> Any:
    activation = served_scheme(scheme, target).activation

    def forward(x: torch.Tensor) -> torch.Tensor:
        if activation is None:
            return x
        flat = x.detach().reshape(-1, x.shape[-1]).to(torch.float32)
        values, factor = activation.quantize(flat, scale)
        rounded = values.to(torch.float32)
        if factor is not None:
            rounded = rounded * factor.to(torch.float32)
        return rounded.to(x.dtype).reshape(x.shape)

    return forward
