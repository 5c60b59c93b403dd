"""Decoding of experts into a scratch buffer, in the dtype of their product."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton

from sglang_modelopt_kernels.formats import ue8m0
from sglang_modelopt_kernels.gemm.w4_decode.launch import decode_into, descale
from sglang_modelopt_kernels.gemm.w4_decode.packing import PackedWeight
from sglang_modelopt_kernels.gemm.w4_stream.launch import DESCALE
from sglang_modelopt_kernels.gemm.w4_stream.launch import decode_into as decode_tiles
from sglang_modelopt_kernels.gemm.w4_stream.packing import StreamedWeight
from sglang_modelopt_kernels.moe.route import Routed

from ..weights import TILES, GroupedWeight

ROWS = 128
"""Row multiple at which an expert is cut that is decoded in several parts."""


@dataclass(frozen=True)
class Part:
    """Rows that are decoded at a time: all rows of some experts, or some rows of one."""

    experts: slice
    rows: slice

    @property
    def shape(self) -> tuple[int, int]:
        """Number of experts, and rows of each."""
        return self.experts.stop - self.experts.start, self.rows.stop - self.rows.start


def parts(experts: int, n: int, k: int, itemsize: int, scratch_bytes: int) -> Iterator[Part]:
    """Yield parts of about one size, each of at most ``scratch_bytes`` when decoded (but at least ROWS rows)."""
    together = scratch_bytes // (n * k * itemsize)
    if together:
        step = triton.cdiv(experts, triton.cdiv(experts, together))
        for first in range(0, experts, step):
            yield Part(slice(first, min(first + step, experts)), slice(0, n))
        return
    most = max(scratch_bytes // (k * itemsize) // ROWS, 1) * ROWS
    step = triton.cdiv(triton.cdiv(n, triton.cdiv(n, most)), ROWS) * ROWS
    for expert in range(experts):
        for first in range(0, n, step):
            yield Part(slice(expert, expert + 1), slice(first, min(first + step, n)))


def operand_of(weight: GroupedWeight, dtype: torch.dtype, out_dtype: torch.dtype, capability: int) -> torch.dtype:
    """Return the dtype of both operands for activations of ``dtype``: theirs, or fp16 for E4M3 where the weight is not E4M3.

    FP8 matrix instructions keep about 13 bits of a sum on Hopper, more than bf16 and fp16 results show and less than fp32: for fp32
    results a weight that fewer tokens multiply in fp16 is multiplied in fp16. Fewer tokens multiply tiles in FP8, too.
    """
    if dtype != torch.float8_e4m3fn:
        return dtype
    becomes_fp8 = (weight.kind == "int4_float" or weight.fp8) and out_dtype != torch.float32
    return dtype if capability >= 89 and (weight.kind in ("e4m3", "mxfp4_tiles") or becomes_fp8) else torch.float16


def divisor(weight: GroupedWeight, dtype: torch.dtype) -> float:
    """Return the divisor of the unit weight in :func:`decode_experts`."""
    if weight.kind == "nvfp4_tiles":
        return DESCALE[weight.tiles]
    if weight.kind not in ("e2m1_e4m3", "e2m1_exponent"):
        return 1.0
    return 2.0**9 if dtype == torch.float8_e4m3fn else descale(weight.kind, dtype == torch.float16)


def decode_experts(weight: GroupedWeight, part: Part, routed: Routed, scratch: torch.Tensor) -> torch.Tensor:
    """Decode a part of the unit weight into ``scratch``, ``[experts, rows, K]``, exact in its dtype.

    E2M1 is divided by :func:`divisor`; under fp32 block scales only the codes are decoded. 4-bit experts without pairs in
    ``routed`` are skipped (those of TILES are not), and their part of ``scratch`` is undefined.
    """
    experts, rows = part.shape
    unit = scratch[: experts * rows * weight.k].view(experts, rows, weight.k)
    if weight.kind == "e2m1_e4m3" or weight.kind == "e2m1_exponent" or weight.kind == "int4_float":
        if weight.scale is None:
            raise ValueError(f"{weight.kind} weights have block scales")
        codes, scale, out_scale = (tensor.flatten(0, 1) for tensor in (weight.codes, weight.scale, weight.out_scale))
        packed = PackedWeight(codes, scale, out_scale, weight.kind, weight.group, weight.fp8)
        decode_into(packed, part.experts.start * weight.n + part.rows.start, unit.flatten(0, 1), routed.first)
        return unit
    if weight.kind in TILES and weight.scale is not None:
        codes, scale, out_scale = (tensor.flatten(0, 1) for tensor in (weight.codes, weight.scale, weight.out_scale))
        decode_tiles(
            StreamedWeight(codes, scale, out_scale, weight.tiles),
            part.experts.start * weight.n + part.rows.start,
            unit.flatten(0, 1),
        )
        return unit
    unit.copy_(weight.codes[part.experts, part.rows])
    if weight.kind == "e4m3_exponent" and weight.scale is not None:
        exponent = weight.scale[part.experts, part.rows].to(torch.int32) - ue8m0.BIAS
        blocks = unit.unflatten(2, (-1, weight.group))
        torch.ldexp(blocks, exponent.unsqueeze(3), out=blocks)
    return unit


def block_scales(weight: GroupedWeight, part: Part) -> torch.Tensor | None:
    """Return the fp32 scales that the product applies to partial sums, ``[experts, blocks, rows]``; None for none."""
    if weight.kind not in ("int4_float", "e4m3_float") or weight.scale is None:
        return None
    return weight.scale[part.experts, part.rows].transpose(1, 2).contiguous()
