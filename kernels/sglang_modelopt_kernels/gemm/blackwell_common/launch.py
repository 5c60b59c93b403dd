"""Descriptors of the operands, and the launch. CUDA tensors, or CPU tensors under Triton's interpreter.

Descriptors are made on the host (``TensorDescriptor``): CUDA's launch takes them by value, as it takes integers. Nothing is read
back from the device, no scratch memory is allocated for a launch (descriptors made in a kernel need some, from an allocator of
the process), and a captured CUDA graph holds the bytes of its descriptors beside the pointers of its other arguments, valid as
long as those are.
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
"""Rows of a tile of block scales, and of the weight in a tile of the product."""
HEIGHT = 8
"""Tiles of rows that a persistent kernel goes through for one tile of tokens, before the next tokens: they stay in L2."""
Element = Literal["e2m1", "e4m3"]


def takes_tiles(m: int) -> bool:
    """Whether ``m`` FP4 tokens are read with their block scales in tiles: where a tile of the product has 128 of them."""
    return m > 64


def tma_objection(tensor: torch.Tensor, padded: bool = False) -> str | None:
    """Why no descriptor of ``tensor`` ``[rows, width]`` can be made; None when one can.

    ``padded`` codes are spread to a byte each on their way to shared memory, where they meet E4M3 (``16U4_ALIGN16B``). The rules
    are those of ``cuTensorMapEncodeTiled`` (CUDA driver API, Tensor Map Object Management).
    """
    multiple, bytes_ = (32 if padded else 16), tensor.shape[-1] * tensor.element_size()
    if tensor.data_ptr() % multiple:
        return f"does not start at a multiple of {multiple} bytes"
    if bytes_ % (64 if padded else multiple):
        return f"has rows of {bytes_} bytes, not in {64 if padded else multiple}s"
    return None if tensor.is_contiguous() else "is not contiguous"


def describe_tiles(scale: torch.Tensor, rows: int, blocks: int) -> TensorDescriptor:
    """Tiles of block scales as ``[tiles, tiles, 2, 256]``, in boxes of ``rows`` x ``blocks`` scales, no side longer than 256."""
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
    """``x @ W^T`` for a weight ``codes`` ``[N, K / 2]`` of E2M1 under block scales in tiles (:func:`naive_swizzle`).

    Args:
        x: E4M3 ``[M, K]``, or E2M1 codes uint8 ``[M, K / 2]``.
        codes: uint8, the even input in the low half.
        scale: of ``group`` inputs each; E4M3 or uint8, UE8M0, in whole tiles.
        x_scale: likewise of ``x``: in tiles where :func:`takes_tiles`, else ``[M, K / group]``; None for E4M3.
        group: inputs to a block scale.
        epilogue: what follows the sum.
        out_dtype: type of the result.
        plan: the configuration and splits.
        describe: whether to use descriptors where they can be made.
    """
    (config, _), m = plan, x.shape[0]
    element: Element = "e4m3" if x_scale is None else "e2m1"
    per_entry = 1 if x_scale is None else 2
    x, blocks = x.contiguous(), config.bk // group
    tiled = x_scale is not None and takes_tiles(m)
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
        t = describe_tiles(t, config.bm, blocks) if tiled else t
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
        TILED=tiled,
        PERSISTENT=config.persistent,
        HEIGHT=HEIGHT,
    )


def tiles_of(rows: int, blocks: int) -> tuple[int, int]:
    """The shape of ``[rows, blocks]`` block scales in whole tiles."""
    return triton.cdiv(rows, TILE) * TILE, triton.cdiv(blocks, 4) * 4
