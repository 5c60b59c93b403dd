"""4-bit weights that stay 4-bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from sglang_modelopt_ext.backends.base import FP8_ACTIVATIONS, Backend, LinearRequest, ShardWeight, merge_blocks
from sglang_modelopt_ext.backends.tokens import covering
from sglang_modelopt_kernels.gemm.w4_decode import (
    block_scaled_linear,
    block_scaled_rows,
    from_tensors,
    pack,
    path_of,
    to_tensors,
)


class BlockScaled(Backend):
    """4-bit codes decoded in registers: :mod:`sglang_modelopt_kernels.gemm.w4_decode`."""

    name = "triton_block_scaled"
    kernels = ("block_scaled_kernel", "decode_kernel", "finish_kernel", "group_scaled_kernel")
    takes_vocabulary = True

    def objection(self, request: LinearRequest) -> str | None:
        """4-bit formats on GPUs from SM80, with activations that float16 or bf16 holds exactly."""
        scheme, activation = request.scheme, request.scheme.activation
        if request.device != "cuda" or (request.capability or 0) < 80:
            return "is for GPUs from SM80"
        if not scheme.weight.has_blocks:
            return f"{scheme.weight.name} weights have no 4-bit blocks"
        if request.math != "exact":
            return f"does not round weights as math {request.math} does"
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

    def check_tokens(self, prepared: Mapping[str, torch.Tensor], request: LinearRequest) -> tuple[int, ...]:
        """Return numbers of tokens for every launch and configuration of :func:`block_scaled_linear`."""
        weight, operand, device = from_tensors(prepared), self.operand(request), prepared["codes"].device
        return covering(lambda m: path_of(weight, m, operand, request.dtype, device))

    def rows(self, prepared: Mapping[str, torch.Tensor], indices: torch.Tensor) -> torch.Tensor:
        """See :func:`block_scaled_rows`."""
        return block_scaled_rows(from_tensors(prepared), indices)
