"""Every registered activation format, against arithmetic written out here and against ModelOpt's own simulation."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from sglang_modelopt_kernels.formats import ACTIVATION_FORMATS
from sglang_modelopt_kernels.formats.base import ActivationFormat, ValueRule
from sglang_modelopt_kernels.formats.mxfp4 import MXFP4Dynamic
from sglang_modelopt_kernels.formats.mxfp8 import MXFP8Dynamic
from sglang_modelopt_kernels.formats.nvfp4 import NVFP4DynamicBlock

every_format = pytest.mark.parametrize("number_format", ACTIVATION_FORMATS.values(), ids=ACTIVATION_FORMATS)
BLOCK = {"nvfp4_dynamic": 16, "mxfp4_dynamic": 32, "mxfp8_dynamic": 32}
DYNAMIC = ["fp8_per_token", "mxfp4_dynamic", "mxfp8_dynamic"]
STATIC = ["fp8_static", "int8_static", "nvfp4_dynamic"]
RANGE = {"fp8_static": 448.0, "int8_static": 127.0, "nvfp4_dynamic": 2688.0}
"""amax / input_scale of the static formats."""

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E4M3 = tuple(m * 2.0**-9 for m in range(8)) + tuple(
    (8 + m) * 2.0 ** (e - 10) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)
)


def activation(m: int = 5, k: int = 96, seed: int = 0) -> torch.Tensor:
    """Gaussian bf16 numbers in float32, with an outlier, zeros, and one row far smaller than the others."""
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(seed)).bfloat16().float()
    x[0, 3] = 90.0
    x[1, :32] = 0.0
    x[-1] *= 2.0**-12
    return x


def calibrated(name: str, x: torch.Tensor) -> torch.Tensor:
    """The ``input_scale`` that calibration on ``x`` would export for a static format."""
    return x.abs().max() / RANGE[name]


def scale_for(number_format: ActivationFormat, x: torch.Tensor) -> torch.Tensor | None:
    """The scale to pass to a format: that of calibration on ``x``, or None for a dynamic one."""
    return calibrated(number_format.name, x) if number_format.tensors else None


def dequantized(number_format: ActivationFormat, x: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    values, row_scale = number_format.quantize(x, scale)
    return values if row_scale is None else values * row_scale


def nearest_even(x: float, magnitudes: tuple[float, ...]) -> float:
    """``x`` rounded to a signed magnitude; of two that are equally near, the one with the even index."""
    index = min(range(len(magnitudes)), key=lambda i: (abs(abs(x) - magnitudes[i]), i % 2))
    return math.copysign(magnitudes[index], x)


def float32(x: float) -> float:
    return torch.tensor(x, dtype=torch.float32).item()


def test_formats_are_static_or_dynamic() -> None:
    assert set(STATIC) | set(DYNAMIC) == set(ACTIVATION_FORMATS)
    assert {name for name, f in ACTIVATION_FORMATS.items() if f.tensors} == set(STATIC)


@pytest.mark.parametrize("name", STATIC)
def test_static_formats_declare_one_positive_scale(name: str) -> None:
    (spec,) = ACTIVATION_FORMATS[name].tensors
    assert (spec.name, spec.dtypes, spec.is_scalar) == ("input_scale", (torch.float32,), True)
    assert spec.values is ValueRule.POSITIVE


@every_format
@pytest.mark.parametrize("shape", [(1, 32), (5, 96), (0, 32)])
def test_shapes_and_dtypes(number_format: ActivationFormat, shape: tuple[int, int]) -> None:
    x = activation()[: shape[0], : shape[1]]
    scale = torch.tensor(0.02) if number_format.tensors else None
    values, row_scale = number_format.quantize(x, scale)
    assert (values.dtype, values.shape) == (torch.float32, shape)
    assert row_scale is None or (row_scale.dtype == torch.float32 and row_scale.shape in [(), (shape[0], 1)])


@every_format
def test_rows_do_not_see_each_other(number_format: ActivationFormat) -> None:
    """One token at a time gives the same bits: what continuous batching rests on."""
    x = activation()
    scale = scale_for(number_format, x)
    together = dequantized(number_format, x, scale)
    alone = torch.cat([dequantized(number_format, x[i : i + 1], scale) for i in range(len(x))])
    assert torch.equal(together, alone)


@every_format
def test_sign_symmetry_and_input_untouched(number_format: ActivationFormat) -> None:
    x = activation()
    before = x.clone()
    scale = scale_for(number_format, x)
    assert torch.equal(dequantized(number_format, -x, scale), -dequantized(number_format, x, scale))
    assert torch.equal(x, before)


@every_format
def test_all_zero_rows_stay_zero(number_format: ActivationFormat) -> None:
    scale = torch.tensor(0.5) if number_format.tensors else None
    values, row_scale = number_format.quantize(torch.zeros(2, 32), scale)
    assert torch.equal(values, torch.zeros(2, 32))
    assert row_scale is None or torch.isfinite(row_scale).all()


@every_format
def test_nan_comes_out_where_it_went_in(number_format: ActivationFormat) -> None:
    x = activation()
    x[2, 40] = math.nan
    out = dequantized(number_format, x, scale_for(number_format, activation()))
    assert out[2, 40].isnan()
    assert not out[:2].isnan().any()
    assert not out[3:].isnan().any()


@pytest.mark.parametrize("name", [*DYNAMIC, "nvfp4_dynamic"])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_shares_a_dynamic_scale_with_a_non_finite_number_becomes_nan(name: str, bad: float) -> None:
    number_format = ACTIVATION_FORMATS[name]
    x = activation()
    scale = scale_for(number_format, x)
    clean = dequantized(number_format, x, scale)
    x[2, 40] = bad
    values, _ = number_format.quantize(x, scale)
    out = dequantized(number_format, x, scale)
    block = BLOCK.get(name, x.shape[1])
    first = 40 // block * block
    assert values[2, first : first + block].isnan().all()  # not left to the scale: a kernel may multiply it in later
    assert out[2, first : first + block].isnan().all()
    out[2, first : first + block] = clean[2, first : first + block]
    assert torch.equal(out, clean)


@pytest.mark.parametrize("name", ["fp8_static", "int8_static"])
def test_static_formats_saturate(name: str) -> None:
    number_format = ACTIVATION_FORMATS[name]
    scale = torch.tensor(0.25)
    x = torch.tensor([[1e30, -1e30, math.inf, -math.inf]])
    values, _ = number_format.quantize(x, scale)
    lowest = -128.0 if name == "int8_static" else -448.0
    assert values.tolist() == [[RANGE[name], lowest, RANGE[name], lowest]]


@pytest.mark.parametrize("name", STATIC)
def test_static_formats_need_exactly_one_scale(name: str) -> None:
    for bad in (None, torch.ones(2), torch.ones(2, 1)):
        with pytest.raises(ValueError, match="input_scale"):
            ACTIVATION_FORMATS[name].quantize(torch.ones(1, 32), bad)
    _, row_scale = ACTIVATION_FORMATS[name].quantize(torch.ones(1, 32), torch.ones(1))
    assert row_scale is not None
    assert row_scale.shape == ()


@pytest.mark.parametrize("name", STATIC)
def test_a_static_scale_for_each_row(name: str) -> None:
    """Rows with scales of their own are rounded as each would be alone."""
    number_format = ACTIVATION_FORMATS[name]
    x = activation()
    scales = torch.linspace(0.5, 2.0, len(x)).unsqueeze(1) * calibrated(name, x)
    values, row_scale = number_format.quantize(x, scales)
    assert row_scale is not None
    assert torch.equal(row_scale, scales)
    alone = [number_format.quantize(x[i : i + 1], scales[i])[0] for i in range(len(x))]
    assert torch.equal(values, torch.cat(alone))


def test_only_a_format_that_scales_tokens_has_a_token_amax() -> None:
    x = activation()
    for name, number_format in ACTIVATION_FORMATS.items():
        amax = number_format.token_amax(x)
        if name == "fp8_per_token":
            assert amax is not None
            assert amax.squeeze(1).tolist() == [max(map(abs, row)) for row in x.tolist()]
        else:
            assert amax is None


def test_slices_of_a_token_round_like_the_whole() -> None:
    """Tensor parallelism needs it: each rank holds some of the values along K and is told the amax of all."""
    number_format = ACTIVATION_FORMATS["fp8_per_token"]
    x = activation()
    whole, whole_scale = number_format.quantize(x, None)
    amax = x.abs().amax(dim=1, keepdim=True)
    slices = [number_format.quantize(part, amax) for part in x.split(32, dim=1)]
    assert torch.equal(torch.cat([values for values, _ in slices], dim=1), whole)
    for _, row_scale in slices:
        assert row_scale is not None
        assert whole_scale is not None
        assert torch.equal(row_scale, whole_scale)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_non_finite_slice_survives_a_maximum_that_lost_it(bad: float) -> None:
    x = activation()
    amax = x.abs().amax(dim=1, keepdim=True)
    x[2, 40] = bad
    values, _ = ACTIVATION_FORMATS["fp8_per_token"].quantize(x, amax)
    assert values[2].isnan().all()
    assert values.isnan().any(dim=1).tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("shape", [(), (1,), (5,), (1, 5)])
def test_the_amax_of_tokens_has_one_entry_for_each(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="5 tokens"):
        ACTIVATION_FORMATS["fp8_per_token"].quantize(activation(), torch.ones(shape))


@pytest.mark.parametrize("name", ["mxfp4_dynamic", "mxfp8_dynamic"])
def test_formats_with_dynamic_blocks_take_no_scale(name: str) -> None:
    with pytest.raises(ValueError, match="takes none"):
        ACTIVATION_FORMATS[name].quantize(torch.ones(1, 32), torch.tensor(1.0))


@every_format
def test_activations_are_float32_matrices_of_whole_blocks(number_format: ActivationFormat) -> None:
    scale = torch.tensor(1.0) if number_format.tensors else None
    for bad in (torch.ones(1, 32, dtype=torch.bfloat16), torch.ones(32)):
        with pytest.raises(ValueError, match="float32"):
            number_format.quantize(bad, scale)
    if number_format.name in BLOCK:
        with pytest.raises(ValueError, match="multiple"):
            number_format.quantize(torch.ones(1, 40), scale)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@every_format
def test_a_gpu_gives_the_bits_of_a_cpu(number_format: ActivationFormat) -> None:
    x = activation()
    scale = scale_for(number_format, x)
    on_gpu = dequantized(number_format, x.cuda(), None if scale is None else scale.cuda())
    assert torch.equal(dequantized(number_format, x, scale), on_gpu.cpu())


# ---- one Python number at a time ------------------------------------------------------------------------------------


def test_fp8_static_number_by_number() -> None:
    x = activation()
    scale = calibrated("fp8_static", x)
    values, row_scale = ACTIVATION_FORMATS["fp8_static"].quantize(x, scale)
    inverse = float32(1 / scale.item())
    want = [[nearest_even(float32(v * inverse), E4M3) for v in row] for row in x.tolist()]
    assert values.tolist() == want
    assert row_scale is not None
    assert torch.equal(row_scale, scale)


def test_int8_static_number_by_number() -> None:
    x = activation()
    x[0, :4] = torch.tensor([0.5, 1.5, -2.5, 90.0])
    for scale in (calibrated("int8_static", x), torch.tensor(1.0)):
        values, _ = ACTIVATION_FORMATS["int8_static"].quantize(x, scale)
        inverse = float32(1 / scale.item())
        want = [[max(-128, min(127, round(float32(v * inverse)))) for v in row] for row in x.tolist()]
        assert values.tolist() == want


def test_fp8_per_token_number_by_number() -> None:
    x = activation()
    x[2] = 0.0
    values, row_scale = ACTIVATION_FORMATS["fp8_per_token"].quantize(x, None)
    assert row_scale is not None
    for row, got, scale in zip(x.tolist(), values.tolist(), row_scale.squeeze(1).tolist(), strict=True):
        amax = max(map(abs, row))
        assert scale == (float32(amax / 448) if amax else 1.0)
        assert got == [nearest_even(float32(v * float32(1 / scale)), E4M3) for v in row]


@pytest.mark.parametrize("name", ["fp8_static", "fp8_per_token", "int8_static"])
def test_the_reciprocal_of_the_scale_is_multiplied(name: str) -> None:
    """Kernels multiply by it. At the ties of the grid, dividing would now and then give the other neighbour."""
    number_format = ACTIVATION_FORMATS[name]
    grid = tuple(map(float, range(128))) if name == "int8_static" else E4M3
    ties = torch.tensor([(a + b) / 2 for a, b in pairwise(grid)])
    differs = 0
    for amax in (3.0, 5.0, 11.0, 90.0):
        scale = torch.tensor(amax) / grid[-1]
        x = torch.cat((ties * scale, torch.tensor([amax]))).unsqueeze(0)
        values, _ = number_format.quantize(x, scale if number_format.tensors else None)
        want = [nearest_even(float32(v * float32(1 / scale.item())), grid) for v in x[0].tolist()]
        assert values[0].tolist() == want
        differs += want != [nearest_even(float32(v / scale.item()), grid) for v in x[0].tolist()]
    assert differs  # else the test could not fail


@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-30, 1e30])
def test_fp8_per_token_at_extreme_sizes(size: float) -> None:
    x = activation() * size
    out = dequantized(ACTIVATION_FORMATS["fp8_per_token"], x, None)
    # Half an e4m3 gap, or the floor of the scale, 2^-126: below it the subnormals of E4M3 are 2^-135 apart.
    bound = x.abs() * (2.0**-4 + 2.0**-20) + x.abs().amax(1, keepdim=True) / 448 * 2.0**-10 + 2.0**-136 + 2.0**-149
    assert ((out - x).abs().double() <= bound.double()).all()


@pytest.mark.parametrize("name", ["mxfp4_dynamic", "mxfp8_dynamic"])
def test_mx_number_by_number(name: str) -> None:
    x = activation()
    values, _ = ACTIVATION_FORMATS[name].quantize(x, None)
    grid = E2M1 if name == "mxfp4_dynamic" else E4M3
    for row, got in zip(x.tolist(), values.tolist(), strict=True):
        for first in range(0, len(row), 32):
            block = row[first : first + 32]
            exponent = -127
            while max(map(abs, block)) > grid[-1] * 2.0**exponent:
                exponent += 1
            want = [nearest_even(v / 2.0**exponent, grid) * 2.0**exponent for v in block]
            assert got[first : first + 32] == want


def test_nvfp4_number_by_number() -> None:
    x = activation()
    scale = calibrated("nvfp4_dynamic", x)
    values, row_scale = ACTIVATION_FORMATS["nvfp4_dynamic"].quantize(x, scale)
    assert row_scale is not None
    assert torch.equal(row_scale, scale)
    for row, got in zip(x.tolist(), values.tolist(), strict=True):
        for first in range(0, len(row), 16):
            block = row[first : first + 16]
            ratio = float32(max(map(abs, block)) / float32(6 * scale.item()))
            block_scale = nearest_even(min(ratio, 448.0), E4M3)
            step = float32(block_scale * scale.item()) or math.inf
            want = [nearest_even(float32(v / step), E2M1) * block_scale for v in block]
            assert got[first : first + 16] == want


def test_nvfp4_blocks_beyond_calibration_saturate_and_those_below_vanish() -> None:
    number_format = NVFP4DynamicBlock()
    x = torch.zeros(2, 16)
    x[0, :2] = torch.tensor([5000.0, -100.0])  # 448 * 6 = 2688 is the most there is
    x[1, 0] = 6 * 2.0**-10  # its scale is a tie between 0 and the smallest, 2^-9: even is 0
    codes, block_scale = number_format.encode(x, torch.tensor(1.0))
    assert block_scale.float().tolist() == [[448.0], [0.0]]
    values, _ = number_format.quantize(x, torch.tensor(1.0))
    assert values[0, 0] == 2688.0
    assert (values[1] == 0).all()
    assert (codes[1] & 7 == 0).all()


@pytest.mark.parametrize("name", list(BLOCK))
def test_encode_is_what_quantize_decodes(name: str) -> None:
    number_format = ACTIVATION_FORMATS[name]
    x = activation()
    scale = scale_for(number_format, x)
    if isinstance(number_format, NVFP4DynamicBlock):
        codes, block_scale = number_format.encode(x, calibrated(name, x))
    else:
        assert isinstance(number_format, MXFP4Dynamic | MXFP8Dynamic)
        codes, block_scale = number_format.encode(x)
    assert codes.shape == x.shape
    assert block_scale.shape == (x.shape[0], x.shape[1] // BLOCK[name])
    values, _ = number_format.quantize(x, scale)
    e2m1_values = torch.tensor([*E2M1, *(-v for v in E2M1)])
    elements = e2m1_values[codes.int()] if codes.dtype == torch.uint8 else codes.float()
    scales = torch.exp2(block_scale.float() - 127) if block_scale.dtype == torch.uint8 else block_scale.float()
    assert torch.equal(values, elements * scales.repeat_interleave(BLOCK[name], dim=1))


# ---- ModelOpt's simulation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("amax", [448 * 2.0**-3, 448.0])
def test_fp8_is_modelopts_simulation(amax: float) -> None:
    """Bit for bit where amax / 448 is a power of two; elsewhere 448 / amax and its inverse are rounded differently."""
    tensor_quant = pytest.importorskip("modelopt.torch.quantization.tensor_quant")
    x = activation().clamp(-amax, amax)
    x[:, 5] = amax
    rows = torch.full((len(x), 1), amax)
    want = tensor_quant.fp8_eager(x, torch.tensor(amax))
    assert torch.equal(dequantized(ACTIVATION_FORMATS["fp8_static"], x, torch.tensor(amax) / 448), want)
    want = tensor_quant.fp8_eager(x, rows)
    assert torch.equal(dequantized(ACTIVATION_FORMATS["fp8_per_token"], x, None), want)


def test_int8_is_modelopts_simulation() -> None:
    tensor_quant = pytest.importorskip("modelopt.torch.quantization.tensor_quant")
    x = activation()
    amax = torch.tensor(127 * 2.0**-2)
    want = tensor_quant.fake_tensor_quant(x, amax, None, 8, False, False)
    assert torch.equal(dequantized(ACTIVATION_FORMATS["int8_static"], x, amax / 127), want)
