"""Which configuration of the kernel runs, and the launches. CUDA tensors, or CPU tensors under Triton's interpreter."""

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
from sglang_modelopt_kernels.gemm.common.launch import Plan
from sglang_modelopt_kernels.gemm.fp8 import fp8_linear

from .kernel import block_scaled_kernel, decode_kernel
from .packing import Kind, PackedWeight

SCRATCH_BYTES = 256 << 20
"""At most this much of a decoded weight exists at a time, for the dense product of many tokens."""


# On SM90 the fastest on an H100 (benchmarks.tiles); elsewhere what compiles ahead of time without spilling (benchmarks.aot).
# At least four bytes of scales to a thread (BN * BK / group), or their loads are not pipelined.
_MMA = (
    KernelConfig(64, 16, 128, 4, 3),
    KernelConfig(64, 32, 128, 4, 3),
    KernelConfig(64, 64, 128, 4, 2),
    KernelConfig(64, 128, 128, 4, 2),
)
_TCGEN05 = (
    # two warps are no warp group: mma.sync, half the instructions a weight of a tile that is written to tensor memory first
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
    "wgmma": (KernelConfig(64, 16, 256, 4, 3), KernelConfig(128, 32, 256, 8, 3), *_WARP_GROUP_MANY),
    "tcgen05": _TCGEN05,
}
# For inputs that are not whole 256s.
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
    """The configurations of the kernel for ``k`` inputs on compute capability ``capability`` (times ten), by tokens, ascending."""
    if kind == "int4_float":
        known = _INT4
    elif k % 256:
        known = _E2M1_HALF
    else:
        known = _E2M1 if kind == "e2m1_e4m3" else _E2M1_EXPONENT
    return known[matrix_instruction(capability)]


def descale(kind: Kind, f16: bool) -> float:
    """What the kernel's accumulators are multiplied by; see ``kernel.py``."""
    if kind == "int4_float":
        return 1.0
    return 2.0**9 if kind == "e2m1_e4m3" and not f16 else 2.0**14


def makes_operands(kind: Kind, group: int, k: int, config: KernelConfig, capability: int) -> bool:
    """Whether codes become matrix instructions' operands in the order of a thread's registers.

    Those of SM100 read memory, but for fewer warps than a warp group. Elsewhere the compiler gives codes that layout where it
    pipelines all loads: where K is whole tiles and a thread has four bytes of scales (``benchmarks.aot`` looks at every choice).
    """
    in_registers = matrix_instruction(capability) != "tcgen05" or config.warps < 4
    pipelined = kind == "int4_float" or config.bn * config.bk // group >= 4 * 32 * config.warps
    return in_registers and pipelined and k % config.bk == 0


def in_order(config: KernelConfig) -> bool:
    """Whether activations are put in the kernel's order, in its type, before it: where many programs would each do so again."""
    return config.bm >= 32


def order(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``x`` ``[M, K]``, K a multiple of 64, as ``dtype`` with each 64 inputs in the order of planes."""
    y = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    y.unflatten(1, (-1, 4, 4, 4)).copy_(x.unflatten(1, (-1, 4, 4, 4)).transpose(2, 3))
    return y


def plan_of(weight: PackedWeight, m: int, device: torch.device) -> Plan:
    """Return the plan of :func:`run` for ``m`` tokens on ``device``."""
    capability, processors = machine(device)
    return choose(configs(weight.kind, capability, weight.k), m, weight.n, weight.k, processors)


def run(
    x: torch.Tensor,
    weight: PackedWeight,
    row_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    plan: Plan | None = None,
) -> torch.Tensor:
    """Launches the kernel; arguments as :func:`block_scaled_linear`, ``plan`` instead of the one chosen by size."""
    capability = machine(x.device)[0]
    f16 = x.dtype != torch.bfloat16
    plan = plan or plan_of(weight, x.shape[0], x.device)
    ordered = in_order(plan[0]) and weight.k % 64 == 0
    if ordered:
        x = order(x, torch.float16 if f16 else torch.bfloat16)
    elif x.dtype == torch.float8_e4m3fn and capability < 89:
        x = x.to(torch.float16)  # exact; the type does not exist for Triton before sm_89
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
    )


def decode_rows(weight: PackedWeight, first: int, rows: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of the weight in ``dtype``, ``[rows, K]``; see :func:`decode_into`."""
    y = torch.empty((rows, weight.k), dtype=dtype, device=weight.codes.device)
    decode_into(weight, first, y)
    return y


def decode_into(weight: PackedWeight, first: int, y: torch.Tensor, firsts: torch.Tensor | None = None) -> None:
    """Rows ``first ..`` of a weight without ``out_scale`` into ``y``, ``[rows, K]``; of INT4 the integers, without their scales.

    E2M1 is divided by :func:`descale` in float16 and bf16, and by 2^9 in E4M3, which takes a weight with :attr:`PackedWeight.fp8`.
    Where the weight is experts one after another, ``firsts`` may be :attr:`sglang_modelopt_kernels.moe.route.Routed.first`: an
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


def _parts(weight: PackedWeight, itemsize: int) -> Iterator[slice]:
    """Rows whose decoded form fits SCRATCH_BYTES, one part after the other."""
    step = max(SCRATCH_BYTES // (itemsize * weight.k) // 128 * 128, 128)
    for first in range(0, weight.n, step):
        yield slice(first, min(first + step, weight.n))


def run_dense(
    x: torch.Tensor,
    weight: PackedWeight,
    row_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """The same product for many tokens: rows decoded into a bounded scratch buffer, then cuBLAS with float32 output."""
    dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float16
    values = x.to(dtype)
    epilogue = Epilogue(weight.out_scale, row_scale, bias, descale(weight.kind, dtype == torch.float16))
    y = torch.empty((x.shape[0], weight.n), dtype=out_dtype, device=x.device)
    for part in _parts(weight, 2):
        unit = decode_rows(weight, part.start, part.stop - part.start, dtype)
        product = torch.mm(values, unit.T, out_dtype=torch.float32)
        epilogue.part(part).finish(product.unsqueeze(0), y[:, part])
    return y


def run_groups(
    x: torch.Tensor,
    weight: PackedWeight,
    row_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    plan: Plan | None = None,
) -> torch.Tensor:
    """The same of INT4: integers decoded likewise, then :mod:`..groups`; of FP8 activations in FP8 but for float32 results."""
    dtype = x.dtype
    if dtype == torch.float8_e4m3fn and (out_dtype == torch.float32 or machine(x.device)[0] < 89):
        dtype = torch.float16
    values = x.to(dtype).contiguous()
    epilogue = Epilogue(weight.out_scale, row_scale, bias)
    y = torch.empty((x.shape[0], weight.n), dtype=out_dtype, device=x.device)
    for part in _parts(weight, dtype.itemsize):
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
    """Likewise in FP8 matrix instructions, for E4M3 activations and a weight with :attr:`PackedWeight.fp8`."""
    scale = weight.out_scale * 2.0**9
    outputs = []
    for part in _parts(weight, 1):
        unit = decode_rows(weight, part.start, part.stop - part.start, torch.float8_e4m3fn)
        outputs.append(fp8_linear(x, row_scale, unit, scale[part], None if bias is None else bias[part], out_dtype))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
