"""Epilogue of a product: its scales and bias as kernel arguments, and the sum of split-K partials."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import triton

from .kernel import finish_kernel

_FINISH_BLOCK = 1024


def check_epilogue(m: int, n: int, row_scale: torch.Tensor | None, bias: torch.Tensor | None) -> None:
    """Raise ValueError unless ``row_scale`` is one or ``m`` fp32 values and ``bias`` has ``n``, where they are given."""
    if row_scale is not None and (row_scale.dtype != torch.float32 or row_scale.numel() not in (1, m)):
        raise ValueError(f"row_scale must be 1 or {m} float32, got {row_scale.numel()} {row_scale.dtype}")
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"bias must be [{n}], got {tuple(bias.shape)}")


@dataclass(frozen=True)
class Epilogue:
    """Scales and bias after the sum: ``y = sum * descale * row_scale * out_scale + bias``.

    Attributes:
        out_scale: float32 ``[N]``.
        row_scale: float32, one value or ``[M, 1]``; None for 1.
        bias: ``[N]`` of any float type, or None.
        descale: a constant of the kernel's numerics, multiplied into ``out_scale``.
    """

    out_scale: torch.Tensor
    row_scale: torch.Tensor | None
    bias: torch.Tensor | None
    descale: float = 1.0

    def arguments(self) -> dict[str, Any]:
        """Return the kernel arguments by name. A pointer stands for an absent tensor; the kernel never reads through it."""
        return {
            "row_scale_ptr": self.out_scale if self.row_scale is None else self.row_scale.contiguous(),
            "out_scale_ptr": self.out_scale,
            "bias_ptr": self.out_scale if self.bias is None else self.bias.contiguous(),
            "row_step": int(self.row_scale is not None and self.row_scale.numel() > 1),
            "DESCALE": self.descale,
            "HAS_ROW_SCALE": self.row_scale is not None,
            "HAS_BIAS": self.bias is not None,
        }

    def part(self, rows: slice) -> Epilogue:
        """Return the epilogue of some output features."""
        bias = None if self.bias is None else self.bias[rows]
        return dataclasses.replace(self, out_scale=self.out_scale[rows], bias=bias)

    def finish(self, partials: torch.Tensor, y: torch.Tensor) -> None:
        """Sum fp32 or int32 partials ``[splits, M, N]`` in a fixed order into ``y`` ``[M, N]``, whose rows may be strided."""
        splits, m, n = partials.shape
        finish_kernel[(m, triton.cdiv(n, _FINISH_BLOCK))](
            partials,
            y_ptr=y,
            m=m,
            n=n,
            y_stride=y.stride(0),
            SPLITS=splits,
            BN=_FINISH_BLOCK,
            **self.arguments(),
        )

    def multiply_in_parts(
        self,
        values: torch.Tensor,
        decode: Callable[[slice], torch.Tensor],
        parts: Iterable[slice],
        out_dtype: torch.dtype,
    ) -> torch.Tensor:
        """Multiply by a weight that is decoded some rows at a time, by cuBLAS with fp32 output; ``[M, N]`` of ``out_dtype``.

        Args:
            values: ``[M, K]`` of a 16-bit type.
            decode: returns some rows of the weight, ``[rows, K]`` of that type.
            parts: the rows of each time.
            out_dtype: type of the result.
        """
        y = torch.empty((values.shape[0], self.out_scale.shape[0]), dtype=out_dtype, device=values.device)
        for part in parts:
            product = torch.mm(values, decode(part).T, out_dtype=torch.float32)
            self.part(part).finish(product.unsqueeze(0), y[:, part])
        return y
