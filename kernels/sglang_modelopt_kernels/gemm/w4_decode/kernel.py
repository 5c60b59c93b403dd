"""``Y = X W^T`` over 4-bit codes with block scales, decoded in registers.

The weight is the left operand, with the long side of the matrix instruction, because decoding has few tokens: ``Y^T = W X^T``.

Numerics: a code times its block scale is formed exactly in fp16 or bf16 (E2M1 has 2 significant bits, E4M3 has 4), so that with
activations of that dtype every product is exact and only the fp32 sum rounds. E2M1's bits are placed at the low end of the
exponent, which makes a subnormal of the value times 2^-14 (fp16) or 2^-126 (bf16); one multiplication by the block scale then
gives the unit weight times 1 / DESCALE. Under fp32 scales (INT4) a block's partial sum is scaled instead.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_modelopt_kernels.early import after_previous
from sglang_modelopt_kernels.formats.fp4_packing.kernel import (
    E2M1_FLOAT16,
    e4m3_scale_float16,
    one_plane,
    plane,
    planes_float16,
    planes_of,
)
from sglang_modelopt_kernels.gemm.common.kernel import (
    drain_wgmma,
    rotated,
    steps_of,
    store_tile,
    tokens_first,
)

_BFLOAT16 = (
    """shr.u32 a, {w}, 3;
    and.b32 a, a, 0x01c001c0;
    lop3.b32 a, {w}, 0x80008000, a, 0xea;
    fma.rn.bf16x2 {p}, a, {s}, z;""",
    """and.b32 a, {w}, 0x01c001c0;
    shl.b32 b, {w}, 3;
    lop3.b32 a, b, 0x80008000, a, 0xea;
    fma.rn.bf16x2 {p}, a, {s}, z;""",
    """shl.b32 a, {w}, 3;
    and.b32 a, a, 0x01c001c0;
    shl.b32 b, {w}, 1;
    lop3.b32 a, b, 0x80008000, a, 0xea;
    fma.rn.bf16x2 {p}, a, {s}, z;""",
    """shl.b32 a, {w}, 6;
    and.b32 a, a, 0x01c001c0;
    shl.b32 b, {w}, 2;
    lop3.b32 a, b, 0x80008000, a, 0xea;
    fma.rn.bf16x2 {p}, a, {s}, z;""",
)
"""E2M1 under its scale to bf16, by plane; ``fma`` with -0 because SM80 has no bf16 multiplication."""
_BFLOAT16_REGISTERS = ".reg .b32 a, b, z; mov.b32 z, 0x80008000;"
PLANES_BFLOAT16: tl.constexpr = tl.constexpr(tuple(one_plane(text, _BFLOAT16_REGISTERS) for text in _BFLOAT16))
E2M1_BFLOAT16: tl.constexpr = tl.constexpr(planes_of(_BFLOAT16, _BFLOAT16_REGISTERS, 4))
INT4_FLOAT16: tl.constexpr = tl.constexpr(
    planes_of(
        (
            """lop3.b32 a, {w}, 0x000f000f, 0x64006400, 0xea;
            add.rn.f16x2 {p}, a, z;""",
            """shr.u32 a, {w}, 4;
            lop3.b32 a, a, 0x000f000f, 0x64006400, 0xea;
            add.rn.f16x2 {p}, a, z;""",
            """shr.u32 a, {w}, 8;
            lop3.b32 a, a, 0x000f000f, 0x64006400, 0xea;
            add.rn.f16x2 {p}, a, z;""",
            """shr.u32 a, {w}, 12;
            lop3.b32 a, a, 0x000f000f, 0x64006400, 0xea;
            add.rn.f16x2 {p}, a, z;""",
        ),
        ".reg .b32 a, z; mov.b32 z, 0xe408e408;",
        4,
    )
)
"""INT4 to fp16: a nibble of code + 8 under the exponent of 1024, minus 1032."""
INT4_BFLOAT16: tl.constexpr = tl.constexpr(
    planes_of(
        (
            """lop3.b32 a, {w}, 0x000f000f, 0x43004300, 0xea;
            fma.rn.bf16x2 {p}, a, o, z;""",
            """shr.u32 a, {w}, 4;
            lop3.b32 a, a, 0x000f000f, 0x43004300, 0xea;
            fma.rn.bf16x2 {p}, a, o, z;""",
            """shr.u32 a, {w}, 8;
            lop3.b32 a, a, 0x000f000f, 0x43004300, 0xea;
            fma.rn.bf16x2 {p}, a, o, z;""",
            """shr.u32 a, {w}, 12;
            lop3.b32 a, a, 0x000f000f, 0x43004300, 0xea;
            fma.rn.bf16x2 {p}, a, o, z;""",
        ),
        ".reg .b32 a, o, z; mov.b32 o, 0x3f803f80; mov.b32 z, 0xc308c308;",
        4,
    )
)
"""INT4 to bf16: a nibble of code + 8 under the exponent of 128, times 1 minus 136; SM80 has no bf16 addition."""


@triton.jit
def _planes_bfloat16(w, s, ASM: tl.constexpr):
    """Decode E2M1 elements and their scales, int16 and bf16 of one shape, to the four planes times the scale."""
    if ASM:
        p0 = plane(w, s, PLANES_BFLOAT16, 0)
        p1 = plane(w, s, PLANES_BFLOAT16, 1)
        p2 = plane(w, s, PLANES_BFLOAT16, 2)
        p3 = plane(w, s, PLANES_BFLOAT16, 3)
    else:
        u = w.to(tl.uint16, bitcast=True)
        f = s.to(tl.float32)
        # Triton's interpreter lacks bf16 arithmetic; emulate in fp32 from the raw bits. The products are bf16 values.
        p0 = _bf16_bits_to_fp32((u >> 3) & 0x01C0, u & 0x8000) * f
        p1 = _bf16_bits_to_fp32(u & 0x01C0, (u << 3) & 0x8000) * f
        p2 = _bf16_bits_to_fp32((u << 3) & 0x01C0, (u << 1) & 0x8000) * f
        p3 = _bf16_bits_to_fp32((u << 6) & 0x01C0, (u << 2) & 0x8000) * f
    return p0, p1, p2, p3


@triton.jit
def _bf16_bits_to_fp32(magnitude, sign):
    """Read bf16 bits, magnitude and sign, as fp32."""
    return ((magnitude | sign).to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _int4_float16(nibble):
    """Decode a nibble of code + 8 to the fp16 code: under the exponent of 1024 a unit in the last place is one."""
    return ((nibble | 0x6400).to(tl.float16, bitcast=True) - 1032.0).to(tl.float16)


@triton.jit
def _int4_float32(nibble):
    """Decode a nibble of code + 8 to the code in fp32, a bf16 value: under bf16's exponent of 128 the last place is one."""
    biased = ((nibble | 0x4300).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return biased - 136.0


@triton.jit
def _int4_planes(w, F16: tl.constexpr):
    """Decode packed INT4 to its four planes, in fp16 or in fp32."""
    u = w.to(tl.uint16, bitcast=True)
    if F16:
        p0 = _int4_float16(u & 15)
        p1 = _int4_float16((u >> 4) & 15)
        p2 = _int4_float16((u >> 8) & 15)
        p3 = _int4_float16(u >> 12)
    else:
        p0 = _int4_float32(u & 15)
        p1 = _int4_float32((u >> 4) & 15)
        p2 = _int4_float32((u >> 8) & 15)
        p3 = _int4_float32(u >> 12)
    return p0, p1, p2, p3


@triton.jit
def _scale_float16(b, KIND: tl.constexpr):
    """Decode stored scale bytes to the fp16 scale."""
    if KIND == "e2m1_e4m3":
        scale = e4m3_scale_float16(b)
    else:
        scale = (b.to(tl.uint16) << 10).to(tl.float16, bitcast=True)
    return scale


@triton.jit
def _scale_bfloat16(b, KIND: tl.constexpr):
    """Decode stored scale bytes to bf16: the scale times 2^117 (E4M3) or ``2^(b + 97)`` (exponents)."""
    if KIND == "e2m1_e4m3":
        # E4M3's exponent and mantissa in fp32's place are the value times 2^-120.
        scale = ((b.to(tl.uint32) << 20).to(tl.float32, bitcast=True) * 2.0**120 * 2.0**117).to(tl.bfloat16)
    else:
        # Exponents are below 32, so `|` adds. ptxas 12.9 drops the constant of a packed 16-bit sum (`add.s16x2`).
        scale = ((b.to(tl.uint16) | 224) << 7).to(tl.bfloat16, bitcast=True)
    return scale


@triton.jit
def _operand(
    w,
    b,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    F16: tl.constexpr,
    ASM: tl.constexpr,
    FRAGMENTS: tl.constexpr,
    ROWS: tl.constexpr,
    BK: tl.constexpr,
):
    """Decode elements ``[ROWS, BK / 4]`` and their stored scales to the operand ``[ROWS, BK]``, each 64 K elements in plane order.

    With FRAGMENTS each plane gets the same elements, so that nothing moves between threads, and the assembly reads a thread's
    part of 16 rows and 64 K elements in the order of the matrix instruction: correct only where the result is its operand in
    registers.
    """
    if KIND == "int4_float":
        scale = w
    elif F16:
        scale = _scale_float16(b, KIND)
    else:
        scale = _scale_bfloat16(b, KIND)
    if FRAGMENTS and ASM:
        word = tl.reshape(tl.broadcast_to(tl.reshape(w, (ROWS, BK // 64, 1, 16)), (ROWS, BK // 64, 4, 16)), (ROWS, BK))
        if KIND == "int4_float":
            if F16:
                unit = _assemble_one(INT4_FLOAT16, word).to(tl.float16, bitcast=True)
            else:
                unit = _assemble_one(INT4_BFLOAT16, word).to(tl.bfloat16, bitcast=True)
        else:
            scale = tl.reshape(scale, (ROWS, BK // 64, 1, 64 // GROUP, 1))
            scale = tl.broadcast_to(scale, (ROWS, BK // 64, 4, 64 // GROUP, GROUP // 4))
            scale = tl.reshape(scale, (ROWS, BK))
            if F16:
                unit = _assemble_two(E2M1_FLOAT16, word, scale).to(tl.float16, bitcast=True)
            else:
                unit = _assemble_two(E2M1_BFLOAT16, word, scale).to(tl.bfloat16, bitcast=True)
    else:
        if KIND == "int4_float":
            p0, p1, p2, p3 = _int4_planes(w, F16)
        else:
            scale = tl.broadcast_to(scale[:, :, None], (ROWS, BK // GROUP, GROUP // 4))
            scale = tl.reshape(scale, (ROWS, BK // 4))
            if F16:
                p0, p1, p2, p3 = planes_float16(w, scale, ASM)
            else:
                p0, p1, p2, p3 = _planes_bfloat16(w, scale, ASM)
        planes = tl.reshape(tl.join(tl.join(p0, p2), tl.join(p1, p3)), (ROWS, BK // 64, 16, 4))
        unit = tl.reshape(tl.permute(planes, (0, 1, 3, 2)), (ROWS, BK))
    return unit


@triton.jit
def _assemble_one(TEXT: tl.constexpr, a):
    """Run assembly of one argument on 32 elements, 32 int16 results."""
    return tl.inline_asm_elementwise(
        TEXT,
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r",
        args=[a],
        dtype=tl.int16,
        is_pure=True,
        pack=32,
    )


@triton.jit
def _assemble_two(TEXT: tl.constexpr, a, b):
    """Run assembly of two arguments on 32 elements, 32 int16 results."""
    return tl.inline_asm_elementwise(
        TEXT,
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,"
        "r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r",
        args=[a, b],
        dtype=tl.int16,
        is_pure=True,
        pack=32,
    )


@triton.jit
def block_scaled_sum(
    x_ptr,
    w_ptr,
    s_ptr,
    row,
    token,
    known,
    k,
    first,
    steps,
    begin,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    F16: tl.constexpr,
    ASM: tl.constexpr,
    FRAGMENTS: tl.constexpr,
    ORDERED: tl.constexpr,
    WGMMA: tl.constexpr,
    EVEN_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """Multiply rows ``row`` of the weight by rows ``token`` of ``x``: ``[BN, BM]`` times 1 / DESCALE.

    K is read in ``steps`` steps of BK from step ``first`` on, that of ``begin`` first (:func:`rotated`). Tokens that are not
    ``known`` count as zeros, unless EVEN_M: then ``token`` has a row to read for each, whose result is not stored.
    With ORDERED the K elements of ``x`` are in plane order already; see :func:`_operand` for FRAGMENTS and :func:`drain_wgmma` for
    WGMMA.
    """
    element = tl.arange(0, BK // 4)
    block = tl.arange(0, BK // GROUP)
    offs_k = tl.arange(0, BK)
    if not ORDERED:
        # Element e of plane p is K element 16 (e / 4) + 4 p + e % 4.
        offs_k = offs_k // 64 * 64 + offs_k % 16 // 4 * 16 + offs_k % 64 // 16 * 4 + offs_k % 4
        offs_k = tl.max_contiguous(tl.multiple_of(offs_k, 4), 4)
    blocks, quarter = k // GROUP, k // 4
    if EVEN_K:
        # A hint for the compiler, which pipelines no loads of less than four bytes for a thread.
        blocks = tl.multiple_of(blocks, BK // GROUP)
        quarter = tl.multiple_of(quarter, BK // 4)
    w_row = w_ptr + row[:, None] * quarter
    s_row = s_ptr + row[:, None] * blocks

    # Triton's interpreter multiplies the raw bits of bf16 operands: give it the same values in fp32.
    BF16: tl.constexpr = tl.bfloat16 if ASM else tl.float32
    acc = tl.zeros((BN, BM), tl.float32)
    # Prefetch the next scale: Triton only pipelines loads that feed `tl.dot`.
    if KIND == "int4_float":
        prefetched = tl.load(s_row + tl.minimum((first + begin) * BK, k - BK) // GROUP + block[None, :])
    for step in range(steps):
        offset = (first + rotated(step, begin, steps)) * BK
        drain_wgmma(offset, WGMMA)
        w_at = w_row + (offset // 4 + element)[None, :]
        s_at = s_row + (offset // GROUP + block)[None, :]
        x_at = x_ptr + token[None, :] * k + (offset + offs_k)[:, None]
        if EVEN_K:
            w = tl.load(w_at)
            x = tl.load(x_at) if EVEN_M else tl.load(x_at, mask=known[None, :], other=0.0)
        else:
            w = tl.load(w_at, mask=(offset + 4 * element < k)[None, :], other=0)
            x = tl.load(x_at, mask=(offset + offs_k < k)[:, None] & known[None, :], other=0.0)
        if KIND == "int4_float":
            b = prefetched
            following = (first + rotated(step + 1, begin, steps)) * BK
            prefetched = tl.load(s_row + tl.minimum(following, k - BK) // GROUP + block[None, :])
        elif EVEN_K:
            b = tl.load(s_at)
        else:
            b = tl.load(s_at, mask=(offset + GROUP * block < k)[None, :], other=0)
        unit = _operand(w, b, KIND, GROUP, F16, ASM, FRAGMENTS, BN, BK)
        if F16:
            x = x.to(tl.float16)
        else:
            unit, x = unit.to(BF16), x.to(BF16)
        if KIND == "int4_float":
            # One block for each step (BK = GROUP): scale its sum.
            acc += tl.dot(unit, x, input_precision="ieee") * tl.reshape(b, (BN, 1))
        else:
            acc = tl.dot(unit, x, acc, input_precision="ieee")
    return acc


@triton.jit
def block_scaled_kernel(
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
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    F16: tl.constexpr,
    ASM: tl.constexpr,
    FRAGMENTS: tl.constexpr,
    ORDERED: tl.constexpr,
    WGMMA: tl.constexpr,
    DESCALE: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    PDL: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """Compute one ``[BN, BM]`` tile of ``Y^T``, or with SPLIT_K > 1 a part of its sum; see :func:`store_tile`."""
    tile, part = tokens_first()
    rows = tile * BN + tl.arange(0, BN)
    tokens = part * BM + tl.arange(0, BM)
    split = tl.program_id(2)
    # Rows out of range read the last one: no mask in the loop, and their results are not stored.
    row = tl.minimum(rows, n - 1).to(tl.int64)
    token = tl.minimum(tokens, m - 1).to(tl.int64)
    first, steps = steps_of(k, split, BK, SPLIT_K)
    after_previous(PDL)
    acc = block_scaled_sum(
        x_ptr,
        w_ptr,
        s_ptr,
        row,
        token,
        tokens < m,
        k,
        first,
        steps,
        tile % tl.maximum(steps, 1),
        KIND,
        GROUP,
        F16,
        ASM,
        FRAGMENTS,
        ORDERED,
        WGMMA,
        EVEN_M,
        EVEN_K,
        BN,
        BM,
        BK,
    )
    store_tile(
        acc,
        y_ptr,
        partial_ptr,
        arrivals_ptr,
        rows,
        tokens,
        tile * tl.num_programs(1) + part,
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
def decode_kernel(
    w_ptr,
    s_ptr,
    y_ptr,
    block_ptr,
    first,
    n,
    k,
    per,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    F16: tl.constexpr,
    FP8: tl.constexpr,
    ASM: tl.constexpr,
    OWNED: tl.constexpr,
    BN: tl.constexpr,
):
    """Decode rows ``first .. first + n`` of the unit weight divided by DESCALE, ``[n, K]``; INT4 to integers. BK is 256.

    With FP8 (and F16) E2M1 is divided by 2^9 instead: exponents 16 to 30 then give E2M1 times 2^-8 to 2^6, all of them E4M3.
    With OWNED, every ``per`` rows belong to one expert, and ``block_ptr`` has the first block of pairs of each expert. Rows of an
    expert without pairs, where the next one has the same first block, are written only beside rows of other experts.
    """
    if OWNED:
        start = first + tl.program_id(0) * BN
        end = first + tl.minimum(tl.program_id(0) * BN + BN, n)
        if tl.load(block_ptr + start // per) == tl.load(block_ptr + (end - 1) // per + 1):
            return
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    row = (first + tl.minimum(rows, n - 1)).to(tl.int64)
    element = tl.program_id(1) * 64 + tl.arange(0, 64)
    inside = (rows < n)[:, None] & (element < k // 4)[None, :]
    w = tl.load(w_ptr + row[:, None] * (k // 4) + element[None, :], mask=inside, other=0)
    if KIND == "int4_float":
        p0, p1, p2, p3 = _int4_planes(w, F16)
    else:
        # Load a byte for each block and broadcast it in registers; a load of the codes' shape would read single bytes.
        block = tl.program_id(1) * (256 // GROUP) + tl.arange(0, 256 // GROUP)
        known = (rows < n)[:, None] & (block < k // GROUP)[None, :]
        b = tl.load(s_ptr + row[:, None] * (k // GROUP) + block[None, :], mask=known, other=0)
        if F16:
            scale = _scale_float16(b, KIND)
        else:
            scale = _scale_bfloat16(b, KIND)
        scale = tl.broadcast_to(scale[:, :, None], (BN, 256 // GROUP, GROUP // 4))
        scale = tl.reshape(scale, (BN, 64))
        if F16:
            p0, p1, p2, p3 = planes_float16(w, scale, ASM)
        else:
            p0, p1, p2, p3 = _planes_bfloat16(w, scale, ASM)
        if FP8:
            p0, p1, p2, p3 = p0 * 32.0, p1 * 32.0, p2 * 32.0, p3 * 32.0
    p0 = p0.to(y_ptr.dtype.element_ty)
    p1 = p1.to(y_ptr.dtype.element_ty)
    p2 = p2.to(y_ptr.dtype.element_ty)
    p3 = p3.to(y_ptr.dtype.element_ty)
    # Element e of plane p is K element 16 (e / 4) + 4 p + e % 4: a thread's four elements are 16 consecutive ones.
    planes = tl.join(tl.join(p0, p2), tl.join(p1, p3))
    planes = tl.permute(tl.reshape(planes, (BN, 16, 4, 4)), (0, 1, 3, 2))
    offs_k = tl.program_id(1) * 256 + tl.arange(0, 256)
    at = y_ptr + rows.to(tl.int64)[:, None] * k + offs_k[None, :]
    tl.store(at, tl.reshape(planes, (BN, 256)), mask=(rows < n)[:, None] & (offs_k < k)[None, :])
