"""MXFP4 weights in FP8 matrix instructions before Blackwell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from sglang_modelopt_ext.backends.base import Backend, LinearRequest, ShardWeight, fp8_objection
from sglang_modelopt_ext.backends.tokens import covering
from sglang_modelopt_kernels.gemm.mxfp4_fp8_hopper import FoldedWeight, fold, folded_linear, path_of


class FoldedMxfp4(Backend):
    """MXFP4 weights made E4M3 numbers in registers: :mod:`sglang_modelopt_kernels.gemm.mxfp4_fp8_hopper`."""

    name = "triton_mxfp4_folded"
    kernels = ("finish_kernel", "folded_kernel", "unfold_kernel")

    def objection(self, request: LinearRequest) -> str | None:
        """MXFP4 weights with FP8 activations on SM89 and SM90."""
        if request.device != "cuda" or request.capability not in (89, 90):
            return "is for SM89 and SM90"
        if request.scheme.weight.name != "mxfp4":
            return f"{request.scheme.weight.name} weights have no UE8M0 block scales"
        return fp8_objection(request)

    def operand(self, request: LinearRequest) -> torch.dtype:
        """E4M3."""
        del request
        return torch.float8_e4m3fn

    def prepare(self, shards: Sequence[ShardWeight]) -> dict[str, torch.Tensor]:
        """``codes`` uint8 ``[N, K / 2]``, ``exponent`` uint8 ``[N, K / 32]`` and ``out_scale`` float32 ``[N]``."""
        parts = [fold(shard.tensors["weight"], shard.tensors["weight_scale"]) for shard in shards]
        return {
            "codes": torch.cat([part.codes for part in parts]),
            "exponent": torch.cat([part.exponent for part in parts]),
            "out_scale": torch.cat([part.out_scale for part in parts]),
        }

    def matmul(
        self,
        prepared: Mapping[str, torch.Tensor],
        values: torch.Tensor,
        row_scale: torch.Tensor | None,
        bias: torch.Tensor | None,
        out_dtype: torch.dtype,
    ) -> torch.Tensor:
        """See :func:`folded_linear`."""
        weight = FoldedWeight(prepared["codes"], prepared["exponent"], prepared["out_scale"])
        y: torch.Tensor = folded_linear(values, weight, row_scale, bias, out_dtype)
        return y

    def check_tokens(self, prepared: Mapping[str, torch.Tensor], request: LinearRequest) -> tuple[int, ...]:
        """Return numbers of tokens for every launch and configuration of :func:`folded_linear`."""
        del request
        weight = FoldedWeight(prepared["codes"], prepared["exponent"], prepared["out_scale"])
        return covering(lambda m: path_of(weight, m, weight.codes.device))
