"""Fused smoothing and FP8 rounding against the formats' own rounding, bit for bit: in Triton's interpreter, and on a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sglang_modelopt_kernels.quantize.fp8 import naive_quantize_fp8, quantize_fp8

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OUT = {"fp8": torch.float8_e4m3fn, "fp16": torch.float16}
# (tokens, inputs, type of x, smoothed, scale, type of the values); K around a block and what registers hold
CASES = [
    (m, k, dtype, smoothed, scale, out)
    for index, (m, k, dtype) in enumerate(
        [
            (1, 64, "bf16"),
            (3, 77, "fp16"),
            (2, 2048, "fp32"),
            (5, 2049, "bf16"),
            (2, 4160, "fp32"),
            (2, 16390, "bf16"),
            (0, 64, "bf16"),
        ]
    )
    for scale in ("static", "token", "ranks")
    for smoothed, out in [(bool(index % 2), "fp8"), (not index % 2, "fp16")]
]


def different(m: int, k: int, dtype: str, smoothed: bool, scale: str, out: str, device: str) -> int:
    """Entries, values and scales, that are not those of the naive twin."""
    generator = torch.Generator().manual_seed(1000 * m + k)
    x = torch.randn(m, 2 * k, generator=generator)[:, :k]  # rows that do not touch
    # Over all of E4M3's binades and beyond, to both sides, exact middles among them.
    x = x * torch.exp2(torch.randint(-14, 13, (m, k), generator=generator))
    x = torch.where(torch.rand(m, k, generator=generator) < 0.3, torch.round(x * 16) / 16, x).to(DTYPES[dtype])
    if m > 1:
        x[0] = 0.0
        x[1, 5], x[1, 6] = float("nan"), float("inf")
    if m > 2:
        x[2, 7] = -float("inf")
    x = x.to(device)
    if m == 5:
        x = x.T.contiguous().T  # columns side by side instead of rows
    smoothing = (torch.rand(k, generator=generator) + 0.5).to(DTYPES[dtype]).to(device) if smoothed else None
    static = torch.tensor(0.37, device=device) if scale == "static" else None
    amax = None
    if scale == "ranks":
        wide = x.float() if smoothing is None else x.float() * smoothing.float()
        amax = wide.abs().amax(dim=1, keepdim=True) * 3
    values, row_scale = quantize_fp8(x, smoothing, static, amax, OUT[out])
    expected, expected_scale = naive_quantize_fp8(x, smoothing, static, amax)
    assert expected_scale is not None
    wrong = 0
    for got, right in ((values.float(), expected), (row_scale, expected_scale)):
        assert got.shape == right.shape, (got.shape, right.shape)
        same = (got == right) | (got.isnan() & right.isnan())
        if device == "cpu" and out == "fp8":
            same |= right.isnan()  # the interpreter's cast to E4M3 loses NaN; float16 shows it there
        wrong += int((~same).sum())
    return wrong


def test_in_the_interpreter() -> None:
    script = (
        "import json, sys, importlib.util as u\n"
        f"spec = u.spec_from_file_location('cases', {str(Path(__file__))!r}); cases = u.module_from_spec(spec)\n"
        "spec.loader.exec_module(cases)\n"
        "print(json.dumps([cases.different(*case, 'cpu') for case in cases.CASES]))\n"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    wrong = json.loads(done.stdout.splitlines()[-1])
    assert wrong == [0] * len(CASES), [case for case, count in zip(CASES, wrong, strict=True) if count]


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_on_a_gpu(case: tuple[int, int, str, bool, str, str]) -> None:
    assert different(*case, "cuda") == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(2, 4, 8),), "x must"),
        ((torch.ones(4, 8, dtype=torch.int8),), "x must"),
        ((torch.ones(4, 8), torch.ones(7)), "smoothing must"),
        ((torch.ones(4, 8), None, torch.ones(2)), "static_scale must"),
        ((torch.ones(4, 8), None, torch.ones((), dtype=torch.float16)), "static_scale must"),
        ((torch.ones(4, 8), None, None, torch.ones(4)), "token_amax must"),
        ((torch.ones(4, 8), None, torch.ones(()), torch.ones(4, 1)), "token_amax must"),
        ((torch.ones(4, 8), None, None, None, torch.bfloat16), "out_dtype must"),
    ],
)
def test_what_would_be_misread_is_refused(arguments: tuple[torch.Tensor, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize_fp8(*arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("static", [True, False])
def test_fake(static: bool) -> None:
    """Compilers see shapes and types without a GPU."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        values, row_scale = quantize_fp8(torch.ones(3, 32), None, torch.ones(()) if static else None)
    assert (values.shape, values.dtype) == ((3, 32), torch.float8_e4m3fn)
    assert row_scale.shape == (() if static else (3, 1))
