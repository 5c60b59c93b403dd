"""Fused smoothing and INT8 rounding against the format's own rounding, bit for bit: in Triton's interpreter, and on a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.registry import compile_cases
from sglang_modelopt_ext.layers.linear import round_input
from sglang_modelopt_kernels.formats.int8 import INT8StaticPerTensor
from sglang_modelopt_kernels.quantize.int8 import naive_quantize_int8, quantize_int8

SCALE = 0.3
"""Its inverse is rounded, so that products with it are."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# (tokens, inputs, type of x, smoothed); K below, at and above a block, odd ones too
CASES = [
    (1, 64, "bf16", False),
    (3, 77, "fp16", True),
    (2, 2048, "fp32", True),
    (5, 2049, "bf16", True),
    (2, 4160, "fp32", False),
    (0, 64, "bf16", False),
]


def sample(m: int, k: int, dtype: str) -> torch.Tensor:
    """Over the range and far beyond it, and halves times the scale; NaN in one token, infinities in others.

    Rounded, the product of such a half with the scale's inverse is mostly the half itself, and not rounded it is beside it.
    """
    generator = torch.Generator().manual_seed(1000 * m + k)
    x = torch.randn(m, 2 * k, generator=generator)[:, :k] * 60  # rows that do not touch
    middles = (torch.randint(-300, 300, (m, k), generator=generator) + 0.5) * SCALE
    x = torch.where(torch.rand(m, k, generator=generator) < 0.3, middles, x).to(DTYPES[dtype])
    if m > 1:
        x[0] = 0.0
        x[1, 5], x[1, 6] = float("nan"), float("inf")
    if m > 2:
        x[2, 7], x[2, 8] = -float("inf"), float("inf")
    return x


def different(m: int, k: int, dtype: str, smoothed: bool, device: str) -> int:
    """Entries, values and scales, that are not those of the naive twin."""
    x = sample(m, k, dtype).to(device)
    if m == 5:
        x = x.T.contiguous().T  # columns side by side instead of rows
    smoothing = (torch.rand(k, generator=torch.Generator().manual_seed(k)) + 0.5).to(x.dtype).to(device)
    arguments = x, smoothing if smoothed else None, torch.tensor(SCALE, device=device)
    values, row_scale = quantize_int8(*arguments)
    expected, expected_scale = naive_quantize_int8(*arguments)
    assert (values.dtype, values.shape, row_scale.shape) == (torch.int8, expected.shape, expected_scale.shape)
    same = (row_scale == expected_scale) | (row_scale.isnan() & expected_scale.isnan())
    return int((values != expected).sum()) + int((~same).sum())


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
def test_on_a_gpu(case: tuple[int, int, str, bool]) -> None:
    assert different(*case, "cuda") == 0


def test_no_multiply_add_swallows_a_rounding() -> None:
    """The compiled kernel rounds products before it rounds to integers; without its options the compiler joins the two."""
    case = next(case for case in compile_cases(90) if case.name == "quantize_int8")
    signature = {name: case.types.get(name, "constexpr") for name in case.kernel.arg_names}
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=case.constexprs)
    for arch in (80, 90):
        fused = [
            "fma.rn" in triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options).asm["ptx"]
            for options in (case.options, {})
        ]
        assert fused == [False, True]


def test_the_twin_is_the_format() -> None:
    """Integers and scale mean what the format's do, NaN included: there a value is NaN, here its token's scale."""
    x = sample(5, 77, "fp32")
    right, scale = INT8StaticPerTensor().quantize(x, torch.tensor(0.25))
    values, row_scale = naive_quantize_int8(x, None, torch.tensor(0.25))
    assert scale is not None
    whole = ~x.isnan().any(dim=1)
    assert whole.tolist() == [True, False, True, True, True]
    assert torch.equal((values.float() * row_scale)[whole], (right * scale)[whole])
    assert bool((values.float() * row_scale)[~whole].isnan().all())


def test_what_a_layer_is_given() -> None:
    """Of int8 operands: a token with NaN keeps it, through smoothing, and no other token does."""
    x = sample(5, 77, "bf16")
    inputs = {"input_scale": torch.tensor(0.25), "pre_quant_scale": torch.full((77,), 0.5)}
    values, row_scale = round_input(x, INT8StaticPerTensor(), torch.int8, inputs)
    assert values.dtype == torch.int8
    assert row_scale is not None
    right, scale = INT8StaticPerTensor().quantize(x.float() * 0.5, torch.tensor(0.25))
    assert scale is not None
    spoiled = x.isnan().any(dim=1)
    assert torch.equal((values.float() * row_scale)[~spoiled], (right * scale)[~spoiled])
    assert torch.equal(row_scale.isnan().flatten(), spoiled)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(2, 4, 8), None, torch.ones(())), "x must"),
        ((torch.ones(4, 8, dtype=torch.int8), None, torch.ones(())), "x must"),
        ((torch.ones(4, 8), torch.ones(7), torch.ones(())), "smoothing must"),
        ((torch.ones(4, 8), None, torch.ones(2)), "static_scale must"),
        ((torch.ones(4, 8), None, torch.ones((), dtype=torch.float16)), "static_scale must"),
    ],
)
def test_what_would_be_misread_is_refused(arguments: tuple[torch.Tensor, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize_int8(*arguments)


def test_fake() -> None:
    """Compilers see shapes and types without a GPU."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        values, row_scale = quantize_int8(torch.ones(3, 32), None, torch.ones(()))
    assert (values.shape, values.dtype) == ((3, 32), torch.int8)
    assert (row_scale.shape, row_scale.dtype) == ((3, 1), torch.float32)
