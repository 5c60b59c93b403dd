"""FP4 weights and activations in matrix instructions against the naive twin: in Triton's interpreter, and on Blackwell."""

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

from sglang_modelopt_kernels.formats.base import BlockActivation
from sglang_modelopt_kernels.gemm.blackwell_common import takes_tiles
from sglang_modelopt_kernels.gemm.common import KernelConfig, choose
from sglang_modelopt_kernels.gemm.fp4_blackwell import fp4_linear, naive_fp4_linear
from sglang_modelopt_kernels.gemm.fp4_blackwell.linear import CONFIGS, SWIZZLED_CONFIGS, run
from sglang_modelopt_kernels.quantize.blocks import naive_swizzle

LAUNCH = importlib.import_module("sglang_modelopt_kernels.gemm.common.launch")  # a function of the package has its name
TOLERANCE = 1e-6
"""Float32 sums of some hundred exact products, relative to the sum of their magnitudes."""


def random_blocks(rows: int, k: int, group: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of all magnitudes, zero scales among E4M3's."""
    codes = torch.randint(0, 256, (rows, k // 2), generator=generator, dtype=torch.uint8)
    if group == 16:
        scale = torch.randint(0, 127, (rows, k // 16), generator=generator, dtype=torch.uint8)
        return codes, scale.view(torch.float8_e4m3fn)
    return codes, torch.randint(107, 147, (rows, k // 32), generator=generator, dtype=torch.uint8)  # 2^-20 to 2^19


def error(
    m: int,
    n: int,
    k: int,
    group: int,
    device: str,
    plan: Any = None,
    swizzled: bool = True,
    describe: bool = True,
    processors: int = 0,
) -> float:
    """The largest error of any output, relative to the sum of the magnitudes of its products.

    ``plan`` is a configuration and the splits, ``swizzled`` whether scales are swizzled, ``describe`` whether TMA may be used,
    ``processors`` the SMs that a persistent kernel finds, 0 for those of the machine.
    """
    generator = torch.Generator().manual_seed(m + n + k)
    codes, scale = random_blocks(n, k, group, generator)
    x_codes, x_scale = random_blocks(m, k, group, generator)
    row_scale = torch.rand((), generator=generator) + 0.5 if m % 2 else None
    bias = torch.randn(n, generator=generator) if n % 2 == 0 else None
    x = BlockActivation(x_codes, x_scale, row_scale)
    kept = naive_swizzle(scale) if swizzled else scale
    x_kept = naive_swizzle(x_scale) if swizzled and takes_tiles(m) else x_scale
    on_device = BlockActivation(*(None if t is None else t.to(device) for t in (x_codes, x_kept, row_scale)))  # type: ignore[arg-type]
    weight = codes.to(device), kept.to(device), torch.ones(n, device=device), None if bias is None else bias.to(device)
    chosen = None if plan is None else (KernelConfig(*plan[:-1]), plan[-1])
    machine = LAUNCH.machine(torch.device(device))
    torch.use_deterministic_algorithms(True, warn_only=True)  # new tensors start as NaN
    with mock.patch.object(LAUNCH, "machine", return_value=(machine[0], processors or machine[1])):
        y = run(on_device, *weight, torch.float32, swizzled, chosen, describe).double().cpu()
    torch.use_deterministic_algorithms(False)
    assert not bool(y.isnan().any()), "not every output was written"
    expected = naive_fp4_linear(x, codes, scale, bias)
    positive = BlockActivation(x_codes & 0x77, x_scale, row_scale)
    bound = naive_fp4_linear(positive, codes & 0x77, scale, None if bias is None else bias.abs())
    return float(((y - expected).abs() / bound.clamp(min=1e-30)).max())


PERSISTENT = (128, 256, 128, 8, 3, True, 1)
ROWS = {"swizzled": False}
CASES: list[tuple[int, int, int, int, dict[str, Any]]] = [
    # m, n, k, group: K in 32s through descriptors, others through pointers
    *[(m, n, k, 16, {}) for m, n, k in [(1, 130, 256), (3, 34, 80), (17, 129, 304), (40, 64, 544), (70, 65, 128)]],
    *[(m, n, k, 32, {}) for m, n, k in [(1, 130, 256), (3, 34, 96), (40, 64, 544), (129, 40, 160)]],
    (70, 130, 208, 16, {}),
    (70, 130, 224, 16, {"describe": False}),
    (1, 130, 256, 16, {"describe": False}),
    (5, 140, 2096, 16, {"plan": (128, 16, 256, 4, 3, 4)}),
    (5, 140, 2080, 32, {"plan": (128, 16, 256, 4, 3, 4)}),
    (2, 32, 64, 16, {"plan": (128, 16, 128, 4, 3, 2)}),  # a split with nothing to do
    (130, 32, 256, 16, {"plan": (128, 128, 128, 8, 3, 1)}),
    (130, 32, 256, 32, {"plan": (128, 128, 128, 8, 3, 2)}),
    # three programs for eight tiles; rows of scales that end within a tile of the product, through descriptors and pointers
    (300, 400, 160, 16, {"plan": PERSISTENT, "processors": 3}),
    (300, 400, 176, 16, {"plan": PERSISTENT, "processors": 3}),
    (260, 140, 160, 32, {"plan": PERSISTENT, "processors": 3}),
]
ROW_CASES: list[tuple[int, int, int, int, dict[str, Any]]] = [
    *[(m, n, k, 16, ROWS) for m, n, k in [(1, 130, 256), (3, 34, 80), (17, 129, 304), (40, 64, 544), (70, 65, 128)]],
    *[(m, n, k, 32, ROWS) for m, n, k in [(1, 130, 256), (3, 34, 96), (40, 64, 544)]],
    (5, 140, 2096, 16, ROWS | {"plan": (128, 16, 256, 4, 3, 4)}),
    (130, 32, 256, 32, ROWS | {"plan": (128, 128, 128, 8, 3, 2)}),
]


def test_in_the_interpreter() -> None:
    """MXFP4 by ``dot_scaled``, NVFP4 by its twin: the interpreter reads E4M3 scales as UE8M0."""
    script = (
        "import json, sys, importlib.util as u\n"
        f"spec = u.spec_from_file_location('cases', {str(Path(__file__))!r}); cases = u.module_from_spec(spec)\n"
        "spec.loader.exec_module(cases)\n"
        "every = cases.CASES + cases.ROW_CASES\n"
        "print(json.dumps([cases.error(*case[:4], 'cpu', **case[4]) for case in every]))\n"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    errors = json.loads(done.stdout.splitlines()[-1])
    assert len(errors) == len(CASES) + len(ROW_CASES)
    assert max(errors) < TOLERANCE, errors


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*CASES, *ROW_CASES, (16, 4096, 4096, 16, {}), (4000, 4096, 4096, 16, {})], ids=str)
def test_on_a_gpu(case: tuple[int, int, int, int, dict[str, Any]]) -> None:
    wanted = 10 if case[4].get("swizzled", True) else 12
    if torch.cuda.get_device_capability()[0] != wanted:
        pytest.skip("swizzled scales are for SM100 and SM103, the others for SM120")
    # What the sum of the matrix instruction keeps there is not known yet: measure it before tightening this.
    assert error(*case[:4], "cuda", **case[4]) < 2**-12


@pytest.mark.parametrize("every", [SWIZZLED_CONFIGS, CONFIGS], ids=["swizzled", "rows"])
@pytest.mark.parametrize("m", [1, 16, 17, 64, 65, 5000])
def test_choice(m: int, every: tuple[KernelConfig, ...]) -> None:
    config, split = choose(every, m, 4096, 4096, 148)
    assert config in every
    assert m <= config.bm or config is every[-1]
    assert split in (1, 2, 4, 8, 16)
    assert every is CONFIGS or takes_tiles(m) == (config.bm >= 128)


E4M3 = torch.float8_e4m3fn
_TOKENS = {"x_codes": torch.zeros(130, 32, dtype=torch.uint8), "x_scale": torch.zeros(130, 4).to(E4M3)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_codes": torch.zeros(2, 16, dtype=torch.uint8)}, "x must"),
        ({"x_codes": torch.zeros(2, 32)}, "x must"),
        ({"x_scale": torch.zeros(2, 2, dtype=torch.uint8)}, "scales of x must"),
        ({"x_scale": torch.zeros(3, 4).to(E4M3)}, "scales of x must"),
        ({"scale": torch.zeros(8, 2).to(E4M3)}, "scale must"),
        ({"scale": torch.zeros(8, 4)}, "codes must"),
        ({"swizzled": True}, "scale must be .* swizzled"),
        ({"swizzled": True, "scale": torch.zeros(128, 4).to(E4M3)} | _TOKENS, "scales of x must be .*256, 4"),
        ({"codes": torch.zeros(8, 32, dtype=torch.int8)}, "codes must"),
        ({"out_scale": torch.ones(7)}, "out_scale"),
        ({"row_scale": torch.ones(3)}, "row_scale"),
        ({"bias": torch.ones(9)}, "bias"),
    ],
)
def test_what_would_be_misread_is_refused(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "x_codes": torch.zeros(2, 32, dtype=torch.uint8),
        "x_scale": torch.zeros(2, 4).to(E4M3),
        "row_scale": torch.ones(()),
        "codes": torch.zeros(8, 32, dtype=torch.uint8),
        "scale": torch.zeros(8, 4).to(E4M3),
        "out_scale": torch.ones(8),
        "bias": torch.ones(8),
    } | change
    x = BlockActivation(*(arguments.pop(name) for name in ("x_codes", "x_scale", "row_scale")))
    with pytest.raises(ValueError, match=message):
        fp4_linear(x, **arguments)


def test_no_tokens_and_fake() -> None:
    """An empty batch, and what compilers see."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    def product(m: int, swizzled: bool) -> torch.Tensor:
        x = BlockActivation(torch.zeros(m, 32, dtype=torch.uint8), torch.zeros(m, 4).to(E4M3), None)
        scale = torch.zeros(128 if swizzled else 8, 4).to(E4M3)
        weight = torch.zeros(8, 32, dtype=torch.uint8), scale, torch.ones(8)
        return fp4_linear(x, *weight, out_dtype=torch.float16, swizzled=swizzled)

    for swizzled in (False, True):
        assert (product(0, swizzled).shape, product(0, swizzled).dtype) == ((0, 8), torch.float16)
        with FakeTensorMode():
            assert (product(3, swizzled).shape, product(3, swizzled).dtype) == ((3, 8), torch.float16)
