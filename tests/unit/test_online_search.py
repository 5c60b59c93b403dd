"""The search for block scales: never worse than a max calibration in any block, and where it can be shown, the best there is."""

from __future__ import annotations

import pytest
import torch

from sglang_modelopt_ext.online.search import block_errors, round_rows
from sglang_modelopt_kernels.formats import WEIGHT_FORMATS
from sglang_modelopt_kernels.formats.base import SearchedWeightFormat
from sglang_modelopt_kernels.formats.nvfp4 import round_unit_to_e4m3

FORMATS = [name for name, number_format in WEIGHT_FORMATS.items() if isinstance(number_format, SearchedWeightFormat)]


def searched(name: str) -> SearchedWeightFormat:
    """Return a format by name."""
    found = WEIGHT_FORMATS[name]
    assert isinstance(found, SearchedWeightFormat)
    return found


def weights(seed: int = 0, rows: int = 96, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Return ``[rows, 256]``: normal, uniform and heavy-tailed values over many magnitudes, zero blocks, single large elements."""
    generator = torch.Generator().manual_seed(seed)
    parts = torch.randn(3, rows // 3, 256, generator=generator)
    parts[1] = torch.rand(rows // 3, 256, generator=generator) - 0.5
    parts[2] = parts[2] ** 3
    weight = parts.flatten(0, 1) * torch.exp2(torch.randint(-12, 6, (rows, 8), generator=generator)).repeat_interleave(
        32, 1
    )
    weight[0, :32] = 0
    weight[1, 5] = 40
    return weight.to(dtype)


def naive_errors(
    number_format: SearchedWeightFormat, weight: torch.Tensor, tensors: dict[str, torch.Tensor]
) -> torch.Tensor:
    """Return the squared error of each block, from the decoded weight."""
    difference = weight.double() - number_format.decode(tensors).dequantize().double()
    return difference.square().unflatten(1, (-1, number_format.group_size)).sum(-1)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_no_block_is_worse_than_under_a_max_calibration(name: str, dtype: torch.dtype) -> None:
    number_format, weight = searched(name), weights(dtype=dtype)
    rounded = round_rows(number_format, weight)
    ours, most = (naive_errors(number_format, weight, t) for t in (rounded.tensors, number_format.quantize(weight)))
    # dequantize() rounds to float32: a part in 2^24 of each value, whose square is at most 36 scales.
    assert bool((ours <= most * (1 + 1e-6) + 1e-13 * weight.double().square().amax()).all())
    assert float(ours.sum()) < 0.97 * float(most.sum())
    torch.testing.assert_close(rounded.error, float(ours.sum()), rtol=1e-5, atol=0)
    torch.testing.assert_close(rounded.max_error, float(most.sum()), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", FORMATS)
def test_without_a_search_it_is_the_max_calibration(name: str) -> None:
    number_format, weight = searched(name), weights(1)
    rounded, most = round_rows(number_format, weight, search=False), number_format.quantize(weight)
    for tensor in most:
        assert torch.equal(
            rounded.tensors[tensor].reshape(-1).view(torch.uint8), most[tensor].reshape(-1).view(torch.uint8)
        )
    assert rounded.error == rounded.max_error


def test_no_power_of_two_is_better_for_mxfp4() -> None:
    """Over all exponents, also on blocks that tempt to halve or quarter a scale: a large element beside steps of the finer one."""
    number_format = searched("mxfp4")
    steps = torch.randint(-24, 25, (256, 32), generator=torch.Generator().manual_seed(3)).float() / 4
    large = steps.clamp(-3, 3)
    large[:, 0] = torch.linspace(3.01, 6, 256)
    for weight in (weights(2), torch.cat([steps, large]).to(torch.bfloat16)):
        rounded = round_rows(number_format, weight)
        ours = block_errors(number_format, weight, rounded.tensors)
        best = torch.full_like(ours, torch.inf)
        for byte in range(127 - 24, 127 + 16):
            scale = torch.full_like(rounded.tensors["weight_scale"], byte)
            tensors = number_format.encode(weight, {"weight_scale": scale})
            best = torch.minimum(best, block_errors(number_format, weight, tensors))
        assert torch.equal(ours, best)


@pytest.mark.parametrize("name", ["nvfp4", "nvfp4_w4a8"])
def test_most_of_the_gain_of_a_sweep_over_all_scales(name: str) -> None:
    number_format, weight = searched(name), torch.randn(64, 512, generator=torch.Generator().manual_seed(4))
    rounded = round_rows(number_format, weight)
    scales = number_format.scales(weight)
    best = torch.full(scales["weight_scale"].shape, torch.inf, dtype=torch.float64)
    for byte in range(1, 0x7F):
        scale = torch.full_like(scales["weight_scale"].view(torch.uint8), byte).view(torch.float8_e4m3fn)
        best = torch.minimum(
            best, block_errors(number_format, weight, number_format.encode(weight, {**scales, "weight_scale": scale}))
        )
    gain, whole = rounded.max_error - rounded.error, rounded.max_error - float(best.sum())
    assert whole > 0
    assert gain > 0.9 * whole


def test_w4a8_stays_in_the_range_of_e4m3() -> None:
    """Where the weight is rounded to E4M3 before it is multiplied, code times block scale must not exceed 448."""
    number_format = searched("nvfp4_w4a8")
    tempting = torch.full(
        (1, 32), 4 * 80 / 448
    )  # a block scale of 80 holds all but the largest, which would become 6 * 80
    tempting[0, 0] = 1
    for weight in (tempting, weights(5)):
        round_unit_to_e4m3(number_format.decode(round_rows(number_format, weight).tensors))


def test_the_rounding_of_a_kernel_is_part_of_the_error() -> None:
    """A kernel that rounds code times block scale to E4M3 has less error with scales that were searched for it."""
    number_format, weight = searched("nvfp4_w4a8"), weights(8)
    errors = {}
    for math in ("exact", "fp8"):
        decoded = number_format.decode(round_rows(number_format, weight, math=math).tensors)
        errors[math] = (weight.double() - round_unit_to_e4m3(decoded).dequantize().double()).square().sum()
    assert errors["fp8"] < 0.99 * errors["exact"]
    torch.testing.assert_close(
        round_rows(number_format, weight, math="fp8").error, float(errors["fp8"]), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("name", FORMATS)
def test_threads_and_parts_do_not_matter(name: str) -> None:
    number_format, weight = searched(name), weights(6)
    amax = weight.abs().amax().float()
    whole = round_rows(number_format, weight, amax).tensors
    parts = [round_rows(number_format, rows, amax).tensors for rows in weight.split(7)]
    for tensor in ("weight", "weight_scale"):
        assert torch.equal(whole[tensor].view(torch.uint8), torch.cat([p[tensor].view(torch.uint8) for p in parts]))


@pytest.mark.gpu
@pytest.mark.parametrize("name", FORMATS)
def test_a_gpu_chooses_alike(name: str) -> None:
    number_format, weight = searched(name), weights(7, rows=3072)
    here, there = (round_rows(number_format, where).tensors for where in (weight, weight.cuda()))
    for tensor in here:
        assert torch.equal(
            here[tensor].reshape(-1).view(torch.uint8), there[tensor].cpu().reshape(-1).view(torch.uint8)
        )
