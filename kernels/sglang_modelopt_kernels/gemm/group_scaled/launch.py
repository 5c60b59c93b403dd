"""INT4 and FP8 in blocks for many tokens: codes decoded once, a dense product in which each group's sum is scaled.

An integer from -8 to 7 is exact in E4M3, float16 and bf16, so every product is exact. A step multiplies within one group of K
elements, in the precision of the matrix instruction (fp32, but about 13 bits of FP8 sums on Hopper), and adds its scaled sum in
fp32.
"""

from __future__ import annotations

import torch

from sglang_modelopt_kernels.gemm.common import Epilogue, KernelConfig, checked, machine, matrix_instruction

from .kernel import group_scaled_kernel

WIDTH = 8
"""Row tiles that pass through all tokens together, so that both operands of a wave of programs fit L2."""

# The largest square that compiles without spilling (benchmarks.aot), timed with E4M3 on SM90 only. Each output
# takes two accumulators.
_CONFIGS = {
    ("wgmma", 1): KernelConfig(128, 128, 128, 8, 4),
    ("wgmma", 2): KernelConfig(128, 128, 64, 8, 4),
    ("tcgen05", 1): KernelConfig(128, 128, 128, 8, 4),
    ("tcgen05", 2): KernelConfig(128, 128, 64, 8, 4),
    ("mma.sync", 1): KernelConfig(128, 128, 128, 8, 3),
    ("mma.sync", 2): KernelConfig(128, 128, 64, 8, 3),
}


def config_for(capability: int, itemsize: int) -> KernelConfig:
    """Return the configuration for operands of ``itemsize`` bytes on compute capability ``capability`` (times ten)."""
    return _CONFIGS[matrix_instruction(capability), itemsize]


def multiply(
    x: torch.Tensor,
    unit: torch.Tensor,
    scale: torch.Tensor,
    epilogue: Epilogue,
    y: torch.Tensor,
    first: int,
    config: KernelConfig | None = None,
) -> None:
    """Write output features ``first ..`` of the product into ``y`` ``[M, N]``.

    Args:
        x: ``[M, K]`` in E4M3, float16 or bf16.
        unit: decoded codes of the dtype of ``x``, ``[rows, K]``; whole tiles of rows, or the last rows of the weight.
        scale: fp32 ``[N, K / group]``, of the whole weight.
        epilogue: of the whole weight.
        y: contiguous, of any float type.
        first: the first row of ``unit`` in the weight.
        config: None for the device's own.
    """
    (m, k), n, rows = x.shape, scale.shape[0], unit.shape[0]
    config = config or config_for(machine(x.device)[0], x.element_size())
    checked(
        group_scaled_kernel[(config.tiles(m, rows),)](
            x,
            unit,
            scale,
            y_ptr=y,
            m=m,
            n=n,
            k=k,
            first=first,
            count=rows,
            GROUP=k // scale.shape[1],
            ASM=x.is_cuda,
            WIDTH=WIDTH,
            BN=config.bn,
            BM=config.bm,
            BK=config.bk,
            num_warps=config.warps,
            num_stages=config.stages,
            **epilogue.arguments(),
        )
    )
