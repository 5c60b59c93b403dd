"""Choice of numerics and configuration, and the launches. CUDA tensors, or CPU tensors under Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
import triton

from sglang_modelopt_kernels.gemm import group_scaled
from sglang_modelopt_kernels.gemm.common import (
    Epilogue,
    KernelConfig,
    choose,
    launch,
    machine,
    matrix_instruction,
    needs_drain,
)
from sglang_modelopt_kernels.gemm.common.launch import Plan, few
from sglang_modelopt_kernels.gemm.w4_decode.launch import SCRATCH_BYTES

from .kernel import byte_decode_kernel, eight_bit_kernel
from .packing import FLOAT_BLOCK, ByteWeight, Kind, scales_of_rows

Math = Literal["f16", "bf16", "i8"]
"""Dtype of the matrix instruction's operands."""

TAKEN: dict[Kind, tuple[torch.dtype, ...]] = {
    "int8": (torch.int8, torch.float16, torch.bfloat16),
    "e4m3": (torch.float16, torch.bfloat16),
    "e4m3_float": (torch.float16, torch.bfloat16),
    "e4m3_exponent": (torch.bfloat16,),  # float16 does not hold such weights
}
"""Dtypes of the activations that each kind of weight supports."""

# Not timed: those that compile without spilling (benchmarks.aot). One warpgroup at the most.
_DECODED: dict[str, tuple[KernelConfig, ...]] = {
    "mma.sync": (
        KernelConfig(64, 16, 128, 4, 3),
        KernelConfig(64, 32, 128, 4, 3),
        KernelConfig(64, 64, 128, 4, 2),
        KernelConfig(64, 128, 64, 4, 3),
    ),
    "wgmma": (
        KernelConfig(64, 16, 128, 4, 4),
        KernelConfig(64, 32, 128, 4, 4),
        KernelConfig(64, 64, 128, 4, 4),
        KernelConfig(64, 128, 128, 4, 3),
    ),
    "tcgen05": (
        # two warps are less than a warpgroup and use mma.sync: half the instructions a weight of a tile written to tensor memory
        KernelConfig(64, 16, 128, 2, 4),
        KernelConfig(64, 32, 128, 2, 4),
        KernelConfig(64, 64, 128, 4, 3),
        KernelConfig(64, 128, 128, 4, 3),
    ),
}
_FLOAT: dict[str, tuple[KernelConfig, ...]] = {
    "mma.sync": (
        KernelConfig(64, 16, 128, 4, 3),
        KernelConfig(64, 32, 128, 4, 3),
        KernelConfig(64, 64, 128, 4, 2),
    ),
    "wgmma": (
        KernelConfig(64, 16, 128, 4, 4),
        KernelConfig(64, 32, 128, 4, 4),
        KernelConfig(64, 64, 128, 4, 4),
    ),
    "tcgen05": (
        KernelConfig(64, 16, 128, 2, 4),
        KernelConfig(32, 32, 128, 2, 4),
        KernelConfig(64, 64, 128, 4, 3),
    ),
}
_INT8: dict[str, tuple[KernelConfig, ...]] = {
    "mma.sync": (
        KernelConfig(64, 16, 256, 4, 3),
        KernelConfig(64, 32, 128, 4, 4),
        KernelConfig(64, 64, 128, 4, 4),
        KernelConfig(128, 128, 64, 8, 4),
    ),
    "wgmma": (
        KernelConfig(64, 16, 256, 4, 4),
        KernelConfig(64, 32, 256, 4, 4),
        KernelConfig(64, 64, 128, 4, 4),
        KernelConfig(128, 128, 128, 4, 4),
    ),
    "tcgen05": (
        KernelConfig(64, 16, 256, 4, 4),
        KernelConfig(64, 32, 128, 4, 4),
        KernelConfig(64, 64, 128, 4, 4),
        KernelConfig(128, 128, 64, 4, 4),
    ),
}


def math_of(kind: Kind, dtype: torch.dtype) -> Math:
    """Return the numerics for activations of ``dtype``. Raises ValueError where the kind does not support them."""
    if dtype not in TAKEN[kind]:
        raise ValueError(f"{kind} weights are multiplied by {' or '.join(map(str, TAKEN[kind]))}, not {dtype}")
    return "i8" if dtype == torch.int8 else "bf16" if dtype == torch.bfloat16 else "f16"


def configs(kind: Kind, math: Math, capability: int) -> tuple[KernelConfig, ...]:
    """Return the configurations on compute capability ``capability`` (times ten), ascending by BM."""
    known = _INT8 if math == "i8" else _FLOAT if kind == "e4m3_float" else _DECODED
    return known[matrix_instruction(capability)]


def _codes(weight: ByteWeight, capability: int) -> torch.Tensor:
    """Return the codes as Triton reads them: bytes before SM89, where it has no E4M3."""
    return weight.codes.view(torch.uint8) if capability < 89 and weight.kind != "int8" else weight.codes


def _scale(weight: ByteWeight) -> torch.Tensor:
    """Return the block scales, or any tensor where there are none: the kernels never read through that pointer."""
    return weight.out_scale if weight.scale is None else weight.scale


def plan_of(weight: ByteWeight, m: int, dtype: torch.dtype, device: torch.device) -> Plan:
    """Return the plan of :func:`run` for ``m`` tokens of ``dtype`` on ``device``."""
    capability, sms = machine(device)
    known = configs(weight.kind, math_of(weight.kind, dtype), capability)
    return choose(known, m, weight.n, weight.k, sms)


def run(
    x: torch.Tensor,
    weight: ByteWeight,
    row_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    plan: Plan | None = None,
) -> torch.Tensor:
    """Launch the kernel; arguments of :func:`eight_bit_linear`, and ``plan`` instead of the choice by size."""
    capability = machine(x.device)[0]
    math = math_of(weight.kind, x.dtype)
    plan = plan or plan_of(weight, x.shape[0], x.dtype, x.device)
    return launch(
        eight_bit_kernel,
        x.contiguous(),
        _codes(weight, capability),
        _scale(weight),
        Epilogue(weight.out_scale, row_scale, bias),
        out_dtype,
        plan,
        sum_dtype=torch.int32 if math == "i8" else torch.float32,
        KIND=weight.kind,
        MATH=math,
        NATIVE=capability >= 89,
        ASM=x.is_cuda,
        WGMMA=needs_drain(x),
        SCALE_ROWS=weight.scale_rows,
        **few(x, plan[0]),
    )


def decode_rows(weight: ByteWeight, first: int, rows: int, dtype: torch.dtype) -> torch.Tensor:
    """Decode rows of the weight to ``dtype``, ``[rows, K]``, without ``out_scale``; ``e4m3_float`` without block scales."""
    capability = machine(weight.codes.device)[0]
    y = torch.empty((rows, weight.k), dtype=dtype, device=weight.codes.device)
    byte_decode_kernel[(triton.cdiv(rows, 8), triton.cdiv(weight.k, 512))](
        _codes(weight, capability),
        _scale(weight),
        y,
        first,
        rows,
        weight.k,
        KIND=weight.kind,
        F16=dtype == torch.float16,
        NATIVE=capability >= 89,
        ASM=y.is_cuda,
        BN=8,
        BK=512,
    )
    return y


def _parts(n: int, bytes_of_row: int) -> Iterator[slice]:
    """Yield slices of rows that take at most SCRATCH_BYTES."""
    step = max(SCRATCH_BYTES // bytes_of_row // 128 * 128, 128)
    for first in range(0, n, step):
        yield slice(first, min(first + step, n))


def run_dense(
    x: torch.Tensor,
    weight: ByteWeight,
    row_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Multiply many tokens: rows of the weight decoded into a bounded scratch buffer, then cuBLAS with fp32 output.

    Arguments of :func:`eight_bit_linear`. Under fp32 block scales the codes are decoded, and :func:`group_scaled.multiply` scales
    the sum of each block; K is a multiple of the block.
    """
    math_of(weight.kind, x.dtype)
    values, epilogue = x.contiguous(), Epilogue(weight.out_scale, row_scale, bias)
    y = torch.empty((x.shape[0], weight.n), dtype=out_dtype, device=x.device)
    scale = scales_of_rows(weight).contiguous() if weight.kind == "e4m3_float" else None
    for part in _parts(weight.n, 2 * weight.k):
        unit = decode_rows(weight, part.start, part.stop - part.start, x.dtype)
        if scale is not None:
            group_scaled.multiply(values, unit, scale, epilogue, y, part.start)
        else:
            product = torch.mm(values, unit.T, out_dtype=torch.float32)
            epilogue.part(part).finish(product.unsqueeze(0), y[:, part])
    return y


def run_int8(
    x: torch.Tensor,
    weight: ByteWeight,
    row_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Multiply many int8 tokens by ``torch._int_mm`` (cuBLASLt), whose int32 sums equal those of :func:`run`."""
    values, epilogue = x.contiguous(), Epilogue(weight.out_scale, row_scale, bias)
    y = torch.empty((x.shape[0], weight.n), dtype=out_dtype, device=x.device)
    for part in _parts(weight.n, 4 * x.shape[0]):
        product = torch._int_mm(values, weight.codes[part].T)
        epilogue.part(part).finish(product.unsqueeze(0), y[:, part])
    return y


def takes_int_mm(m: int, n: int, k: int, capability: int) -> bool:
    """Return whether ``torch._int_mm`` supports the product. On Blackwell it was not tried."""
    return capability < 100 and m > 16 and n % 8 == 0 and k % 8 == 0


def takes_dense(weight: ByteWeight) -> bool:
    """Return whether :func:`run_dense` supports the weight."""
    return weight.kind != "e4m3_float" or weight.k % FLOAT_BLOCK == 0
