"""TMA descriptors of the operands, and the launch. CUDA tensors, or CPU tensors under Triton's interpreter.

Descriptors are made on the host (``TensorDescriptor``): the launch passes them by value. Nothing is read back from the device, no
scratch memory is allocated for a launch (descriptors made in a kernel need some), and a captured CUDA graph holds its descriptors
beside its pointers, valid as long as those are.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from sglang_modelopt_kernels.gemm.common import Epilogue, launch
from sglang_modelopt_kernels.gemm.common.launch import Plan

from .kernel import tcgen05_kernel

TILE = 128
"""Rows of a swizzled tile of block scales, and BN of the product."""
HEIGHT = 8
"""Row tiles that a persistent kernel computes for one token tile before the next: the weights stay in L2."""
Element = Literal["e2m1", "e4m3"]


def takes_tiles(m: int) -> bool:
    """Return whether the block scales of ``m`` FP4 tokens must be swizzled: where BM is 128 or more."""
    return m > 64


def tma_objection(tensor: torch.Tensor, padded: bool = False) -> str | None:
    """Return why TMA cannot describe ``tensor`` ``[rows, width]``, or None.

    ``padded`` 4-bit codes get a byte each in shared memory, beside E4M3 (``16U4_ALIGN16B``). The rules are those of
    ``cuTensorMapEncodeTiled`` (CUDA driver API, Tensor Map Object Management).
    """
    multiple, bytes_ = (32 if padded else 16), tensor.shape[-1] * tensor.element_size()
    if tensor.data_ptr() % multiple:
        return f"does not start at a multiple of {multiple} bytes"
    if bytes_ % (64 if padded else multiple):
        return f"has rows of {bytes_} bytes, not in {64 if padded else multiple}s"
    return None if tensor.is_contiguous() else "is not contiguous"


def describe_tiles(scale: torch.Tensor, rows: int, blocks: int) -> TensorDescriptor:
    """Describe swizzled block scales as ``[tiles, tiles, 2, 256]``, in boxes of ``rows`` x ``blocks`` scales, no side above 256."""
    stored = scale.view(scale.shape[0] // TILE, scale.shape[1] // 4, 2, 256)
    return TensorDescriptor.from_tensor(stored, [rows // TILE, blocks // 4, 2, 256])


def tcgen05_product(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    x_scale: torch.Tensor | None,
    group: int,
    epilogue: Epilogue,
    out_dtype: torch.dtype,
    plan: Plan,
    describe: bool = True,
) -> torch.Tensor:
    """Compute ``x @ W^T`` for E2M1 weights ``codes`` ``[N, K / 2]`` under swizzled block scales (:func:`naive_swizzle`).

    Args:
        x: E4M3 ``[M, K]``, or E2M1 codes uint8 ``[M, K / 2]``.
        codes: uint8, the even K element in the low half.
        scale: E4M3 or UE8M0 (uint8) of ``group`` K elements each, swizzled in whole tiles.
        x_scale: block scales of ``x``, swizzled where :func:`takes_tiles`, else ``[M, K / group]``; None for E4M3.
        group: K elements under a block scale.
        epilogue: scales and bias.
        out_dtype: dtype of the result.
        plan: the configuration and splits.
        describe: whether to use descriptors where they can be made.
    """
    (config, _), m = plan, x.shape[0]
    element: Element = "e4m3" if x_scale is None else "e2m1"
    per_entry = 1 if x_scale is None else 2
    x, blocks = x.contiguous(), config.bk // group
    swizzled = x_scale is not None and takes_tiles(m)
    t: Any = scale if x_scale is None else x_scale.contiguous()
    described = describe and tma_objection(codes, element == "e4m3") is None and tma_objection(x) is None
    described = described and scale.data_ptr() % 16 == 0 and t.data_ptr() % 16 == 0
    operands: tuple[Any, ...] = (x, codes, scale)
    if described:
        operands = (
            TensorDescriptor.from_tensor(x, [config.bm, config.bk // per_entry]),
            TensorDescriptor.from_tensor(codes, [config.bn, config.bk // 2]),
            describe_tiles(scale, config.bn, blocks),
        )
        t = describe_tiles(t, config.bm, blocks) if swizzled else t
    return launch(
        tcgen05_kernel,
        x,
        codes,
        scale,
        epilogue,
        out_dtype,
        plan,
        per_entry,
        operands,
        t=t,
        X=element,
        GROUP=group,
        NATIVE=x.is_cuda,
        DESCRIBED=described,
        SWIZZLED=swizzled,
        PERSISTENT=config.persistent,
        HEIGHT=HEIGHT,
    )


def tiles_of(rows: int, blocks: int) -> tuple[int, int]:
    """Return the shape of ``[rows, blocks]`` block scales, swizzled in whole tiles."""
    return triton.cdiv(rows, TILE) * TILE, triton.cdiv(blocks, 4) * 4
