"""Contract of backends of linear layers: the request, the stored and the prepared weight, the product."""

from __future__ import annotations

import dataclasses
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch

from sglang_modelopt_ext.backends.packages import installed
from sglang_modelopt_ext.backends.tokens import SPREAD
from sglang_modelopt_ext.device import Device
from sglang_modelopt_ext.env import W4A8Math
from sglang_modelopt_ext.schemes.base import LayerScheme
from sglang_modelopt_kernels.formats.base import (
    ActivationFormat,
    BlockActivation,
    BlockWeight,
    DecodedWeight,
    NumberType,
    WeightFormat,
)
from sglang_modelopt_kernels.formats.fp8 import FP8
from sglang_modelopt_kernels.formats.nvfp4 import round_unit_to_e4m3
from sglang_modelopt_kernels.quantize.blocks import naive_quantize_blocks, naive_swizzle, quantize_blocks, rounds


@dataclass(frozen=True)
class LinearRequest:
    """A layer, its device and the packages at hand: the facts that a backend answers by.

    Attributes:
        scheme: how the layer is quantized, as :func:`.select.served_scheme` has it.
        target: the device that is to serve it.
        n, k: output and input features of this rank's part.
        math: the numerics of its weights.
        dtype: the model's type.
        vocabulary: whether it is an embedding or an ``lm_head``, whose rows may be looked up.
        gpu: the GPU's name, as tuning files have it.
        packages: versions of other packages with kernels, by name, as :func:`installed` has them.
    """

    scheme: LayerScheme
    target: Device
    n: int
    k: int
    math: W4A8Math = "exact"
    dtype: torch.dtype = torch.bfloat16
    vocabulary: bool = False
    gpu: str = ""
    packages: Mapping[str, str] = field(default_factory=installed, compare=False)


@dataclass(frozen=True)
class ShardWeight:
    """The stored weight of one shard and the numerics it is served with."""

    format: WeightFormat
    tensors: Mapping[str, torch.Tensor]
    math: W4A8Math = "exact"

    @property
    def rows(self) -> int:
        """Output features (N)."""
        spec = next(spec for spec in self.format.tensors if spec.name == "weight")
        index = spec.dim_of("N")
        assert index is not None, "every weight has outputs"
        return self.tensors["weight"].shape[index] * spec.dims[index].per

    def decode(self) -> DecodedWeight:
        """Decode to float32. Raises ValueError when values are beyond float32 or ``math`` cannot hold them."""
        decoded = self.format.decode(self.tensors)
        if not bool(torch.isfinite(decoded.unit).all()):
            raise ValueError("a code times its block scale is beyond float32")
        return round_unit_to_e4m3(decoded) if self.math == "fp8" else decoded


class Prepared(Protocol):
    """A layer as a backend keeps it: a frozen dataclass of tensors and static metadata."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


class PreparedWeight(Prepared, Protocol):
    """The weight of one product as a backend keeps it."""

    @property
    def out_scale(self) -> torch.Tensor:
        """The scale of each output, float32 ``[N]``."""


WeightT = TypeVar("WeightT", bound=PreparedWeight)
PreparedT = TypeVar("PreparedT", bound=Prepared)


def tensors_of(weight: Prepared) -> dict[str, torch.Tensor]:
    """Return the tensors of what a backend keeps, by field."""
    values = {entry.name: getattr(weight, entry.name) for entry in dataclasses.fields(weight)}
    return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}


def without_tensors(weight: PreparedT) -> Callable[..., PreparedT]:
    """Return a function that builds ``weight`` again from its tensors, given by field; it keeps none of them alive."""
    tensors = tensors_of(weight)
    static = {entry.name: getattr(weight, entry.name) for entry in dataclasses.fields(weight)}
    return functools.partial(type(weight), **{name: value for name, value in static.items() if name not in tensors})


@dataclass(frozen=True)
class BlockScaledWeight:
    """Codes and block scales in the order of the backend that prepared them.

    Attributes:
        codes: the elements, N rows of them.
        block_scale: their block scales.
        out_scale: float32 ``[N]``.
    """

    codes: torch.Tensor
    block_scale: torch.Tensor
    out_scale: torch.Tensor


class Backend(ABC, Generic[WeightT]):
    """A way to keep a weight, and the product that reads it."""

    name: str
    repeats = True
    """Whether its product repeats bit for bit: the check before serving holds it to that."""
    kernels: tuple[str, ...] = ()
    """Names of the Triton functions of this package its product launches; none where PyTorch or another package multiplies."""
    interpreted = True
    """Whether tests run its kernels on a CPU, in Triton's interpreter, which has no Gluon."""
    takes_vocabulary = False
    """Whether it has :meth:`rows`."""

    def supports(self, request: LinearRequest) -> str | None:
        """Return why this backend cannot serve ``request``, or None."""
        if request.vocabulary and not self.takes_vocabulary:
            return "does not take vocabulary layers"
        return self.objection(request)

    @abstractmethod
    def objection(self, request: LinearRequest) -> str | None:
        """Return why this backend cannot serve ``request``, or None. :meth:`supports` checks what all backends ask."""

    @abstractmethod
    def operand(self, request: LinearRequest) -> torch.dtype:
        """Return the type that :meth:`matmul` reads activations in, which holds the rounded values exactly."""

    @abstractmethod
    def prepare(self, shards: Sequence[ShardWeight]) -> WeightT:
        """Return what is kept of the shards, one below the other. Raises ValueError when the backend cannot hold them."""

    @abstractmethod
    def matmul(
        self,
        weight: WeightT,
        values: torch.Tensor,
        row_scale: torch.Tensor | None,
        bias: torch.Tensor | None,
        out_dtype: torch.dtype,
    ) -> torch.Tensor:
        """Return the layer's output ``[M, N]``, rounded once, for activations ``values * row_scale``; see :func:`dense_linear`."""

    def check_tokens(self, weight: WeightT, request: LinearRequest) -> tuple[int, ...]:
        """Return numbers of tokens that together take every path by which :meth:`matmul` chooses for ``weight``."""
        del weight, request
        return SPREAD

    def rows(self, weight: WeightT, indices: torch.Tensor) -> torch.Tensor:
        """Return rows of the decoded weight, float32 ``[..., K]``, for indices ``[...]``: a quantized embedding."""
        raise NotImplementedError(f"{self.name} does not take vocabulary layers")


class BlockBackend(Backend[WeightT]):
    """A backend whose product reads rounded activations as codes under block scales, not as values."""

    swizzled = False
    """Whether activation scales must use the swizzled layout of 128 x 4 tiles (:func:`naive_swizzle`), for any number of tokens."""
    takes_low_rank = False
    """Whether it has :meth:`matmul_low_rank`; its :meth:`prepare` then keeps the shards' ``svdquant_lora_b``."""

    def swizzles(self, tokens: int) -> bool:
        """Return whether activation scales must use the swizzled layout for ``tokens`` tokens."""
        del tokens
        return self.swizzled

    def operand(self, request: LinearRequest) -> torch.dtype:
        """Return the type of packed codes, uint8."""
        del request
        return torch.uint8

    def matmul(
        self,
        weight: WeightT,
        values: torch.Tensor,
        row_scale: torch.Tensor | None,
        bias: torch.Tensor | None,
        out_dtype: torch.dtype,
    ) -> torch.Tensor:
        """Raise NotImplementedError: :meth:`matmul_blocks` is its product."""
        raise NotImplementedError(f"{self.name} reads activations as codes under block scales")

    @abstractmethod
    def matmul_blocks(
        self,
        weight: WeightT,
        x: BlockActivation,
        bias: torch.Tensor | None,
        out_dtype: torch.dtype,
    ) -> torch.Tensor:
        """Return the layer's output ``[M, N]``, rounded once; another package's kernel may round the sum before the bias, too."""

    def matmul_low_rank(
        self,
        weight: WeightT,
        x: BlockActivation,
        down: torch.Tensor,
        bias: torch.Tensor | None,
        out_dtype: torch.dtype,
    ) -> torch.Tensor:
        """Return :meth:`matmul_blocks` plus ``down @ svdquant_lora_b^T``, for float32 ``down`` ``[M, R]``.

        The shards' factors ``svdquant_lora_b`` stand on a diagonal.
        """
        raise NotImplementedError(f"{self.name} has no low-rank branch")


def round_to_blocks(
    activation: ActivationFormat | None,
    x: torch.Tensor,
    smoothing: torch.Tensor | None,
    scale: torch.Tensor | None,
    swizzled: bool = False,
) -> BlockActivation:
    """Return ``x * smoothing`` ``[M, K]`` in the format's codes, which a :class:`BlockBackend` multiplies.

    ``scale`` is the format's static scale. Block scales are swizzled where ``swizzled``, see :meth:`BlockBackend.swizzles`.

    Raises ValueError when the activations have no codes under block scales.
    """
    if activation is None or not rounds(activation):
        raise ValueError(f"{activation or 'unrounded'} activations have no block scales that a kernel rounds to")
    if x.is_cuda:
        return quantize_blocks(x, activation.name, smoothing, scale, swizzled)
    rounded = naive_quantize_blocks(x, activation.name, smoothing, scale)
    return dataclasses.replace(rounded, scale=naive_swizzle(rounded.scale)) if swizzled else rounded


def is_fp8(activation: ActivationFormat | None) -> bool:
    """Return whether activations are E4M3 values without block scales."""
    return activation is not None and activation.number_type == FP8


def exact_float(activation: ActivationFormat) -> torch.dtype:
    """Return the 16-bit type that holds the rounded values: bf16 for power-of-two block scales, which float16 has no range for."""
    return torch.bfloat16 if activation.number_type.block_scale == "ue8m0" else torch.float16


def describe_operands(scheme: LayerScheme) -> str:
    """Name the formats of a product and their number types: ``fp8 weights by fp8_static activations (E4M3 by E4M3)``."""
    names, types = [scheme.weight.name, "unrounded"], [str(scheme.weight.number_type)]
    if scheme.activation is not None:
        names[1] = scheme.activation.name
        types.append(str(scheme.activation.number_type))
    return f"{names[0]} weights by {names[1]} activations ({' by '.join(types)})"


def type_objection(scheme: LayerScheme, read: Collection[NumberType]) -> str | None:
    """Return why a kernel that reads weights of the number types ``read`` does not read the scheme's; None where it does."""
    if scheme.weight.number_type in read:
        return None
    return f"reads weights in {' or '.join(map(str, read))}, not {scheme.weight}"


def check_type(shards: Sequence[ShardWeight], read: Collection[NumberType]) -> None:
    """Raise ValueError, with what was expected and given, unless the shards' weights have one of the number types ``read``."""
    for shard in shards:
        if shard.format.number_type not in read:
            raise ValueError(f"packing: expected {' or '.join(map(str, read))}, got {shard.format}")


def fp8_objection(request: LinearRequest) -> str | None:
    """Return why FP8 matrix instructions do not serve ``request``'s activations; None when they do."""
    activation = request.scheme.activation
    if not is_fp8(activation):
        return f"needs FP8 activations, not {activation or 'unrounded'}"
    if request.dtype not in (torch.float16, torch.bfloat16):
        return f"may sum at less than the precision of {request.dtype}"
    return None


def one_scale(shards: Sequence[ShardWeight]) -> torch.Tensor:
    """Return the output scale that shards have in common, float32 ``[1]``. Raises ValueError when they have more than one."""
    scales = torch.cat([output_scale(shard) for shard in shards])
    if not bool((scales == scales[0]).all()):
        raise ValueError("takes one global scale, and the shards have several")
    return scales[:1].clone()


def output_scale(shard: ShardWeight) -> torch.Tensor:
    """Return the stored scale of the shard's outputs, float32: ``[1]`` for all of them, 1 where none is stored, or ``[N]``."""
    name = shard.format.output_scale
    if name is None:
        return torch.ones(1, dtype=torch.float32, device=shard.tensors["weight"].device)
    return shard.tensors[name].to(torch.float32).reshape(-1)


def output_scales(shards: Sequence[ShardWeight]) -> torch.Tensor:
    """Return the stored scale of each output of the shards, one below the other: float32 ``[N]``, 1 where none is stored."""
    # The dimension N of a weight may be packed: the format knows it.
    rows = [shard.rows for shard in shards]
    return torch.cat([output_scale(shard).expand(count) for shard, count in zip(shards, rows, strict=True)])


def check_no_output_scale(shards: Sequence[ShardWeight]) -> None:
    """Raise ValueError where a shard's format has a scale of its outputs, for products that take none."""
    for shard in shards:
        if shard.format.output_scale is not None:
            raise ValueError(f"packing: expected no scale of outputs, got {shard.format.output_scale}")


def merge_decoded(shards: Sequence[ShardWeight]) -> DecodedWeight:
    """Return the shards as one weight with an output scale for each row."""
    parts = [shard.decode() for shard in shards]
    return DecodedWeight(torch.cat([part.unit for part in parts]), _rows_of_scales(parts))


def merge_blocks(shards: Sequence[ShardWeight]) -> BlockWeight:
    """Return the shards as 4-bit codes and block scales, with an output scale for each row.

    Raises ValueError when the format has no 4-bit codes.
    """
    parts = []
    for shard in shards:
        part = shard.format.blocks(shard.tensors)
        if part is None:
            raise ValueError(f"{shard.format} has no 4-bit blocks")
        parts.append(part)
    return dataclasses.replace(
        parts[0],
        codes=torch.cat([part.codes for part in parts]),
        scale=torch.cat([part.scale for part in parts]),
        out_scale=_rows_of_scales(parts),
    )


def _rows_of_scales(parts: Sequence[DecodedWeight] | Sequence[BlockWeight]) -> torch.Tensor:
    scales = []
    for part in parts:
        rows = part.unit.shape[0] if isinstance(part, DecodedWeight) else part.codes.shape[0]
        scales.append(part.out_scale.reshape(-1, 1).expand(rows, 1))
    return torch.cat(scales)
