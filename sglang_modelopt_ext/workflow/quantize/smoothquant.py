"""SmoothQuant for FP8, which ModelOpt 0.47 skips with a warning: its ``smoothquant`` takes INT8 only.

The scale is the one of ModelOpt's ``smoothquant`` (``modelopt/torch/quantization/model_calib.py``)::

    pre_quant_scale[k] = max_n |W[n, k]| ^ (1 - alpha) / max_t |x[t, k]| ^ alpha

clamped to [1e-4, 1e4], and 1 for a channel that was always zero. ``y = FP8(x * pre_quant_scale) @ FP8(W / pre_quant_scale)^T``;
both scales are per tensor, the input's from the largest smoothed activation. The exporter stores ``pre_quant_scale`` beside the
FP8 tensors, where this package's reader finds it. SGLang 0.5.23's own FP8 path would ignore it.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

import torch

_ZERO_CHANNEL = 1.0 / (1 << 31)
_LOWEST, _HIGHEST = 1e-4, 1e4


@cache
def register() -> None:
    """Register ``fp8_smoothquant`` as one of ModelOpt's calibration algorithms, with layer-by-layer runs and resume."""
    from modelopt.torch.quantization.config import QuantizeAlgorithmConfig, SmoothQuantCalibConfig
    from modelopt.torch.quantization.mode import BaseCalibrateModeDescriptor, CalibrateModeRegistry

    class FP8SmoothQuantConfig(SmoothQuantCalibConfig):
        """The options of ``smoothquant`` for FP8."""

        method: Literal["fp8_smoothquant"] = "fp8_smoothquant"

    @CalibrateModeRegistry.register_mode
    class FP8SmoothQuantModeDescriptor(BaseCalibrateModeDescriptor):
        """The mode's entry in ModelOpt's registry."""

        @property
        def config_class(self) -> type[QuantizeAlgorithmConfig]:
            """Return the class of the mode's options."""
            return FP8SmoothQuantConfig

        _calib_func = smooth


def takes(module: Any) -> bool:
    """Return whether a linear layer's weight and input are static FP8 with one scale per tensor."""
    return all(
        getattr(quantizer, "is_fp8", False) and quantizer.is_enabled and not quantizer._dynamic
        for quantizer in (module.weight_quantizer, module.input_quantizer)
    )


@torch.no_grad()
def smooth(model: torch.nn.Module, forward_loop: Any = None, alpha: float = 1.0) -> None:
    """Calibrate every linear layer that :func:`takes` accepts with smoothing, all others by their largest magnitude."""
    from modelopt.torch.quantization.model_calib import max_calibrate
    from modelopt.torch.quantization.utils import is_quantized_linear
    from modelopt.torch.quantization.utils.core_utils import enable_weight_access_and_writeback

    modules = dict(model.named_modules())
    chosen = [module for module in modules.values() if is_quantized_linear(module) and takes(module)]
    for module in chosen:
        module.input_quantizer.axis = -1  # a maximum per input channel
    # Also merges the maxima of several processes.
    max_calibrate(model, forward_loop)
    for module in chosen:
        if not hasattr(module.input_quantizer, "_amax"):
            module.input_quantizer.axis = None  # no token reached this layer
            continue
        with enable_weight_access_and_writeback(module, model, modules):
            _smooth_layer(module, alpha)


def pre_quant_scale(weight: torch.Tensor, amax: torch.Tensor, alpha: float) -> torch.Tensor:
    """Return the smoothing scale, float32 ``[K]``.

    Args:
        weight: ``[N, K]``.
        amax: the largest magnitude of each input channel, ``[K]``.
        alpha: share of the channels' differences that moves into the weight, 0 to 1.
    """
    inputs = amax.float().reshape(-1)
    columns = weight.abs().amax(dim=0).float()
    scale = columns.pow(1 - alpha) / inputs.pow(alpha)
    scale = torch.where(inputs <= _ZERO_CHANNEL, 1.0, scale)
    return scale.clamp(_LOWEST, _HIGHEST)


def _smooth_layer(module: Any, alpha: float) -> None:
    from modelopt.torch.quantization.model_calib import apply_pre_quant_scale_and_smooth

    quantizer, weight = module.input_quantizer, module.weight
    amax = quantizer._amax.float()
    scale = pre_quant_scale(weight, amax, alpha)
    # ModelOpt's export reads this when it gives layers with one input one scale.
    quantizer._amax_for_smoothing = amax.reshape(-1).cpu()
    quantizer.reset_amax()
    quantizer.axis = None
    quantizer.amax = amax.amax().to(dtype=weight.dtype, device=weight.device)
    apply_pre_quant_scale_and_smooth(module, scale.to(weight.device))
