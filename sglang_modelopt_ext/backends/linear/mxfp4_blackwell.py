"""MXFP4 weights on Blackwell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from sglang_modelopt_ext.backends.base import Backend, LinearRequest, ShardWeight, fp8_objection
from sglang_modelopt_ext.backends.tokens import covering
from sglang_modelopt_kernels.formats import ue8m0
from sglang_modelopt_kernels.gemm.mxfp4_fp8_blackwell import mxfp4_linear, pair_blocks, path_of
from sglang_modelopt_kernels.quantize.blocks import naive_swizzle


class Mxfp4(Backend):
    """MXFP4 weights with FP8 activations in block-scaled instructions: :mod:`sglang_modelopt_kernels.gemm.mxfp4_fp8_blackwell`."""

    architectures: tuple[str, ...]
    """The GPUs it is for."""
    paired: bool
    """Whether it keeps the codes as :func:`pair_blocks` has them."""

    def objection(self, request: LinearRequest) -> str | None:
        """MXFP4 weights with FP8 activations on its architectures, under pairs of blocks where it pairs them."""
        scheme, capability = request.scheme, request.capability or 0
        if request.device != "cuda" or f"SM{capability}" not in self.architectures:
            return f"is for {' and '.join(self.architectures)}"
        if scheme.weight.name != "mxfp4":
            return f"{scheme.weight.name} weights have no UE8M0 block scales"
        if self.paired and request.k % 64:
            return f"needs K in 64s, not {request.k}"
        return fp8_objection(request)

    def operand(self, request: LinearRequest) -> torch.dtype:
        """E4M3."""
        del request
        return torch.float8_e4m3fn

    def prepare(self, shards: Sequence[ShardWeight]) -> dict[str, torch.Tensor]:
        """``codes`` uint8 ``[N, K / 2]``, ``block_scale`` uint8 ``[N, K / 32]`` and ``out_scale`` float32 ``[N]``, which is 1.

        The scales are in tiles, :func:`naive_swizzle`, where the codes are not in pairs.
        """
        stored = [shard.tensors["weight"] for shard in shards]
        codes = torch.cat([pair_blocks(part) for part in stored] if self.paired else stored)
        scale = torch.cat([shard.tensors["weight_scale"] for shard in shards])
        if bool(ue8m0.byte_is_nan(scale).any()):
            raise ValueError("a UE8M0 block scale is NaN")
        ones = torch.ones(codes.shape[0], dtype=torch.float32, device=codes.device)
        kept = scale if self.paired else naive_swizzle(scale)
        return {"codes": codes, "block_scale": kept, "out_scale": ones}

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
        y: torch.Tensor = mxfp4_linear(values, *weight, row_scale, bias, out_dtype, self.paired)
        return y

    def check_tokens(self, prepared: Mapping[str, torch.Tensor], request: LinearRequest) -> tuple[int, ...]:
        """Return numbers of tokens for every launch and configuration of :func:`mxfp4_linear`."""
        del request
        (n, half), device = prepared["codes"].shape, prepared["codes"].device
        return covering(lambda m: path_of(self.paired, m, n, 2 * half, device))


class BlackwellMxfp4(Mxfp4):
    """The codes as stored."""

    name = "triton_mxfp4_tcgen05"
    kernels = ("finish_kernel", "tcgen05_kernel")
    architectures = ("SM100", "SM103")
    paired = False


class WidenedMxfp4(Mxfp4):
    """The codes widened to E4M3 in registers, where no instruction mixes the two."""

    name = "triton_mxfp4_mma"
    kernels = ("finish_kernel", "mxfp4_widened_kernel")
    architectures = ("SM120", "SM121")
    paired = True
