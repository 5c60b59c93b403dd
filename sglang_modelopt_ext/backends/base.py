"""What a backend is asked, and what it is given."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

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
    WeightFormat,
)
from sglang_modelopt_kernels.formats.nvfp4 import round_unit_to_e4m3
from sglang_modelopt_kernels.quantize.blocks import (
    BLOCK_ACTIVATIONS,
    naive_quantize_blocks,
    naive_swizzle,
    quantize_blocks,
)

FP8_ACTIVATIONS = ("fp8_static", "fp8_per_token")


@dataclass(frozen=True)
class LinearRequest:
    """What a backend may base its answer on.

    Attributes:
        scheme: how the layer is quantized, as :func:`served_scheme` has it.
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

    @property
    def device(self) -> str:
        """The kind of device: ``cuda`` for an NVIDIA GPU, ``cpu`` or ``other``."""
        return self.target.kind

    @property
    def capability(self) -> int | None:
        """The compute capability of an NVIDIA GPU, times ten (90 for 9.0), None on any other device."""
        return self.target.capability


@dataclass(frozen=True)
class ShardWeight:
    """The stored weight of one shard and the numerics it is served with."""

    format: WeightFormat
    tensors: Mapping[str, torch.Tensor]
    math: W4A8Math = "exact"

    def decode(self) -> DecodedWeight:
        """As numbers. Raises ValueError when they are beyond float32 or ``math`` cannot hold them."""
        decoded = self.format.decode(self.tensors)
        if not bool(torch.isfinite(decoded.unit).all()):
            raise ValueError("a code times its block scale is beyond float32")
        return round_unit_to_e4m3(decoded) if self.math == "fp8" else decoded


class Backend(ABC):
    """A way to keep a weight, and the product that reads it."""

    name: str
    repeats = True
    """Whether its product repeats bit for bit: the check before serving holds it to that."""
    kernels: tuple[str, ...] = ()
    """Names of the Triton functions of this package its product launches; none where PyTorch or another package multiplies."""
    takes_vocabulary = False
    """Whether it has :meth:`rows`."""

    def supports(self, request: LinearRequest) -> str | None:
        """None, or the reason why not."""
        if request.vocabulary and not self.takes_vocabulary:
            return "does not take vocabulary layers"
        return self.objection(request)

    @abstractmethod
    def objection(self, request: LinearRequest) -> str | None:
        """Likewise, apart from what every backend asks."""

    @abstractmethod
    def operand(self, request: LinearRequest) -> torch.dtype:
        """The type :meth:`matmul` reads activations in; it holds the rounded ones exactly."""

    @abstractmethod
    def prepare(self, shards: Sequence[ShardWeight]) -> dict[str, torch.Tensor]:
        """The tensors kept for the shards, one below the other. Raises ValueError when the backend cannot hold them."""

    @abstractmethod
    def matmul(
        self,
        prepared: Mapping[str, torch.Tensor],
        values: torch.Tensor,
        row_scale: torch.Tensor | None,
        bias: torch.Tensor | None,
        out_dtype: torch.dtype,
    ) -> torch.Tensor:
        """The layer's output ``[M, N]``, rounded once, for activations ``values * row_scale``; see :func:`dense_linear`."""

    def check_tokens(self, prepared: Mapping[str, torch.Tensor], request: LinearRequest) -> tuple[int, ...]:
        """Return numbers of tokens that together take every path by which :meth:`matmul` chooses for the weight ``prepared``."""
        del prepared, request
        return SPREAD

    def rows(self, prepared: Mapping[str, torch.Tensor], indices: torch.Tensor) -> torch.Tensor:
        """Rows of the decoded weight, float32 ``[..., K]``, for indices ``[...]``: a quantized embedding."""
        raise NotImplementedError(f"{self.name} does not take vocabulary layers")


class BlockBackend(Backend):
    """A backend whose product reads rounded activations as codes under block scales, not as numbers."""

    swizzled = False
    """Whether it reads the activations' block scales in tiles of 128 x 4, :func:`naive_swizzle`, whatever their number."""
    takes_low_rank = False
    """Whether it has :meth:`matmul_low_rank`; its :meth:`prepare` then keeps the shards' ``svdquant_lora_b``."""

    def swizzles(self, tokens: int) -> bool:
        """Whether it reads those of ``tokens`` tokens so."""
        del tokens
        return self.swizzled

    def operand(self, request: LinearRequest) -> torch.dtype:
        """That of the codes."""
        del request
        return torch.uint8

    def matmul(
        self,
        prepared: Mapping[str, torch.Tensor],
        values: torch.Tensor,
        row_scale: torch.Tensor | None,
        bias: torch.Tensor | None,
        out_dtype: torch.dtype,
    ) -> torch.Tensor:
        """Raises NotImplementedError: :meth:`matmul_blocks` is its product."""
        raise NotImplementedError(f"{self.name} reads activations as codes under block scales")

    @abstractmethod
    def matmul_blocks(
        self,
        prepared: Mapping[str, torch.Tensor],
        x: BlockActivation,
        bias: torch.Tensor | None,
        out_dtype: torch.dtype,
    ) -> torch.Tensor:
        """The layer's output ``[M, N]``, rounded once; another package's kernel may round the sum before the bias, too."""

    def matmul_low_rank(
        self,
        prepared: Mapping[str, torch.Tensor],
        x: BlockActivation,
        down: torch.Tensor,
        bias: torch.Tensor | None,
        out_dtype: torch.dtype,
    ) -> torch.Tensor:
        """Likewise plus ``down @ svdquant_lora_b^T``, the shards' factors on a diagonal, for float32 ``down`` ``[M, R]``."""
        raise NotImplementedError(f"{self.name} has no low-rank branch")


def round_to_blocks(
    activation: ActivationFormat | None,
    x: torch.Tensor,
    smoothing: torch.Tensor | None,
    scale: torch.Tensor | None,
    swizzled: bool = False,
) -> BlockActivation:
    """What a :class:`BlockBackend` multiplies: ``x * smoothing`` ``[M, K]`` in the format's codes, ``scale`` its static scale.

    Block scales are in tiles where ``swizzled``, as :meth:`BlockBackend.swizzles` has it.

    Raises ValueError when the activations have no codes under block scales.
    """
    if activation is None or activation.name not in BLOCK_ACTIVATIONS:
        raise ValueError(f"{activation.name if activation else 'unrounded'} activations have no block scales")
    if x.is_cuda:
        return quantize_blocks(x, activation.name, smoothing, scale, swizzled)
    rounded = naive_quantize_blocks(x, activation.name, smoothing, scale)
    return dataclasses.replace(rounded, scale=naive_swizzle(rounded.scale)) if swizzled else rounded


def fp8_objection(request: LinearRequest) -> str | None:
    """Why FP8 matrix instructions do not serve ``request``'s activations; None when they do."""
    activation = request.scheme.activation
    if activation is None or activation.name not in FP8_ACTIVATIONS:
        return "needs FP8 activations"
    if request.dtype not in (torch.float16, torch.bfloat16):
        return f"may sum at less than the precision of {request.dtype}"
    return None


def one_scale(shards: Sequence[ShardWeight]) -> torch.Tensor:
    """The float32 scale ``[1]`` that NVFP4 shards have in common. Raises ValueError when they have more than one."""
    scales = torch.stack([shard.tensors["weight_scale_2"].to(torch.float32).reshape(()) for shard in shards])
    if not bool((scales == scales[0]).all()):
        raise ValueError("takes one global scale, and the shards have several")
    return scales[:1].clone()


def merge_decoded(shards: Sequence[ShardWeight]) -> DecodedWeight:
    """The shards as one weight with an output scale for each row."""
    parts = [shard.decode() for shard in shards]
    return DecodedWeight(torch.cat([part.unit for part in parts]), _rows_of_scales(parts))


def merge_blocks(shards: Sequence[ShardWeight]) -> BlockWeight:
    """Likewise as 4-bit codes and block scales. Raises ValueError when the format has none."""
    parts = []
    for shard in shards:
        part = shard.format.blocks(shard.tensors)
        if part is None:
            raise ValueError(f"{shard.format.name} has no 4-bit blocks")
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
