"""The contracts every number format is written against.

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

Axis = Literal["N", "K"]


class ValueRule(Enum):
    """What the entries of a tensor may be. Checked when a checkpoint is read, before anything is multiplied."""

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
        """Entries stored for a weight ``[n, k]``. Raises ValueError when ``per`` must divide the axis and does not."""
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
        """The stored shape for a weight ``[n, k]``. Raises ValueError when a dimension does not divide."""
        return tuple(dim.size(n, k) for dim in self.dims)

    def dim_of(self, axis: Axis) -> int | None:
        """The index of the dimension that follows ``axis`` of the weight, or None."""
        for index, dim in enumerate(self.dims):
            if dim.axis == axis:
                return index
        return None


@dataclass(frozen=True)
class DecodedWeight:
    """A weight as numbers: ``W = unit * out_scale``.

    Attributes:
        unit: float32 ``[N, K]``, codes times block scales; exact products but under float32 block scales, where they are
            rounded to float32; exact in bf16 too where the format says so (:attr:`WeightFormat.exact_in_bf16`).
        out_scale: float32, ``[]`` or ``[N, 1]``: the global scale, applied to the output of the matrix product.
    """

    unit: torch.Tensor
    out_scale: torch.Tensor

    def dequantize(self) -> torch.Tensor:
        """The float32 weight ``[N, K]``."""
        return self.unit * self.out_scale


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
    group_size: int
    """Inputs that share one block scale; 0 when there are no blocks."""
    exact_in_bf16: bool
    """Every entry of :attr:`DecodedWeight.unit` is a bf16 number."""
    often_exact_in_bf16: bool = False
    """Likewise for every weight but those at the end of float32's range; a backend has to look."""
    has_blocks: bool = False
    """:meth:`blocks` gives 4-bit codes and block scales."""

    @property
    @abstractmethod
    def tensors(self) -> tuple[TensorSpec, ...]:
        """The tensors stored for the weight alone, in the order a reader should check them."""

    @abstractmethod
    def decode(self, tensors: Mapping[str, torch.Tensor]) -> DecodedWeight:
        """Reads the stored tensors of one shard (by spec name; values already validated), on their device."""

    def blocks(self, tensors: Mapping[str, torch.Tensor]) -> BlockWeight | None:
        """Likewise as 4-bit codes and block scales, None where the format has none."""
        del tensors
        return None

    @abstractmethod
    def quantize(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Reference quantizer: the tensors a max-calibrated ModelOpt export stores for ``weight``, bit for bit."""

    def bits_per_weight(self) -> float:
        """Stored bits for one weight, block scales included, per-tensor scales not."""
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


class ActivationFormat(ABC):
    """The rounding a recipe applies to the input of a linear layer."""

    name: str

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """The tensors a checkpoint stores for it (a static scale, or nothing)."""
        return ()

    def token_amax(self, x: torch.Tensor) -> torch.Tensor | None:
        """The largest magnitude of each token, float32 ``[M, 1]``, where the format scales per token; else None.

        Ranks that hold slices of the same tokens take the maximum of theirs, so that a token is rounded alike however many
        ranks there are.
        """
        del x
        return None

    def blocks(self, x: torch.Tensor, scale: torch.Tensor | None) -> BlockActivation | None:
        """What :meth:`quantize` rounds ``x`` to, as codes and block scales; None where the format has none."""
        del x, scale
        return None

    @abstractmethod
    def quantize(self, x: torch.Tensor, scale: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rounds ``x`` float32 ``[M, K]``.

        Args:
            x: float32 ``[M, K]``.
            scale: the static scale, float32 ``[]``, or ``[M, 1]`` where each row has its own (experts); for a per-token format
                the :meth:`token_amax` of the whole tokens, float32 ``[M, 1]``, or None when ``x`` holds them whole; None for
                any other dynamic format.

        Returns:
            ``(values, row_scale)``: float32 ``[M, K]`` and float32 ``[]`` or ``[M, 1]`` with ``x ~ values * row_scale``;
            ``row_scale`` None stands for 1. No value of a row depends on another row unless the scale is static.
        """
