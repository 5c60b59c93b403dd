"""Weights of all experts of a layer as the grouped product reads them, in one of eleven kinds.

======================  =============================  ==================================  ================
kind                    codes ``[E, N, ..]``           scale ``[E, N, K / group]``         for
======================  =============================  ==================================  ================
``e2m1_e4m3``           int16, four planes             uint8, E4M3 bits                    NVFP4
``e2m1_exponent``       int16, four planes             uint8, ``b`` of ``2^(b - 15)``      MXFP4
``int4_float``          int16, four planes             float32                             INT4
``mxfp4``               uint8, two codes to a byte     uint8, UE8M0                        MXFP4, tcgen05
``mxfp4_tiles``         uint8, tiles                   uint8, folded exponents             MXFP4, SM90
``nvfp4_tiles``         uint8, tiles                   uint8, E4M3 bits                    NVFP4, SM90
``e4m3``                E4M3                           none                                FP8
``e4m3_float``          E4M3                           float32                             FP8 in blocks
``e4m3_exponent``       E4M3                           uint8, ``b`` of ``2^(b - 127)``     MXFP8
``int8``                int8                           none                                INT8
``bf16``                bf16                           none                                any, decoded
======================  =============================  ==================================  ================

The first three are those of :mod:`sglang_modelopt_kernels.gemm.w4_decode.packing`, the fourth that of
:mod:`sglang_modelopt_kernels.gemm.mxfp4_fp8_blackwell`, those of tiles are of
:mod:`sglang_modelopt_kernels.gemm.w4_stream.packing`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from sglang_modelopt_kernels.formats import e2m1, e4m3, ue8m0
from sglang_modelopt_kernels.formats.base import NumberType
from sglang_modelopt_kernels.formats.checks import check_mxfp4, check_tensor, scale_blocks
from sglang_modelopt_kernels.gemm import w8_decode
from sglang_modelopt_kernels.gemm.w4_decode import packing
from sglang_modelopt_kernels.gemm.w4_decode.packing import PackedWeight
from sglang_modelopt_kernels.gemm.w4_stream.packing import Kind as TileKind
from sglang_modelopt_kernels.gemm.w4_stream.packing import StreamedWeight, nvfp4_kind, unstream
from sglang_modelopt_kernels.gemm.w8_decode import packing as w8_packing

Kind = Literal[
    "e2m1_e4m3",
    "e2m1_exponent",
    "int4_float",
    "mxfp4",
    "mxfp4_tiles",
    "nvfp4_tiles",
    "e4m3",
    "e4m3_float",
    "e4m3_exponent",
    "int8",
    "bf16",
]
"""How codes and block scales are read."""
KINDS: tuple[Kind, ...] = get_args(Kind)
TILES: tuple[Kind, ...] = ("mxfp4_tiles", "nvfp4_tiles")
"""Those of the streamed product."""
KIND_OF: dict[NumberType, Kind] = {**packing.KIND_OF, **w8_packing.KIND_OF}
"""The number types that are kept at their stored width, apart from those of ``mxfp4`` and of TILES."""


@dataclass(frozen=True)
class GroupedWeight:
    """The weights of all experts, or of one (without the first dimension): ``W = code * block scale * out_scale``.

    Attributes:
        codes, scale: see the table above; ``scale`` None where there is none.
        out_scale: float32 ``[E, N]``.
        kind: how codes and scales are read.
        fp8: whether E4M3 holds all unit weights (:attr:`PackedWeight.fp8`).
    """

    codes: torch.Tensor
    scale: torch.Tensor | None
    out_scale: torch.Tensor
    kind: Kind
    fp8: bool = False

    @property
    def n(self) -> int:
        """Output features."""
        return self.codes.shape[-2]

    @property
    def k(self) -> int:
        """Input features."""
        per = {torch.int16: 4, torch.uint8: 2}.get(self.codes.dtype, 1)
        return self.codes.shape[-1] * per

    @property
    def experts(self) -> int:
        """Number of experts."""
        return self.codes.shape[0]

    @property
    def group(self) -> int:
        """K elements under a block scale; K without block scales. The last block of ``e4m3_float`` may be short."""
        if self.kind == "e4m3_float":
            return 128
        return self.k if self.scale is None else self.k // self.scale.shape[-1]

    @property
    def tiles(self) -> TileKind:
        """How the tiles are read. Raises ValueError for a kind that is not one of TILES."""
        if self.kind not in TILES:
            raise ValueError(f"{self.kind} weights are not kept as tiles")
        return "folded" if self.kind == "mxfp4_tiles" else nvfp4_kind(self.group)


def packed(weight: PackedWeight) -> GroupedWeight:
    """Wrap a packed 4-bit weight of one expert."""
    return GroupedWeight(weight.codes, weight.scale, weight.out_scale, weight.kind, weight.fp8)


def mxfp4_as_stored(codes: torch.Tensor, scale: torch.Tensor) -> GroupedWeight:
    """Wrap an MXFP4 weight of one expert as stored, uint8 ``[N, K / 2]`` and ``[N, K / 32]``.

    Raises:
        ValueError: codes or scales of another dtype, scales of other blocks, or a scale that is NaN.
    """
    check_mxfp4(codes, scale)
    _no_nan(scale)
    return GroupedWeight(codes, scale, torch.ones(codes.shape[0], device=codes.device), "mxfp4")


def tiled(weight: StreamedWeight) -> GroupedWeight:
    """Wrap a weight of one expert that was put into tiles."""
    if weight.kind == "folded":
        return GroupedWeight(weight.codes, weight.scale, weight.out_scale, "mxfp4_tiles", fp8=True)
    return GroupedWeight(weight.codes, weight.scale, weight.out_scale, "nvfp4_tiles")


def whole(codes: torch.Tensor, out_scale: torch.Tensor) -> GroupedWeight:
    """Wrap E4M3, int8 or bf16 values ``[N, K]`` of one expert under fp32 ``[N]``. Raises ValueError for other dtypes."""
    kinds: dict[torch.dtype, Kind] = {torch.float8_e4m3fn: "e4m3", torch.int8: "int8", torch.bfloat16: "bf16"}
    if codes.dtype not in kinds:
        raise ValueError(f"codes: expected e4m3, int8 or bf16, got {codes.dtype}")
    return GroupedWeight(codes, None, out_scale, kinds[codes.dtype])


def float_blocks(codes: torch.Tensor, scale: torch.Tensor) -> GroupedWeight:
    """Wrap E4M3 codes ``[N, K]`` of one expert under fp32 ``[N, ceil(K / 128)]``. Raises ValueError for other dtypes and shapes."""
    check_tensor("codes", codes, torch.float8_e4m3fn, (codes.shape[0], codes.shape[-1]))
    check_tensor("scales of blocks of 128", scale, torch.float32, (codes.shape[0], -(-codes.shape[1] // 128)))
    return GroupedWeight(codes, scale, torch.ones_like(scale[:, 0]), "e4m3_float")


def mxfp8(codes: torch.Tensor, scale: torch.Tensor) -> GroupedWeight:
    """Wrap E4M3 codes ``[N, K]`` of one expert under UE8M0 ``[N, K / 32]``, exactly.

    Raises:
        ValueError: a scale is NaN, or a row's scales span more than the kernel's range.
    """
    weight = w8_decode.mxfp8(codes, scale)
    return GroupedWeight(codes, weight.scale, weight.out_scale, "e4m3_exponent")


def _no_nan(scale: torch.Tensor) -> None:
    if bool(ue8m0.byte_is_nan(scale).any()):
        raise ValueError("a UE8M0 block scale is NaN")


def stack(experts: Sequence[GroupedWeight]) -> GroupedWeight:
    """Stack the weights of single experts. Raises ValueError when they differ in kind or shape."""
    kinds = {(one.kind, one.codes.shape, None if one.scale is None else one.scale.shape) for one in experts}
    if len(kinds) != 1:
        raise ValueError(f"experts of one layer differ: {sorted(map(str, kinds))}")
    scale = None if experts[0].scale is None else torch.stack([one.scale for one in experts if one.scale is not None])
    codes, out_scale = (torch.stack([getattr(one, name) for one in experts]) for name in ("codes", "out_scale"))
    return GroupedWeight(codes, scale, out_scale, experts[0].kind, all(one.fp8 for one in experts))


def unpack(weight: GroupedWeight, expert: int) -> torch.Tensor:
    """Decode one expert's weight without its ``out_scale``, float64 ``[N, K]``, for the naive twin."""
    codes = weight.codes[expert]
    scale = None if weight.scale is None else weight.scale[expert]
    if scale is None:
        return e4m3.decode(codes).double() if weight.kind == "e4m3" else codes.double()
    if weight.kind == "e4m3_float" or weight.kind == "e4m3_exponent":
        factor = scale.double() if weight.kind == "e4m3_float" else torch.exp2(scale.double() - ue8m0.BIAS)
        return e4m3.decode(codes).double() * factor.repeat_interleave(weight.group, dim=1)[:, : weight.k]
    if weight.kind == "mxfp4":
        exponents = torch.exp2(scale.to(torch.float64) - ue8m0.BIAS)
        return scale_blocks(e2m1.decode(e2m1.unpack_codes(codes)).to(torch.float64), exponents)
    if weight.kind == "mxfp4_tiles" or weight.kind == "nvfp4_tiles":
        return unstream(StreamedWeight(codes, scale, weight.out_scale[expert], weight.tiles))
    if weight.kind == "e4m3" or weight.kind == "int8" or weight.kind == "bf16":
        raise ValueError(f"{weight.kind} weights have no block scales")
    return packing.unpack(PackedWeight(codes, scale, weight.out_scale[expert], weight.kind, weight.group))
