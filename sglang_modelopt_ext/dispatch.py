"""Which kernel serves a linear layer.

One step at load: a request (scheme, device, sizes) is offered to every layout in order; the first that has no objection to it
and can hold the layer's weights gets the layer, and when none is left the error carries every objection. A layer holds
exactly one prepared copy of its weights. At run time the number of tokens picks among the kernels that read the layout.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from sglang_modelopt_ext.env import FP4_ACTIVATIONS, GEMM, W4A8Math
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.schemes.base import LayerScheme
from sglang_modelopt_kernels.formats import ue8m0
from sglang_modelopt_kernels.formats.base import BlockWeight, DecodedWeight, WeightFormat
from sglang_modelopt_kernels.formats.nvfp4 import round_unit_to_e4m3
from sglang_modelopt_kernels.gemm.block_scaled import block_scaled_linear, from_tensors, pack, to_tensors
from sglang_modelopt_kernels.gemm.dense import dense_linear, prepare_dense
from sglang_modelopt_kernels.gemm.fp8 import fp8_linear, prepare_fp8
from sglang_modelopt_kernels.gemm.mxfp4 import mxfp4_linear

FP8_ACTIVATIONS = ("fp8_static", "fp8_per_token")
BLACKWELL = 100


@dataclass(frozen=True)
class LinearRequest:
    """What a layout may base its answer on.

    Attributes:
        scheme: how the layer is quantized, as :func:`served_scheme` has it.
        device: ``cpu`` or ``cuda``.
        capability: the GPU's compute capability times ten (90 for 9.0), None on a CPU.
        n, k: output and input features of this rank's part.
        math: the numerics of its weights.
        dtype: the model's type.
        vocabulary: whether it is an embedding or an ``lm_head``, whose rows may be looked up.
    """

    scheme: LayerScheme
    device: str
    capability: int | None
    n: int
    k: int
    math: W4A8Math = "exact"
    dtype: torch.dtype = torch.bfloat16
    vocabulary: bool = False


def served_scheme(scheme: LayerScheme, device: str, capability: int | None) -> LayerScheme:
    """``scheme`` without its activation rounding where ``SGLANG_MODELOPT_EXT_FP4_ACTIVATIONS`` leaves that out."""
    if scheme.activation is None or scheme.activation.name not in ("nvfp4_dynamic", "mxfp4_dynamic"):
        return scheme
    setting = FP4_ACTIVATIONS.read()
    older_gpu = device == "cuda" and capability is not None and capability < BLACKWELL
    if setting == "keep" or (setting == "auto" and older_gpu):
        return dataclasses.replace(scheme, activation=None)
    return scheme


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


class Layout(ABC):
    """A way to keep a weight, and the product that reads it."""

    name: str

    @abstractmethod
    def supports(self, request: LinearRequest) -> str | None:
        """None, or the reason why not."""

    @abstractmethod
    def operand(self, request: LinearRequest) -> torch.dtype:
        """The type :meth:`matmul` reads activations in; it holds the rounded ones exactly."""

    @abstractmethod
    def prepare(self, shards: Sequence[ShardWeight]) -> dict[str, torch.Tensor]:
        """The tensors kept for the shards, one below the other. Raises ValueError when the layout cannot hold them."""

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

    def rows(self, prepared: Mapping[str, torch.Tensor], indices: torch.Tensor) -> torch.Tensor:
        """Rows of the decoded weight, float32 ``[..., K]``, for indices ``[...]``: a quantized embedding."""
        raise NotImplementedError(f"{self.name} does not take vocabulary layers")


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


class BlockScaled(Layout):
    """4-bit codes decoded in registers: :mod:`sglang_modelopt_kernels.gemm.block_scaled`."""

    name = "triton_block_scaled"

    def supports(self, request: LinearRequest) -> str | None:
        """4-bit formats on GPUs from SM80, with activations that float16 or bf16 holds exactly."""
        scheme, activation = request.scheme, request.scheme.activation
        if request.device != "cuda" or (request.capability or 0) < 80:
            return "is for GPUs from SM80"
        if not scheme.weight.has_blocks:
            return f"{scheme.weight.name} weights have no 4-bit blocks"
        if request.math != "exact":
            return f"does not round weights as math {request.math} does"
        if request.vocabulary:
            return "does not take vocabulary layers"
        if activation is None and request.dtype not in (torch.float16, torch.bfloat16):
            return f"does not take unrounded activations in {request.dtype}"
        if activation is not None and activation.name not in (*FP8_ACTIVATIONS, "nvfp4_dynamic", "mxfp4_dynamic"):
            return f"does not take {activation.name} activations"
        if request.k % 16:
            return f"needs K in 16s, not {request.k}"
        return None

    def operand(self, request: LinearRequest) -> torch.dtype:
        """The type of the activations' numbers: E4M3 where the GPU has it, float16 for NVFP4, bf16 for MXFP4, or the model's."""
        activation = request.scheme.activation
        if activation is None:
            return request.dtype
        if activation.name in FP8_ACTIVATIONS and (request.capability or 0) >= 89:
            return torch.float8_e4m3fn
        return torch.bfloat16 if activation.name == "mxfp4_dynamic" else torch.float16

    def prepare(self, shards: Sequence[ShardWeight]) -> dict[str, torch.Tensor]:
        """``codes`` int16 ``[N, K / 4]``, ``block_scale`` ``[N, K / group]`` and ``out_scale`` float32 ``[N]``."""
        return to_tensors(pack(merge_blocks(shards)))

    def matmul(
        self,
        prepared: Mapping[str, torch.Tensor],
        values: torch.Tensor,
        row_scale: torch.Tensor | None,
        bias: torch.Tensor | None,
        out_dtype: torch.dtype,
    ) -> torch.Tensor:
        """See :func:`block_scaled_linear`."""
        y: torch.Tensor = block_scaled_linear(values, from_tensors(prepared), row_scale, bias, out_dtype)
        return y


class BlackwellMxfp4(Layout):
    """MXFP4 weights as stored, in block-scaled matrix instructions: :mod:`sglang_modelopt_kernels.gemm.mxfp4`."""

    name = "triton_mxfp4_tcgen05"

    def supports(self, request: LinearRequest) -> str | None:
        """MXFP4 weights with FP8 activations on SM100 and SM103."""
        scheme = request.scheme
        if request.device != "cuda" or not BLACKWELL <= (request.capability or 0) < 110:
            return "is for SM100 and SM103"
        if scheme.weight.name != "mxfp4":
            return f"{scheme.weight.name} weights have no UE8M0 block scales"
        if scheme.activation is None or scheme.activation.name not in FP8_ACTIVATIONS:
            return "needs FP8 activations"
        if request.dtype not in (torch.float16, torch.bfloat16):
            return f"may sum at less than the precision of {request.dtype}"
        if request.vocabulary:
            return "does not take vocabulary layers"
        return None

    def operand(self, request: LinearRequest) -> torch.dtype:
        """E4M3."""
        del request
        return torch.float8_e4m3fn

    def prepare(self, shards: Sequence[ShardWeight]) -> dict[str, torch.Tensor]:
        """``codes`` uint8 ``[N, K / 2]``, ``block_scale`` uint8 ``[N, K / 32]`` and ``out_scale`` float32 ``[N]``, which is 1."""
        codes = torch.cat([shard.tensors["weight"] for shard in shards])
        scale = torch.cat([shard.tensors["weight_scale"] for shard in shards])
        if bool(ue8m0.byte_is_nan(scale).any()):
            raise ValueError("a UE8M0 block scale is NaN")
        ones = torch.ones(codes.shape[0], dtype=torch.float32, device=codes.device)
        return {"codes": codes, "block_scale": scale, "out_scale": ones}

    def matmul(
        self,
        prepared: Mapping[str, torch.Tensor],
        values: torch.Tensor,
        row_scale: torch.Tensor | None,
        bias: torch.Tensor | None,
        out_dtype: torch.dtype,
    ) -> torch.Tensor:
        """See :func:`mxfp4_linear`."""
        weight = prepared["codes"], prepared["block_scale"], prepared["out_scale"]
        y: torch.Tensor = mxfp4_linear(values, *weight, row_scale, bias, out_dtype)
        return y


class Fp8(Layout):
    """FP8 weights and activations in FP8 matrix instructions: :mod:`sglang_modelopt_kernels.gemm.fp8`."""

    name = "fp8_scaled_mm"

    def supports(self, request: LinearRequest) -> str | None:
        """Weights on E4M3's grid under scales of rows, with FP8 activations, on GPUs from SM89."""
        scheme = request.scheme
        if request.device != "cuda" or (request.capability or 0) < 89:
            return "is for GPUs from SM89"
        if request.math != "fp8" and scheme.weight.name not in ("fp8", "fp8_per_channel"):
            return f"{scheme.weight.name} weights are not E4M3 numbers under a scale for each row"
        if scheme.activation is None or scheme.activation.name not in FP8_ACTIVATIONS:
            return "needs FP8 activations"
        if request.dtype not in (torch.float16, torch.bfloat16):
            return f"sums at less than the precision of {request.dtype}"
        if request.vocabulary:
            return "does not take vocabulary layers"
        if request.k % 16 or request.n % 16:
            return f"needs N and K in 16s, not {request.n} and {request.k}"
        return None

    def operand(self, request: LinearRequest) -> torch.dtype:
        """E4M3."""
        del request
        return torch.float8_e4m3fn

    def prepare(self, shards: Sequence[ShardWeight]) -> dict[str, torch.Tensor]:
        """``unit`` E4M3 ``[N, K]`` and ``out_scale`` float32 ``[N]``."""
        unit, out_scale = prepare_fp8(merge_decoded(shards))
        if unit.shape[0] % 16:
            raise ValueError(f"{unit.shape[0]} rows of shards that share a product are not a multiple of 16")
        return {"unit": unit, "out_scale": out_scale}

    def matmul(
        self,
        prepared: Mapping[str, torch.Tensor],
        values: torch.Tensor,
        row_scale: torch.Tensor | None,
        bias: torch.Tensor | None,
        out_dtype: torch.dtype,
    ) -> torch.Tensor:
        """See :func:`fp8_linear`."""
        return fp8_linear(values, row_scale, prepared["unit"], prepared["out_scale"], bias, out_dtype)


class Dense(Layout):
    """The reference path of :mod:`sglang_modelopt_kernels.gemm.dense`."""

    def __init__(self, dtype: torch.dtype, devices: tuple[str, ...]) -> None:
        self.dtype = dtype
        self.devices = devices
        self.name = f"dense_{str(dtype).removeprefix('torch.')}"

    def supports(self, request: LinearRequest) -> str | None:
        """Any layer on its devices; in bf16 only formats and activations whose products are (nearly always) exact there."""
        if request.device not in self.devices:
            return f"is for {' and '.join(self.devices)}"
        if self.dtype == torch.bfloat16:
            weight = request.scheme.weight
            if not (weight.exact_in_bf16 or weight.often_exact_in_bf16):
                return f"{weight.name} weights are not exact in bf16"
            if request.scheme.activation is None and request.dtype != torch.bfloat16:
                return f"unrounded activations in {request.dtype} are not exact in bf16"
        return None

    def operand(self, request: LinearRequest) -> torch.dtype:
        """The type of the decoded weight."""
        del request
        return self.dtype

    def prepare(self, shards: Sequence[ShardWeight]) -> dict[str, torch.Tensor]:
        """``unit`` ``[N, K]`` and ``out_scale`` ``[N]``."""
        unit, out_scale = prepare_dense(merge_decoded(shards), self.dtype)
        return {"unit": unit, "out_scale": out_scale}

    def matmul(
        self,
        prepared: Mapping[str, torch.Tensor],
        values: torch.Tensor,
        row_scale: torch.Tensor | None,
        bias: torch.Tensor | None,
        out_dtype: torch.dtype,
    ) -> torch.Tensor:
        """See :func:`dense_linear`."""
        y: torch.Tensor = dense_linear(values, row_scale, prepared["unit"], prepared["out_scale"], bias)
        return y.to(out_dtype)

    def rows(self, prepared: Mapping[str, torch.Tensor], indices: torch.Tensor) -> torch.Tensor:
        """``unit[indices] * out_scale[indices]``."""
        return prepared["unit"][indices].to(torch.float32) * prepared["out_scale"][indices].unsqueeze(-1)


LAYOUTS: tuple[Layout, ...] = (
    BlackwellMxfp4(),
    BlockScaled(),
    Fp8(),
    Dense(torch.bfloat16, ("cuda",)),
    Dense(torch.float32, ("cuda", "cpu")),
)


def candidates(request: LinearRequest, subject: str) -> list[Layout]:
    """The layouts that take ``request``, best first. Raises ModelOptExtError with every reason when there is none.

    ``SGLANG_MODELOPT_EXT_GEMM`` limits them to the ones it names, in its order.
    """
    known = {layout.name: layout for layout in LAYOUTS}
    wanted = GEMM.read().split(",") if GEMM.read() else list(known)
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise ModelOptExtError.at("environment", GEMM.variable, f"names among {', '.join(known)}", unknown[0])
    reasons = {name: known[name].supports(request) for name in wanted}
    taking = [known[name] for name, reason in reasons.items() if reason is None]
    if not taking:
        why = "; ".join(f"{name} {reason}" for name, reason in reasons.items())
        raise ModelOptExtError.at(subject, request.scheme.algo, "a kernel that serves it", why)
    return taking
