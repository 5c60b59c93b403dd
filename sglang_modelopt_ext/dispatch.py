"""Which kernel serves a linear layer.

One step at load: a request (scheme, device, sizes) is offered to every layout in order; the first that has no objection gets
the layer, and when none is left the error carries every objection. A layer holds exactly one prepared copy of its weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.schemes.base import LayerScheme
from sglang_modelopt_kernels.formats.base import DecodedWeight
from sglang_modelopt_kernels.gemm.dense import dense_linear, prepare_dense


@dataclass(frozen=True)
class LinearRequest:
    """What a layout may base its answer on.

    Attributes:
        scheme: how the layer is quantized.
        device: ``cpu`` or ``cuda``.
        capability: the GPU's compute capability times ten (90 for 9.0), None on a CPU.
        n, k: output and input features of this rank's part.
    """

    scheme: LayerScheme
    device: str
    capability: int | None
    n: int
    k: int


class Layout(ABC):
    """A way to keep a weight, and the product that reads it."""

    name: str

    @abstractmethod
    def supports(self, request: LinearRequest) -> str | None:
        """None, or the reason why not."""

    @abstractmethod
    def prepare(self, weight: DecodedWeight) -> dict[str, torch.Tensor]:
        """The tensors kept for ``weight``, by name."""

    @abstractmethod
    def matmul(
        self,
        prepared: dict[str, torch.Tensor],
        values: torch.Tensor,
        row_scale: torch.Tensor | None,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """The layer's output, float32 ``[M, N]``, for rounded activations; see :func:`dense_linear`."""

    @abstractmethod
    def rows(self, prepared: dict[str, torch.Tensor], indices: torch.Tensor) -> torch.Tensor:
        """Rows of the decoded weight, float32 ``[..., K]``, for indices ``[...]``: a quantized embedding."""


class Dense(Layout):
    """The reference path of :mod:`sglang_modelopt_kernels.gemm.dense`."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self.device = device
        self.dtype = dtype
        self.name = f"dense_{str(dtype).removeprefix('torch.')}"

    def supports(self, request: LinearRequest) -> str | None:
        """Any layer on its device; in bf16 only formats and activations whose products are exact there."""
        if request.device != self.device:
            return f"is for {self.device}"
        if self.dtype == torch.bfloat16:
            if not request.scheme.weight.exact_in_bf16:
                return f"{request.scheme.weight.name} weights are not exact in bf16"
            if request.scheme.activation is None:
                return "unrounded activations are not exact in bf16"
        return None

    def prepare(self, weight: DecodedWeight) -> dict[str, torch.Tensor]:
        """``unit`` ``[N, K]`` and ``out_scale`` ``[N]``."""
        unit, out_scale = prepare_dense(weight, self.dtype)
        return {"unit": unit, "out_scale": out_scale}

    def matmul(
        self,
        prepared: dict[str, torch.Tensor],
        values: torch.Tensor,
        row_scale: torch.Tensor | None,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """See :func:`dense_linear`."""
        y: torch.Tensor = dense_linear(values, row_scale, prepared["unit"], prepared["out_scale"], bias)
        return y

    def rows(self, prepared: dict[str, torch.Tensor], indices: torch.Tensor) -> torch.Tensor:
        """``unit[indices] * out_scale[indices]``."""
        return prepared["unit"][indices].to(torch.float32) * prepared["out_scale"][indices].unsqueeze(-1)


LAYOUTS: tuple[Layout, ...] = (
    Dense("cuda", torch.bfloat16),
    Dense("cuda", torch.float32),
    Dense("cpu", torch.float32),
)


def choose_layout(request: LinearRequest, subject: str) -> Layout:
    """The first layout that takes ``request``. Raises ModelOptExtError with every reason when none does."""
    reasons = []
    for layout in LAYOUTS:
        reason = layout.supports(request)
        if reason is None:
            return layout
        reasons.append(f"{layout.name} {reason}")
    raise ModelOptExtError.at(subject, request.scheme.algo, "a kernel that serves it", "; ".join(reasons))
