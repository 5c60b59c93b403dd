"""KV caches: how the keys or values of one attention layer are rounded, packed and read back.

A *format* (:class:`KVFormat`) is the number format of the stored vectors; a *recipe* (:class:`KVRecipe`) is a format and
what is done to a vector around it: a static bias taken off, or a rotation of the keys. Vectors run along head_dim, ``D``.

Sources: ``KV_CACHE_*`` and ``postprocess_state_dict`` in ``torch/export`` of ModelOpt 0.47, the presets
``FP8_KV_CFG``, ``FP8_AFFINE_KV_CFG``, ``NVFP4_KV_CFG``, ``NVFP4_AFFINE_KV_CFG`` and ``NVFP4_KV_ROTATE_CFG``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache

import torch

from sglang_modelopt_kernels.formats.fp4_packing.packing import pack_e2m1, unpack_e2m1

from . import e2m1, e4m3
from .checks import scale_blocks
from .fp8 import FP8StaticPerTensor
from .nvfp4 import FULL_RANGE, NVFP4DynamicBlock


class KVFormat(ABC):
    """The number format of cached vectors under one static scale."""

    name: str
    block: int
    """Entries under one block scale; 0 when there are none."""
    range: float
    """The largest stored value: the static scale is amax / range."""
    vector_multiple: int
    """A number that must divide head_dim."""

    code_dtype: torch.dtype
    """Of the stored codes."""

    @abstractmethod
    def code_width(self, head_dim: int) -> int:
        """Return the number of stored entries of :attr:`code_dtype` for the codes of one vector."""

    def scale_bytes(self, head_dim: int) -> int:
        """Return the bytes of the block scales of one vector."""
        return head_dim // self.block if self.block else 0

    @abstractmethod
    def encode(self, x: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Round vectors.

        Args:
            x: float32 ``[..., D]``.
            scale: the static scale, float32 ``[]`` or ``[1]``.

        Returns:
            Codes ``[..., code_width(D)]`` and uint8 block scales ``[..., D / block]``, None without blocks.
        """

    @abstractmethod
    def decode(self, codes: torch.Tensor, block_scales: torch.Tensor | None, scale: torch.Tensor) -> torch.Tensor:
        """Return the vectors that :meth:`encode` stored, float32 ``[..., D]``."""


class FP8KV(KVFormat):
    """E4M3, one byte to an entry: ``e4m3(x / scale)``, saturating."""

    name = "fp8"
    block = 0
    range = e4m3.MAX
    vector_multiple = 1
    code_dtype = torch.uint8

    def code_width(self, head_dim: int) -> int:
        """Return the number of bytes of one vector, one for each entry."""
        return head_dim

    def encode(self, x: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See :meth:`KVFormat.encode`."""
        values, _ = FP8StaticPerTensor().quantize(x.reshape(-1, x.shape[-1]), scale)
        return e4m3.to_e4m3(values).view(torch.uint8).view(x.shape), None

    def decode(self, codes: torch.Tensor, block_scales: torch.Tensor | None, scale: torch.Tensor) -> torch.Tensor:
        """See :meth:`KVFormat.decode`."""
        del block_scales
        return e4m3.decode(codes) * scale


class NVFP4KV(KVFormat):
    """E2M1 under dynamic E4M3 scales of 16 entries and the static scale, packed in planes as the kernels read it.

    The layout (:mod:`sglang_modelopt_kernels.formats.fp4_packing.packing`) is the cache's own affair: no checkpoint holds one.
    """

    name = "nvfp4"
    block = 16
    range = FULL_RANGE
    vector_multiple = 16
    code_dtype = torch.int16

    def code_width(self, head_dim: int) -> int:
        """Return the number of 16-bit elements of one vector, one for four entries."""
        return head_dim // 4

    def encode(self, x: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See :meth:`KVFormat.encode`."""
        codes, block_scales = NVFP4DynamicBlock().encode(x.reshape(-1, x.shape[-1]), scale.reshape(()))
        packed = pack_e2m1(codes).view(*x.shape[:-1], -1)
        stored = block_scales.view(torch.uint8)
        # Of E4M3's two NaN the one whose bits are NaN in float16 as well, where the kernels put them.
        stored = torch.where(e4m3.byte_is_nan(stored), 0xFF, stored)
        return packed, stored.view(*x.shape[:-1], -1)

    def decode(self, codes: torch.Tensor, block_scales: torch.Tensor | None, scale: torch.Tensor) -> torch.Tensor:
        """See :meth:`KVFormat.decode`. Raises ValueError without block scales."""
        if block_scales is None:
            raise ValueError("an NVFP4 cache has block scales")
        return scale_blocks(e2m1.decode(unpack_e2m1(codes)), e4m3.decode(block_scales)) * scale


KV_FORMATS: dict[str, KVFormat] = {kv_format.name: kv_format for kv_format in (FP8KV(), NVFP4KV())}


@dataclass(frozen=True)
class KVRecipe:
    """How keys and values are cached.

    Attributes:
        name: as in ``--kv-cache-dtype modelopt_<name>``.
        format: of keys and values alike.
        affine: a static bias for each KV head and channel comes off before rounding and back on after reading.
        rotate: keys are rotated by the normalised Hadamard transform along head_dim, after their position embedding.
    """

    name: str
    format: KVFormat
    affine: bool = False
    rotate: bool = False

    def bytes_per_vector(self, head_dim: int) -> int:
        """Return the bytes of one key or value vector of one head."""
        number = self.format
        return number.code_width(head_dim) * number.code_dtype.itemsize + number.scale_bytes(head_dim)


KV_RECIPES: dict[str, KVRecipe] = {
    recipe.name: recipe
    for recipe in (
        KVRecipe("fp8", KV_FORMATS["fp8"]),
        KVRecipe("fp8_affine", KV_FORMATS["fp8"], affine=True),
        KVRecipe("nvfp4", KV_FORMATS["nvfp4"]),
        KVRecipe("nvfp4_affine", KV_FORMATS["nvfp4"], affine=True),
        KVRecipe("nvfp4_rotate", KV_FORMATS["nvfp4"], rotate=True),
    )
}
"""By name; a further recipe is one row."""


def hadamard_block(head_dim: int) -> int:
    """Return the size of the blocks the Hadamard transform works on: the largest power of two that divides head_dim."""
    return head_dim & -head_dim


@cache
def hadamard_matrix(size: int, device: torch.device) -> torch.Tensor:
    """Return Sylvester's Hadamard matrix over sqrt(size), float32 ``[size, size]``: symmetric and its own inverse."""
    with torch.inference_mode(False):
        matrix = torch.ones(1, 1, dtype=torch.float32, device=device)
        while matrix.shape[0] < size:
            matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
        return matrix * size**-0.5


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Return the normalised Hadamard transform of float32 ``[..., D]`` along D, in blocks of :func:`hadamard_block`.

    Source: ``normalized_hadamard_transform`` in ``torch/quantization/nn/functional.py`` of ModelOpt 0.47.
    """
    size = hadamard_block(x.shape[-1])
    return (torch.unflatten(x, -1, (-1, size)) @ hadamard_matrix(size, x.device)).flatten(-2)
