"""MXFP4 weights in block-scaled matrix instructions against the naive twin: in Triton's interpreter, and on a Blackwell GPU."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from sglang_modelopt_kernels.gemm.common import KernelConfig, choose
from sglang_modelopt_kernels.gemm.mxfp4_fp8_blackwell import mxfp4_linear, naive_mxfp4_linear, pair_blocks
from sglang_modelopt_kernels.gemm.mxfp4_fp8_blackwell.linear import CONFIGS, PAIRED_CONFIGS, run
from sglang_modelopt_kernels.quantize.blocks import naive_swizzle

LAUNCH = importlib.import_module("sglang_modelopt_kernels.gemm.common.launch")  # a function of the package has its name
TOLERANCE = 1e-6
"""Float32 sums of some hundred exact products, relative to the sum of their magnitudes."""


def error(
    m: int,
    n: int,
    k: int,
    device: str,
    plan: Any = None,
    paired: bool = False,
    describe: bool = True,
    processors: int = 0,
) -> float:
    """The largest error of any output, relative to the sum of the magnitudes of its products.

    ``plan`` is a configuration and the splits, ``describe`` whether TMA may be used, ``processors`` the SMs that a
    persistent kernel finds, 0 for those of the machine.
    """
    generator = torch.Generator().manual_seed(m + n + k)
    codes = torch.randint(0, 256, (n, k // 2), generator=generator, dtype=torch.uint8)
    scale = torch.randint(97, 157, (n, k // 32), generator=generator, dtype=torch.uint8)  # 2^-30 to 2^29
    x = (torch.randn(m, k, generator=generator) * 20).to(torch.float8_e4m3fn)
    row_scale = (torch.rand(m, 2, generator=generator) + 0.5)[:, :1] if m % 2 else None
    bias = torch.randn(n, generator=generator) if n % 2 == 0 else None
    ones = torch.ones(n)
    kept = (pair_blocks(codes), scale) if paired else (codes, naive_swizzle(scale))
    moved = [None if t is None else t.to(device) for t in (x, *kept, ones, row_scale, bias)]
    chosen = None if plan is None else (KernelConfig(*plan[:-1]), plan[-1])
    machine = LAUNCH.machine(torch.device(device))
    torch.use_deterministic_algorithms(True, warn_only=True)  # new tensors start as NaN
    with mock.patch.object(LAUNCH, "machine", return_value=(machine[0], processors or machine[1])):
        y = run(*moved, torch.float32, paired, chosen, describe).double().cpu()  # type: ignore[arg-type]
    torch.use_deterministic_algorithms(False)
    assert not bool(y.isnan().any()), "not every output was written"
    expected = naive_mxfp4_linear(x, codes, scale, row_scale, bias)
    bound = naive_mxfp4_linear(x.float().abs(), codes & 0x77, scale, row_scale, None if bias is None else bias.abs())
    return float(((y - expected).abs() / bound).max())


SPLIT = (128, 16, 128, 4, 3, 4)
PERSISTENT = (128, 256, 128, 8, 3, True, 1)
CASES: list[tuple[int, int, int, dict[str, Any]]] = [
    # m, n, k: K in 128s through descriptors, others through pointers
    *[(m, n, k, {}) for m, n, k in [(1, 130, 256), (3, 34, 96), (17, 129, 288), (40, 64, 544), (70, 65, 128)]],
    *[(m, n, k, {}) for m, n, k in [(2, 129, 384), (40, 257, 128), (130, 40, 384)]],
    (1, 130, 256, {"describe": False}),
    (5, 140, 2080, {"plan": SPLIT}),
    (5, 140, 2176, {"plan": SPLIT}),
    (2, 32, 64, {"plan": (128, 16, 128, 4, 3, 2)}),  # a split with nothing to do
    (130, 32, 256, {"plan": (128, 128, 128, 8, 3, 1)}),
    # three programs for 18 tiles, the last group of rows shorter; one without a second tile
    (257, 1030, 128, {"plan": PERSISTENT, "processors": 3}),
    (300, 140, 160, {"plan": PERSISTENT, "processors": 3}),
    (300, 140, 384, {"plan": PERSISTENT, "processors": 3, "describe": False}),
]


PAIRED_CASES: list[tuple[int, int, int, dict[str, Any]]] = [
    *[(m, n, k, {"paired": True}) for m, n, k in [(1, 66, 256), (3, 34, 64), (17, 65, 320), (40, 64, 576)]],
    (5, 70, 2112, {"paired": True, "plan": (64, 16, 128, 4, 3, 4)}),
    (130, 32, 256, {"paired": True, "plan": (128, 128, 128, 8, 3, 1)}),
]


def test_in_the_interpreter() -> None:
    script = (
        "import json, sys, importlib.util as u\n"
        f"spec = u.spec_from_file_location('cases', {str(Path(__file__))!r}); cases = u.module_from_spec(spec)\n"
        "spec.loader.exec_module(cases)\n"
        "every = cases.CASES + cases.PAIRED_CASES\n"
        "print(json.dumps([cases.error(*case[:3], 'cpu', **case[3]) for case in every]))\n"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    errors = json.loads(done.stdout.splitlines()[-1])
    assert len(errors) == len(CASES) + len(PAIRED_CASES)
    assert max(errors) < TOLERANCE, errors


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*CASES, (16, 4096, 4096, {}), (4000, 4096, 4096, {})], ids=str)
def test_on_a_gpu(case: tuple[int, int, int, dict[str, Any]]) -> None:
    if torch.cuda.get_device_capability()[0] != 10:
        pytest.skip("tcgen05 is for SM100 and SM103")
    # What the sum of the matrix instruction keeps there is not known yet: measure it before tightening this.
    assert error(case[0], case[1], case[2], "cuda", **case[3]) < 2**-12


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case", [*PAIRED_CASES, (16, 4096, 4096, {"paired": True}), (1000, 512, 4096, {"paired": True})], ids=str
)
def test_paired_on_a_gpu(case: tuple[int, int, int, dict[str, Any]]) -> None:
    if torch.cuda.get_device_capability()[0] != 12:
        pytest.skip("the widened kernel is for SM120")
    assert error(case[0], case[1], case[2], "cuda", **case[3]) < 2**-12


def test_pairs() -> None:
    """Byte j of 32 holds inputs j and 32 + j of 64, counted one by one."""
    codes = torch.randint(0, 256, (3, 64), dtype=torch.uint8)
    paired = pair_blocks(codes)
    for row in range(3):
        for byte in range(64):
            low = byte // 32 * 64 + byte % 32
            for half, k in ((paired[row, byte] & 15, low), (paired[row, byte] >> 4, low + 32)):
                stored = codes[row, k // 2]
                assert half == (stored >> 4 if k % 2 else stored & 15)


@pytest.mark.parametrize("configs", [CONFIGS, PAIRED_CONFIGS], ids=["stored", "paired"])
@pytest.mark.parametrize("m", [1, 16, 17, 64, 65, 5000])
def test_choice(m: int, configs: tuple[KernelConfig, ...]) -> None:
    config, split = choose(configs, m, 4096, 4096, 148)
    assert config in configs
    assert m <= config.bm or config is configs[-1]
    assert split in (1, 2, 4, 8, 16)


_ROWS_OF_96 = {"codes": torch.zeros(8, 48, dtype=torch.uint8), "scale": torch.zeros(8, 3, dtype=torch.uint8)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 64)}, "x must"),
        ({"x": torch.zeros(2, 32).to(torch.float8_e4m3fn)}, "x must"),
        ({"scale": torch.zeros(8, 2, dtype=torch.uint8)}, "codes and scale"),
        ({"scale": torch.zeros(128, 8, dtype=torch.uint8)}, "codes and scale"),
        ({"scale": torch.zeros(128, 4)}, "codes and scale"),
        ({"paired": True}, "codes and scale"),
        ({"paired": True, "x": torch.zeros(2, 96).to(torch.float8_e4m3fn)} | _ROWS_OF_96, "K must be a multiple of 64"),
        ({"out_scale": torch.ones(7)}, "out_scale"),
        ({"row_scale": torch.ones(3)}, "row_scale"),
        ({"bias": torch.ones(9)}, "bias"),
    ],
)
def test_what_would_be_misread_is_refused(change: dict[str, Any], message: str) -> None:
    arguments = {
        "x": torch.zeros(2, 64).to(torch.float8_e4m3fn),
        "codes": torch.zeros(8, 32, dtype=torch.uint8),
        "scale": torch.zeros(128, 4, dtype=torch.uint8),
        "out_scale": torch.ones(8),
    }
    with pytest.raises(ValueError, match=message):
        mxfp4_linear(**(arguments | change))  # type: ignore[arg-type]
