"""Packed keys or values of one layer, which kernels read, and their encoding and decoding in plain PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from sglang_modelopt_kernels.formats.kv_cache import KVFormat, rotate


@dataclass(frozen=True)
class PackedCache:
    """Keys (or values) of one layer for every slot of a pool: ``x ~ R(decode(codes) + bias)``.

    R is the rotation, its own inverse, or nothing. No recipe has both a bias and a rotation.

    Attributes:
        format: the number format.
        codes: ``format.code_dtype`` ``[slots, H, format.code_width(D)]``.
        block_scales: uint8 ``[slots, H, 2, D / 16]``, E4M3 bytes, in one tensor for keys (index 0) and values (1); None for a
            format without blocks. Adjacent, because both are read for the same tokens, and memory is read 32 bytes at a time.
        side: 0 of keys, 1 of values.
        scale: the static scale, float32 ``[1]``, on the device of the codes.
        bias: float32 ``[H, D]`` or None.
        rotated: whether the stored vectors are rotated.
        head_dim: D.
        dtype: dtype that :meth:`__getitem__` returns.
    """

    format: KVFormat
    codes: torch.Tensor
    block_scales: torch.Tensor | None
    side: int
    scale: torch.Tensor
    bias: torch.Tensor | None
    rotated: bool
    head_dim: int
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        """Shape of the unpacked cache, ``[slots, H, D]``."""
        return torch.Size((*self.codes.shape[:2], self.head_dim))

    def store(self, slots: torch.Tensor, x: torch.Tensor) -> None:
        """Round vectors ``[T, H, D]`` of any float dtype in fp32 and write them to ``slots`` ``[T]``."""
        x_fp32 = x.to(torch.float32)
        if self.rotated:
            x_fp32 = rotate(x_fp32)
        if self.bias is not None:
            x_fp32 = x_fp32 - self.bias
        codes, block_scales = self.format.encode(x_fp32, self.scale)
        self.codes[slots] = codes
        if self.block_scales is not None and block_scales is not None:
            self.block_scales[slots, :, self.side] = block_scales

    def __getitem__(self, slots: Any) -> torch.Tensor:
        """Decode the vectors of some slots, ``[..., H, D]``."""
        block_scales = None if self.block_scales is None else self.block_scales[slots][..., self.side, :]
        x_fp32 = self.format.decode(self.codes[slots], block_scales, self.scale)
        if self.bias is not None:
            x_fp32 = x_fp32 + self.bias
        return (rotate(x_fp32) if self.rotated else x_fp32).to(self.dtype)
