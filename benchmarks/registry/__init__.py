"""Registry of the kernels: one row for each kernel folder, which every benchmark iterates over.

A new kernel is a folder with its ``kernel.py`` and ``naive.py``, and a :class:`~benchmarks.registry.base.Kernel` here:
``benchmarks.aot`` then compiles it, ``benchmarks.stress`` launches it under load, ``benchmarks.gemm``, ``benchmarks.moe`` and
``benchmarks.attention`` time it, and ``benchmarks.tiles`` searches its tiles. ``tests/kernels/test_registry.py`` fails for a folder
without a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

from benchmarks.registry.attention import DECODE, EXTEND, STORE, VECTORS
from benchmarks.registry.base import ARCHITECTURES, Case, Kernel, StressCase, Tiled
from benchmarks.registry.blackwell import FP4_BLACKWELL, MXFP4_FP8_BLACKWELL, TCGEN05
from benchmarks.registry.common import FINISH, FP8, ORDER, PLANES
from benchmarks.registry.experts import GROUPED, GROUPED_DENSE, STREAMED_EXPERTS
from benchmarks.registry.moe import ACTIVATION, COMBINE, ROUTE
from benchmarks.registry.mxfp4_fp8_hopper import MXFP4_FP8_HOPPER
from benchmarks.registry.quantize import (
    QUANTIZE_BLOCKS,
    QUANTIZE_FP8,
    QUANTIZE_INT8,
    RMS_NORM_FP8,
    ROUNDING,
    SWIGLU_FP8,
)
from benchmarks.registry.w4_decode import GROUP_SCALED, W4_DECODE
from benchmarks.registry.w4_stream import W4_STREAM
from benchmarks.registry.w8_decode import W8_DECODE

__all__ = ["ARCHITECTURES", "KERNELS", "compile_cases", "measured", "stress_cases", "tile_candidates"]

KERNELS: tuple[Kernel, ...] = (
    W4_DECODE,
    MXFP4_FP8_HOPPER,
    W4_STREAM,
    W8_DECODE,
    GROUP_SCALED,
    FP8,
    MXFP4_FP8_BLACKWELL,
    FP4_BLACKWELL,
    TCGEN05,
    GROUPED,
    GROUPED_DENSE,
    STREAMED_EXPERTS,
    ROUTE,
    ACTIVATION,
    COMBINE,
    DECODE,
    EXTEND,
    STORE,
    QUANTIZE_FP8,
    RMS_NORM_FP8,
    SWIGLU_FP8,
    QUANTIZE_BLOCKS,
    QUANTIZE_INT8,
    FINISH,
    ORDER,
    PLANES,
    ROUNDING,
    VECTORS,
)
Format = TypeVar("Format")


def compile_cases(arch: int) -> list[Case]:
    """Return every compilation for compute capability ``arch`` (times ten)."""
    return [case for kernel in KERNELS if arch in kernel.architectures for case in kernel.compile(arch)]


def stress_cases(capability: int) -> Iterator[StressCase]:
    """Yield every launch on compute capability ``capability`` (times ten)."""
    for kernel in KERNELS:
        yield from kernel.stress(capability)


def measured(kind: type[Format]) -> dict[str, Format]:
    """Return the formats of one type that the kernels are timed with, by name."""
    return {
        name: format_ for kernel in KERNELS for name, format_ in kernel.measured.items() if isinstance(format_, kind)
    }


def tile_candidates() -> dict[str, Tiled]:
    """Return the kernels whose tiles are searched, by name."""
    return {name: tiled for kernel in KERNELS for name, tiled in kernel.tiles.items()}
