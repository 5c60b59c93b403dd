"""A backend whose kernel races on GPUs with wgmma, for tests of the check before serving.

The kernel is ``block_scaled_kernel`` as it was when it raced (commit 6c915bb, ``benchmarks/results/2026-11-29-h200-race.md``), in
the one configuration that did: NVFP4 weights in blocks of 32, E4M3 activations, tiles of 128 outputs, 256 tokens and 128 K
elements, 8 warps, 3 stages. Triton 3.8 compiles the loop to the same instructions as that commit's, which depends on the order of
the statements. Shipped kernels have another loop since: without its wait it overwrites registers of a product in flight, too, but
was not seen to differ. This is a copy, so that no change of theirs hides the race.

It is launched without :func:`sglang_modelopt_kernels.gemm.common.checked`, which would reject it.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
import triton
import triton.language as tl

from sglang_modelopt_ext.backends.base import LinearRequest
from sglang_modelopt_ext.backends.linear.block_scaled import BlockScaled
from sglang_modelopt_ext.backends.tokens import covering
from sglang_modelopt_kernels.gemm.plane_order import naive_order
from sglang_modelopt_kernels.gemm.w4_decode import PackedWeight, path_of

CONSTEXPRS = {"GROUP": 32, "BN": 128, "BM": 256, "BK": 128}
OPTIONS = {"num_warps": 8, "num_stages": 3}
RACING_FROM = 257
"""Tokens from which this configuration served."""
_PLANES = tuple(
    f"{{ .reg .b32 a, b;\n{text} }}"
    for text in (
        """and.b32 a, $1, 0x8e008e00;
        mul.rn.f16x2 $0, a, $2;""",
        """shl.b32 a, $1, 3;
        and.b32 a, a, 0x8e008e00;
        mul.rn.f16x2 $0, a, $2;""",
        """shl.b32 a, $1, 6;
        and.b32 a, a, 0x0e000e00;
        shl.b32 b, $1, 1;
        lop3.b32 a, b, 0x80008000, a, 0xea;
        mul.rn.f16x2 $0, a, $2;""",
        """shl.b32 a, $1, 9;
        and.b32 a, a, 0x0e000e00;
        shl.b32 b, $1, 2;
        lop3.b32 a, b, 0x80008000, a, 0xea;
        mul.rn.f16x2 $0, a, $2;""",
    )
)
PLANES: tl.constexpr = tl.constexpr(_PLANES)
"""Assembly of two elements of four E2M1 codes, under their scales, to two fp16 values of one plane, times 2^-14."""


@triton.jit
def _plane(w, s, PLANE: tl.constexpr):
    """Decode one plane of elements and multiply by their scales."""
    return tl.inline_asm_elementwise(PLANES[PLANE], "=r,r,r", args=[w, s], dtype=s.dtype, is_pure=True, pack=2)


@triton.jit
def racing_kernel(
    x_ptr,
    w_ptr,
    s_ptr,
    row_scale_ptr,
    out_scale_ptr,
    y_ptr,
    m,
    n,
    k,
    WAIT: tl.constexpr,
    ASM: tl.constexpr,
    GROUP: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """Compute one ``[BN, BM]`` tile of ``Y^T`` for fp16 ``x`` in plane order; K is a multiple of BK.

    With WAIT each step first waits until no ``wgmma`` is in flight, as in shipped kernels, which ends the race.
    """
    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tile, part = program // tl.num_programs(1), program % tl.num_programs(1)
    rows = tile * BN + tl.arange(0, BN)
    tokens = part * BM + tl.arange(0, BM)
    split = tl.program_id(2)
    row = tl.minimum(rows, n - 1).to(tl.int64)
    token = tl.minimum(tokens, m - 1).to(tl.int64)
    # K is not split, but the compiler does not know that ``split`` is 0: it orders the loop otherwise where it does.
    steps = tl.cdiv(k, BK)
    start = split * steps * BK
    end = tl.minimum(start + steps * BK, k)
    element = tl.arange(0, BK // 4)
    block = tl.arange(0, BK // GROUP)
    entry = tl.arange(0, BK)
    blocks, quarter = tl.multiple_of(k // GROUP, BK // GROUP), tl.multiple_of(k // 4, BK // 4)
    w_row = w_ptr + row[:, None] * quarter
    s_row = s_ptr + row[:, None] * blocks
    acc = tl.zeros((BN, BM), tl.float32)
    for offset in range(start, end, BK):
        if WAIT:
            tl.inline_asm_elementwise(
                "wgmma.wait_group.sync.aligned 0; mov.b32 $0, $1;",
                "=r,r",
                args=[offset],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )
        w_at = w_row + (offset // 4 + element)[None, :]
        s_at = s_row + (offset // GROUP + block)[None, :]
        x_at = x_ptr + token[None, :] * k + (offset + entry)[:, None]
        w = tl.load(w_at)
        x = tl.load(x_at)
        b = tl.load(s_at)
        # E4M3's exponent and mantissa in fp16's place are the value times 2^-8.
        scale = ((b.to(tl.uint16) << 7).to(tl.float16, bitcast=True) * 256.0).to(tl.float16)
        scale = tl.broadcast_to(scale[:, :, None], (BN, BK // GROUP, GROUP // 4))
        scale = tl.reshape(scale, (BN, BK // 4))
        if ASM:
            p0 = _plane(w, scale, 0)
            p1 = _plane(w, scale, 1)
            p2 = _plane(w, scale, 2)
            p3 = _plane(w, scale, 3)
        else:
            u = w.to(tl.uint16, bitcast=True)
            p0 = (u & 0x8E00).to(tl.float16, bitcast=True) * scale
            p1 = ((u << 3) & 0x8E00).to(tl.float16, bitcast=True) * scale
            p2 = (((u << 6) & 0x0E00) | ((u << 1) & 0x8000)).to(tl.float16, bitcast=True) * scale
            p3 = (((u << 9) & 0x0E00) | ((u << 2) & 0x8000)).to(tl.float16, bitcast=True) * scale
        planes = tl.reshape(tl.join(tl.join(p0, p2), tl.join(p1, p3)), (BN, BK // 64, 16, 4))
        unit = tl.reshape(tl.permute(planes, (0, 1, 3, 2)), (BN, BK))
        acc = tl.dot(unit, x, acc, input_precision="ieee")
    inside = (rows < n)[:, None] & (tokens < m)[None, :]
    at = y_ptr + split.to(tl.int64) * m * n + token[None, :] * n + rows.to(tl.int64)[:, None]
    y = acc * (tl.load(out_scale_ptr + row) * 16384.0)[:, None]
    y = y * tl.load(row_scale_ptr + token)[None, :]
    tl.store(at, y.to(y_ptr.dtype.element_ty), mask=inside)


class Racing(BlockScaled):
    """The backend of 4-bit weights with the racing kernel from :data:`RACING_FROM` tokens on."""

    def __init__(self, waits: bool) -> None:
        self.waits = waits

    def objection(self, request: LinearRequest) -> str | None:
        """Reject what the kernel was not compiled for."""
        if request.scheme.weight.name != "nvfp4_w4a8" or self.operand(request) != torch.float8_e4m3fn:
            return "multiplies NVFP4 in blocks of 32 by E4M3"
        if request.dtype != torch.bfloat16 or request.k % CONSTEXPRS["BK"]:
            return "was compiled for bf16 results and whole tiles along K"
        return super().objection(request)

    def matmul(
        self,
        weight: PackedWeight,
        values: torch.Tensor,
        row_scale: torch.Tensor | None,
        bias: torch.Tensor | None,
        out_dtype: torch.dtype,
    ) -> torch.Tensor:
        """Launch the racing kernel for many tokens, which takes scales of rows and no bias."""
        m, n, k = values.shape[0], weight.n, weight.k
        if m < RACING_FROM:
            return super().matmul(weight, values, row_scale, bias, out_dtype)
        if row_scale is None or row_scale.shape != (m, 1) or bias is not None:
            raise ValueError("the racing kernel reads a scale for each token and no bias")
        x, y = naive_order(values, torch.float16), torch.empty((m, n), dtype=out_dtype, device=values.device)
        racing_kernel[triton.cdiv(n, CONSTEXPRS["BN"]), triton.cdiv(m, CONSTEXPRS["BM"]), 1](
            x,
            weight.codes,
            weight.scale,
            row_scale.contiguous(),
            weight.out_scale,
            y,
            m,
            n,
            k,
            WAIT=self.waits,
            ASM=x.is_cuda,
            **CONSTEXPRS,
            **OPTIONS,
        )
        return y

    def check_tokens(self, weight: PackedWeight, request: LinearRequest) -> tuple[int, ...]:
        """Return numbers of tokens for every launch, as of shipped backends."""
        operand, device = self.operand(request), weight.codes.device

        def path(m: int) -> Hashable:
            return "racing" if m >= RACING_FROM else path_of(weight, m, operand, request.dtype, device)

        return covering(path)
