"""MXFP4 made E4M3 in registers against the stored weight in float64: in Triton's interpreter, and on a GPU of SM89 or SM90."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_modelopt_kernels.gemm.common import KernelConfig, choose
from sglang_modelopt_kernels.gemm.mxfp4_fp8_blackwell import naive_mxfp4_linear
from sglang_modelopt_kernels.gemm.mxfp4_fp8_hopper import (
    FoldedWeight,
    fold,
    folded_linear,
    naive_folded_linear,
    unfold,
)
from sglang_modelopt_kernels.gemm.mxfp4_fp8_hopper.linear import configs, run, unfold_rows

TOLERANCE = 1e-6
"""Float32 sums of some hundred exact products, relative to the sum of their magnitudes."""


def random_weight(n: int, k: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales whose rows span all that can be folded, each about a middle of its own, with blocks of zeros far below."""
    codes = torch.randint(0, 256, (n, k // 2), generator=generator, dtype=torch.uint8)
    scale = torch.randint(0, 12, (n, k // 32), generator=generator) + torch.randint(
        90, 140, (n, 1), generator=generator
    )
    codes[::3, :16], scale[::3, 0] = 0x80, 0
    return codes, scale.to(torch.uint8)


def move(weight: FoldedWeight, device: str) -> FoldedWeight:
    return FoldedWeight(weight.codes.to(device), weight.exponent.to(device), weight.out_scale.to(device))


def error(m: int, n: int, k: int, device: str, plan: Any = None) -> float:
    """The largest error of any output, relative to the sum of the magnitudes of its products; 1 when decoding alone is wrong."""
    generator = torch.Generator().manual_seed(m + n + k)
    codes, scale = random_weight(n, k, generator)
    weight = move(fold(codes, scale), device)
    x = (torch.randn(m, k, generator=generator) * 20).to(torch.float8_e4m3fn)
    row_scale = (torch.rand(m, 2, generator=generator) + 0.5)[:, :1] if m % 2 else None
    bias = torch.randn(n, generator=generator) if n % 2 == 0 else None
    if not torch.equal(unfold_rows(weight, 3, n - 3).double().cpu(), unfold(move(weight, "cpu"))[3:]):
        return 1.0
    chosen = None if plan is None else (KernelConfig(*plan[:5]), plan[5])
    moved = [None if t is None else t.to(device) for t in (row_scale, bias)]
    torch.use_deterministic_algorithms(True, warn_only=True)  # new tensors start as NaN
    y = run(x.to(device), weight, *moved, torch.float32, chosen).double().cpu()
    torch.use_deterministic_algorithms(False)
    assert not bool(y.isnan().any()), "not every output was written"
    expected = naive_mxfp4_linear(x, codes, scale, row_scale, bias)
    bound = naive_mxfp4_linear(x.float().abs(), codes & 0x77, scale, row_scale, None if bias is None else bias.abs())
    return float(((y - expected).abs() / bound).max())


CASES: list[tuple[int, int, int, Any]] = [
    *[(m, n, k, None) for m, n, k in [(1, 66, 256), (3, 34, 96), (17, 65, 288), (40, 64, 544)]],
    (5, 70, 2080, (64, 16, 128, 4, 3, 4)),
    (2, 32, 64, (64, 16, 128, 4, 3, 2)),  # a split with nothing to do
    (130, 32, 256, (128, 128, 128, 8, 3, 1)),
]


def test_in_the_interpreter() -> None:
    script = (
        "import json, sys, importlib.util as u\n"
        f"spec = u.spec_from_file_location('cases', {str(Path(__file__))!r}); cases = u.module_from_spec(spec)\n"
        "spec.loader.exec_module(cases)\n"
        "print(json.dumps([cases.error(*case[:3], 'cpu', case[3]) for case in cases.CASES]))\n"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    errors = json.loads(done.stdout.splitlines()[-1])
    assert len(errors) == len(CASES)
    assert max(errors) < TOLERANCE, errors


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case", [*CASES, *[(m, n, k, None) for m in (1, 16, 30, 60, 100) for n, k in ((4096, 4096), (514, 896))]], ids=str
)
def test_on_a_gpu(case: tuple[int, int, int, Any]) -> None:
    if torch.cuda.get_device_capability() not in ((8, 9), (9, 0)):
        pytest.skip("the kernel is for SM89 and SM90")
    # Hopper's FP8 instructions cut each of 32 products at 2^-13 of the largest, on average by half of that; relative to the sum of
    # all magnitudes that is 2^-14 times the largest over the mean one, which is below 8 for these codes and normal activations.
    assert error(case[0], case[1], case[2], "cuda", case[3]) < 2**-11


@pytest.mark.gpu
def test_many_tokens_on_a_gpu() -> None:
    if torch.cuda.get_device_capability() not in ((8, 9), (9, 0)):
        pytest.skip("the kernel is for SM89 and SM90")
    generator = torch.Generator().manual_seed(0)
    codes, scale = random_weight(512, 2048, generator)
    x = torch.randn(300, 2048, generator=generator).to(torch.float8_e4m3fn)
    y = folded_linear(x.cuda(), move(fold(codes, scale), "cuda"), out_dtype=torch.bfloat16).double().cpu()
    expected = naive_mxfp4_linear(x, codes, scale)
    assert float(((y - expected).norm(dim=1) / expected.norm(dim=1)).max()) < 2**-8


def test_fold_is_exact() -> None:
    codes, scale = random_weight(40, 256, torch.Generator().manual_seed(1))
    weight = fold(codes, scale)
    one = torch.eye(256)
    assert torch.equal(naive_folded_linear(one, weight), naive_mxfp4_linear(one, codes, scale))
    assert torch.equal(unfold(weight).to(torch.float8_e4m3fn).double(), unfold(weight))


def test_what_does_not_fit_is_refused() -> None:
    codes = torch.full((2, 32), 0x77, dtype=torch.uint8)
    scale = torch.tensor([[100, 100], [100, 112]], dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"span 2\^12, more than 2\^11"):
        fold(codes, scale)
    codes[1, :16] = 0x80  # zeros, whatever their scale says
    fold(codes, scale)
    scale[0, 0] = 255
    with pytest.raises(ValueError, match="NaN"):
        fold(codes, scale)


@pytest.mark.parametrize("capability", [89, 90])
@pytest.mark.parametrize("m", [1, 16, 17, 64, 65, 5000])
def test_choice(m: int, capability: int) -> None:
    config, split = choose(configs(capability), m, 4096, 4096, 132)
    assert config in configs(capability)
    assert m <= config.bm or config is configs(capability)[-1]
    assert split in (1, 2, 4, 8, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 64)}, "x must"),
        ({"x": torch.zeros(2, 32).to(torch.float8_e4m3fn)}, "x must"),
        ({"row_scale": torch.ones(3)}, "row_scale"),
        ({"bias": torch.ones(9)}, "bias"),
    ],
)
def test_what_would_be_misread_is_refused(change: dict[str, torch.Tensor], message: str) -> None:
    weight = fold(torch.zeros(8, 32, dtype=torch.uint8), torch.full((8, 2), 127, dtype=torch.uint8))
    arguments = {"x": torch.zeros(2, 64).to(torch.float8_e4m3fn), "weight": weight}
    with pytest.raises(ValueError, match=message):
        folded_linear(**(arguments | change))  # type: ignore[arg-type]
