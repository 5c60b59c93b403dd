"""Choice of the configuration, and the launches. CUDA tensors, or CPU tensors under Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator

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
from sglang_modelopt_kernels.gemm.fp8 import fp8_linear_in_parts
from sglang_modelopt_kernels.gemm.plane_order import order

from .kernel import block_scaled_kernel, decode_kernel
from .packing import Kind, PackedWeight

SCRATCH_BYTES = 256 << 20
"""Bytes of a decoded weight that exist at a time, at most, for the dense product of many tokens."""


# On SM90 the fastest on an H100 (benchmarks.tiles); elsewhere those that compile without spilling (benchmarks.aot).
# Each thread loads at least four bytes of scales (BN * BK / group), or Triton does not pipeline the loads.
_MMA = (
    KernelConfig(64, 16, 128, 4, 3),
    KernelConfig(64, 32, 128, 4, 3),
    KernelConfig(64, 64, 128, 4, 2),
    KernelConfig(64, 128, 128, 4, 2),
)
_TCGEN05 = (
    # two warps are less than a warpgroup and use mma.sync: half the instructions a weight of a tile written to tensor memory
    KernelConfig(64, 16, 128, 2, 3),
    KernelConfig(64, 32, 128, 2, 3),
    KernelConfig(128, 64, 128, 8, 2),
    KernelConfig(64, 128, 128, 4, 2),
)
_WARP_GROUP_MANY = (
    KernelConfig(64, 64, 128, 4, 4),
    KernelConfig(64, 128, 128, 4, 3),
    KernelConfig(128, 256, 128, 8, 3),
)
_E2M1: dict[str, tuple[KernelConfig, ...]] = {
    "mma.sync": _MMA,
    "wgmma": (
        KernelConfig(128, 16, 256, 4, 3),
        KernelConfig(128, 32, 256, 4, 3),
        KernelConfig(64, 32, 256, 4, 3),
        KernelConfig(128, 64, 256, 8, 3),
        KernelConfig(64, 64, 256, 4, 4),
        KernelConfig(64, 128, 128, 4, 3),
        KernelConfig(128, 256, 128, 8, 3),
    ),
    "tcgen05": _TCGEN05,
}
# For K that is no multiple of 256.
_E2M1_HALF: dict[str, tuple[KernelConfig, ...]] = {
    "mma.sync": _MMA,
    "wgmma": (KernelConfig(64, 16, 128, 2, 3), KernelConfig(64, 32, 128, 4, 3), *_WARP_GROUP_MANY),
    "tcgen05": _TCGEN05,
}
# Not timed.
_E2M1_EXPONENT: dict[str, tuple[KernelConfig, ...]] = {
    "mma.sync": (
        KernelConfig(64, 16, 256, 4, 3),
        KernelConfig(64, 32, 256, 4, 2),
        KernelConfig(128, 64, 256, 8, 2),
        KernelConfig(64, 128, 256, 4, 2),
    ),
    "tcgen05": _TCGEN05,
    "wgmma": (
        KernelConfig(64, 16, 128, 2, 3),
        KernelConfig(64, 32, 256, 4, 3),
        KernelConfig(128, 64, 256, 8, 2),
        KernelConfig(128, 128, 256, 8, 2),
    ),
}
_INT4_FEW = (KernelConfig(64, 16, 128, 4, 4), KernelConfig(64, 32, 128, 4, 4))
_INT4: dict[str, tuple[KernelConfig, ...]] = {
    "mma.sync": (*_INT4_FEW, KernelConfig(128, 64, 128, 8, 2)),
    "wgmma": (*_INT4_FEW, *_WARP_GROUP_MANY[:2]),
    "tcgen05": (*_INT4_FEW, KernelConfig(128, 64, 128, 8, 3)),
}


def configs(kind: Kind, capability: int, k: int = 256) -> tuple[KernelConfig, ...]:
    """Return the configurations for ``k`` on compute capability ``capability`` (times ten), ascending by BM."""
    if kind == "int4_float":
        known = _INT4
    elif k % 256:
        known = _E2M1_HALF
    else:
        known = _E2M1 if kind == "e2m1_e4m3" else _E2M1_EXPONENT
    return known[matrix_instruction(capability)]


def descale(kind: Kind, f16: bool) -> float:
    """Return the factor of the kernel's accumulators, the inverse of what its decoding divides by; see ``kernel.py``."""
    if kind == "int4_float":
        return 1.0
    return 2.0**9 if kind == "e2m1_e4m3" and not f16 else 2.0**14


def makes_operands(kind: Kind, group: int, k: int, config: KernelConfig, capability: int) -> bool:
    """Return whether codes are decoded in the register order of the matrix instruction's operand.

    tcgen05 (SM100) reads operands from memory, except below a warpgroup. Elsewhere the compiler gives codes that layout where it
    pipelines all loads: where K is a multiple of BK and a thread loads four bytes of scales. ``benchmarks.aot`` checks every
    choice.
    """
    in_registers = matrix_instruction(capability) != "tcgen05" or config.warps < 4
    pipelined = kind == "int4_float" or config.bn * config.bk // group >= 4 * 32 * config.warps
    return in_registers and pipelined and k % config.bk == 0


def in_order(config: KernelConfig) -> bool:
    """Return whether activations are permuted and cast before the launch: where many programs would each do so again."""
    return config.bm >= 32


def plan_of(weight: PackedWeight, m: int, device: torch.device) -> Plan:
    """Return the plan of :func:`run` for ``m`` tokens on ``device``."""
    capability, sms = machine(device)
    return choose(configs(weight.kind, capability, weight.k), m, weight.n, weight.k, sms)


def run(
    x: torch.Tensor,
    weight: PackedWeight,
    row_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    plan: Plan | None = None,
) -> torch.Tensor:
    """Launch the decoding kernel; arguments of :func:`block_scaled_linear`, and ``plan`` instead of the choice by size."""
    capability = machine(x.device)[0]
    f16 = x.dtype != torch.bfloat16
    plan = plan or plan_of(weight, x.shape[0], x.device)
    ordered = in_order(plan[0]) and weight.k % 64 == 0
    if ordered:
        x = order(x, torch.float16 if f16 else torch.bfloat16)
    elif x.dtype == torch.float8_e4m3fn and capability < 89:
        x = x.to(torch.float16)  # exact; Triton has no E4M3 before SM89
    return launch(
        block_scaled_kernel,
        x.contiguous(),
        weight.codes,
        weight.scale,
        Epilogue(weight.out_scale, row_scale, bias, descale(weight.kind, f16)),
        out_dtype,
        plan,
        KIND=weight.kind,
        GROUP=weight.group,
        F16=f16,
        ASM=x.is_cuda,
        FRAGMENTS=makes_operands(weight.kind, weight.group, weight.k, plan[0], capability),
        ORDERED=ordered,
        WGMMA=needs_drain(x),
        **few(x, plan[0]),
    )


def decode_rows(weight: PackedWeight, first: int, rows: int, dtype: torch.dtype) -> torch.Tensor:
    """Decode rows of the weight to ``dtype``, ``[rows, K]``; see :func:`decode_into`."""
    y = torch.empty((rows, weight.k), dtype=dtype, device=weight.codes.device)
    decode_into(weight, first, y)
    return y


def decode_into(weight: PackedWeight, first: int, y: torch.Tensor, firsts: torch.Tensor | None = None) -> None:
    """Decode rows ``first ..`` of a weight into ``y`` ``[rows, K]``, without ``out_scale``; INT4 to integers without block scales.

    E2M1 is divided by :func:`descale` in float16 and bf16, and by 2^9 in E4M3, which takes a weight with :attr:`PackedWeight.fp8`.
    Where the weight concatenates experts, ``firsts`` may be :attr:`sglang_modelopt_kernels.moe.route.Routed.first`: an
    expert without pairs then stays undefined.
    """
    fp8 = y.dtype == torch.float8_e4m3fn
    decode_kernel[(triton.cdiv(y.shape[0], 16), triton.cdiv(weight.k, 256))](
        weight.codes,
        weight.scale,
        y,
        weight.codes if firsts is None else firsts,
        first,
        y.shape[0],
        weight.k,
        weight.n if firsts is None else weight.n // (firsts.shape[0] - 2),
        KIND=weight.kind,
        GROUP=weight.group,
        F16=y.dtype != torch.bfloat16,
        FP8=fp8,
        ASM=y.is_cuda,
        OWNED=firsts is not None,
        BN=16,
    )


def row_parts(n: int, bytes_of_row: int) -> Iterator[slice]:
    """Yield slices of ``n`` rows that take at most SCRATCH_BYTES, or are 128."""
    step = max(SCRATCH_BYTES // bytes_of_row // 128 * 128, 128)
    for first in range(0, n, step):
        yield slice(first, min(first + step, n))


def run_dense(
    x: torch.Tensor,
    weight: PackedWeight,
    row_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Multiply many tokens: rows decoded into a bounded scratch buffer, then cuBLAS with fp32 output.

    Arguments of :func:`block_scaled_linear`.
    """
    dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float16
    epilogue = Epilogue(weight.out_scale, row_scale, bias, descale(weight.kind, dtype == torch.float16))

    def decode(part: slice) -> torch.Tensor:
        return decode_rows(weight, part.start, part.stop - part.start, dtype)

    return epilogue.multiply_in_parts(x.to(dtype), decode, row_parts(weight.n, 2 * weight.k), out_dtype)


def run_groups(
    x: torch.Tensor,
    weight: PackedWeight,
    row_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    plan: Plan | None = None,
) -> torch.Tensor:
    """Multiply many tokens by INT4: integers decoded into a scratch buffer, then :func:`group_scaled.multiply`.

    Arguments of :func:`block_scaled_linear`, and the configuration of ``plan``. FP8 activations are multiplied in FP8, for fp32
    results in fp16.
    """
    dtype = x.dtype
    if dtype == torch.float8_e4m3fn and (out_dtype == torch.float32 or machine(x.device)[0] < 89):
        dtype = torch.float16
    values = x.to(dtype).contiguous()
    epilogue = Epilogue(weight.out_scale, row_scale, bias)
    y = torch.empty((x.shape[0], weight.n), dtype=out_dtype, device=x.device)
    for part in row_parts(weight.n, dtype.itemsize * weight.k):
        unit = decode_rows(weight, part.start, part.stop - part.start, dtype)
        group_scaled.multiply(values, unit, weight.scale, epilogue, y, part.start, plan[0] if plan else None)
    return y


def run_fp8(
    x: torch.Tensor,
    weight: PackedWeight,
    row_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Multiply many E4M3 tokens in FP8 matrix instructions: rows decoded to E4M3 into a scratch buffer, then
    :func:`fp8_linear_in_parts`.

    Arguments of :func:`block_scaled_linear`, for a weight with :attr:`PackedWeight.fp8`.
    """

    def decode(part: slice) -> torch.Tensor:
        return decode_rows(weight, part.start, part.stop - part.start, torch.float8_e4m3fn)

    parts = row_parts(weight.n, weight.k)
    return fp8_linear_in_parts(x, row_scale, decode, parts, weight.out_scale * 2.0**9, bias, out_dtype)
