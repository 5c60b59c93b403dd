"""The reference quantizers against real ModelOpt exports, bit for bit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from sglang_modelopt_kernels.formats import ACTIVATION_FORMATS, WEIGHT_FORMATS

if TYPE_CHECKING:
    from conftest import ModelOptExport

MLP = (("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))
ALL = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",), *MLP)
"""Linear layers that share their weight_scale_2, because a server runs them as one."""

SINGLE = tuple((linear,) for group in ALL for linear in group)

# preset, calibration algorithm in place of the preset's, weight format, quantized linear layers
WEIGHTS = [
    ("NVFP4_DEFAULT_CFG", None, "nvfp4", ALL),
    ("W4A16_NVFP4_CFG", None, "nvfp4", ALL),
    ("NVFP4_MLP_WEIGHT_ONLY_CFG", None, "nvfp4_bs32", MLP),
    ("W4A8_NVFP4_FP8_CFG", None, "nvfp4_w4a8", ALL),
    ("MXFP4_DEFAULT_CFG", None, "mxfp4", ALL),
    ("W4A8_MXFP4_FP8_CFG", None, "mxfp4", ALL),
    ("FP8_DEFAULT_CFG", None, "fp8", SINGLE),
    ("FP8_PER_CHANNEL_PER_TOKEN_CFG", None, "fp8_per_channel", ALL),
    ("FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG", None, "fp8_block", ALL),
    ("MXFP8_DEFAULT_CFG", None, "mxfp8", ALL),
    ("INT8_DEFAULT_CFG", None, "int8_per_channel", ALL),
    ("INT8_WEIGHT_ONLY_CFG", None, "int8_per_channel", ALL),
    ("INT4_BLOCKWISE_WEIGHT_ONLY_CFG", None, "int4_awq", ALL),
    # AWQ rescales the weight before it is quantized; without the search the weight that goes in is known.
    ("W4A8_AWQ_BETA_CFG", "max", "int4_awq_w4a8", ALL),
]

# preset, static activation format, amax / input_scale
INPUT_SCALES = [
    ("NVFP4_DEFAULT_CFG", "nvfp4_dynamic", 2688.0),
    ("W4A8_NVFP4_FP8_CFG", "fp8_static", 448.0),
    ("FP8_DEFAULT_CFG", "fp8_static", 448.0),
    ("INT8_DEFAULT_CFG", "int8_static", 127.0),
]


def assert_bits_equal(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Same dtype, shape and bytes: NaN equals itself here, and the zeros differ."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    assert torch.equal(raw_bytes(actual), raw_bytes(expected))


def raw_bytes(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous().view(-1).view(torch.uint8)


def test_every_format_is_compared_with_an_export() -> None:
    assert {name for _, _, name, _ in WEIGHTS} == set(WEIGHT_FORMATS)


# fp16, whose smallest numbers ModelOpt treats apart, once for each format.
FP16 = [row for i, row in enumerate(WEIGHTS) if row[2] not in {earlier[2] for earlier in WEIGHTS[:i]}]


@pytest.mark.parametrize(
    ("preset", "algorithm", "name", "groups", "dtype"),
    [(*row, torch.bfloat16) for row in WEIGHTS] + [(*row, torch.float16) for row in FP16],
    ids=[f"{row[0]}-bf16" for row in WEIGHTS] + [f"{row[0]}-fp16" for row in FP16],
)
def test_quantize_is_the_export(
    modelopt_export: ModelOptExport,
    preset: str,
    algorithm: str | None,
    name: str,
    groups: tuple[tuple[str, ...], ...],
    dtype: torch.dtype,
) -> None:
    export = modelopt_export(preset, dtype, algorithm)
    number_format = WEIGHT_FORMATS[name]
    for group in groups:
        fused = torch.cat([export.source[linear] for linear in group])
        quantized = number_format.quantize(fused)
        first_row = 0
        for linear in group:
            n, k = export.source[linear].shape
            stored = export.tensors_of(linear)
            for spec in number_format.tensors:
                part = quantized[spec.name]
                axis = spec.dim_of("N")
                if axis is not None:
                    per = spec.dims[axis].per
                    part = part.narrow(axis, first_row // per, n // per)
                assert stored[spec.name].shape == spec.shape(n, k)
                assert stored[spec.name].dtype in spec.dtypes
                assert_bits_equal(part, stored[spec.name])
            first_row += n


def test_quantize_is_the_export_with_short_fp8_blocks(modelopt_export: ModelOptExport) -> None:
    export = modelopt_export("FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG", torch.bfloat16, intermediate=296)
    number_format = WEIGHT_FORMATS["fp8_block"]
    for linear in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):  # N = 296, then K = 296
        weight = export.source[linear]
        quantized = number_format.quantize(weight)
        for spec in number_format.tensors:
            stored = export.tensors_of(linear)[spec.name]
            assert stored.shape == spec.shape(*weight.shape)
            assert_bits_equal(quantized[spec.name], stored)


@pytest.mark.parametrize(("preset", "name", "divisor"), INPUT_SCALES, ids=[row[0] for row in INPUT_SCALES])
def test_input_scale_is_amax_over_the_range(
    modelopt_export: ModelOptExport, preset: str, name: str, divisor: float
) -> None:
    export = modelopt_export(preset, torch.bfloat16)
    (spec,) = ACTIVATION_FORMATS[name].tensors
    for (linear,) in SINGLE:
        stored = export.tensors_of(linear)[spec.name]
        n, k = export.source[linear].shape
        assert stored.dtype in spec.dtypes
        assert stored.shape == spec.shape(n, k)
        assert_bits_equal(stored, torch.tensor(export.input_amax[linear]) / divisor)


@pytest.mark.parametrize("preset", ["W4A8_MXFP4_FP8_CFG", "FP8_PER_CHANNEL_PER_TOKEN_CFG", "MXFP8_DEFAULT_CFG"])
def test_dynamic_recipes_store_no_input_scale(modelopt_export: ModelOptExport, preset: str) -> None:
    export = modelopt_export(preset, torch.bfloat16)
    assert not [name for name in export.stored if name.endswith("input_scale")]
