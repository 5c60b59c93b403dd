"""How the tcgen05 product loads its operands: descriptors or pointers, swizzled activation scales or not, one tile or many."""

from __future__ import annotations

import importlib
from typing import Any
from unittest import mock

import pytest
import torch

from sglang_modelopt_kernels.gemm.blackwell_common import takes_tiles, tcgen05_product, tiles_of
from sglang_modelopt_kernels.gemm.blackwell_common.launch import describe_tiles, tma_objection
from sglang_modelopt_kernels.gemm.common import Epilogue, KernelConfig, choose
from sglang_modelopt_kernels.gemm.fp4_blackwell.linear import SWIZZLED_CONFIGS
from sglang_modelopt_kernels.gemm.mxfp4_fp8_blackwell.linear import CONFIGS

LAUNCH = importlib.import_module("sglang_modelopt_kernels.gemm.blackwell_common.launch")
EVERY = pytest.mark.parametrize("configs", [CONFIGS, SWIZZLED_CONFIGS], ids=["mxfp4", "fp4"])
PROCESSORS = 148
"""A B200's."""


@pytest.mark.parametrize(
    ("width", "padded", "offset", "reason"),
    [
        (16, False, 0, None),
        (48, False, 16, None),
        (40, False, 0, "has rows of 40 bytes, not in 16s"),
        (32, False, 8, "does not start at a multiple of 16 bytes"),
        (64, True, 0, None),
        (192, True, 32, None),
        (96, True, 0, "has rows of 96 bytes, not in 64s"),
        (64, True, 16, "does not start at a multiple of 32 bytes"),
    ],
)
def test_what_tma_takes(width: int, padded: bool, offset: int, reason: str | None) -> None:
    memory = torch.zeros(4 * width + 128, dtype=torch.uint8)
    start = -memory.data_ptr() % 64 + offset
    assert tma_objection(memory[start : start + 4 * width].view(4, width), padded) == reason


def test_tma_takes_no_gaps() -> None:
    assert tma_objection(torch.zeros(4, 128, dtype=torch.uint8)[:, :64]) == "is not contiguous"


@pytest.mark.parametrize(
    ("k", "group", "e4m3", "m", "described"),
    [
        (256, 32, True, 3, True),
        (160, 32, True, 3, False),  # the weight's codes are spread to bytes in 128s
        (160, 32, False, 3, True),
        (160, 16, False, 80, True),
        (176, 16, False, 80, False),  # rows of 88 bytes
    ],
)
def test_the_way_it_takes(k: int, group: int, e4m3: bool, m: int, described: bool) -> None:
    """Without descriptors, or where asked for none, the kernel gets the tensors themselves."""
    n, blocks, one = 40, k // group, torch.ones(40)
    x = torch.zeros(m, k).to(torch.float8_e4m3fn) if e4m3 else torch.zeros(m, k // 2, dtype=torch.uint8)
    shape = tiles_of(m, blocks) if takes_tiles(m) else (m, blocks)
    operands = (
        x,
        torch.zeros(n, k // 2, dtype=torch.uint8),
        torch.zeros(tiles_of(n, blocks), dtype=torch.uint8),
        None if e4m3 else torch.zeros(shape, dtype=torch.uint8),
    )
    plan = choose(CONFIGS, m, n, k, PROCESSORS)
    for asked in (True, False):
        with mock.patch.object(LAUNCH, "launch") as launch:
            tcgen05_product(*operands, group, Epilogue(one, None, None), torch.float32, plan, asked)
        arguments: dict[str, Any] = launch.call_args.kwargs
        given = launch.call_args.args[8]
        assert arguments["DESCRIBED"] == (described and asked)
        assert arguments["SWIZZLED"] == (not e4m3 and m > 64)
        assert all(isinstance(operand, torch.Tensor) != arguments["DESCRIBED"] for operand in given)
        scales_described = arguments["DESCRIBED"] and arguments["SWIZZLED"]
        assert isinstance(arguments["t"], torch.Tensor) != scales_described


def test_tiles_are_described_whole() -> None:
    """Two rows of three tiles, in boxes of one by two: 512 bytes each, as two of 256."""
    described = describe_tiles(torch.zeros(256, 12, dtype=torch.uint8), 128, 8)
    assert (list(described.shape), list(described.strides)) == ([2, 3, 2, 256], [1536, 512, 256, 1])
    assert described.block_shape == [1, 2, 2, 256]


@EVERY
def test_many_tokens_are_for_the_persistent_kernel(configs: tuple[KernelConfig, ...]) -> None:
    persistent, largest = configs[-1], configs[-2]
    assert [config.persistent for config in configs] == [False] * (len(configs) - 1) + [True]
    assert choose(configs, 4096, 4096, 4096, PROCESSORS) == (persistent, 1)
    assert choose(configs, 256, 128 * PROCESSORS, 4096, PROCESSORS) == (persistent, 1)
    config, split = choose(configs, 256, 128 * (PROCESSORS - 1), 4096, PROCESSORS)
    assert (config, split) == (largest, 1)
    config, split = choose(configs, 300, 1024, 8192, PROCESSORS)
    assert config is largest
    assert split > 1
