"""Choice of numerics and configuration, and the launch. CUDA tensors, or CPU tensors under Triton's interpreter."""

from __future__ import annotations

from typing import Literal

import torch
import triton

from sglang_modelopt_kernels.gemm.common import KernelConfig, checked, machine, matrix_instruction, needs_drain
from sglang_modelopt_kernels.gemm.mxfp4_fp8_blackwell.linear import ROW_CONFIGS as MXFP4
from sglang_modelopt_kernels.gemm.w4_decode.launch import configs as block_scaled_configs
from sglang_modelopt_kernels.gemm.w4_decode.launch import descale as block_scaled_descale
from sglang_modelopt_kernels.gemm.w4_decode.launch import makes_operands
from sglang_modelopt_kernels.moe.route import Routed

from .kernel import grouped_kernel
from .weights import GroupedWeight, Kind

Math = Literal["f16", "bf16", "fp8"]
"""Dtype of the matrix instruction's operands."""

BLOCKS = (16, 64)
"""Pairs in a block: few, as in decoding, and many. With gathered rows, more spill where the weight is decoded in registers."""
_INT4 = (KernelConfig(64, 16, 128, 4, 4), KernelConfig(64, 64, 128, 4, 3))
_DECODED = (KernelConfig(64, 16, 128, 4, 3), KernelConfig(64, 64, 128, 4, 2))
_HALF = (KernelConfig(64, 16, 64, 4, 4), KernelConfig(64, 64, 128, 4, 2))
_FLOAT = (KernelConfig(64, 16, 128, 4, 3), KernelConfig(64, 64, 128, 8, 3))
# Multiplied as stored: above 16 pairs for an expert the dense product runs.
_E4M3 = (KernelConfig(64, 16, 256, 4, 3),)
_BF16 = (KernelConfig(64, 16, 128, 4, 3),)
"""Configurations that compile without spilling (``benchmarks.aot``)."""
_E2M1_16 = KernelConfig(64, 16, 256, 4, 3)
_E2M1_64 = KernelConfig(128, 64, 128, 8, 3)
"""For gathered rows on wgmma: the fastest of seven for 32 to 128 pairs on an H100."""


_FLOATS = (torch.float16, torch.bfloat16)
TAKEN: dict[Kind, tuple[torch.dtype, ...]] = {
    "e2m1_e4m3": (torch.float8_e4m3fn, *_FLOATS),
    "e2m1_exponent": (torch.float8_e4m3fn, *_FLOATS),
    "int4_float": (torch.float8_e4m3fn, *_FLOATS),
    "mxfp4": (torch.float8_e4m3fn,),
    "mxfp4_tiles": (torch.float8_e4m3fn,),
    "nvfp4_tiles": (torch.float16,),
    "e4m3": (torch.float8_e4m3fn, torch.float16),
    "e4m3_float": _FLOATS,
    "e4m3_exponent": (torch.bfloat16,),  # float16 does not hold such weights
    "int8": _FLOATS,
    "bf16": (torch.bfloat16,),
}
"""Dtypes of the activations that each kind of weight supports."""


def math_of(kind: Kind, dtype: torch.dtype, capability: int) -> Math:
    """Return the numerics for activations of ``dtype`` on compute capability ``capability`` (times ten).

    Raises:
        ValueError: the kind does not support the dtype.
    """
    if dtype not in TAKEN[kind]:
        raise ValueError(f"{kind} weights are multiplied by {' or '.join(map(str, TAKEN[kind]))}, not {dtype}")
    if dtype == torch.bfloat16:
        return "bf16"
    # E4M3 values are exact in fp16; Triton has E4M3 from SM89 on.
    native = dtype == torch.float8_e4m3fn and kind in ("e4m3", "mxfp4", "mxfp4_tiles") and capability >= 89
    return "fp8" if native else "f16"


def descale(kind: Kind, math: Math) -> float:
    """Return the factor of the kernel's accumulators, the inverse of what its decoding divides by."""
    if kind in ("e2m1_e4m3", "e2m1_exponent", "int4_float"):
        return block_scaled_descale(kind, math == "f16")
    return 1.0


def makes_fragments(kind: Kind, group: int, k: int, config: KernelConfig, capability: int) -> bool:
    """Return whether 4-bit codes are decoded in the operand's register order (``makes_operands``); False for other kinds."""
    if kind in ("e2m1_e4m3", "e2m1_exponent", "int4_float"):
        return makes_operands(kind, group, k, config, capability)
    return False


def configs(kind: Kind, math: Math, capability: int, k: int = 256) -> tuple[KernelConfig, ...]:
    """Return the configurations for ``k`` on compute capability ``capability`` (times ten), ascending by pairs in a block.

    The block sizes do not depend on ``k``.
    """
    if kind in ("mxfp4", "e2m1_e4m3", "e2m1_exponent"):
        known = MXFP4 if kind == "mxfp4" else block_scaled_configs(kind, capability, k)
        few, many = (next(config for config in known if config.bm == block) for block in BLOCKS)
        if kind == "mxfp4" or matrix_instruction(capability) != "wgmma":
            return few, many
        return few if kind != "e2m1_e4m3" or k % 256 else _E2M1_16, _E2M1_64
    if math == "fp8":
        return _E4M3
    return {"int4_float": _INT4, "e4m3": _HALF, "e4m3_float": _FLOAT, "bf16": _BF16}.get(kind, _DECODED)


def choose_block(kind: Kind, dtype: torch.dtype, pairs: int, experts: int, capability: int) -> int:
    """Return the pairs in a block by sizes alone: the smallest block that holds the average pairs of an expert, or the largest."""
    known = [config.bm for config in configs(kind, math_of(kind, dtype, capability), capability)]
    return next((block for block in known if pairs <= block * experts), known[-1])


def run(
    x: torch.Tensor,
    weight: GroupedWeight,
    routed: Routed,
    pairs: int,
    row_scale: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Launch the kernel; arguments of :func:`grouped_linear`."""
    capability = machine(x.device)[0]
    math = math_of(weight.kind, x.dtype, capability)
    every = configs(weight.kind, math, capability, weight.k)
    config = next((config for config in every if config.bm == routed.block), None)
    if config is None:
        raise ValueError(f"no configuration for {weight.kind} weights has blocks of {routed.block} pairs")
    codes = weight.codes
    native = capability >= 89  # Triton has no E4M3 before
    if not native:
        codes = codes.view(torch.uint8) if codes.dtype == torch.float8_e4m3fn else codes
        x = x.to(torch.float16) if x.dtype == torch.float8_e4m3fn else x  # exact
    n, k, group = weight.n, weight.k, weight.group
    y = torch.empty((pairs, n), dtype=out_dtype, device=x.device)
    checked(
        grouped_kernel[(routed.owner.shape[0], triton.cdiv(n, config.bn))](
            x.contiguous(),
            codes,
            # A pointer stands for an absent tensor; the kernel never reads through it.
            weight.out_scale if weight.scale is None else weight.scale,
            routed.pairs,
            routed.owner,
            weight.out_scale if row_scale is None else row_scale.contiguous(),
            weight.out_scale,
            y,
            pairs,
            weight.experts,
            n,
            k,
            KIND=weight.kind,
            GROUP=group if weight.scale is not None else 0,
            MATH=math,
            NATIVE=native,
            ASM=x.is_cuda,
            FRAGMENTS=makes_fragments(weight.kind, group, k, config, capability),
            WGMMA=needs_drain(x),
            DESCALE=descale(weight.kind, math),
            HAS_ROW_SCALE=row_scale is not None,
            SHARE=pairs // x.shape[0],
            EVEN_K=k % config.bk == 0,
            BN=config.bn,
            BM=config.bm,
            BK=config.bk,
            num_warps=config.warps,
            num_stages=config.stages,
        )
    )
    return y
