"""Fused smoothing and rounding under block scales against the formats' own, bit for bit: in Triton's interpreter, and on a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sglang_modelopt_kernels.formats import ACTIVATION_FORMATS
from sglang_modelopt_kernels.quantize.blocks import (
    BLOCK_ACTIVATIONS,
    naive_quantize_blocks,
    naive_swizzle,
    naive_unswizzle,
    quantize_blocks,
    round_blocks,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# (format, tokens, inputs, type of x, smoothed, output); K below, at and above what a program rounds
SIZES = [(1, 32, "bf16"), (3, 96, "fp16"), (2, 2048, "fp32"), (6, 2080, "bf16"), (0, 64, "bf16")]
CASES = [
    (activation, m, k, dtype, bool((index + shift) % 2), output)
    for shift, activation in enumerate(BLOCK_ACTIVATIONS)
    for index, (m, k, dtype) in enumerate(SIZES)
    for output in ("codes", ("fp32", "fp16")[index % 2])
] + [("nvfp4_dynamic", 130, 160, "bf16", True, "swizzled"), ("mxfp8_dynamic", 3, 96, "fp16", False, "swizzled")]


def activations(m: int, k: int, dtype: str) -> torch.Tensor:
    """Blocks over all binades with spread inside each, exact middles, zeros of both signs, subnormals, NaN and infinities."""
    generator = torch.Generator().manual_seed(1000 * m + k)
    x = torch.randn(m, 2 * k, generator=generator)[:, :k]  # rows that do not touch
    x = x * torch.exp2(torch.randint(-5, 1, (m, k), generator=generator))
    # Quarters of a block's largest / 6 are the middles of E2M1.
    middles = torch.randint(-24, 25, (m, k), generator=generator) / 4
    x = torch.where(torch.rand(m, k, generator=generator) < 0.4, middles, x)
    lowest = -90 if dtype == "bf16" else -148  # the interpreter reads bf16's subnormal numbers as zero
    blocks = torch.randint(lowest, 126, (m, k // 16), generator=generator).repeat_interleave(16, dim=1)
    ordinary = (torch.arange(m) % 2 == 0).unsqueeze(1)
    x = torch.ldexp(x, torch.where(ordinary, blocks.remainder(12) - 6, blocks))
    if m > 2:
        x[0, :16], x[0, 16:32] = 0.0, -0.0
        x[1, 0], x[1, 40], x[2, 7] = float("nan"), float("inf"), -float("inf")
        x[2, 64:96] = torch.exp2(torch.arange(-149.0, -117.0).clamp(min=-126 if dtype == "bf16" else -149))
        x[0, 64:96] = 0.0
        x[0, 70] = 2.0**-149  # a block whose amax is lost by the division
    return x.to(DTYPES[dtype])


def different(activation: str, m: int, k: int, dtype: str, smoothed: bool, output: str, device: str) -> int:
    """Codes and block scales, or values, that are not those of the naive twin."""
    x = activations(m, k, dtype).to(device)
    if m == 6:
        x = x.T.contiguous().T  # columns side by side instead of rows
    smoothing = (torch.rand(k, generator=torch.Generator().manual_seed(k)) + 0.5) if smoothed else None
    smoothing = None if smoothing is None else smoothing.to(DTYPES[dtype]).to(device)
    input_scale = torch.tensor(0.0123, device=device) if activation == "nvfp4_dynamic" else None
    if output in DTYPES:
        got, row_scale = round_blocks(x, activation, smoothing, input_scale, DTYPES[output])
        wide = x.float() if smoothing is None else x.float() * smoothing.float()
        values, expected_scale = ACTIVATION_FORMATS[activation].quantize(wide, input_scale)
        assert (row_scale is None) == (expected_scale is None)
        right = values.to(DTYPES[output])
        return int((~((got == right) | (got.isnan() & right.isnan()))).sum())
    expected = naive_quantize_blocks(x, activation, smoothing, input_scale)
    rounded = quantize_blocks(x, activation, smoothing, input_scale, swizzled=output == "swizzled")
    scale = naive_swizzle(expected.scale) if output == "swizzled" else expected.scale
    assert (rounded.codes.dtype, rounded.scale.dtype) == (expected.codes.dtype, expected.scale.dtype)
    spoiled = expected.scale.float().isnan() if input_scale is not None else expected.scale == 255
    spoiled = spoiled.repeat_interleave(expected.codes.shape[1] // expected.scale.shape[1], dim=1)
    # A code under a NaN scale means nothing.
    wrong = int(((rounded.codes.view(torch.uint8) != expected.codes.view(torch.uint8)) & ~spoiled).sum())
    return wrong + int((rounded.scale.view(torch.uint8) != scale.view(torch.uint8)).sum())


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
@pytest.mark.parametrize("case", [*CASES, ("mxfp4_dynamic", 6, 2080, "fp32", True, "bf16")], ids=str)
def test_on_a_gpu(case: tuple[str, int, int, str, bool, str]) -> None:
    assert different(*case, "cuda") == 0


@pytest.mark.parametrize("activation", BLOCK_ACTIVATIONS)
def test_the_codes_are_the_values(activation: str) -> None:
    """The codes of a format decode to its values."""
    x = activations(6, 2080, "fp32")
    input_scale = torch.tensor(0.0123) if activation == "nvfp4_dynamic" else None
    rounded = naive_quantize_blocks(x, activation, None, input_scale)
    values, row_scale = ACTIVATION_FORMATS[activation].quantize(x, input_scale)
    table = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    if activation == "mxfp8_dynamic":
        numbers = rounded.codes.double()
    else:
        codes = torch.stack((rounded.codes & 15, rounded.codes >> 4), dim=-1).flatten(-2).long()
        numbers = torch.tensor([*table, *(-number for number in table)], dtype=torch.float64)[codes]
    scale = rounded.scale
    steps = scale.double() if activation == "nvfp4_dynamic" else torch.exp2(scale.double() - 127)
    steps = torch.where(scale.view(torch.uint8) == 255, float("nan"), steps)
    product = numbers * steps.repeat_interleave(x.shape[1] // scale.shape[1], dim=1)
    assert torch.equal(product.float().nan_to_num(7e30), values.nan_to_num(7e30))
    assert (rounded.row_scale is None) == (row_scale is None)


def test_swizzled_places() -> None:
    """The byte of row r and block c, counted as the documentation of the instruction does."""
    m, blocks = 200, 6
    scale = torch.arange(m * blocks, dtype=torch.int32).remainder(251).to(torch.uint8).view(m, blocks) + 1
    flat = naive_swizzle(scale).flatten()
    assert flat.shape == (256 * 8,)
    seen = torch.zeros_like(flat)
    for row in range(m):
        for block in range(blocks):
            tile = row // 128 * 2 + block // 4
            at = tile * 512 + (row % 32) * 16 + (row % 128) // 32 * 4 + block % 4
            assert flat[at] == scale[row, block]
            seen[at] = 1
    assert int(seen.sum()) == m * blocks
    assert bool((flat[seen == 0] == 0).all())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (128, 4), (127, 3), (129, 5), (1030, 18), (256, 8)], ids=str)
def test_tiles_give_the_scales_back(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """The inverse, for rows and blocks that are whole tiles and that are not."""
    scale = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(1), dtype=torch.uint8).view(dtype)
    back = naive_unswizzle(naive_swizzle(scale), *shape)
    assert (back.dtype, back.shape) == (dtype, shape)
    assert torch.equal(back.view(torch.uint8), scale.view(torch.uint8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "fp8_static"}, "activation must"),
        ({"x": torch.ones(2, 4, 8)}, "x must"),
        ({"x": torch.ones(4, 24)}, "x must"),
        ({"x": torch.ones(4, 32, dtype=torch.int8)}, "x must"),
        ({"smoothing": torch.ones(31)}, "smoothing must"),
        ({"input_scale": None}, "input_scale must be given"),
        ({"activation": "mxfp4_dynamic"}, "input_scale must be left out"),
        ({"input_scale": torch.ones(2)}, "input_scale must be one"),
        ({"input_scale": torch.ones((), dtype=torch.float16)}, "input_scale must be one"),
    ],
)
def test_what_would_be_misread_is_refused(change: dict[str, object], message: str) -> None:
    arguments = {
        "x": torch.ones(4, 32),
        "activation": "nvfp4_dynamic",
        "smoothing": None,
        "input_scale": torch.ones(()),
    }
    for function in (quantize_blocks, round_blocks):
        with pytest.raises(ValueError, match=message):
            function(**(arguments | change))  # type: ignore[operator]
    with pytest.raises(ValueError, match="out_dtype must"):
        round_blocks(torch.ones(4, 32), "mxfp8_dynamic", out_dtype=torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="fp8_static has no block scales"):
        naive_quantize_blocks(torch.ones(4, 32), "fp8_static", None, torch.ones(()))


@pytest.mark.parametrize("activation", BLOCK_ACTIVATIONS)
@pytest.mark.parametrize("swizzled", [False, True])
def test_fake(activation: str, swizzled: bool) -> None:
    """Compilers see shapes and types without a GPU."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        scale = torch.ones(()) if activation == "nvfp4_dynamic" else None
        got = quantize_blocks(torch.ones(3, 96), activation, None, scale, swizzled)
        values, _ = round_blocks(torch.ones(3, 96), activation, None, scale, torch.bfloat16)
    right = naive_quantize_blocks(torch.ones(3, 96), activation, None, None if scale is None else torch.ones(()))
    assert (got.codes.shape, got.codes.dtype) == (right.codes.shape, right.codes.dtype)
    expected = naive_swizzle(right.scale) if swizzled else right.scale
    assert (got.scale.shape, got.scale.dtype) == (expected.shape, expected.dtype)
    assert (values.shape, values.dtype) == ((3, 96), torch.bfloat16)
