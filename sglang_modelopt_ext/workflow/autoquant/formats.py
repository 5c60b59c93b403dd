"""The candidate formats of a search: their names, stored tensors and kernels.

No format is listed here: each is applied to a small linear layer by ModelOpt itself, and the result is looked up in
the scheme table.
"""

from __future__ import annotations

import copy
import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sglang_modelopt_ext.backends.base import LinearRequest
from sglang_modelopt_ext.backends.experts.base import ExpertRequest
from sglang_modelopt_ext.backends.select import candidates, expert_candidates, served_scheme
from sglang_modelopt_ext.device import NAMED, Device
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.schemes.base import PRE_QUANT_SCALE, LayerScheme
from sglang_modelopt_ext.schemes.table import find_scheme, math_of
from sglang_modelopt_ext.workflow.autoquant.state import Layer
from sglang_modelopt_ext.workflow.common.base_model import import_modelopt
from sglang_modelopt_ext.workflow.quantize import checks
from sglang_modelopt_ext.workflow.quantize.calibrate import modelopt_messages
from sglang_modelopt_ext.workflow.quantize.quantizers import fused_experts, is_on, projections_of_expert
from sglang_modelopt_ext.workflow.quantize.recipes import Changes, build
from sglang_modelopt_ext.workflow.quantize.run import insert_quantizers

_SUFFIXES = ("", "_CFG", "_CONFIG", "_DEFAULT_CFG", "_LITE_CFG", "_BETA_CFG")
_PROBE_SIZE = 256


@dataclass(frozen=True)
class Candidate:
    """A candidate format that ModelOpt applied to a small layer.

    Attributes:
        name: ModelOpt's configuration.
        config: that configuration, with the stored bits as its ``effective_bits``.
        scheme: the scheme of a layer in this format.
        algorithm: ModelOpt's calibration algorithm with its options.
    """

    name: str
    config: dict[str, Any]
    scheme: LayerScheme
    algorithm: dict[str, Any]

    def cost(self, layer: Layer, dtype: torch.dtype) -> int | None:
        """Return the bits stored for ``layer`` of a model in ``dtype``, scales included; None if it cannot be exported so.

        Blocks must fit, and ModelOpt exports no experts with smoothing scales.
        """
        if layer.experts and str(self.algorithm["method"]).startswith("awq"):
            return None
        try:
            shapes = [(spec, math.prod(spec.shape(layer.n, layer.k))) for spec in self.scheme.tensors]
        except ValueError:
            return None
        # ModelOpt stores the smoothing scale in the model's dtype.
        types = [dtype if spec is PRE_QUANT_SCALE else spec.dtypes[0] for spec, _ in shapes]
        one = sum(8 * kind.itemsize * entries for kind, (_, entries) in zip(types, shapes, strict=True))
        return one * layer.count


def this_gpu() -> Device:
    """Return this machine's device. Raises ModelOptExtError for one that users may not name (:data:`NAMED`)."""
    device = Device.here()
    if device not in NAMED:
        known = ", ".join(named.flag for named in NAMED)
        raise ModelOptExtError.at("--gpu", "default", f"this machine's GPU to be one of {known}", device.flag)
    return device


def find_formats(names: Sequence[str], device: str) -> list[Candidate]:
    """Return the candidates of these names.

    A name is that of a ModelOpt configuration, with or without a suffix such as ``_CFG`` or ``_DEFAULT_CFG``, or of
    the algorithm it exports, such as ``NVFP4_AWQ``. Case does not matter.

    Raises:
        ModelOptExtError: no ModelOpt, an unknown name (with the nearest ones), a name given twice, or a format that a search
            over layers cannot use.
    """
    mtq = import_modelopt()
    choices = sorted(mtq.config.choices)
    found: dict[str, Candidate] = {}
    for name in names:
        full = next((name.upper() + suffix for suffix in _SUFFIXES if name.upper() + suffix in choices), None)
        if full is None:
            short = {_short(choice): choice for choice in choices}
            near = difflib.get_close_matches(name.upper(), [*short, *choices], n=3, cutoff=0.4)
            raise ModelOptExtError.at("--formats", name, f"a ModelOpt format, such as {', '.join(near or short)}", name)
        if full in found:
            raise ModelOptExtError.at("--formats", name, "every format once", f"{full} twice")
        found[full] = try_format(full, getattr(mtq, full), device)
    return list(found.values())


def _short(choice: str) -> str:
    for suffix in _SUFFIXES[:0:-1]:
        choice = choice.removesuffix(suffix)
    return choice


def try_format(name: str, config: dict[str, Any], device: str) -> Candidate:
    """Return a configuration as a candidate, after ModelOpt applied it to a small layer.

    Raises:
        ModelOptExtError: a configuration that a search over layers cannot use, or that states other bits than are stored.
    """
    from modelopt.torch.quantization.config import QuantizeConfig
    from modelopt.torch.quantization.model_quant import _AUTO_QUANTIZE_SUPPORTED_ALGORITHMS as ALLOWED

    algorithm = config.get("algorithm")
    method = algorithm.get("method") if isinstance(algorithm, dict) else algorithm
    if method not in ALLOWED:
        raise ModelOptExtError.at(
            "--formats", name, "a calibration that ModelOpt's auto_quantize allows", f"{method}; quantize with it alone"
        )
    attention = [entry["quantizer_name"] for entry in config["quant_cfg"] if "bmm" in entry["quantizer_name"]]
    if any(entry.get("enable", True) for entry in config["quant_cfg"] if entry["quantizer_name"] in attention):
        raise ModelOptExtError.at("--formats", name, "a format of linear layers", "one that quantizes attention too")
    try:
        algo, block, stored = _quantize_one_layer(QuantizeConfig(**copy.deepcopy(config)), device)
    except Exception as error:  # ModelOpt raises assertions and errors of every kind
        raise ModelOptExtError.at(
            "--formats", name, "a format ModelOpt can simulate and export", f"{type(error).__name__}: {error}"
        ) from error
    if algo is None:
        expected = "a format for any linear layer"
        raise ModelOptExtError.at("--formats", name, expected, "one that picks layers by name or quantizes none")
    row = find_scheme(algo, f"--formats: {name}")
    weight = row.weight_format(block if any(row.group_sizes) else None, "--formats", name)
    stored_blocks = {dim.per for spec in weight.tensors[1:] for dim in spec.dims if dim.per > 1}
    if stored_blocks != ({block} if block else set()):
        expected = f"blocks of {' or '.join(map(str, stored_blocks)) or 'no size'}, as {algo} is served"
        raise ModelOptExtError.at("--formats", name, expected, block or "none")
    scheme = LayerScheme(row.algo, weight, row.activation_format(stored), PRE_QUANT_SCALE.name in stored)
    bits = weight.bits_per_weight()
    declared = config.get("effective_bits")
    if declared is not None and declared != bits:
        raise ModelOptExtError.at(
            "--formats", f"{name}: effective_bits", f"{bits:g}, the bits that are stored", declared
        )
    costed = {**copy.deepcopy(config), "effective_bits": bits}
    steps = dict(algorithm) if isinstance(algorithm, dict) else {"method": algorithm or "none"}
    return Candidate(name, costed, scheme, steps)


def applied_formats(model: Any, name: str, config: dict[str, Any]) -> dict[str, Candidate]:
    """Return the format of every layer that a configuration quantizes by the layers' names, all as candidates called ``name``.

    Args:
        model: the model, which may have no weights; it is given quantizers.
        name: of the candidates.
        config: the configuration.

    Raises:
        ModelOptExtError: a layer that cannot be exported or served, or nothing to quantize.
    """
    built = build(config, Changes())
    methods = [step["method"] for step in built["algorithm"]]
    insert_quantizers(model, name, built["quant_cfg"])
    modules: dict[str, Any] = dict(model.named_modules())
    algos = checks.check_model(model, name, methods)
    modules |= {layer: next(projections_of_expert(module), module) for layer, module in fused_experts(model)}
    steps = built["algorithm"][0] if methods else {"method": "none"}
    found = {}
    for layer, algo in algos.items():
        row, block = find_scheme(algo, name), checks.group_size(modules[layer])
        weight = row.weight_format(block if any(row.group_sizes) else None, name, layer)
        activation = row.activation_format(["input_scale"] if methods else ())
        rounds = is_on(modules[layer].input_quantizer)
        found[layer] = Candidate(
            name, dict(config), LayerScheme(row.algo, weight, activation if rounds else None), steps
        )
    return found


def _quantize_one_layer(config: Any, device: str) -> tuple[str | None, int, frozenset[str]]:
    """Return the algorithm that a linear layer exports as (None: unquantized), its block size and its input scales."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export.quant_utils import (
        get_quantization_format,
        get_weight_block_size,
        process_layer_quant_config,
    )
    from modelopt.torch.quantization.conversion import set_quantizer_by_cfg
    from modelopt.torch.quantization.model_quant import calibrate

    with modelopt_messages(), torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(_PROBE_SIZE, _PROBE_SIZE, bias=False, dtype=torch.bfloat16))
        model.to(device)
        x = torch.randn(16, _PROBE_SIZE, dtype=torch.bfloat16).to(device)
        mtq.quantize(model, {"quant_cfg": [{"quantizer_name": "*", "enable": False}], "algorithm": None})
        # Match patterns as auto_quantize does: against the quantizer names of a single layer.
        set_quantizer_by_cfg(model[0], config.quant_cfg)
        calibrate(model, algorithm=config.algorithm, forward_loop=lambda model: model(x))
    block = int(get_weight_block_size(model[0]))
    kind = get_quantization_format(model[0])
    described = process_layer_quant_config({"layer.quantization": kind, "layer.awq_block_size": block})
    inputs: Any = model[0].input_quantizer
    of_input = {PRE_QUANT_SCALE.name: getattr(inputs, "_pre_quant_scale", None), "input_scale": inputs.amax}
    stored = frozenset(name for name, scale in of_input.items() if scale is not None)
    return described["quant_algo"] if kind is not None else None, block, stored


def serving(
    candidate: Candidate, layer: Layer, gpu: Device, dtype: torch.dtype, *, head: bool = False
) -> tuple[list[str], str]:
    """Return the kernels that serve ``layer`` in that format on ``gpu``, best first, and the numerics they compute.

    Args:
        candidate: the format.
        layer: the layer, or a product of experts.
        gpu: the target.
        dtype: the model's.
        head: whether the layer is the ``lm_head``.

    Raises:
        ModelOptExtError: no kernel does; the message has each one's reason.
    """
    scheme = served_scheme(candidate.scheme, gpu)
    subject = f"--formats: {candidate.name} on {gpu.flag}, {layer.name}"
    sizes = (scheme, gpu, layer.n, layer.k, math_of(scheme), dtype)
    if layer.experts:
        backends = expert_candidates(ExpertRequest(*sizes, experts=layer.count, top_k=1), subject)
        return [backend.name for backend in backends], scheme.describe()
    return [backend.name for backend in candidates(LinearRequest(*sizes, head), subject)], scheme.describe()
