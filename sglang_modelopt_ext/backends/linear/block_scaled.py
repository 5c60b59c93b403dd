"""4-bit weights that stay 4-bit."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sglang_modelopt_ext.backends.base import (
    Backend,
    LinearRequest,
    ShardWeight,
    exact_float,
    is_fp8,
    merge_blocks,
    type_objection,
)
from sglang_modelopt_ext.backends.tokens import covering
from sglang_modelopt_kernels.formats.fp8 import FP8
from sglang_modelopt_kernels.formats.mxfp4 import MXFP4
from sglang_modelopt_kernels.formats.nvfp4 import NVFP4
from sglang_modelopt_kernels.gemm.w4_decode import PackedWeight, block_scaled_linear, block_scaled_rows, pack, path_of
from sglang_modelopt_kernels.gemm.w4_decode.packing import KIND_OF

ACTIVATIONS = (FP8, NVFP4, MXFP4)
"""The number types of activations whose products with decoded weights were tested."""


class BlockScaled(Backend[PackedWeight]):
    """4-bit weights decoded in registers: :mod:`sglang_modelopt_kernels.gemm.w4_decode`."""

    name = "triton_block_scaled"
    kernels = ("block_scaled_kernel", "decode_kernel", "finish_kernel", "group_scaled_kernel", "order_kernel")
    takes_vocabulary = True

    def objection(self, request: LinearRequest) -> str | None:
        """Reject all but 4-bit formats on GPUs from SM80, with activations that float16 or bf16 holds exactly."""
        scheme, activation = request.scheme, request.scheme.activation
        if not request.target.at_least(80):
            return "is for GPUs from SM80"
        if scheme.weight.number_type.bits != 4:
            return f"{scheme.weight.name} weights have no 4-bit blocks"
        if (reason := type_objection(scheme, KIND_OF)) is not None:
            return reason
        if request.math != "exact":
            return f"does not round weights as math {request.math} does"
        if activation is None and request.dtype not in (torch.float16, torch.bfloat16):
            return f"does not take unrounded activations in {request.dtype}"
        if activation is not None and activation.number_type not in ACTIVATIONS:
            return f"does not take {activation} activations"
        if request.k % 16:
            return f"needs K in 16s, not {request.k}"
        return None

    def operand(self, request: LinearRequest) -> torch.dtype:
        """Return the type of the activations: E4M3 where the GPU has it, float16 for NVFP4, bf16 for MXFP4, or the model's."""
        activation = request.scheme.activation
        if activation is None:
            return request.dtype
        if is_fp8(activation) and request.target.at_least(89):
            return torch.float8_e4m3fn
        return exact_float(activation)

    def prepare(self, shards: Sequence[ShardWeight]) -> PackedWeight:
        """Pack the shards' codes in planes; see :func:`pack`."""
        return pack(merge_blocks(shards))

    def matmul(
        self,
        weight: PackedWeight,
        values: torch.Tensor,
        row_scale: torch.Tensor | None,
        bias: torch.Tensor | None,
        out_dtype: torch.dtype,
    ) -> torch.Tensor:
        """See :func:`block_scaled_linear`."""
        y: torch.Tensor = block_scaled_linear(values, weight, row_scale, bias, out_dtype)
        return y

    def check_tokens(self, weight: PackedWeight, request: LinearRequest) -> tuple[int, ...]:
        """Return numbers of tokens for every launch and configuration of :func:`block_scaled_linear`."""
        operand, device = self.operand(request), weight.codes.device
        return covering(lambda m: path_of(weight, m, operand, request.dtype, device))

    def rows(self, weight: PackedWeight, indices: torch.Tensor) -> torch.Tensor:
        """See :func:`block_scaled_rows`."""
        return block_scaled_rows(weight, indices)
