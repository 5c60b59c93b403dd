"""Choice of the configuration, and the launches, on a GPU of SM90."""

from __future__ import annotations

import torch

from sglang_modelopt_kernels.early import early
from sglang_modelopt_kernels.gemm.common import Epilogue, KernelConfig, choose, launch, machine
from sglang_modelopt_kernels.gemm.common.launch import Plan, few
from sglang_modelopt_kernels.gemm.fp8 import fp8_linear_in_parts
from sglang_modelopt_kernels.gemm.mxfp4_fp8_hopper.kernel import folded_kernel
from sglang_modelopt_kernels.gemm.w4_decode.launch import row_parts

from .packing import BLOCKS, ROWS, WIDTH, Kind, StreamedWeight

# Of those that were timed on an H200 the fastest for an 8B model's layers, NVFP4 in blocks of 32; ascending by BM.
_NVFP4 = (
    KernelConfig(64, 8, 256, 4, 4),
    KernelConfig(64, 16, 256, 4, 3),
    KernelConfig(64, 32, 256, 4, 4),
    KernelConfig(64, 64, 256, 4, 2),
)
_MXFP4 = (
    KernelConfig(64, 8, 256, 4, 4),
    KernelConfig(64, 16, 256, 4, 4),
    KernelConfig(64, 32, 256, 4, 3),
    KernelConfig(64, 64, 256, 4, 3),
)
STREAMED: dict[Kind, tuple[KernelConfig, ...]] = {"folded": _MXFP4, "scaled_16": _NVFP4, "scaled_32": _NVFP4}
"""The configurations of the streamed kernel."""
TILED = (KernelConfig(64, 64, 256, 4, 4), KernelConfig(64, 128, 256, 4, 3))
"""Those from TILED_FROM tokens of MXFP4 on, of the folded kernel that reads the same tiles: its copies do not begin early,
and Triton pipelines its loop."""
TILED_FROM = 33
SHORT_STEPS, WAVE = 16, 1.5
"""Steps of 256 K elements, and programs for each SM, up to which MXFP4 is streamed for up to 128 tokens: a short product ends
before a pipeline is in its stride (measured on an H200)."""
RESIDENT = 2
"""Programs of four warps on an SM up to which K is split; twice as many for up to 8 tokens, whose partial sums are small."""
LEAST_STEPS = 4
"""Steps of 256 K elements that a split has at least; twice as many of MXFP4 from TILED_FROM tokens on, whose partial sums
are larger."""
DESCALE: dict[Kind, float] = {"folded": 1.0, "scaled_16": 2.0**14, "scaled_32": 2.0**14}
"""The factor of the kernel's accumulators, the inverse of what its decoding divides by."""
DENSE_FROM: dict[Kind, int] = {"folded": 513, "scaled_16": 385, "scaled_32": 385}
"""Tokens from which the weight is decoded once for a product of PyTorch's. The folded kernel takes 0.98 of that with 512 tokens and
1.14 with 768, in rows; in TILED's tiles it was not timed. NVFP4's lies between 128, where decoding first takes twice
as long, and 512, where it takes less; nothing between was timed."""


def operand(kind: Kind) -> torch.dtype:
    """Return the type of activations that the kernel reads: E4M3, or float16, which holds E4M3's values."""
    return torch.float8_e4m3fn if kind == "folded" else torch.float16


def plan_of(weight: StreamedWeight, m: int, device: torch.device) -> Plan:
    """Return the plan of :func:`run` for ``m`` tokens on ``device``.

    The streamed kernel's K is split into as many parts as leave all programs resident at a time.
    """
    configs, sms, steps = STREAMED[weight.kind], machine(device)[1], weight.k // WIDTH
    config = next((config for config in configs if m <= config.bm), configs[-1])
    least = LEAST_STEPS
    if weight.kind == "folded" and m >= TILED_FROM:
        if m > 2 * config.bm or steps > SHORT_STEPS or config.tiles(m, weight.n) > WAVE * sms:
            return choose(TILED, m, weight.n, weight.k, sms)
        least *= 2
    room = RESIDENT * sms * (2 if config.bm <= 8 else 1)
    split = 1
    while split < 8 and config.tiles(m, weight.n) * 2 * split <= room and steps >= 2 * least * split:
        split *= 2
    return config, split


def run(
    x: torch.Tensor,
    weight: StreamedWeight,
    row_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    plan: Plan | None = None,
) -> torch.Tensor:
    """Launch a kernel; arguments of :func:`streamed_linear`, and ``plan`` instead of the choice by size."""
    config, split = plan = plan or plan_of(weight, x.shape[0], x.device)
    epilogue = Epilogue(weight.out_scale, row_scale, bias, DESCALE[weight.kind])
    operands = (x.contiguous(), weight.codes, weight.scale)
    if config in TILED and weight.kind == "folded":
        return launch(folded_kernel, *operands, epilogue, out_dtype, plan, ASM=x.is_cuda, TILED=True, **few(x, config))
    from .kernel import streamed_kernel  # needs a Triton with Gluon: see available.py

    return launch(
        streamed_kernel,
        *operands,
        epilogue,
        out_dtype,
        (config, split),
        FP8=weight.kind == "folded",
        BLOCKS=BLOCKS[weight.kind],
        STAGES=config.stages,
        EVEN_M=x.shape[0] % config.bm == 0,
        **early(x.device),
    )


def decode_rows(weight: StreamedWeight, first: int, rows: int) -> torch.Tensor:
    """Decode rows of the weight, whole tiles, ``[rows, K]``: E4M3 without ``out_scale``, or float16 divided by DESCALE too."""
    y = torch.empty((rows, weight.k), dtype=operand(weight.kind), device=weight.codes.device)
    decode_into(weight, first, y)
    return y


def decode_into(weight: StreamedWeight, first: int, y: torch.Tensor) -> None:
    """Decode rows ``first ..`` of the weight into ``y`` ``[rows, K]``; see :func:`decode_rows`."""
    from .kernel import unstream_kernel

    fp8 = weight.kind == "folded"
    words = torch.int32 if fp8 else torch.int16
    unstream_kernel[(y.shape[0] // ROWS, weight.k // WIDTH)](
        weight.codes.view(words),
        weight.scale,
        y.view(torch.int32) if fp8 else y,
        first // ROWS,
        weight.k,
        FP8=fp8,
        BLOCKS=BLOCKS[weight.kind],
        ASM=y.is_cuda,
    )


def run_dense(
    x: torch.Tensor,
    weight: StreamedWeight,
    row_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Multiply many tokens: rows decoded into a bounded scratch buffer, then a product in FP8, or in float16 with fp32 output.

    Arguments of :func:`streamed_linear`.
    """

    def decode(part: slice) -> torch.Tensor:
        return decode_rows(weight, part.start, part.stop - part.start)

    parts = row_parts(weight.n, x.element_size() * weight.k)
    if weight.kind == "folded":
        return fp8_linear_in_parts(x, row_scale, decode, parts, weight.out_scale, bias, out_dtype)
    epilogue = Epilogue(weight.out_scale, row_scale, bias, DESCALE[weight.kind])
    return epilogue.multiply_in_parts(x, decode, parts, out_dtype)
