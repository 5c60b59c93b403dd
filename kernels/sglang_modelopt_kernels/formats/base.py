"""Contracts of number formats.

A *weight format* is a self-contained bundle: it declares the tensors a checkpoint stores for one linear layer
(:class:`TensorSpec`), and owns how they are decoded and how a reference quantizer makes them. The declaration is data, so
that the strict reader, SGLang's parameters, tensor-parallel slicing, ``inspect`` and the malformed-input tests all read the
same table and none of them repeats it.

An *activation format* owns the rounding a recipe applies to the input of a linear layer.

Shapes use ``N`` (output features), ``K`` (input features) and ``M`` (tokens). A weight is always ``[N, K]``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Literal

import torch

from .checks import check_weight

Axis = Literal["N", "K"]
Element = Literal["e2m1", "e4m3", "int4", "int8", "float"]
"""The type of one stored element of a weight or an activation; ``float`` is one of the model's own types."""
BlockScale = Literal["e4m3", "ue8m0", "float32"]
"""The type of the scales that blocks of elements share."""
RowScale = Literal["static", "token"]
"""Where the float32 scale of an activation's rows comes from: stored for the whole tensor, or computed for each token."""


@dataclass(frozen=True)
class NumberType:
    """Elements and the scales of their blocks: what a kernel has to decode.

    Backends compare it as a whole with the types that their kernels read. Scales of whole rows, which multiply a product's
    output, are no part of it.

    Attributes:
        element: the type of one element.
        block: rows and columns (N and K of a weight, M and K of an activation) that share a block scale; None without blocks.
        block_scale: the type of a block scale; None without blocks.
    """

    element: Element
    block: tuple[int, int] | None = None
    block_scale: BlockScale | None = None

    def __post_init__(self) -> None:
        """Raise ValueError where only one of ``block`` and ``block_scale`` is given, or a block is empty."""
        if (self.block is None) != (self.block_scale is None) or (self.block is not None and min(self.block) < 1):
            raise ValueError(f"blocks and their scales come together, got {self.block} and {self.block_scale}")

    @property
    def bits(self) -> int:
        """Bits of one element; of ``float`` those of a 16-bit type."""
        return {"e2m1": 4, "int4": 4, "float": 16}.get(self.element, 8)

    def __str__(self) -> str:
        """Name the properties, such as ``E2M1 in blocks of 16 under E4M3 scales``, for messages."""
        if self.block is None or self.block_scale is None:
            return self.element.upper()
        rows, columns = self.block
        size = f"{columns}" if rows == 1 else f"{rows} x {columns}"
        scale = self.block_scale if self.block_scale == "float32" else self.block_scale.upper()
        return f"{self.element.upper()} in blocks of {size} under {scale} scales"


class ValueRule(Enum):
    """Rule for the entries of a stored tensor, checked when a checkpoint is read, before anything is multiplied."""

    CODES = "codes"
    """Packed codes: every byte is legal."""
    POSITIVE = "positive"
    """Per-tensor or per-channel scale: finite, positive, normal."""
    BLOCK_SCALE_E4M3 = "block_scale_e4m3"
    """e4m3 block scale: no NaN, not negative. Zero is legal only over a block whose codes are all zero."""
    BLOCK_SCALE_UE8M0 = "block_scale_ue8m0"
    """ue8m0 block scale stored as uint8 ``e + 127``: 255 is NaN (OCP MX v1.0, 5.4.1) and illegal."""
    FINITE = "finite"
    """Any finite value."""


@dataclass(frozen=True)
class Dim:
    """One dimension of a stored tensor: ``axis`` of the weight, ``per`` weight elements to one stored entry.

    ``Dim("K", 2)`` is a K dimension with two 4-bit codes to a byte, ``Dim("K", 32)`` one block scale for 32 inputs.
    A dimension that does not follow the weight has ``axis`` None and the fixed size ``per``. With ``partial`` the last
    block may be short: ModelOpt's 128 x 128 FP8 blocks.
    """

    axis: Axis | None
    per: int = 1
    partial: bool = False

    def size(self, n: int, k: int) -> int:
        """Return the entries stored for a weight ``[n, k]``. Raises ValueError when ``per`` must divide the axis and does not."""
        if self.axis is None:
            return self.per
        extent = n if self.axis == "N" else k
        if self.partial:
            return -(-extent // self.per)
        if extent % self.per:
            raise ValueError(f"{self.axis} = {extent} is not a multiple of {self.per}")
        return extent // self.per


@dataclass(frozen=True)
class TensorSpec:
    """One tensor a checkpoint stores for a linear layer, next to its ``bias``.

    Attributes:
        name: the last part of the tensor's name, such as ``weight_scale``.
        dtypes: the storage types that are accepted.
        dims: its dimensions; ``()`` is a scalar, stored as ``[]`` or ``[1]``, one for each shard of a fused layer.
        values: the rule its entries obey.
        optional: a checkpoint may leave it out (then for every shard of a fused layer alike).
    """

    name: str
    dtypes: tuple[torch.dtype, ...]
    dims: tuple[Dim, ...]
    values: ValueRule
    optional: bool = False

    @property
    def is_scalar(self) -> bool:
        """Whether there is one value for each shard."""
        return not self.dims

    def shape(self, n: int, k: int) -> tuple[int, ...]:
        """Return the stored shape for a weight ``[n, k]``. Raises ValueError when a dimension does not divide."""
        return tuple(dim.size(n, k) for dim in self.dims)

    def dim_of(self, axis: Axis) -> int | None:
        """Return the index of the dimension that follows ``axis`` of the weight, or None."""
        for index, dim in enumerate(self.dims):
            if dim.axis == axis:
                return index
        return None


@dataclass(frozen=True)
class DecodedWeight:
    """A weight as float32 values: ``W = unit * out_scale``.

    Attributes:
        unit: float32 ``[N, K]``, codes times block scales; exact products but under float32 block scales, where they are
            rounded to float32; exact in bf16 too where the format says so (:attr:`WeightFormat.exact_in_bf16`).
        out_scale: float32, ``[]`` or ``[N, 1]``: the global scale, applied to the output of the matrix product.
    """

    unit: torch.Tensor
    out_scale: torch.Tensor

    def dequantize(self) -> torch.Tensor:
        """Return the float32 weight ``[N, K]``."""
        return self.unit * self.out_scale


_BLOCK_SCALE_OF: dict[torch.dtype, BlockScale] = {
    torch.float8_e4m3fn: "e4m3",
    torch.uint8: "ue8m0",
    torch.float32: "float32",
}


@dataclass(frozen=True)
class BlockWeight:
    """A weight as its 4-bit codes and block scales: ``W = code * scale * out_scale``.

    Attributes:
        codes: ``[N, K]``, one code to an entry: uint8 E2M1 codes 0..15, or int8 -8..7.
        scale: as stored, ``[N, K / group]``: e4m3, uint8 (UE8M0) or float32.
        out_scale: float32, ``[]`` or ``[N, 1]``.
        code: what the codes are.
        group: inputs to a block scale.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    out_scale: torch.Tensor
    code: Literal["e2m1", "int4"]
    group: int

    @property
    def number_type(self) -> NumberType:
        """The number type of codes and block scales. Raises ValueError where :attr:`scale` has another dtype than it may."""
        if self.scale.dtype not in _BLOCK_SCALE_OF:
            raise ValueError(f"block scales: expected e4m3, uint8 or float32, got {self.scale.dtype}")
        return NumberType(self.code, (1, self.group), _BLOCK_SCALE_OF[self.scale.dtype])


@dataclass(frozen=True)
class BlockActivation:
    """Rounded activations as codes and block scales: ``x ~ code * scale * row_scale``.

    Attributes:
        codes: uint8 ``[M, K / 2]``, two E2M1 codes to a byte, the even k in the low half; or E4M3 ``[M, K]``.
        scale: ``[M, K / group]``: E4M3 or uint8 (UE8M0); NaN where the block is.
        row_scale: float32 ``[]``, None for 1.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    row_scale: torch.Tensor | None


class WeightFormat(ABC):
    """How a quantized weight ``[N, K]`` is stored and read."""

    name: str
    number_type: NumberType
    """The stored elements and block scales."""
    output_scale: str | None = None
    """The stored tensor that :attr:`DecodedWeight.out_scale` holds: a scalar or one entry for each output; None where it is 1."""
    exact_in_bf16: bool
    """Every entry of :attr:`DecodedWeight.unit` is a bf16 number."""
    often_exact_in_bf16: bool = False
    """Every entry is a bf16 number but for those at the end of float32's range; a backend has to look."""

    def __str__(self) -> str:
        """Name and number type, for messages."""
        return f"{self.name} ({self.number_type})"

    @property
    def group_size(self) -> int:
        """Inputs (K) that share one block scale; 0 without blocks."""
        return self.number_type.block[1] if self.number_type.block else 0

    @property
    @abstractmethod
    def tensors(self) -> tuple[TensorSpec, ...]:
        """The tensors stored for the weight alone, in the order a reader should check them."""

    @abstractmethod
    def decode(self, tensors: Mapping[str, torch.Tensor]) -> DecodedWeight:
        """Read the stored tensors of one shard (by spec name; values already validated), on their device."""

    def blocks(self, tensors: Mapping[str, torch.Tensor]) -> BlockWeight | None:
        """Read one shard as 4-bit codes and block scales; None where the elements have another width."""
        del tensors
        return None

    @abstractmethod
    def quantize(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the tensors a max-calibrated ModelOpt export stores for ``weight``, bit for bit."""

    def bits_per_weight(self) -> float:
        """Return the stored bits of one element, block scales included, per-tensor scales not."""
        bits = 0.0
        for spec in self.tensors:
            if spec.is_scalar:
                continue
            entries = 1.0
            for dim in spec.dims:
                entries /= dim.per if dim.axis else 1
            if {dim.axis for dim in spec.dims} >= {"N", "K"}:
                bits += entries * spec.dtypes[0].itemsize * 8
        return bits


class SearchedWeightFormat(WeightFormat):
    """A weight format whose block scales (``weight_scale``) may be other than a max calibration's, to be searched for.

    Rounding is apart from the choice of scales, so that a search measures what is stored.
    """

    @abstractmethod
    def scales(self, weight: torch.Tensor, amax: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Return the scales of a max-calibrated ModelOpt export, by the names of :attr:`tensors`.

        Args:
            weight: ``[N, K]``, or some of its rows.
            amax: the largest magnitude of all that shares a global scale, ``[]``, float32; None for that of ``weight``.

        Raises:
            ValueError: there are no such scales.
        """

    @abstractmethod
    def encode(self, weight: torch.Tensor, scales: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the stored tensors of ``weight`` ``[N, K]``, finite, rounded as ModelOpt's export does under these ``scales``."""

    @abstractmethod
    def candidates(self, scale: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return other block scales that may have less error than a max calibration's ``scale``, each of its shape and type."""

    def quantize(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the tensors of a max-calibrated export of ``weight`` ``[N, K]``, in the dtype of the model, bit for bit.

        Raises:
            ValueError: the weight is not a finite matrix with K a multiple of the block, or has no scales.
        """
        check_weight(weight, self.group_size)
        return self.encode(weight, self.scales(weight))


class ActivationFormat(ABC):
    """The rounding a recipe applies to the input of a linear layer."""

    name: str
    number_type: NumberType
    """The elements and block scales that the input is rounded to."""
    row_scale: RowScale | None = None
    """Where the float32 scale of the rows comes from; None where it is 1."""
    calibrated_range: float | None = None
    """The value that a static scale brings the calibrated amax to: ``input_scale = amax / calibrated_range``; None without one."""

    def __str__(self) -> str:
        """Name and number type, for messages."""
        return f"{self.name} ({self.number_type})"

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """The tensors a checkpoint stores for it (a static scale, or nothing)."""
        return ()

    def token_amax(self, x: torch.Tensor) -> torch.Tensor | None:
        """Return the largest magnitude of each token, float32 ``[M, 1]``, where the format scales per token; else None.

        Ranks that hold slices of the same tokens take the maximum of theirs, so that a token is rounded alike however many
        ranks there are.
        """
        del x
        return None

    def blocks(self, x: torch.Tensor, scale: torch.Tensor | None) -> BlockActivation | None:
        """Return :meth:`quantize` of ``x`` as codes and block scales; None where the format has none."""
        del x, scale
        return None

    @abstractmethod
    def quantize(self, x: torch.Tensor, scale: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Round ``x`` float32 ``[M, K]``.

        Args:
            x: float32 ``[M, K]``.
            scale: the static scale, float32 ``[]``, or ``[M, 1]`` where each row has its own (experts); for a per-token format
                the :meth:`token_amax` of the whole tokens, float32 ``[M, 1]``, or None when ``x`` holds them whole; None for
                any other dynamic format.

        Returns:
            ``(values, row_scale)``: float32 ``[M, K]`` and float32 ``[]`` or ``[M, 1]`` with ``x ~ values * row_scale``;
            ``row_scale`` None stands for 1. No value of a row depends on another row unless the scale is static.
        """
