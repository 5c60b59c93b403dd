"""The reference path, on every device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sglang_modelopt_ext.backends.base import Backend, LinearRequest, ShardWeight, merge_decoded
from sglang_modelopt_kernels.gemm.reference import dense_linear, prepare_dense


@dataclass(frozen=True)
class DenseWeight:
    """A decoded weight: ``W = unit * out_scale``.

    Attributes:
        unit: ``[N, K]`` of a float dtype.
        out_scale: fp32 ``[N]``.
    """

    unit: torch.Tensor
    out_scale: torch.Tensor


class Dense(Backend[DenseWeight]):
    """The reference path, weights decoded once at load: :mod:`sglang_modelopt_kernels.gemm.reference`."""

    takes_vocabulary = True

    def __init__(self, dtype: torch.dtype, devices: tuple[str, ...]) -> None:
        self.dtype = dtype
        self.devices = devices
        self.name = f"dense_{str(dtype).removeprefix('torch.')}"

    def objection(self, request: LinearRequest) -> str | None:
        """Reject other devices, and in bf16 formats and activations whose products are not (nearly always) exact there."""
        if request.target.kind not in self.devices:
            return f"is for {' and '.join(self.devices)}"
        if self.dtype == torch.bfloat16:
            weight = request.scheme.weight
            if not (weight.exact_in_bf16 or weight.often_exact_in_bf16):
                return f"{weight.name} weights are not exact in bf16"
            if request.scheme.activation is None and request.dtype != torch.bfloat16:
                return f"unrounded activations in {request.dtype} are not exact in bf16"
        return None

    def operand(self, request: LinearRequest) -> torch.dtype:
        """Return the type of the decoded weight."""
        del request
        return self.dtype

    def prepare(self, shards: Sequence[ShardWeight]) -> DenseWeight:
        """Decode the shards to the backend's type. Raises ValueError where that does not hold them exactly."""
        return DenseWeight(*prepare_dense(merge_decoded(shards), self.dtype))

    def matmul(
        self,
        weight: DenseWeight,
        values: torch.Tensor,
        row_scale: torch.Tensor | None,
        bias: torch.Tensor | None,
        out_dtype: torch.dtype,
    ) -> torch.Tensor:
        """See :func:`dense_linear`."""
        y: torch.Tensor = dense_linear(values, row_scale, weight.unit, weight.out_scale, bias)
        return y.to(out_dtype)

    def rows(self, weight: DenseWeight, indices: torch.Tensor) -> torch.Tensor:
        """Return ``unit[indices] * out_scale[indices]``."""
        return weight.unit[indices].to(torch.float32) * weight.out_scale[indices].unsqueeze(-1)
