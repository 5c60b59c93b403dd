"""A CPU emulation, in torch, of ModelOpt's CUDA-only quantizer simulations.

ModelOpt 0.47 quantizes and exports on a CPU, but runs a forward pass with NVFP4 or MX quantizers, and its NVFP4 searches, only
through CUDA and Triton kernels. Every calibration that needs such a pass (AWQ, SVDQuant, MSE sweep, local Hessian, rotated KV
caches) therefore fails on a CPU. This module gives ModelOpt torch versions of exactly those functions, with its rounding; the
searches and exports themselves stay ModelOpt's.

Differences: W4A8_NVFP4_FP8 is simulated with its real blocks of 32 (ModelOpt's Triton kernel uses 16 from SM89 on), and a block
scale below 1e-5 is not replaced by 1.
"""

from __future__ import annotations

import logging
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_kernels.formats import e2m1
from sglang_modelopt_kernels.formats.base import ActivationFormat
from sglang_modelopt_kernels.formats.mxfp4 import MXFP4Dynamic
from sglang_modelopt_kernels.formats.mxfp8 import MXFP8Dynamic
from sglang_modelopt_kernels.formats.nvfp4 import NVFP4DynamicBlock

logger = logging.getLogger(__name__)

NAME = "cpu"
"""Name recorded in the metadata of exports made with this emulation."""

_E2M1, _E4M3, _UE8M0 = (2, 1), (4, 3), (8, 0)
_NVFP4_AMAX = 2688.0  # 6 * 448


def install(device: str | None = None) -> bool:
    """Install the emulation in ModelOpt unless it runs on a CUDA device, and return whether it is installed.

    Args:
        device: ModelOpt's device; None: CUDA where there is a GPU.

    Raises:
        ModelOptExtError: ModelOpt lacks a function of version 0.47.
    """
    if torch.cuda.is_available() and (device is None or device.startswith("cuda")):
        return False
    import modelopt.torch.quantization.tensor_quant as tensor_quant

    if tensor_quant.dynamic_block_quantize_op is dynamic_block_quantize:
        return True
    for name in ("dynamic_block_quantize_op", "triton_kernel"):
        if not hasattr(tensor_quant, name):
            raise ModelOptExtError.at(
                "modelopt.torch.quantization.tensor_quant", name, "a function of ModelOpt 0.47", "none"
            )
    tensor_quant.dynamic_block_quantize_op = dynamic_block_quantize
    tensor_quant.triton_kernel = SimpleNamespace(
        IS_AVAILABLE=True, static_blockwise_fp4_fake_quant=static_blockwise_fp4_fake_quant
    )
    sys.modules.setdefault("fast_hadamard_transform", _hadamard_module())
    logger.info(
        "no CUDA device: ModelOpt's CUDA-only quantizer simulations run in torch (sglang_modelopt_ext emulation)"
    )
    return True


def _hadamard_module() -> ModuleType:
    module = ModuleType("fast_hadamard_transform")
    module.hadamard_transform = hadamard_transform  # type: ignore[attr-defined]
    return module


def dynamic_block_quantize(
    inputs: torch.Tensor,
    block_size: int,
    amax: torch.Tensor | None,
    num_bits: int,
    exponent_bits: int,
    scale_num_bits: int,
    scale_exponent_bits: int,
) -> torch.Tensor:
    """Return ``inputs`` rounded to a block format and back, in their own dtype.

    Args:
        inputs: ``[..., K]``; a last block that is short is padded with zeros.
        block_size: elements along K that share a scale.
        amax: the largest magnitude of the whole tensor, for formats with a global scale.
        num_bits, exponent_bits: the element type.
        scale_num_bits, scale_exponent_bits: the type of the block scales.

    Raises:
        NotImplementedError: a format that ModelOpt 0.47 cannot export.
    """
    element = (exponent_bits, num_bits - exponent_bits - 1)
    scale = (scale_exponent_bits, scale_num_bits - scale_exponent_bits - 1)
    rounding, input_scale = _rounding(element, scale, block_size, amax)
    flat = inputs.reshape(-1, inputs.shape[-1]).to(torch.float32)
    padded = torch.nn.functional.pad(flat, (0, -flat.shape[1] % block_size))
    values, row_scale = rounding.quantize(padded, input_scale)
    rounded = values if row_scale is None else values * row_scale
    return rounded[:, : flat.shape[1]].reshape(inputs.shape).to(inputs.dtype)


def _rounding(
    element: tuple[int, int], scale: tuple[int, int], block_size: int, amax: torch.Tensor | None
) -> tuple[ActivationFormat, torch.Tensor | None]:
    if scale == _UE8M0 and block_size == 32 and element in (_E2M1, _E4M3):
        return (MXFP4Dynamic() if element == _E2M1 else MXFP8Dynamic()), None
    if element == _E2M1 and scale == _E4M3 and amax is not None:
        nvfp4 = NVFP4DynamicBlock()
        nvfp4.block = block_size
        # An all-zero tensor has no scale; any positive one rounds it to zeros.
        largest = amax.to(torch.float32).amax().clamp(min=torch.finfo(torch.float32).tiny * _NVFP4_AMAX)
        return nvfp4, largest / _NVFP4_AMAX
    raise NotImplementedError(f"no CPU simulation of elements {element} under scales {scale} in blocks of {block_size}")


def static_blockwise_fp4_fake_quant(
    x: torch.Tensor,
    amax: torch.Tensor,
    global_amax: torch.Tensor | None = None,
    quantize_block_scales: bool = True,
    fp8_max_for_normalization: float = 448.0,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Return ``x`` rounded to E2M1 under given block maxima. The arguments are those of ModelOpt's Triton kernel.

    Raises:
        ValueError: the number of values is not a multiple of the number of entries of ``amax``.
    """
    from modelopt.torch.kernels.quantization.gemm.fp4_kernel import compute_fp4_scales

    if x.numel() % amax.numel():
        raise ValueError(f"{x.numel()} values are not {amax.numel()} blocks")
    scale: Any = compute_fp4_scales(amax, global_amax, quantize_block_scales, fp8_max_for_normalization)
    scale = scale.reshape(-1, 1)
    blocks = x.to(torch.float32).reshape(scale.shape[0], -1)
    step = torch.where(scale == 0, torch.inf, scale)  # a block without a scale becomes zero
    rounded = e2m1.decode(e2m1.encode(blocks / step)) * scale
    return rounded.reshape(x.shape).to(out_dtype or x.dtype)


def hadamard_transform(x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """Return the Hadamard transform (Sylvester order) of the last dimension, a power of two, times ``scale``."""
    size = x.shape[-1]
    y = x.to(torch.float32).reshape(-1, size)
    half = 1
    while half < size:
        pairs = y.reshape(-1, size // (2 * half), 2, half)
        y = torch.stack((pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]), dim=2).reshape(-1, size)
        half *= 2
    return (y * scale).reshape(x.shape).to(x.dtype)
