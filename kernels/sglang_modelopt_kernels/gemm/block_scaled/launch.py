"""Which configuration of the kernel runs, and the launches. CUDA tensors, or CPU tensors under Triton's interpreter."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton

from sglang_modelopt_kernels.gemm.fp8 import fp8_linear

from .kernel import block_scaled_kernel, decode_kernel, finish_kernel
from .packing import Kind, PackedWeight

SCRATCH_BYTES = 256 << 20
"""At most this much of a decoded weight exists at a time, for the dense product of many tokens."""


@dataclass(frozen=True)
class KernelConfig:
    """Tile sizes of :func:`block_scaled_kernel`: output features, tokens and inputs; warps and pipeline stages."""

    bn: int
    bm: int
    bk: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"{self.bn}x{self.bm}x{self.bk}w{self.warps}s{self.stages}"


# Chosen on an H200 by time (benchmarks/results), elsewhere by what compiles ahead of time without spilling (benchmarks.aot):
# the largest E2M1 tile exceeds the shared memory of sm_89 and sm_120, and for sm_100 Triton 3.8 compiles it to a bare trap.
_E2M1 = {
    "mma.sync": (
        KernelConfig(64, 16, 128, 4, 3),
        KernelConfig(64, 32, 128, 4, 3),
        KernelConfig(64, 64, 128, 4, 2),
        KernelConfig(64, 128, 128, 4, 2),
    ),
    "wgmma": (
        KernelConfig(64, 16, 128, 2, 3),  # two warps are no warp group: mma.sync, faster here
        KernelConfig(64, 32, 256, 4, 3),
        KernelConfig(128, 64, 128, 8, 2),
        KernelConfig(128, 128, 256, 8, 2),
    ),
    "tcgen05": (
        KernelConfig(64, 16, 256, 4, 3),
        KernelConfig(64, 32, 256, 4, 3),
        KernelConfig(128, 64, 128, 8, 2),
        KernelConfig(64, 128, 128, 4, 2),
    ),
}
_INT4_MMA = (
    KernelConfig(64, 16, 128, 4, 4),
    KernelConfig(64, 32, 128, 4, 4),
    KernelConfig(64, 64, 128, 4, 3),  # twice as many tokens spill
)
_INT4_WARP_GROUP = (
    KernelConfig(64, 16, 128, 4, 4),
    KernelConfig(64, 32, 128, 4, 4),
    KernelConfig(128, 64, 128, 4, 3),
    KernelConfig(128, 128, 128, 8, 2),
)
_INT4 = {"mma.sync": _INT4_MMA, "wgmma": _INT4_WARP_GROUP, "tcgen05": _INT4_WARP_GROUP}


def matrix_instruction(capability: int) -> str:
    """The matrix instruction of compute capability ``capability`` (times ten) for float16 and bf16."""
    if 90 <= capability < 100:
        return "wgmma"
    return "tcgen05" if 100 <= capability < 120 else "mma.sync"


def configs(kind: Kind, capability: int) -> tuple[KernelConfig, ...]:
    """The configurations :func:`choose` picks from on compute capability ``capability`` (times ten), by tokens, ascending."""
    return (_INT4 if kind == "int4_float" else _E2M1)[matrix_instruction(capability)]


def descale(kind: Kind, f16: bool) -> float:
    """What the kernel's accumulators are multiplied by; see ``kernel.py``."""
    if kind == "int4_float":
        return 1.0
    return 2.0**9 if kind == "e2m1_e4m3" and not f16 else 2.0**14


def choose(kind: Kind, m: int, n: int, k: int, capability: int, processors: int) -> tuple[KernelConfig, int]:
    """The configuration and the number of splits along K for ``m`` tokens; a function of its arguments alone."""
    candidates = configs(kind, capability)
    config = next((config for config in candidates if m <= config.bm), candidates[-1])
    tiles = triton.cdiv(n, config.bn) * triton.cdiv(m, config.bm)
    return config, splits(tiles * config.warps, triton.cdiv(k, config.bk), processors)


def splits(warps: int, steps: int, processors: int) -> int:
    """Splits along K of a launch of ``warps`` warps in all, each of ``steps`` steps, a power of 2 up to 16."""
    split = 1
    # Enough programs for eight warps to a multiprocessor, while each still has a pipeline's worth of steps.
    while warps * split < 8 * processors and split < 16 and steps >= 4 * 2 * split:
        split *= 2
    return split


@functools.cache
def machine(device: torch.device) -> tuple[int, int]:
    """Compute capability times ten and multiprocessors; an H200's for the interpreter."""
    if device.type != "cuda":
        return 90, 132
    properties = torch.cuda.get_device_properties(device)
    return 10 * properties.major + properties.minor, properties.multi_processor_count


def run(
    x: torch.Tensor,
    weight: PackedWeight,
    row_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    plan: tuple[KernelConfig, int] | None = None,
) -> torch.Tensor:
    """Launches the kernel; arguments as :func:`block_scaled_linear`, ``plan`` instead of :func:`choose`'s."""
    (m, k), n = x.shape, weight.n
    f16 = x.dtype != torch.bfloat16
    capability, processors = machine(x.device)
    if x.dtype == torch.float8_e4m3fn and capability < 89:
        x = x.to(torch.float16)  # exact; the type does not exist for Triton before sm_89
    x = x.contiguous()
    config, split = plan or choose(weight.kind, m, n, k, capability, processors)
    y = torch.empty((m, n), dtype=out_dtype, device=x.device)
    target = torch.empty((split, m, n), dtype=torch.float32, device=x.device) if split > 1 else y
    row_step = int(row_scale is not None and row_scale.numel() > 1)
    # The kernels take a pointer for what is absent and never read through it.
    row_scales = weight.out_scale if row_scale is None else row_scale.contiguous()
    biases = weight.out_scale if bias is None else bias.contiguous()
    epilogue = {
        "DESCALE": descale(weight.kind, f16),
        "HAS_ROW_SCALE": row_scale is not None,
        "HAS_BIAS": bias is not None,
    }
    block_scaled_kernel[(triton.cdiv(n, config.bn), triton.cdiv(m, config.bm), split)](
        x,
        weight.codes,
        weight.scale,
        row_scales,
        weight.out_scale,
        biases,
        target,
        m,
        n,
        k,
        row_step,
        KIND=weight.kind,
        GROUP=weight.group,
        F16=f16,
        ASM=x.is_cuda,
        EVEN_K=k % config.bk == 0,
        SPLIT_K=split,
        BN=config.bn,
        BM=config.bm,
        BK=config.bk,
        num_warps=config.warps,
        num_stages=config.stages,
        **epilogue,
    )
    if split > 1:
        finish_kernel[(m, triton.cdiv(n, 1024))](
            target,
            row_scales,
            weight.out_scale,
            biases,
            y,
            m,
            n,
            n,
            row_step,
            SPLITS=split,
            BN=1024,
            **epilogue,
        )
    return y


def decode_rows(weight: PackedWeight, first: int, rows: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of an E2M1 weight without ``out_scale``, ``[rows, K]``.

    Divided by :func:`descale` in float16 and bf16, and by 2^9 in E4M3, which takes a weight with :attr:`PackedWeight.fp8`.
    """
    fp8 = dtype == torch.float8_e4m3fn
    y = torch.empty((rows, weight.k), dtype=dtype, device=weight.codes.device)
    decode_kernel[(triton.cdiv(rows, 16), triton.cdiv(weight.k, 256))](
        weight.codes,
        weight.scale,
        y,
        first,
        rows,
        weight.k,
        KIND=weight.kind,
        GROUP=weight.group,
        F16=dtype != torch.bfloat16,
        FP8=fp8,
        ASM=y.is_cuda,
        BN=16,
    )
    return y


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
    values, m = x.to(dtype), x.shape[0]
    y = torch.empty((m, weight.n), dtype=out_dtype, device=x.device)
    row_step = int(row_scale is not None and row_scale.numel() > 1)
    row_scales = weight.out_scale if row_scale is None else row_scale.contiguous()
    biases = weight.out_scale if bias is None else bias.contiguous()
    for part in _parts(weight, 2):
        rows = part.stop - part.start
        product = torch.mm(values, decode_rows(weight, part.start, rows, dtype).T, out_dtype=torch.float32)
        finish_kernel[(m, triton.cdiv(rows, 1024))](
            product,
            row_scales,
            weight.out_scale[part],
            biases[part],
            y[:, part],
            m,
            rows,
            weight.n,
            row_step,
            DESCALE=descale(weight.kind, dtype == torch.float16),
            HAS_ROW_SCALE=row_scale is not None,
            HAS_BIAS=bias is not None,
            SPLITS=1,
            BN=1024,
        )
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
