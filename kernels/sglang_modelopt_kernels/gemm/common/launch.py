"""Which configuration of a tiled product runs, and its launch. CUDA tensors, or CPU tensors under Triton's interpreter."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton

from .epilogue import Epilogue
from .wgmma import checked


@dataclass(frozen=True)
class KernelConfig:
    """Tile sizes: output features, tokens and inputs; warps and pipeline stages; whether a program takes tile after tile."""

    bn: int
    bm: int
    bk: int
    warps: int
    stages: int
    persistent: bool = False

    def __str__(self) -> str:
        return f"{self.bn}x{self.bm}x{self.bk}w{self.warps}s{self.stages}{'p' if self.persistent else ''}"

    def tiles(self, m: int, n: int) -> int:
        """Tiles of a product of ``m`` tokens and ``n`` output features."""
        return triton.cdiv(n, self.bn) * triton.cdiv(m, self.bm)


Plan = tuple[KernelConfig, int]
"""A configuration and the number of splits along K."""


def matrix_instruction(capability: int) -> str:
    """The matrix instruction of compute capability ``capability`` (times ten) for float16 and bf16."""
    if 90 <= capability < 100:
        return "wgmma"
    return "tcgen05" if 100 <= capability < 120 else "mma.sync"


@functools.cache
def machine(device: torch.device) -> tuple[int, int]:
    """Compute capability times ten and multiprocessors; an H200's for the interpreter."""
    if device.type != "cuda":
        return 90, 132
    properties = torch.cuda.get_device_properties(device)
    return 10 * properties.major + properties.minor, properties.multi_processor_count


def needs_drain(x: torch.Tensor) -> bool:
    """Whether kernels over ``x`` must call :func:`.kernel.drain_wgmma`: the GPU multiplies by ``wgmma``."""
    return x.is_cuda and matrix_instruction(machine(x.device)[0]) == "wgmma"


def choose(configs: Sequence[KernelConfig], m: int, n: int, k: int, processors: int) -> Plan:
    """The first of ``configs``, ascending by tokens, that holds ``m`` tokens, or the last; a function of its arguments alone.

    Only the last may be persistent. It is left to products with a tile for each multiprocessor; others may be split along K.
    """
    config = next((config for config in configs if m <= config.bm), configs[-1])
    if config.persistent:
        if config.tiles(m, n) >= processors:
            return config, 1
        config = configs[-2]
    warps = config.warps * config.tiles(m, n)
    steps, split = triton.cdiv(k, config.bk), 1
    # Enough programs for about eight warps to a multiprocessor, while each still has a pipeline's worth of steps.
    while warps * split < 7 * processors and split < 16 and steps >= 4 * 2 * split:
        split *= 2
    return config, split


def path(plan: Plan, m: int, n: int, processors: int) -> tuple[object, ...]:
    """Return what of a launch with ``plan`` depends on M: equal for all M that run the same instructions.

    That is the configuration, whether K is split, and of a persistent kernel whether a program takes several tiles.
    """
    config, split = plan
    return config, split > 1, config.persistent and config.tiles(m, n) > processors


def launch(
    kernel: Any,
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    epilogue: Epilogue,
    out_dtype: torch.dtype,
    plan: Plan,
    per_entry: int = 1,
    operands: Sequence[Any] | None = None,
    sum_dtype: torch.dtype = torch.float32,
    **arguments: Any,
) -> torch.Tensor:
    """``[M, N]`` of ``out_dtype`` from a kernel over tiles of ``Y^T``, for activations ``x`` and a weight of N rows.

    ``x`` is ``[M, K]``, or ``[M, K / per_entry]`` where an entry holds several inputs; ``operands`` what the kernel gets for ``x``,
    ``codes`` and ``scale``, where that is not themselves; ``sum_dtype`` is the type of partial sums; ``arguments`` are those of the
    kernel's own.
    """
    m, k, n = x.shape[0], x.shape[1] * per_entry, codes.shape[0]
    config, split = plan
    y = torch.empty((m, n), dtype=out_dtype, device=x.device)
    partials = torch.empty((split, m, n), dtype=sum_dtype, device=x.device) if split > 1 else None
    grid = (triton.cdiv(n, config.bn), triton.cdiv(m, config.bm), split)
    if config.persistent:
        grid = (min(config.tiles(m, n), machine(x.device)[1]), 1, 1)
    checked(
        kernel[grid](
            *((x, codes, scale) if operands is None else operands),
            y_ptr=y if partials is None else partials,
            m=m,
            n=n,
            k=k,
            EVEN_K=k % config.bk == 0,
            SPLIT_K=split,
            BN=config.bn,
            BM=config.bm,
            BK=config.bk,
            num_warps=config.warps,
            num_stages=config.stages,
            **epilogue.arguments(),
            **arguments,
        )
    )
    if partials is not None:
        epilogue.finish(partials, y)
    return y
