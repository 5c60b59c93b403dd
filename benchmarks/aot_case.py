"""What a compilation without a GPU is told (:mod:`benchmarks.aot`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sglang_modelopt_kernels.gemm.w4_decode.packing import Kind

KINDS: tuple[tuple[Kind, int], ...] = (
    ("e2m1_e4m3", 16),
    ("e2m1_e4m3", 32),
    ("e2m1_exponent", 32),
    ("int4_float", 128),
)
"""Kinds of packed 4-bit weights and their inputs to a block scale."""


@dataclass(frozen=True)
class Case:
    """One compilation.

    Attributes:
        name: kernel and configuration.
        kernel: the Triton function.
        types: Triton's type of every argument that is not a constexpr; pointers, and the integers in ``aligned``, are
            multiples of 16.
        constexprs: the others.
        options: ``num_warps`` and ``num_stages``.
        matrix: what the PTX of its matrix instruction must contain; "any" for the architecture's own, "small" for that or
            ``mma.sync``, where a tile has few columns; empty for none.
        weights: weights one iteration of the main loop reads, 0 where there is no loop over weights.
        copies: what else the PTX must contain: bulk tensor loads, the copy of scales to tensor memory.
        fragments: whether inline assembly makes a matrix instruction's operand, which must then be in registers.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constexprs: dict[str, Any]
    options: dict[str, int]
    aligned: tuple[str, ...] = ()
    matrix: str = ""
    weights: int = 0
    fragments: bool = False
    copies: tuple[str, ...] = ()
