"""Types of the kernel registry: the row of a kernel, and its compile cases, launches, products and tile candidates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sglang_modelopt_kernels.gemm.common import KernelConfig

ARCHITECTURES = (80, 89, 90, 100, 103, 120)
"""Compute capabilities, times ten, that kernels are compiled for."""
TOLERANCE = 2.0**-8
"""Relative error of an output row: twice the largest rounding error of a bf16 result. The sums err far less, a race by more."""


@dataclass(frozen=True)
class Case:
    """One compilation (:mod:`benchmarks.aot`).

    Attributes:
        name: kernel and configuration.
        kernel: the Triton function.
        types: Triton's type of every argument that is not a constexpr. Pointers are multiples of 16 bytes.
        constexprs: values of the constexpr arguments.
        options: ``num_warps`` and ``num_stages``.
        aligned: integer arguments that are multiples of 16.
        matrix: text that the PTX of the matrix instruction must contain; "any" for the architecture's own instruction, "small" for
            that or ``mma.sync``, where a tile has few columns; empty for no matrix instruction.
        weights: weights that one iteration of the main loop reads; 0 where no loop reads weights.
        fragments: whether inline assembly makes a matrix instruction's operand, which must then be in registers.
        copies: other text that the PTX must contain: bulk tensor loads, copies of scales to tensor memory.
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


@dataclass(frozen=True)
class Launch:
    """A kernel with its operands on the GPU.

    Attributes:
        call: launches the kernel on the same operands every time and returns its output ``[rows, columns]``.
        expected: the result in float64; None where only repetition is checked, and a test compares with the naive twin.
        tolerance: the largest error of a row, relative to the row's norm.
    """

    call: Callable[[], torch.Tensor]
    expected: torch.Tensor | None
    tolerance: float = TOLERANCE


@dataclass(frozen=True)
class StressCase:
    """A kernel in one configuration (:mod:`benchmarks.stress`); ``build`` puts its operands on the current GPU."""

    name: str
    build: Callable[[], Launch]


@dataclass(frozen=True)
class Product:
    """A matrix product with random operands (:mod:`benchmarks.gemm`).

    Attributes:
        supports: whether it runs on a compute capability (times ten).
        weight: makes a random weight ``(n, k)``: tensors and packed weights by name, "codes" and "scale" among them.
        activations: makes random activations ``(m, k)``.
        run: computes the product of ``(activations, weight)`` in the dtype of its third argument.
        naive: computes the product in float64.
        tolerance: the largest relative error of an fp32 result. For instructions that were not run yet: as much as bf16 hides.
        rows: N of the problem it is checked on, a number that no tile divides.
    """

    supports: Callable[[int], bool]
    weight: Callable[[int, int], Mapping[str, Any]]
    activations: Callable[[int, int], Any]
    run: Callable[[Any, Mapping[str, Any], torch.dtype], torch.Tensor]
    naive: Callable[[Any, Mapping[str, Any]], torch.Tensor]
    tolerance: float = 1e-5
    rows: int = 1030


@dataclass(frozen=True)
class ExpertFormat:
    """Weights and activations of a layer of experts (:mod:`benchmarks.moe`).

    Attributes:
        weight: name of the weight format.
        activations: dtype of the activations.
    """

    weight: str
    activations: torch.dtype


@dataclass(frozen=True)
class Rounding:
    """An activation format and its kernel (:mod:`benchmarks.gemm`).

    Attributes:
        supports: whether it runs on a compute capability (times ten).
        run: rounds ``(x, smoothing=, scale=)``: bf16 ``[M, K]`` and ``[K]``, and the static scale, fp32 ``[]`` or None.
        written: bytes that ``run`` writes for ``(m, k)``.
        static: whether the format has a static scale.
    """

    supports: Callable[[int], bool]
    run: Callable[..., Any]
    written: Callable[[int, int], int]
    static: bool = False


@dataclass(frozen=True)
class Tiled:
    """Tile candidates of a kernel (:mod:`benchmarks.tiles`).

    Attributes:
        kernel: the Triton function.
        product: name of its :class:`Product`: its operands, its naive twin, and what dispatch runs.
        run: launches it: activations, weight, row_scale, bias, out_dtype, plan.
        configs: the kernel's own configurations, by compute capability times ten.
        bks: candidates for BK, the tile length along K.
        bits: of a weight and of an activation in shared memory, at least.
        splits: whether it can be split along K.
    """

    kernel: Any
    product: str
    run: Callable[..., torch.Tensor]
    configs: Callable[[int], Sequence[KernelConfig]]
    bks: tuple[int, ...]
    bits: tuple[int, int] = (4, 8)
    splits: bool = True


def _nothing(capability: int) -> Iterable[Any]:
    del capability
    return ()


@dataclass(frozen=True)
class Kernel:
    """Everything the benchmarks know of one kernel folder.

    Attributes:
        name: of the kernel, unique.
        folder: the folder of its ``kernel.py`` and ``naive.py``, below ``sglang_modelopt_kernels``.
        naive: its naive twin: in the folder's ``naive.py``, or named by the docstring of the folder's ``__init__``.
        architectures: compute capabilities, times ten, that it is compiled for.
        compile: its configurations on a compute capability, for :mod:`benchmarks.aot`.
        stress: its launches on a compute capability, for :mod:`benchmarks.stress`.
        measured: the formats that it is timed with, by name: :class:`Product` and :class:`Rounding` for :mod:`benchmarks.gemm`,
            :class:`ExpertFormat` for :mod:`benchmarks.moe`, KV recipes for :mod:`benchmarks.attention`.
        tiles: its tile candidates, by name, for :mod:`benchmarks.tiles`.
        without: the reason for a missing ``compile`` or ``stress``, by attribute.
    """

    name: str
    folder: str
    naive: Callable[..., Any]
    architectures: tuple[int, ...] = ARCHITECTURES
    compile: Callable[[int], Iterable[Case]] = _nothing
    stress: Callable[[int], Iterable[StressCase]] = _nothing
    measured: Mapping[str, Any] = field(default_factory=dict)
    tiles: Mapping[str, Tiled] = field(default_factory=dict)
    without: Mapping[str, str] = field(default_factory=dict)
