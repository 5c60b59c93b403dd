"""MXFP4 weights on Blackwell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from sglang_modelopt_ext.layouts.base import Layout, LinearRequest, ShardWeight, fp8_objection
from sglang_modelopt_kernels.formats import ue8m0
from sglang_modelopt_kernels.gemm.mxfp4 import mxfp4_linear


class BlackwellMxfp4(Layout):
    """MXFP4 weights as stored, in block-scaled matrix instructions: :mod:`sglang_modelopt_kernels.gemm.mxfp4`."""

    name = "triton_mxfp4_tcgen05"

    def objection(self, request: LinearRequest) -> str | None:
        """MXFP4 weights with FP8 activations on SM100 and SM103."""
        scheme = request.scheme
        if request.device != "cuda" or not 100 <= (request.capability or 0) < 110:
            return "is for SM100 and SM103"
        if scheme.weight.name != "mxfp4":
            return f"{scheme.weight.name} weights have no UE8M0 block scales"
        return fp8_objection(request)

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
