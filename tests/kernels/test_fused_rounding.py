"""RMSNorm and SwiGLU with rounding to E4M3 against their naive twins: in Triton's interpreter, and on a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sglang_modelopt_kernels.quantize.fp8 import naive_quantize_fp8
from sglang_modelopt_kernels.quantize.gated import naive_swiglu_fp8, swiglu_fp8
from sglang_modelopt_kernels.quantize.rms_norm import naive_rms_norm_fp8, rms_norm_fp8

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# (what, tokens, K, type of x, smoothed, static, residual)
CASES = [
    (what, m, k, dtype, bool(index % 2), bool(index % 3), bool(index % 2) and what == "norm")
    for what in ("norm", "gated")
    for index, (m, k, dtype) in enumerate(
        [(1, 64, "fp32"), (3, 77, "bf16"), (2, 2048, "bf16"), (5, 2049, "fp16"), (0, 64, "bf16"), (2, 4160, "bf16")]
    )
]
STEPS = 1.01
"""The largest difference of the first output from float64, in units of the last place of its type.

Both are rounded to that type from within 1e-6 of the same number, so that they are equal or neighbours; in fp32, whose last
place is 1.2e-7, the sum of squares itself differs.
"""


def spaced(x: torch.Tensor) -> torch.Tensor:
    """Return the distance of representable numbers at ``x`` in float64, of fp32 a hundred times."""
    bits = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 17}[x.dtype]
    return torch.exp2(torch.floor(torch.log2(x.double().abs().clamp(min=2.0**-14))) - bits + 1)


def problems(
    what: str, m: int, k: int, dtype: str, smoothed: bool, static: bool, with_residual: bool, device: str
) -> list[str]:
    """Return what differs from the naive twin."""
    generator = torch.Generator().manual_seed(1000 * m + k)
    width = 2 * k if what == "gated" else k

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(DTYPES[dtype]).to(device)

    x, weight, residual = random(m, width), random(k), random(m, k) if with_residual else None
    smoothing = (random(k).abs() + 0.5) if smoothed else None
    scale = torch.tensor(0.02, device=device) if static else None
    if what == "norm":
        before = None if residual is None else residual.clone()
        expected = naive_rms_norm_fp8(x, weight, 1e-5, before, smoothing, scale)[0]
        total = x.double() if before is None else x.double() + before.double()
        first, values, row_scale = rms_norm_fp8(x, weight, 1e-5, residual, smoothing, scale)
        # The cast of Triton's interpreter to bf16 does not round to nearest.
        steps = STEPS if device == "cpu" else 0.5
        if residual is not None and bool(((residual.double() - total).abs() > steps * spaced(total.to(x.dtype))).any()):
            return ["residual"]
        if residual is not None and first is not x:
            return ["not in place"]
    else:
        expected = naive_swiglu_fp8(x, smoothing, scale)[0]
        first, values, row_scale = swiglu_fp8(x, smoothing, scale)
    wrong = []
    if bool(((first.double() - expected.double()).abs() > STEPS * spaced(expected)).any()):
        wrong.append("first output")
    # Whatever its last place is, it is rounded as the kernel that does nothing else rounds it.
    right, right_scale = naive_quantize_fp8(first, smoothing, scale, None)
    if not torch.equal(values.float(), right):
        wrong.append("values")
    if not torch.equal(row_scale, right_scale if right_scale is not None else row_scale):
        wrong.append("scale")
    return wrong


def test_in_the_interpreter() -> None:
    script = (
        "import json, sys, importlib.util as u\n"
        f"spec = u.spec_from_file_location('cases', {str(Path(__file__))!r}); cases = u.module_from_spec(spec)\n"
        "spec.loader.exec_module(cases)\n"
        "print(json.dumps([cases.problems(*case, 'cpu') for case in cases.CASES]))\n"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    wrong = json.loads(done.stdout.splitlines()[-1])
    assert wrong == [[]] * len(CASES), [(case, found) for case, found in zip(CASES, wrong, strict=True) if found]


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_on_a_gpu(case: tuple[str, int, int, str, bool, bool, bool]) -> None:
    assert problems(*case, "cuda") == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rms_norm_fp8(torch.ones(4, 8, 2), torch.ones(2), 1e-5), "x must"),
        (lambda: rms_norm_fp8(torch.ones(4, 8), torch.ones(7), 1e-5), "weight must"),
        (lambda: rms_norm_fp8(torch.ones(1, 16385), torch.ones(16385), 1e-5), "weight must"),
        (lambda: rms_norm_fp8(torch.ones(4, 8), torch.ones(8), 1e-5, torch.ones(4, 8).half()), "residual must"),
        (lambda: rms_norm_fp8(torch.ones(4, 8), torch.ones(8), 1e-5, None, torch.ones(7)), "smoothing must"),
        (lambda: swiglu_fp8(torch.ones(4, 7)), "h must"),
        (lambda: swiglu_fp8(torch.ones(1, 32770)), "h must"),
        (lambda: swiglu_fp8(torch.ones(4, 8), None, torch.ones(2)), "static_scale must"),
        (lambda: swiglu_fp8(torch.ones(4, 8), None, None, torch.bfloat16), "out_dtype must"),
    ],
)
def test_what_would_be_misread_is_refused(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("static", [True, False])
def test_fake(static: bool) -> None:
    """Compilers see shapes and types without a GPU."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        scale = torch.ones(()) if static else None
        normed, values, row_scale = rms_norm_fp8(torch.ones(3, 32), torch.ones(32), 1e-5, None, None, scale)
        gated, gated_values, _ = swiglu_fp8(torch.ones(3, 64), None, scale)
    assert (normed.shape, values.shape, values.dtype) == ((3, 32), (3, 32), torch.float8_e4m3fn)
    assert row_scale.shape == (() if static else (3, 1))
    assert (gated.shape, gated_values.shape) == ((3, 32), (3, 32))
