"""The rounding as PyTorch operators. CUDA tensors, or CPU tensors under Triton's interpreter."""

from __future__ import annotations

import torch
import triton

from sglang_modelopt_kernels.formats import ACTIVATION_FORMATS
from sglang_modelopt_kernels.formats.base import ActivationFormat, BlockActivation, Element
from sglang_modelopt_kernels.formats.mxfp4 import MXFP4
from sglang_modelopt_kernels.formats.mxfp8 import MXFP8
from sglang_modelopt_kernels.formats.nvfp4 import NVFP4

from .kernel import quantize_blocks_kernel

PROGRAM_VALUES = 2048
"""Values of one token that a program rounds."""

ROW_SCALE_OF = {NVFP4: "static", MXFP4: None, MXFP8: None}
"""The number types that the kernel rounds to, and the scale of rows that it takes with each."""
VALUE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def rounds(activation: ActivationFormat | None) -> bool:
    """Return whether the kernel rounds to ``activation``: its number type, under its scale of rows."""
    if activation is None or activation.number_type not in ROW_SCALE_OF:
        return False
    return ROW_SCALE_OF[activation.number_type] == activation.row_scale


BLOCK_ACTIVATIONS = tuple(name for name, activation in ACTIVATION_FORMATS.items() if rounds(activation))
"""Names of the registered activation formats that are rounded here."""


def numerics(activation: str) -> tuple[int, Element]:
    """K elements to a block scale, and the element. Raises ValueError for a format that the kernel does not round to."""
    known = ACTIVATION_FORMATS.get(activation)
    if known is None or not rounds(known) or known.number_type.block is None:
        raise ValueError(
            f"activation must be {' or '.join(map(str, ROW_SCALE_OF))}, got {activation if known is None else known}"
        )
    return known.number_type.block[1], known.number_type.element


def _launch(
    x: torch.Tensor,
    activation: str,
    smoothing: torch.Tensor | None,
    input_scale: torch.Tensor | None,
    y: torch.Tensor,
    scale: torch.Tensor | None,
    swizzled: bool,
) -> None:
    (m, k), (group, element) = x.shape, numerics(activation)
    if m == 0 or k == 0:
        return
    x = x if x.stride(1) == 1 else x.contiguous()
    blocks = min(PROGRAM_VALUES // group, triton.next_power_of_2(k // group))
    # A pointer stands for an absent tensor; the kernel never reads through it.
    quantize_blocks_kernel[(m, triton.cdiv(k // group, blocks))](
        x,
        y if smoothing is None else smoothing.contiguous(),
        y if input_scale is None else input_scale,
        y,
        y if scale is None else scale,
        k,
        x.stride(0),
        0 if scale is None else scale.shape[1],
        GROUP=group,
        ELEMENT=element,
        SMOOTH=smoothing is not None,
        VALUES=scale is None,
        SWIZZLE=swizzled,
        BLOCKS=blocks,
    )


@torch.library.custom_op("modelopt_ext::quantize_blocks", mutates_args=())
def _quantize_blocks(
    x: torch.Tensor,
    activation: str,
    smoothing: torch.Tensor | None,
    input_scale: torch.Tensor | None,
    swizzled: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scale = _empty(x, activation, swizzled)
    if swizzled:
        scale.zero_()
    _launch(x, activation, smoothing, input_scale, codes, scale, swizzled)
    return codes, scale


@_quantize_blocks.register_fake
def _(
    x: torch.Tensor,
    activation: str,
    smoothing: torch.Tensor | None,
    input_scale: torch.Tensor | None,
    swizzled: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    del smoothing, input_scale
    return _empty(x, activation, swizzled)


def _empty(x: torch.Tensor, activation: str, swizzled: bool) -> tuple[torch.Tensor, torch.Tensor]:
    (m, k), (group, element) = x.shape, numerics(activation)
    rows, columns = (-(-m // 128) * 128, -(-k // group // 4) * 4) if swizzled else (m, k // group)
    codes = x.new_empty((m, k // 2 if element == "e2m1" else k), dtype=torch.uint8)
    return codes, x.new_empty((rows, columns), dtype=torch.uint8)


@torch.library.custom_op("modelopt_ext::round_blocks", mutates_args=())
def _round_blocks(
    x: torch.Tensor,
    activation: str,
    smoothing: torch.Tensor | None,
    input_scale: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    y = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    _launch(x, activation, smoothing, input_scale, y, None, False)
    return y


@_round_blocks.register_fake
def _(
    x: torch.Tensor,
    activation: str,
    smoothing: torch.Tensor | None,
    input_scale: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    del activation, smoothing, input_scale
    return x.new_empty(x.shape, dtype=out_dtype)


def _check(x: torch.Tensor, activation: str, smoothing: torch.Tensor | None, input_scale: torch.Tensor | None) -> None:
    group, _ = numerics(activation)
    static = ACTIVATION_FORMATS[activation].row_scale == "static"
    if x.dim() != 2 or not x.is_floating_point() or x.shape[1] % group:
        raise ValueError(f"x must be [M, K] floats with K in {group}s, got {tuple(x.shape)} {x.dtype}")
    if smoothing is not None and smoothing.shape != x.shape[1:]:
        raise ValueError(f"smoothing must be [{x.shape[1]}], got {tuple(smoothing.shape)}")
    if (input_scale is not None) != static:
        raise ValueError(f"input_scale must be {'given' if static else 'left out'} for {activation}")
    if input_scale is not None and (input_scale.numel() != 1 or input_scale.dtype != torch.float32):
        raise ValueError(f"input_scale must be one float32, got {tuple(input_scale.shape)} {input_scale.dtype}")


def quantize_blocks(
    x: torch.Tensor,
    activation: str,
    smoothing: torch.Tensor | None = None,
    input_scale: torch.Tensor | None = None,
    swizzled: bool = False,
) -> BlockActivation:
    """Round ``x * smoothing`` to codes and block scales, bit for bit those of the activation format ``activation``.

    Args:
        x: ``[M, K]`` of a float dtype, K a multiple of the block; copied unless rows are contiguous.
        activation: the name of a registered format for which :func:`rounds` is true; the formulas are in ``formats/``.
        smoothing: ``[K]`` of a float dtype, multiplied in fp32 before rounding; None for 1.
        input_scale: NVFP4's static scale, float32, one value.
        swizzled: whether block scales get the 128x4 swizzled layout, padded with zeros (:func:`naive_swizzle`).

    Raises:
        ValueError: an unknown format, or a shape or dtype that the kernel does not read.
    """
    _check(x, activation, smoothing, input_scale)
    codes, scale = _quantize_blocks(x, activation, smoothing, input_scale, swizzled)
    _, element = numerics(activation)
    codes = codes if element == "e2m1" else codes.view(torch.float8_e4m3fn)
    row_scale = None if input_scale is None else input_scale.reshape(())
    is_e4m3 = ACTIVATION_FORMATS[activation].number_type.block_scale == "e4m3"
    return BlockActivation(codes, scale.view(torch.float8_e4m3fn) if is_e4m3 else scale, row_scale)


def round_blocks(
    x: torch.Tensor,
    activation: str,
    smoothing: torch.Tensor | None = None,
    input_scale: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Round ``x * smoothing`` to values: ``code * block scale`` in ``out_dtype`` ``[M, K]``, and the ``input_scale``.

    Arguments of :func:`quantize_blocks`.

    Raises:
        ValueError: an unknown format, a shape or dtype that the kernel does not read, or an ``out_dtype`` not in VALUE_DTYPES.
    """
    _check(x, activation, smoothing, input_scale)
    if out_dtype not in VALUE_DTYPES:
        raise ValueError(f"out_dtype must be float32, bf16 or float16, got {out_dtype}")
    values: torch.Tensor = _round_blocks(x, activation, smoothing, input_scale, out_dtype)
    return values, None if input_scale is None else input_scale.reshape(())
