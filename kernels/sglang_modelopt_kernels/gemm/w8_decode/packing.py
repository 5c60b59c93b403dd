"""Packing for the 8-bit kernel: codes of a byte as they are stored, and block scales in little more than they are stored in.

=================  ========  ======================================  ==============
kind               codes     block scale                             for
=================  ========  ======================================  ==============
``int8``           int8      none                                    INT8
``e4m3``           E4M3      none                                    FP8
``e4m3_float``     E4M3      float32 ``[ceil(N / rows), K / 128]``   FP8 in blocks
``e4m3_exponent``  E4M3      uint8 ``[N, K / 32]``: ``2^(b - 127)``  MXFP8
=================  ========  ======================================  ==============
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from sglang_modelopt_kernels.formats import e4m3, ue8m0
from sglang_modelopt_kernels.formats.base import NumberType
from sglang_modelopt_kernels.formats.checks import check_tensor
from sglang_modelopt_kernels.formats.fp8 import FP8, FP8_BLOCKS
from sglang_modelopt_kernels.formats.int8 import INT8
from sglang_modelopt_kernels.formats.mxfp8 import MXFP8

Kind = Literal["int8", "e4m3", "e4m3_float", "e4m3_exponent"]
"""How codes and block scales are read."""
KINDS: tuple[Kind, ...] = get_args(Kind)
KIND_OF: dict[NumberType, Kind] = {INT8: "int8", FP8: "e4m3", FP8_BLOCKS: "e4m3_float", MXFP8: "e4m3_exponent"}
"""The number types that can be kept."""

FLOAT_BLOCK = 128
"""Inputs to a block scale of ``e4m3_float``, and at the most its rows."""
SPAN = 100
"""Exponents that one row of MXFP8 may span: the smallest E4M3 number times 2^-100 is a normal bf16 number still."""


@dataclass(frozen=True)
class ByteWeight:
    """A weight ``[N, K]`` with codes of a byte: ``W = code * block scale * out_scale``.

    Attributes:
        codes: ``[N, K]``.
        scale: see the table above; None where there is none.
        out_scale: float32 ``[N]``.
        kind: how codes and scales are read.
    """

    codes: torch.Tensor
    scale: torch.Tensor | None
    out_scale: torch.Tensor
    kind: Kind

    @property
    def n(self) -> int:
        """Output features."""
        return self.codes.shape[0]

    @property
    def k(self) -> int:
        """Input features."""
        return self.codes.shape[1]

    @property
    def scale_rows(self) -> int:
        """Rows that share a row of block scales, a power of two."""
        if self.kind != "e4m3_float" or self.scale is None:
            return 1
        # Where a smaller one gives as many rows of scales, there is one, which every row has.
        powers = (FLOAT_BLOCK >> i for i in range(FLOAT_BLOCK.bit_length()))
        return next(rows for rows in powers if -(-self.n // rows) == self.scale.shape[0])


def whole(codes: torch.Tensor, out_scale: torch.Tensor) -> ByteWeight:
    """Keep int8 or E4M3 values ``[N, K]`` under float32 ``[N]``. Raises ValueError for other dtypes and shapes."""
    if codes.dtype not in (torch.int8, torch.float8_e4m3fn) or codes.dim() != 2:
        raise ValueError(f"codes: expected int8 or e4m3 [N, K], got {codes.dtype} {list(codes.shape)}")
    check_tensor("scale of outputs", out_scale, torch.float32, (codes.shape[0],))
    return ByteWeight(codes, None, out_scale, "int8" if codes.dtype == torch.int8 else "e4m3")


def float_blocks(shards: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> ByteWeight:
    """Keep E4M3 codes ``[N, K]`` under float32 ``[ceil(N / 128), ceil(K / 128)]``, of shards one below the other.

    A shard starts its blocks anew. Where that is not at a multiple of 128 rows, scales are repeated for as many rows as there are
    whole ones of in every shard but the last.

    Raises:
        ValueError: codes or scales of another dtype, or scales of other blocks.
    """
    for codes, scale in shards:
        blocks = (-(-codes.shape[0] // FLOAT_BLOCK), -(-codes.shape[-1] // FLOAT_BLOCK))
        check_tensor("codes", codes, torch.float8_e4m3fn, (codes.shape[0], codes.shape[-1]))
        check_tensor(f"scales of blocks of {FLOAT_BLOCK} x {FLOAT_BLOCK}", scale, torch.float32, blocks)
    ends = [codes.shape[0] for codes, _ in shards[:-1]]
    rows = math.gcd(FLOAT_BLOCK, *ends)
    scales = []
    for codes, scale in shards:
        repeated = scale.to(torch.float32).unsqueeze(1).expand(-1, FLOAT_BLOCK // rows, -1).flatten(0, 1)
        scales.append(repeated[: -(-codes.shape[0] // rows)])
    codes, scale = torch.cat([codes for codes, _ in shards]), torch.cat(scales)
    return ByteWeight(codes, scale, scale.new_ones(codes.shape[0]), "e4m3_float")


def mxfp8(codes: torch.Tensor, scale: torch.Tensor) -> ByteWeight:
    """Keep E4M3 codes ``[N, K]`` under UE8M0 ``[N, K / 32]``, which become relative to a row's largest; exact, or rejected.

    Raises:
        ValueError: codes or scales of another dtype, scales of other blocks, a scale that is NaN, or scales of a row that span
            more than the kernel's range.
    """
    check_tensor("codes", codes, torch.float8_e4m3fn, (codes.shape[0], codes.shape[-1]))
    check_tensor("UE8M0 scales of blocks of 32", scale, torch.uint8, (codes.shape[0], codes.shape[1] // 32))
    if bool(ue8m0.byte_is_nan(scale).any()):
        raise ValueError("a UE8M0 block scale is NaN")
    exponent = scale.to(torch.int32)
    top = exponent.amax(dim=1, keepdim=True)
    if bool((top - exponent > SPAN).any()):
        raise ValueError(f"block scales of one row span 2^{int((top - exponent).max())}, more than 2^{SPAN}")
    factor = torch.exp2((top - ue8m0.BIAS).to(torch.float64)).to(torch.float32)
    stored = (exponent - top + ue8m0.BIAS).to(torch.uint8)
    return ByteWeight(codes, stored, factor.reshape(-1), "e4m3_exponent")


def scales_of_rows(weight: ByteWeight) -> torch.Tensor:
    """Return the block scales of ``e4m3_float`` for each row, float32 ``[N, ceil(K / 128)]``. Raises ValueError for other kinds."""
    if weight.kind != "e4m3_float" or weight.scale is None:
        raise ValueError(f"{weight.kind} weights have no float32 block scales")
    return weight.scale.unsqueeze(1).expand(-1, weight.scale_rows, -1).flatten(0, 1)[: weight.n]


def rows_of(weight: ByteWeight, indices: torch.Tensor) -> torch.Tensor:
    """Return rows of the weight, float32 ``[..., K]``, for indices ``[...]``: a lookup in an embedding. No host sync."""
    # Not every device looks up in E4M3.
    codes = weight.codes.view(torch.uint8)[indices].view(weight.codes.dtype)
    values = codes.to(torch.float32)
    if weight.scale is not None:
        if weight.kind == "e4m3_exponent":
            # A power of two above 2^-127 by its bits.
            scale = (weight.scale[indices].to(torch.int32) << 23).view(torch.float32)
            group = weight.k // scale.shape[-1]
        else:
            scale, group = weight.scale[indices // weight.scale_rows], FLOAT_BLOCK
        spread = scale.unsqueeze(-1).expand(*scale.shape, group).flatten(-2)
        values = values * spread[..., : weight.k]
    return values * weight.out_scale[indices].unsqueeze(-1)


def unpack(weight: ByteWeight) -> torch.Tensor:
    """Return the weight without its ``out_scale``, float64 ``[N, K]``: the naive reading of what the kernel reads."""
    codes = weight.codes.double() if weight.kind == "int8" else e4m3.decode(weight.codes).double()
    if weight.kind == "e4m3_float":
        return codes * scales_of_rows(weight).double().repeat_interleave(FLOAT_BLOCK, dim=1)[:, : weight.k]
    if weight.kind == "e4m3_exponent" and weight.scale is not None:
        scale = torch.exp2(weight.scale.double() - ue8m0.BIAS)
        return codes * scale.repeat_interleave(weight.k // scale.shape[1], dim=1)
    return codes
