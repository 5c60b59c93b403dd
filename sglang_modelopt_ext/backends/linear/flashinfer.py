"""FlashInfer's block-scaled products on Blackwell, for recipes whose codes they read as stored.

The activations are rounded here, bit for bit as the recipe says, and not by FlashInfer's own quantizers, which multiply by
approximate reciprocals. Every product returns its sum rounded to the model's type; a bias is added afterwards.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from sglang_modelopt_ext.backends.base import (
    BlockBackend,
    BlockScaledWeight,
    LinearRequest,
    ShardWeight,
    check_no_output_scale,
    check_type,
    describe_operands,
    one_scale,
)
from sglang_modelopt_ext.backends.packages import package_objection
from sglang_modelopt_ext.schemes.base import LORA_B, LayerScheme
from sglang_modelopt_kernels.formats.base import BlockActivation, NumberType
from sglang_modelopt_kernels.formats.mxfp4 import MXFP4
from sglang_modelopt_kernels.formats.mxfp8 import MXFP8
from sglang_modelopt_kernels.formats.nvfp4 import NVFP4
from sglang_modelopt_kernels.quantize.blocks import naive_swizzle, rounds

PACKAGE = "flashinfer-python"
CAPABILITIES = (100, 103, 110, 120, 121)
"""Compute capabilities times ten that the CUTLASS kernels of ``mm_fp4`` and ``mm_mxfp8`` are built for."""


def flashinfer_objection(request: LinearRequest, capabilities: Sequence[int]) -> str | None:
    """Return why FlashInfer's products do not serve ``request`` (GPU, model's type, package), or None."""
    if not request.target.is_one_of(*capabilities):
        return f"is for {', '.join(f'SM{capability}' for capability in capabilities)}"
    if request.dtype not in (torch.float16, torch.bfloat16):
        return f"has no {request.dtype} output"
    return package_objection(PACKAGE, request.packages)


def both_sides(scheme: LayerScheme, wanted: NumberType) -> bool:
    """Return whether weights and activations have the number type ``wanted``, and a kernel of ours rounds the activations to it."""
    activation = scheme.activation
    if activation is None or not rounds(activation):
        return False
    return scheme.weight.number_type == wanted == activation.number_type


def check_rows(rows: int, multiple: int) -> None:
    """Raise ValueError unless ``multiple`` divides the rows of shards that share a product."""
    if rows % multiple:
        raise ValueError(f"{rows} rows of shards that share a product are not a multiple of {multiple}")


def stored(shards: Sequence[ShardWeight], name: str) -> torch.Tensor:
    """Return the shards' tensors of that name, one below the other."""
    return torch.cat([shard.tensors[name] for shard in shards]).contiguous()


def add_bias(y: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return ``y + bias`` in float32, rounded to the type of ``y``."""
    return y if bias is None else (y.to(torch.float32) + bias.to(torch.float32)).to(y.dtype)


@dataclass(frozen=True)
class FlashInferWeight(BlockScaledWeight):
    """A weight as stored, with swizzled block scales.

    Attributes:
        up: the second low-rank factor, bf16 ``[N, R]``; None without a low-rank branch.
    """

    up: torch.Tensor | None = None


class FlashInferFp4(BlockBackend[FlashInferWeight]):
    """FP4 weights and activations in FP4 matrix instructions: ``flashinfer.mm_fp4``.

    NVFP4 goes to its CUTLASS kernels, MXFP4 to its CuTe-DSL ones, the only ones for MXFP4 that plan nothing for each number of
    tokens.
    """

    name = "flashinfer_mm_fp4"
    repeats = False  # not known
    swizzled = True
    capabilities: Mapping[NumberType, Sequence[int]] = {NVFP4: CAPABILITIES, MXFP4: (100, 103)}
    """The number types that it reads, on both sides alike, and the GPUs for each."""

    def objection(self, request: LinearRequest) -> str | None:
        """Reject all but NVFP4 and MXFP4 with rounded activations, N and K in 32s."""
        scheme = request.scheme
        if scheme.weight.number_type not in self.capabilities or not both_sides(scheme, scheme.weight.number_type):
            return f"does not multiply {describe_operands(scheme)}"
        if request.n % 32 or request.k % 32:
            return f"needs N and K in 32s, not {request.n} and {request.k}"
        if scheme.low_rank:
            return "has no float32 output for a low-rank branch"
        return flashinfer_objection(request, self.capabilities[scheme.weight.number_type])

    def prepare(self, shards: Sequence[ShardWeight]) -> FlashInferWeight:
        """Keep ``codes`` uint8 ``[N, K / 2]`` as stored, ``block_scale`` uint8 swizzled, and ``out_scale`` float32 ``[N]``."""
        check_type(shards, self.capabilities)
        codes = stored(shards, "weight")
        check_rows(codes.shape[0], 32)
        scale = one_scale(shards)
        swizzled = naive_swizzle(stored(shards, "weight_scale")).view(torch.uint8)
        return FlashInferWeight(codes, swizzled, scale.expand(codes.shape[0]).contiguous())

    def matmul_blocks(
        self,
        weight: FlashInferWeight,
        x: BlockActivation,
        bias: torch.Tensor | None,
        out_dtype: torch.dtype,
    ) -> torch.Tensor:
        """Multiply; the sum is scaled by ``out_scale`` and the activations' scale before it is rounded."""
        is_mx = x.row_scale is None
        alpha = weight.out_scale[:1] if x.row_scale is None else weight.out_scale[:1] * x.row_scale
        kept = weight.codes, weight.block_scale
        y: torch.Tensor = _mm_fp4(x.codes, x.scale.view(torch.uint8), *kept, alpha, is_mx, out_dtype)
        return add_bias(y, bias)


@torch.library.custom_op("modelopt_ext::flashinfer_mm_fp4", mutates_args=())
def _mm_fp4(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    codes: torch.Tensor,
    block_scale: torch.Tensor,
    alpha: torch.Tensor,
    is_mx: bool,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    from flashinfer import mm_fp4

    if x.shape[0] == 0:
        return x.new_empty((0, codes.shape[0]), dtype=out_dtype)
    return mm_fp4(
        x,
        codes.T,
        x_scale,
        block_scale.T,
        alpha,
        out_dtype,
        block_size=32 if is_mx else 16,
        use_8x4_sf_layout=False,
        backend="cute-dsl" if is_mx else "cutlass",
        use_nvfp4=not is_mx,
    )


@_mm_fp4.register_fake
def _(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    codes: torch.Tensor,
    block_scale: torch.Tensor,
    alpha: torch.Tensor,
    is_mx: bool,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    del x_scale, block_scale, alpha, is_mx
    return x.new_empty((x.shape[0], codes.shape[0]), dtype=out_dtype)


class FlashInferSvdquant(FlashInferFp4):
    """NVFP4 weights and activations with SVDQuant's branch in the same product: ``flashinfer.mm_nvfp4_svdquant``.

    What enters the branch's second factor is rounded to bf16, as it is where ModelOpt simulates a bf16 model.
    """

    name = "flashinfer_svdquant"
    takes_low_rank = True
    multiple = 32
    """Of the rank."""

    def objection(self, request: LinearRequest) -> str | None:
        """Reject all but NVFP4 layers of bf16 models with a rank in 32s, N and K in 32s."""
        scheme = request.scheme
        if not both_sides(scheme, NVFP4):
            return f"multiplies NVFP4 weights by NVFP4 activations only, not {describe_operands(scheme)}"
        if not scheme.low_rank or scheme.low_rank % self.multiple:
            return f"needs a rank in {self.multiple}s, not {scheme.low_rank}"
        if request.n % 32 or request.k % 32:
            return f"needs N and K in 32s, not {request.n} and {request.k}"
        if request.dtype != torch.bfloat16:
            return f"has no {request.dtype} output"
        return flashinfer_objection(request, (100, 103, 120, 121))

    def prepare(self, shards: Sequence[ShardWeight]) -> FlashInferWeight:
        """Return the weight of :meth:`FlashInferFp4.prepare` with ``up``: the shards' second factors on a diagonal."""
        kept = super().prepare(shards)
        factors = [shard.tensors[LORA_B].to(torch.float32) for shard in shards]
        up = torch.block_diag(*factors).to(torch.bfloat16)
        if not torch.equal(up.to(torch.float32), torch.block_diag(*factors)):
            raise ValueError(f"{LORA_B} is not exact in bf16")
        return dataclasses.replace(kept, up=up)

    def matmul_low_rank(
        self,
        weight: FlashInferWeight,
        x: BlockActivation,
        down: torch.Tensor,
        bias: torch.Tensor | None,
        out_dtype: torch.dtype,
    ) -> torch.Tensor:
        """Multiply with the low-rank branch.

        FlashInfer scales the sum as a whole: ``down`` is divided by the scale, in float32, before it is rounded to bf16.
        """
        if x.row_scale is None or weight.up is None:
            raise ValueError("expected NVFP4 activations with an input_scale, and a low-rank branch")
        alpha = weight.out_scale[:1] * x.row_scale
        scaled = (down / alpha).to(torch.bfloat16)
        kept = weight.codes, weight.block_scale
        y: torch.Tensor = _mm_svdquant(x.codes, x.scale.view(torch.uint8), *kept, alpha, scaled, weight.up)
        return add_bias(y, bias).to(out_dtype)


@torch.library.custom_op("modelopt_ext::flashinfer_mm_nvfp4_svdquant", mutates_args=())
def _mm_svdquant(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    codes: torch.Tensor,
    block_scale: torch.Tensor,
    alpha: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
) -> torch.Tensor:
    from flashinfer import mm_nvfp4_svdquant

    if x.shape[0] == 0:
        return down.new_empty((0, codes.shape[0]))
    return mm_nvfp4_svdquant(x, codes, x_scale, block_scale, alpha, down, up, backend="auto")


@_mm_svdquant.register_fake
def _(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    codes: torch.Tensor,
    block_scale: torch.Tensor,
    alpha: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
) -> torch.Tensor:
    del x_scale, block_scale, alpha, up
    return down.new_empty((x.shape[0], codes.shape[0]))


class FlashInferMxfp8(BlockBackend[FlashInferWeight]):
    """MXFP8 weights and activations in block-scaled FP8 matrix instructions: ``flashinfer.mm_mxfp8``, its CUTLASS kernels."""

    name = "flashinfer_mm_mxfp8"
    repeats = False  # not known
    swizzled = True

    def objection(self, request: LinearRequest) -> str | None:
        """Reject all but MXFP8, N and K in 32s and from 128."""
        scheme = request.scheme
        if not both_sides(scheme, MXFP8):
            return f"multiplies MXFP8 weights by MXFP8 activations only, not {describe_operands(scheme)}"
        if request.n % 32 or request.k % 32 or request.n < 128 or request.k < 128:
            return f"needs N and K in 32s and from 128, not {request.n} and {request.k}"
        return flashinfer_objection(request, CAPABILITIES)

    def operand(self, request: LinearRequest) -> torch.dtype:
        """Return E4M3."""
        del request
        return torch.float8_e4m3fn

    def prepare(self, shards: Sequence[ShardWeight]) -> FlashInferWeight:
        """Keep ``codes`` E4M3 ``[N, K]`` as stored, ``block_scale`` uint8 swizzled, and ``out_scale`` of ones."""
        check_type(shards, (MXFP8,))
        check_no_output_scale(shards)
        codes = stored(shards, "weight")
        check_rows(codes.shape[0], 32)
        if codes.shape[0] < 128:
            raise ValueError(f"{codes.shape[0]} rows of shards that share a product are fewer than 128")
        ones = torch.ones(codes.shape[0], dtype=torch.float32, device=codes.device)
        return FlashInferWeight(codes, naive_swizzle(stored(shards, "weight_scale")).flatten(), ones)

    def matmul_blocks(
        self,
        weight: FlashInferWeight,
        x: BlockActivation,
        bias: torch.Tensor | None,
        out_dtype: torch.dtype,
    ) -> torch.Tensor:
        """Multiply; MXFP8 has no scales but those of blocks."""
        x_scale = x.scale.flatten()
        y: torch.Tensor = _mm_mxfp8(x.codes, x_scale, weight.codes, weight.block_scale, out_dtype)
        return add_bias(y, bias)


@torch.library.custom_op("modelopt_ext::flashinfer_mm_mxfp8", mutates_args=())
def _mm_mxfp8(
    x: torch.Tensor, x_scale: torch.Tensor, codes: torch.Tensor, block_scale: torch.Tensor, out_dtype: torch.dtype
) -> torch.Tensor:
    from flashinfer import mm_mxfp8

    if x.shape[0] == 0:
        return x.new_empty((0, codes.shape[0]), dtype=out_dtype)
    return mm_mxfp8(x, codes.T, x_scale, block_scale, out_dtype=out_dtype, use_8x4_sf_layout=False, backend="cutlass")


@_mm_mxfp8.register_fake
def _(
    x: torch.Tensor, x_scale: torch.Tensor, codes: torch.Tensor, block_scale: torch.Tensor, out_dtype: torch.dtype
) -> torch.Tensor:
    del x_scale, block_scale
    return x.new_empty((x.shape[0], codes.shape[0]), dtype=out_dtype)
