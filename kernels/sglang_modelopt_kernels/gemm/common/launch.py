"""Choice of a tiled product's configuration, and its launch. CUDA tensors, or CPU tensors under Triton's interpreter."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton

from sglang_modelopt_kernels.early import early

from .arrivals import COUNTERS, arrivals
from .epilogue import Epilogue
from .wgmma import checked


@dataclass(frozen=True)
class KernelConfig:
    """Tile sizes along N (``bn``), M (``bm``) and K (``bk``), warps, pipeline stages, and whether the kernel is persistent."""

    bn: int
    bm: int
    bk: int
    warps: int
    stages: int
    persistent: bool = False

    def __str__(self) -> str:
        return f"{self.bn}x{self.bm}x{self.bk}w{self.warps}s{self.stages}{'p' if self.persistent else ''}"

    def tiles(self, m: int, n: int) -> int:
        """Return the tiles of a product of ``m`` tokens and ``n`` output features."""
        return triton.cdiv(n, self.bn) * triton.cdiv(m, self.bm)


MANY, MANY_K = 64, 3584
"""BM from which a split has so many K elements: with fewer, parts of the sum cost more than idle SMs (measured on an H200)."""
Plan = tuple[KernelConfig, int]
"""A configuration and the number of splits along K."""


def matrix_instruction(capability: int) -> str:
    """Return the matrix instruction of compute capability ``capability`` (times ten) for fp16 and bf16."""
    if 90 <= capability < 100:
        return "wgmma"
    return "tcgen05" if 100 <= capability < 120 else "mma.sync"


@functools.cache
def machine(device: torch.device) -> tuple[int, int]:
    """Return the compute capability times ten and the number of SMs; those of an H200 for the interpreter."""
    if device.type != "cuda":
        return 90, 132
    properties = torch.cuda.get_device_properties(device)
    return 10 * properties.major + properties.minor, properties.multi_processor_count


def needs_drain(x: torch.Tensor) -> bool:
    """Return whether kernels over ``x`` must call :func:`.kernel.drain_wgmma`: on a GPU that multiplies by ``wgmma``."""
    return x.is_cuda and matrix_instruction(machine(x.device)[0]) == "wgmma"


def choose(configs: Sequence[KernelConfig], m: int, n: int, k: int, sms: int) -> Plan:
    """Choose one of ``configs``, ascending by BM, and the splits along K, as a function of the arguments alone.

    The first BM that holds ``m`` tokens counts, or the last. Of several configurations with this BM, which descend by BN, it is the
    first that has a program for nine in ten of ``sms`` SMs, or the last. Only the last of all may be persistent: it runs products
    with a tile for each SM, without splits.
    """
    bm = next((config.bm for config in configs if m <= config.bm), configs[-1].bm)
    *larger, config = [config for config in configs if config.bm == bm]
    splits = max(k // MANY_K, 1) if bm >= MANY else 1
    config = next((large for large in larger if 10 * large.tiles(m, n) * splits >= 9 * sms), config)
    if config.persistent:
        if config.tiles(m, n) >= sms:
            return config, 1
        config = configs[-2]
    warps, split = config.warps * config.tiles(m, n), 1
    # Split until there are six warps or more for each SM, while each program has a pipeline's worth of K.
    while warps * split < 6 * sms and split < 16 and k >= 2 * split * _least(config):
        split *= 2
    return config, split


def _least(config: KernelConfig) -> int:
    """Return the K elements that a split has at least: a pipeline's worth, and more where the parts of the sum have many tokens."""
    return MANY_K if config.bm >= MANY else 4 * config.bk


def path(plan: Plan, m: int, n: int, sms: int) -> tuple[object, ...]:
    """Return what of a launch with ``plan`` depends on M: equal for all M that run the same instructions.

    That is the configuration, whether K is split, and of a persistent kernel whether a program takes several tiles.
    """
    config, split = plan
    return config, split > 1, config.persistent and config.tiles(m, n) > sms


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
    """Launch a kernel over tiles of ``Y^T``.

    Args:
        kernel: the Triton function.
        x: activations ``[M, K]``, or ``[M, K / per_entry]``.
        codes: weight of N rows.
        scale: block scales of the weight.
        epilogue: scales and bias.
        out_dtype: dtype of the result.
        plan: configuration and splits along K.
        per_entry: values in an entry of ``x``.
        operands: the kernel's first arguments; None for ``x``, ``codes`` and ``scale``.
        sum_dtype: dtype of split-K partials.
        arguments: constexprs and further arguments of this kernel.

    Returns:
        ``[M, N]`` of ``out_dtype``.
    """
    m, k, n = x.shape[0], x.shape[1] * per_entry, codes.shape[0]
    config, split = plan
    if split > 1 and config.tiles(m, n) > COUNTERS:
        raise ValueError(f"a product of more than {COUNTERS} tiles is not split along K, got {config.tiles(m, n)}")
    y = torch.empty((m, n), dtype=out_dtype, device=x.device)
    partials = torch.empty((split, m, n), dtype=sum_dtype, device=x.device) if split > 1 else y
    grid = (triton.cdiv(n, config.bn), triton.cdiv(m, config.bm), split)
    if config.persistent:
        grid = (min(config.tiles(m, n), machine(x.device)[1]), 1, 1)
    checked(
        kernel[grid](
            *((x, codes, scale) if operands is None else operands),
            y_ptr=y,
            partial_ptr=partials,
            # A pointer stands for counters that the kernel does not read.
            arrivals_ptr=arrivals(x.device) if split > 1 else y,
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
    return y


def few(x: torch.Tensor, config: KernelConfig) -> dict[str, Any]:
    """Return the arguments of a kernel that masks tokens out of range, for activations ``x``, beside those of :func:`early`.

    Only small tiles mask: all their programs read the same few lines of L2. Large ones read the last token in place of others.
    """
    return {"EVEN_M": not masks(config) or x.shape[0] % config.bm == 0} | early(x.device)


def masks(config: KernelConfig) -> bool:
    """Return whether a configuration masks tokens out of range."""
    return config.bm < MANY
