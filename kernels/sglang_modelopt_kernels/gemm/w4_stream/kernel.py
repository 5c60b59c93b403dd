"""``Y^T = W X^T`` in Gluon: every copy, wait and layout is written out, so that copies of the weight begin before all else.

A program copies the first tiles of its weight to shared memory, waits for the kernels ahead
(:mod:`sglang_modelopt_kernels.early`), and only then copies activations: by then most of a small weight has arrived. Codes lie
in the order in which threads read them (``packing.py``), and are decoded to the left operand of ``wgmma`` in registers, without
a move between threads.

What is fetched before the wait must have been written by a kernel that ended before the one ahead began: a weight that the
kernel directly ahead writes may be read half. A layer's input is always made or rounded between its weight and its product.

Numerics: MXFP4 becomes E4M3 and NVFP4 becomes float16 times 2^-14, both exactly, so that every product is exact. The sum of a
tile's 256 products in FP8 keeps fewer bits than fp32 (on Hopper about 13) and is added to the rest in fp32; that in float16 is
fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma

from sglang_modelopt_kernels.early import after_previous
from sglang_modelopt_kernels.formats.fp4_packing.kernel import TEXTS_FLOAT16, e4m3_scale_float16, planes_float16
from sglang_modelopt_kernels.gemm.common.kernel import rotated, steps_of, store_tile, tokens_first
from sglang_modelopt_kernels.gemm.mxfp4_fp8_hopper.kernel import FOLD_FRAGMENT, fold_words


def _nvfp4_fragment(block: int) -> str:
    """Write the assembly of a thread's part of 16 rows and 32 K elements, in the order of the matrix instruction.

    Operands: results ``$0 ..``, two rows of each of four planes; words of codes ``$8``, ``$9``, one for each row, given four times;
    scales ``$16`` and ``$18``, of the first and the second 16 K elements four bytes: two of the first row, two of the second. They
    are the same for blocks of 32.
    """
    # 256: E4M3's bits in float16's place are the value times 2^-8.
    lines = [".reg .b32 a, b, m, s, t; mov.b32 m, 0x5c005c00;"]
    for row in range(2):
        byte = "0x4040" if row == 0 else "0x4242"
        for scale, source in (("s", "$16"), ("t", "$18"))[: 32 // block]:
            lines.append(f"prmt.b32 {scale}, {source}, 0, {byte}; shl.b32 {scale}, {scale}, 7;")
            lines.append(f"mul.rn.f16x2 {scale}, {scale}, m;")
        for plane, text in enumerate(TEXTS_FLOAT16):
            scale = "t" if plane >= 2 and block == 16 else "s"
            lines.append(text.format(p=f"${row + 2 * plane}", w=f"${8 + row}", s=scale))
    return "{ " + "\n".join(lines) + " }"


NVFP4_FRAGMENT: tl.constexpr = tl.constexpr(_nvfp4_fragment(16))
NVFP4_FRAGMENT_32: tl.constexpr = tl.constexpr(_nvfp4_fragment(32))
FOLD_OPERANDS: tl.constexpr = tl.constexpr(",".join(["=&r"] * 4 + ["r"] * 8))
NVFP4_OPERANDS: tl.constexpr = tl.constexpr(",".join(["=&r"] * 8 + ["r"] * 12))


@gluon.constexpr_function
def bytes_layout(each):
    """Return the layout of a tile's bytes, ``each`` consecutive ones a thread of a warpgroup."""
    return gl.BlockedLayout([each], [32], [4], [0])


@gluon.constexpr_function
def scales_layout(blocks):
    """Return the layout of a tile's block scales, index ``(w, r, r3, block)``, for each ``q``.

    Threads that differ in ``q`` hold the same scales: the layout of the bytes is its slice along the second dimension.
    """
    of_row = [[1, 0], [2, 0], [4, 0], [8, 0]][: 4 if blocks == 16 else 3]
    return gl.DistributedLinearLayout(
        reg_bases=[*of_row, [blocks, 0]],
        lane_bases=[[0, 1], [0, 2], [2 * blocks, 0], [4 * blocks, 0], [8 * blocks, 0]],
        warp_bases=[[16 * blocks, 0], [32 * blocks, 0]],
        block_bases=[],
        shape=[64 * blocks, 4],
    )


@gluon.constexpr_function
def tokens_layout(itemsize):
    """Return the layout in which 256 K elements of some tokens are copied, 16 bytes a thread."""
    return gl.BlockedLayout([1, 16 // itemsize], [2 // itemsize, 16 * itemsize], [4, 1], [1, 0])


@gluon.jit
def fetch_weight(w_s, s_s, w_ptr, s_ptr, at, stage, SCALES: gl.constexpr):
    """Copy the codes and the scales of tile ``at``."""
    byte = gl.arange(0, 8192, layout=bytes_layout(16))
    scale = gl.arange(0, SCALES, layout=bytes_layout(SCALES // 128))
    tile = at.to(gl.int64)
    async_copy.async_copy_global_to_shared(w_s.index(stage), w_ptr + tile * 8192 + byte)
    async_copy.async_copy_global_to_shared(s_s.index(stage), s_ptr + tile * SCALES + scale)


@gluon.jit
def _fetch_tokens(x_s, x_ptr, offset, stage, first, m, k, BM: gl.constexpr, LAYOUT: gl.constexpr, EVEN_M: gl.constexpr):
    """Copy 256 K elements of BM tokens from ``first`` on; tokens that are not there become zeros."""
    token = gl.arange(0, BM, layout=gl.SliceLayout(1, LAYOUT))
    column = gl.arange(0, 256, layout=gl.SliceLayout(0, LAYOUT))
    # Offsets of 32 bits within the tile: its pointers live in registers all along the loop.
    at = x_ptr + first.to(gl.int64) * k + offset + (token[:, None] * k + column[None, :])
    if EVEN_M:
        async_copy.async_copy_global_to_shared(x_s.index(stage), at)
    else:
        async_copy.async_copy_global_to_shared(
            x_s.index(stage), at, mask=(token < m - first)[:, None] & (column >= 0)[None, :]
        )


@gluon.jit
def e4m3_operand(codes, scales, OPERAND: gl.constexpr):
    """Decode an MXFP4 tile, bytes of codes and scales for each ``q``, to E4M3 ``[64, 256]``."""
    codes = gl.permute(gl.reshape(codes, [2, 2, 4, 8, 4, 4, 4]), (2, 1, 3, 0, 5, 4, 6))  # from b2 r3 w r q j byte
    word = gl.reshape(gl.reshape(codes, [64, 8, 1, 16]).broadcast_to([64, 8, 2, 16]), [64, 256])
    scales = gl.permute(gl.reshape(scales, [4, 8, 2, 8, 4]), (0, 2, 1, 3, 4))  # from w r r3 block q
    spread = gl.reshape(gl.reshape(scales, [64, 8, 1, 4, 1]).broadcast_to([64, 8, 2, 4, 4]), [64, 256])
    word = gl.convert_layout(word, OPERAND, assert_trivial=True)
    spread = gl.convert_layout(spread, OPERAND, assert_trivial=True)
    bits = gl.inline_asm_elementwise(
        FOLD_FRAGMENT, FOLD_OPERANDS, args=[word, spread], dtype=gl.uint8, is_pure=True, pack=16
    )
    return bits.to(gl.float8e4nv, bitcast=True)


@gluon.jit
def float16_operand(codes, scales, OPERAND: gl.constexpr, BLOCKS: gl.constexpr):
    """Decode an NVFP4 tile, bytes of codes and scales for each ``q``, to float16 times 2^-14, ``[64, 256]``."""
    low, high = gl.split(gl.reshape(codes, [2, 2, 4, 8, 4, 4, 2, 2]))  # b2 r3 w r q j half byte
    half = gl.permute(low.to(gl.uint16) | (high.to(gl.uint16) << 8), (2, 1, 3, 0, 5, 4, 6))
    word = gl.reshape(gl.reshape(half, [64, 8, 1, 1, 8]).broadcast_to([64, 8, 2, 2, 8]), [64, 256])
    scales = gl.permute(gl.reshape(scales, [4, 8, 2, BLOCKS, 4]), (0, 2, 1, 3, 4))  # from w r r3 block q
    scales = gl.reshape(scales, [64, BLOCKS, 1, 4, 1])
    spread = gl.reshape(scales.broadcast_to([64, BLOCKS, 32 // BLOCKS, 4, 2]), [64, 256])
    word = gl.convert_layout(word.to(gl.int16, bitcast=True), OPERAND, assert_trivial=True)
    spread = gl.convert_layout(spread, OPERAND, assert_trivial=True)
    TEXT: gl.constexpr = NVFP4_FRAGMENT if BLOCKS == 16 else NVFP4_FRAGMENT_32
    bits = gl.inline_asm_elementwise(TEXT, NVFP4_OPERANDS, args=[word, spread], dtype=gl.int16, is_pure=True, pack=16)
    return bits.to(gl.float16, bitcast=True)


@gluon.jit
def streamed_kernel(
    x_ptr,
    w_ptr,
    s_ptr,
    row_scale_ptr,
    out_scale_ptr,
    bias_ptr,
    y_ptr,
    partial_ptr,
    arrivals_ptr,
    m,
    n,
    k,
    row_step,
    FP8: gl.constexpr,
    BLOCKS: gl.constexpr,
    STAGES: gl.constexpr,
    DESCALE: gl.constexpr,
    HAS_ROW_SCALE: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    EVEN_M: gl.constexpr,
    EVEN_K: gl.constexpr,
    SPLIT_K: gl.constexpr,
    PDL: gl.constexpr,
    BN: gl.constexpr,
    BM: gl.constexpr,
    BK: gl.constexpr,
):
    """Compute one ``[BN, BM]`` tile of ``Y^T``, or with SPLIT_K > 1 a part of its sum; see :func:`store_tile`.

    With FP8 the weight is MXFP4 and ``x`` E4M3, without it NVFP4 and float16. A row has BLOCKS scales in a tile. STAGES tiles
    are on their way or in use at a time.
    """
    gl.static_assert(EVEN_K and BN == 64 and BK == 256 and gl.num_warps() == 4)
    SCALES: gl.constexpr = 64 * BLOCKS
    ITEM: gl.constexpr = 1 if FP8 else 2
    X_COPY: gl.constexpr = tokens_layout(ITEM)
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 32 // ITEM])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, MMA, 4 // ITEM)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    w_s = gl.allocate_shared_memory(gl.uint8, [STAGES, 8192], FLAT)
    s_s = gl.allocate_shared_memory(gl.uint8, [STAGES, SCALES], FLAT)
    x_s = gl.allocate_shared_memory(
        gl.float8e4nv if FP8 else gl.float16, [STAGES, BM, 256], gl.NVMMASharedLayout(128, 8 * ITEM, 2)
    )

    tile, part = tokens_first()
    split = gl.program_id(2)
    first, steps = steps_of(k, split, BK, SPLIT_K)
    begin = tile % gl.maximum(steps, 1)
    base = tile * (k // BK) + first
    first_token = part * BM

    # No kernel writes weights: their copies need not wait.
    for stage in gl.static_range(STAGES - 1):
        if stage < steps:
            fetch_weight(w_s, s_s, w_ptr, s_ptr, base + rotated(stage, begin, steps), stage, SCALES)
    async_copy.commit_group()
    after_previous(PDL)
    for stage in gl.static_range(STAGES - 1):
        if stage < steps:
            offset = (first + rotated(stage, begin, steps)) * BK
            _fetch_tokens(x_s, x_ptr, offset, stage, first_token, m, k, BM, X_COPY, EVEN_M)
        async_copy.commit_group()

    acc = gl.zeros((BN, BM), gl.float32, MMA)
    used, free = 0, STAGES - 1
    for step in range(steps):
        # All but the newest STAGES - 2 groups have arrived, those of this step for every thread; the oldest stage is read no more.
        async_copy.wait_group(STAGES - 2)
        gl.barrier()
        ahead = step + STAGES - 1
        if ahead < steps:
            place = rotated(ahead, begin, steps)
            fetch_weight(w_s, s_s, w_ptr, s_ptr, base + place, free, SCALES)
            _fetch_tokens(x_s, x_ptr, (first + place) * BK, free, first_token, m, k, BM, X_COPY, EVEN_M)
        async_copy.commit_group()
        codes = w_s.index(used).load(bytes_layout(16))
        scales = gl.expand_dims(s_s.index(used).load(gl.SliceLayout(1, scales_layout(BLOCKS))), 1)
        scales = scales.broadcast_to([SCALES, 4])
        x = x_s.index(used).permute([1, 0])
        fence_async_shared()
        # The product is waited for where it is issued: nothing overwrites its operand in registers (see gemm/common/wgmma.py).
        if FP8:
            unit = e4m3_operand(codes, scales, OPERAND)
            acc += warpgroup_mma(unit, x, gl.zeros((BN, BM), gl.float32, MMA), use_acc=False, is_async=False)
        else:
            unit = float16_operand(codes, scales, OPERAND, BLOCKS)
            acc = warpgroup_mma(unit, x, acc, is_async=False)
        used = gl.where(used == STAGES - 1, 0, used + 1)
        free = gl.where(free == STAGES - 1, 0, free + 1)
    store_tile(
        acc,
        y_ptr,
        partial_ptr,
        arrivals_ptr,
        tile * BN + gl.arange(0, BN, layout=gl.SliceLayout(1, MMA)),
        first_token + gl.arange(0, BM, layout=gl.SliceLayout(0, MMA)),
        tile * gl.num_programs(1) + part,
        split,
        m,
        n,
        row_scale_ptr,
        out_scale_ptr,
        bias_ptr,
        row_step,
        DESCALE,
        HAS_ROW_SCALE,
        HAS_BIAS,
        SPLIT_K,
    )


@triton.jit
def unstream_kernel(w_ptr, s_ptr, y_ptr, first, k, FP8: tl.constexpr, BLOCKS: tl.constexpr, ASM: tl.constexpr):
    """Decode one tile from tile row ``first`` on to rows of the unit weight.

    With FP8 MXFP4 becomes E4M3, four values to an int32 ``y[.., K / 4]``; else NVFP4 becomes float16 times 2^-14, ``y[.., K]``.
    """
    every = k // 256
    tile = (first + tl.program_id(0)).to(tl.int64) * every + tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * 64 + tl.arange(0, 64)
    if FP8:
        word = tl.load(w_ptr + tile * 2048 + tl.arange(0, 2048))
        scale = tl.load(s_ptr + tile * 512 + tl.arange(0, 512))
        # The scales (w, r, r3, b2, j) beside the words (b2, r3, w, r, q, j).
        scale = tl.permute(tl.reshape(scale, (4, 8, 2, 2, 1, 4)), (3, 2, 0, 1, 4, 5))
        scale = tl.reshape(tl.broadcast_to(scale, (2, 2, 4, 8, 4, 4)), (2048,))
        low, high = fold_words(word, scale.to(tl.int32), ASM)
        both = tl.reshape(tl.join(low, high), (2, 2, 4, 8, 4, 4, 2))
        # A row (w, r3, r) has its words in the order (b2, j, low or high, q).
        values = tl.reshape(tl.permute(both, (2, 1, 3, 0, 5, 6, 4)), (64, 64))
        column = tl.program_id(1) * 64 + tl.arange(0, 64)
        tl.store(y_ptr + row[:, None] * (k // 4) + column[None, :], values)
    else:
        half = tl.load(w_ptr + tile * 4096 + tl.arange(0, 4096))
        scale = e4m3_scale_float16(tl.load(s_ptr + tile * 64 * BLOCKS + tl.arange(0, 64 * BLOCKS)))
        # The scales (w, r, r3, b2, j, s), one for each two planes, beside the halves (b2, r3, w, r, q, j, half).
        scale = tl.permute(tl.reshape(scale, (4, 8, 2, 2, 1, 4, 1, BLOCKS // 8)), (3, 2, 0, 1, 4, 5, 6, 7))
        even, odd = tl.split(tl.reshape(tl.broadcast_to(scale, (2, 2, 4, 8, 4, 4, 2, 2)), (4096, 2)))
        p0, p1, _, _ = planes_float16(half, even, False)
        _, _, p2, p3 = planes_float16(half, odd, False)
        planes = tl.reshape(tl.join(tl.join(p0, p2), tl.join(p1, p3)), (2, 2, 4, 8, 4, 4, 2, 2, 2))
        # A row (w, r3, r) has its values in the order (b2, j, s, h, q, half).
        values = tl.reshape(tl.permute(planes, (2, 1, 3, 0, 5, 7, 8, 4, 6)), (64, 256))
        column = tl.program_id(1) * 256 + tl.arange(0, 256)
        tl.store(y_ptr + row[:, None] * k + column[None, :], values)
