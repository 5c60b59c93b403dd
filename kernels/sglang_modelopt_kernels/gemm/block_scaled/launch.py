"""Which configuration of the kernel runs, and the launches. CUDA tensors, or CPU tensors under Triton's interpreter."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton

from sglang_modelopt_kernels.gemm.dense import dense_linear

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


_E2M1_CONFIGS = (
    KernelConfig(64, 16, 256, 4, 3),
    KernelConfig(64, 32, 256, 4, 3),
    KernelConfig(128, 64, 128, 8, 2),
    KernelConfig(128, 128, 256, 8, 2),
)
_INT4_CONFIGS = (
    KernelConfig(64, 16, 128, 4, 4),
    KernelConfig(64, 32, 128, 4, 4),
    KernelConfig(128, 64, 128, 4, 3),
    KernelConfig(128, 128, 128, 8, 2),
)
# Found by compiling ahead of time: the largest E2M1 tile exceeds the shared memory of sm_89 and sm_120, and for sm_100 Triton 3.8
# compiles it to a bare trap instruction.
_SMALL_E2M1_CONFIGS = (*_E2M1_CONFIGS[:-1], KernelConfig(64, 128, 128, 4, 2))


def configs(kind: Kind, capability: int) -> tuple[KernelConfig, ...]:
    """The configurations :func:`choose` picks from on compute capability ``capability`` (times ten), by tokens, ascending."""
    if kind == "int4_float":
        return _INT4_CONFIGS
    return _E2M1_CONFIGS if capability in (80, 90) else _SMALL_E2M1_CONFIGS


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
    steps = triton.cdiv(k, config.bk)
    split = 1
    # Enough programs for two to a multiprocessor, while each still has a pipeline's worth of steps.
    while tiles * split < 2 * processors and split < 16 and steps >= 4 * 2 * split:
        split *= 2
    return config, split


@functools.cache
def _machine(device: torch.device) -> tuple[int, int]:
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
    capability, processors = _machine(x.device)
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
            row_step,
            SPLITS=split,
            BN=1024,
            **epilogue,
        )
    return y


def decode_rows(weight: PackedWeight, first: int, rows: int, f16: bool) -> torch.Tensor:
    """Rows of the weight without ``out_scale``, divided by :func:`descale`, ``[rows, K]`` float16 or bf16. E2M1 only."""
    y = torch.empty((rows, weight.k), dtype=torch.float16 if f16 else torch.bfloat16, device=weight.codes.device)
    decode_kernel[(triton.cdiv(rows, 16), triton.cdiv(weight.k, 256))](
        weight.codes,
        weight.scale,
        y,
        first,
        rows,
        weight.k,
        KIND=weight.kind,
        GROUP=weight.group,
        F16=f16,
        ASM=y.is_cuda,
        BN=16,
    )
    return y


def run_dense(
    x: torch.Tensor,
    weight: PackedWeight,
    row_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """The same product for many tokens: rows decoded into a bounded scratch buffer, then cuBLAS with float32 output."""
    f16 = x.dtype != torch.bfloat16
    values = x.to(torch.float16 if f16 else torch.bfloat16)
    y = torch.empty((x.shape[0], weight.n), dtype=out_dtype, device=x.device)
    factor = weight.out_scale * descale(weight.kind, f16)
    step = max(SCRATCH_BYTES // (2 * weight.k) // 128 * 128, 128)
    for first in range(0, weight.n, step):
        rows = min(step, weight.n - first)
        part = slice(first, first + rows)
        unit = decode_rows(weight, first, rows, f16)
        y[:, part] = dense_linear(values, row_scale, unit, factor[part], None if bias is None else bias[part])
    return y
