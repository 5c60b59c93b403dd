"""PyTorch in place of other packages' kernels of linear layers.

Each checks its arguments with the package's own checks, reads scales and codes in the package's order, and computes in float64.
"""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

from sglang_modelopt_ext.backends.linear.humming import kernel_choice, layer_config
from sglang_modelopt_kernels.formats import e2m1, e4m3, ue8m0
from sglang_modelopt_kernels.formats.checks import scale_blocks
from tests.support.contracts import evaluate

GEMM, WEIGHT_ONLY = "flashinfer/gemm/gemm_base.py", "flashinfer/gemm/gemm_bf16_fp4.py"
NVFP4_UTILS = "quack/blockscaled/nvfp4_utils.py"


class SfLayout:
    layout_128x4, layout_8x4, layout_linear = range(3)


def unswizzled(scale: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    (function,) = evaluate(WEIGHT_ONLY, "_unswizzle_sf_128x4", torch=torch)
    result: torch.Tensor = function(scale, rows, columns)
    return result


def scales(stored: torch.Tensor, mx: bool) -> torch.Tensor:
    return ue8m0.decode(stored) if mx else e4m3.decode(stored.view(torch.float8_e4m3fn))


def fp4(codes: torch.Tensor, scale: torch.Tensor, mx: bool) -> torch.Tensor:
    """Return packed codes ``[R, K / 2]`` and swizzled scales as float64 ``[R, K]``."""
    rows, k = codes.shape[0], 2 * codes.shape[1]
    linear = unswizzled(scale, rows, k // (32 if mx else 16))
    return scale_blocks(e2m1.decode(e2m1.unpack_codes(codes)), scales(linear, mx)).double()


def mm_fp4(a: torch.Tensor, b: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    check = evaluate(
        GEMM,
        "_check_mm_fp4_problem_size",
        torch=torch,
        get_native_fp4_dtype=lambda: torch.float4_e2m1fn_x2,
    )[0]
    assert check(a, b, *args, **kwargs)
    a_descale, b_descale, alpha, out_dtype = args
    mx = not kwargs["use_nvfp4"]
    assert alpha.numel() == 1
    assert a.is_contiguous()
    assert b.T.is_contiguous()
    assert a_descale.is_contiguous()
    assert b_descale.T.is_contiguous()
    y = fp4(a, a_descale, mx) @ fp4(b.T, b_descale.T, mx).T
    return (y * alpha.double()).to(out_dtype)


def mm_nvfp4_svdquant(
    a: torch.Tensor,
    b: torch.Tensor,
    a_sf: torch.Tensor,
    b_sf: torch.Tensor,
    alpha: torch.Tensor,
    d: torch.Tensor,
    l1: torch.Tensor,
    backend: str,
) -> torch.Tensor:
    """Return ``alpha * (a @ b^T + d @ l1^T)``."""
    check = evaluate(
        "flashinfer/gemm/gemm_svdquant.py",
        "_check_mm_nvfp4_svdquant_problem",
        "_swizzled_sf_size",
        "_pad_up",
        torch=torch,
        SVDQUANT_LORA_RANK_GRANULARITY=32,
    )[0]
    assert check(a, b, a_sf, b_sf, alpha, d, l1, backend=backend)
    y = fp4(a, a_sf, False) @ fp4(b, b_sf, False).T + d.double() @ l1.double().T
    return (y * alpha.double()).to(torch.bfloat16)


def mm_mxfp8(a: torch.Tensor, b: torch.Tensor, a_descale: Any, b_descale: Any, **kwargs: Any) -> torch.Tensor:
    check = evaluate(
        GEMM,
        "_check_mm_mxfp8_problem_size",
        "_mxfp8_swizzled_scale_len",
        "_pad_up",
        "_validate_mxfp8_output_dtype",
        torch=torch,
        SfLayout=SfLayout,
    )[0]
    assert check(a, b, a_descale, b_descale, **kwargs)
    assert a.is_contiguous()
    assert b.T.is_contiguous()

    def decoded(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        linear = unswizzled(scale, codes.shape[0], codes.shape[1] // 32)
        return scale_blocks(e4m3.decode(codes), ue8m0.decode(linear)).double()

    return (decoded(a, a_descale) @ decoded(b.T, b_descale).T).to(kwargs["out_dtype"])


def prepare_bf16_fp4_weights(
    b: torch.Tensor, b_descale: torch.Tensor, alpha: torch.Tensor, *, backend: str, block_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return SM100's prepared weight: unchanged codes, and a view of the scales in the kernel's order."""
    function = evaluate(WEIGHT_ONLY, "prepare_bf16_fp4_weights", torch=torch)[0]
    with pytest.raises(ValueError, match="Unknown backend 'none'"):  # the checks before the backends
        function(b, b_descale, alpha, backend="none", block_size=block_size)
    (view, _) = evaluate("flashinfer/cute_dsl/utils.py", "convert_sf_to_mma_layout", "ceil_div", torch=torch)
    n, k = b.shape[0], 2 * b.shape[1]
    return b, view(b_descale, m=n, k=k, num_groups=1, sf_vec_size=block_size), alpha


def mm_bf16_fp4(
    a: torch.Tensor, b: torch.Tensor, b_descale: torch.Tensor, alpha: torch.Tensor, **kwargs: Any
) -> torch.Tensor:
    (check,) = evaluate(WEIGHT_ONLY, "_check_mm_bf16_fp4_problem_size", torch=torch)
    assert check(a, b, b_descale, alpha, **kwargs)
    rows, k = b.shape[0], 2 * b.shape[1]
    outer, inner, row_tile, column, column_tile = torch.meshgrid(
        *(torch.arange(size) for size in b_descale.shape[:5]), indexing="ij"
    )
    linear = torch.zeros(row_tile.max() * 128 + 128, column_tile.max() * 4 + 4)
    linear[row_tile * 128 + inner * 32 + outer, column_tile * 4 + column] = b_descale[..., 0].float()
    weight = scale_blocks(e2m1.decode(e2m1.unpack_codes(b)), linear[:rows, : k // 16])
    return (a.double() @ weight.double().T * alpha.double()).to(kwargs["out_dtype"])


def prepare_w4_weight(q: torch.Tensor, sf: torch.Tensor, wformat: str) -> tuple[torch.Tensor, torch.Tensor]:
    pad, weight, scale = (
        evaluate("quack/operand_transform/formats/__init__.py", "_pad_n128", torch=torch)[0],
        *evaluate(NVFP4_UTILS, "repack_nvfp4_weight", "repack_nvfp4_sf", torch=torch),
    )
    assert wformat == "nvfp4"
    q, sf = pad(q, sf)
    return weight(q), scale(sf)


def unpacked(repack: Callable[[torch.Tensor], torch.Tensor], packed: torch.Tensor, rows: int, columns: int) -> Any:
    """Return the bytes that ``repack`` put into ``packed``, by their original places, found one byte position at a time."""
    place = torch.arange(rows * columns).view(rows, columns)
    parts = [repack((place >> shift & 255).to(torch.uint8)).long() << shift for shift in (0, 8, 16)]
    result = torch.zeros(rows * columns, dtype=torch.uint8)
    result[torch.stack(parts).sum(0).flatten()] = packed.flatten()
    return result.view(rows, columns)


def gemm_w4a16(
    act: torch.Tensor, blob: torch.Tensor, sf: torch.Tensor, tensor_scale: torch.Tensor, n_out: int, wformat: str
) -> torch.Tensor:
    weight, scale = evaluate(NVFP4_UTILS, "repack_nvfp4_weight", "repack_nvfp4_sf", torch=torch)
    k = act.shape[1]
    assert wformat == "nvfp4"
    assert act.dtype == torch.bfloat16
    assert act.is_contiguous()
    assert tensor_scale.shape == (1,)
    assert tensor_scale.dtype == torch.float32
    rows = blob.shape[0] * 64
    codes = unpacked(weight, blob, rows, k // 2)
    linear = unpacked(scale, sf, rows, k // 16).view(torch.float8_e4m3fn)
    values = scale_blocks(e2m1.decode(e2m1.unpack_codes(codes)), e4m3.decode(linear)).double()
    return (act.double() @ values.T * tensor_scale.double()).to(torch.bfloat16)[:, :n_out]


def process_mxfp4_w4a8_weight(weight: torch.Tensor, offsets: torch.Tensor, inplace: bool) -> torch.Tensor:
    """Return the codes that are exact under a scale raised by ``offsets``."""
    assert inplace
    codes = e2m1.unpack_codes(weight.view(torch.uint8))
    lowered = scale_blocks(e2m1.decode(codes), torch.exp2(-offsets.view(codes.shape[0], -1).float()))
    weight.view(torch.uint8).copy_(e2m1.pack_codes(e2m1.encode(lowered)))
    return weight


def transform_humming_tensors(config: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Fold the exponents with humming's own function, and leave everything in its place."""
    (fold,) = evaluate(
        "humming/transform.py",
        "process_fused_e8m0_scale",
        torch=torch,
        dtypes=types.SimpleNamespace(int8="int8", float8e4m3="float8e4m3"),
        WeightScale2Type=types.SimpleNamespace(CHANNEL="channel"),
        ops=types.SimpleNamespace(process_mxfp4_w4a8_weight=process_mxfp4_w4a8_weight),
    )
    ones = torch.ones(config.shape_n, dtype=torch.bfloat16)
    weight, scale, scale_2 = fold(config, tensors["weight"], tensors["weight_scale"], ones)
    return {"weight": weight, "weight_scale": scale, "weight_scale_2": scale_2.to(torch.bfloat16)}


def prepare_layer_config(**arguments: Any) -> Any:
    assert arguments["torch_dtype"] == torch.bfloat16
    assert arguments["weight_schema"] == {
        "b_dtype": "float4e2m1",
        "bs_dtype": "float8e8m0",
        "weight_scale_group_size": 32,
        "weight_scale_2_type": "channel",
    }
    return types.SimpleNamespace(
        num_experts=0,
        weight_scale_2_type="channel",
        shape_n=arguments["shape_n"],
        a_dtype=arguments["input_schema"]["a_dtype"],
    )


def get_heuristics_config(config: Any) -> list[list[Any]]:
    """Return kernels as humming chooses them for SM90: sums are split, and with many tokens two blocks share their loads."""
    assert config.num_experts == 0
    return [
        [0, 700, {"num_stages": 4, "use_stream_k": True}],
        [700, 1 << 30, {"num_stages": 4, "use_stream_k": True, "multi_cast_size_a": 2}],
    ]


def humming_forward(
    config: Any,
    inputs: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_scale_2: torch.Tensor,
    input_scale: torch.Tensor,
    tuning_config: str,
) -> torch.Tensor:
    """Return whether a code times 2^scale fits humming's E4M3: its exponent is at most 12, and 12 for code 6 alone."""
    assert inputs.dtype == torch.float8_e4m3fn
    assert input_scale.shape == (inputs.shape[0], 1)
    assert input_scale.dtype == torch.float32
    (kernel,) = [kernel for above, to, kernel in json.loads(tuning_config) if above < inputs.shape[0] <= to]
    assert kernel == {"num_stages": 4, "multi_cast_size_a": 1, "multi_cast_size_b": 1, "use_stream_k": False}
    exponent = weight_scale.view(torch.uint8).float()
    used = scale_blocks(torch.ones(weight.shape[0], 8 * weight.shape[1]), exponent)
    values = e2m1.decode(e2m1.unpack_codes(weight.view(torch.uint8)))
    folded = values * torch.exp2(used - 7)  # into the range of E4M3
    assert torch.equal(e4m3.round_to_e4m3(folded), folded)
    y = inputs.double() @ (folded.double() * 2.0**7 * weight_scale_2.double()[:, None]).T
    return (y * input_scale.double()).to(torch.bfloat16)


def module(name: str, *functions: Callable[..., Any]) -> types.ModuleType:
    made = types.ModuleType(name)
    for function in functions:
        setattr(made, function.__name__, function)
    return made


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the kernels where the packages' own would be imported from."""
    monkeypatch.setitem(
        sys.modules,
        "flashinfer",
        module("flashinfer", mm_fp4, mm_nvfp4_svdquant, mm_mxfp8, mm_bf16_fp4, prepare_bf16_fp4_weights),
    )
    monkeypatch.setitem(sys.modules, "humming", module("humming"))
    schemas = module("humming.schema")
    schemas.HummingWeightSchema = schemas.HummingInputSchema = dict  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "humming.schema", schemas)
    transform = module("humming.transform", prepare_layer_config, transform_humming_tensors)
    monkeypatch.setitem(sys.modules, "humming.transform", transform)
    monkeypatch.setitem(sys.modules, "humming.forward", module("humming.forward", humming_forward))
    monkeypatch.setitem(sys.modules, "humming.tune", module("humming.tune", get_heuristics_config))
    layer_config.cache_clear()
    kernel_choice.cache_clear()
    monkeypatch.setitem(sys.modules, "quack", module("quack"))
    monkeypatch.setitem(sys.modules, "quack.gemm_w4", module("quack.gemm_w4", gemm_w4a16, prepare_w4_weight))
