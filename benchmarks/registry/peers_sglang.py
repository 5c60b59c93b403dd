"""Products that SGLang calls, through its own functions: peers of :mod:`benchmarks.gemm`, where they are installed.

A Llama of ModelOpt's static FP8 (``modelopt_fp8``) on SM90, SM100 and SM120 multiplies by
``apply_fp8_linear_bmm_flashinfer``, with any number of tokens: a launch that rounds the activations, then FlashInfer's ``bmm_fp8``
on its cuBLAS backend. The server lets FlashInfer's tuner choose among the algorithms that cuBLAS offers, for as many tokens as its
largest CUDA graph of decoding has; with more tokens cuBLAS chooses. On SM120 a kernel of SGLang's own comes first. On SM89, and
wherever N or K is no multiple of 16, it multiplies by ``apply_fp8_linear`` with a scale for each column, as it does for the static
scales of ``fp8`` checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

from benchmarks.registry.base import TOLERANCE, Product
from benchmarks.registry.operands import random_bf16, random_codes, random_fp8, random_scale
from sglang_modelopt_kernels.formats import e2m1

GROUP = 128
"""K elements under a scale of Marlin's INT4 weights."""
INPUT_SCALE = 2.0**-6
"""Scale of static FP8 activations. To divide by a power of two and to multiply by its reciprocal is one; no ``randn`` saturates."""
ROWS = 2112
"""N of Marlin's check, no multiple of its tiles of 128 columns. Below 2048 SGLang lets it add parts of a sum in bf16."""


def _fp8_weight(n: int, k: int) -> dict[str, Any]:
    """Make a random FP8 weight with one scale, the weight transposed as ``ModelOptFp8LinearMethod`` keeps it."""
    codes, scale = random_fp8(n, k), torch.full((), 0.01, device="cuda")
    return {
        "codes": codes,
        "scale": scale,
        "weight": codes.T,
        "input_scale": torch.full((), INPUT_SCALE, device="cuda"),
    }


def _column_weight(n: int, k: int) -> dict[str, Any]:
    """Make a random FP8 weight with its one scale repeated for each column, as ``convert_to_channelwise`` does."""
    return {**_fp8_weight(n, k), "scale": torch.full((n, 1), 0.01, device="cuda")}


def _naive_fp8(x: torch.Tensor, weight: Mapping[str, Any]) -> torch.Tensor:
    """Multiply in float64, bf16 activations after rounding them to E4M3."""
    if x.dtype != torch.float8_e4m3fn:
        x = (x.double() / weight["input_scale"].double()).clamp(-448, 448).to(torch.float8_e4m3fn)
    scale = weight["scale"].flatten()[0].double() * weight["input_scale"].double()
    return x.double() @ weight["codes"].double().T * scale


@contextmanager
def tuning(tuned: bool) -> Iterator[None]:
    """Tune as SGLang's tuning pass does, or leave the choice to cuBLAS. While a graph is captured, what was tuned is used."""
    from flashinfer import autotune, autotune_v2

    with ExitStack() as contexts:
        if not tuned:
            contexts.enter_context(autotune(False, skip_ops={"fp8_gemm"}))
        elif not torch.cuda.is_current_stream_capturing():
            contexts.enter_context(autotune(True))
            contexts.enter_context(autotune_v2(mode="tune", persistent_cache=False))
        yield


def bmm(x: torch.Tensor, weight: Mapping[str, Any], tuned: bool = True) -> torch.Tensor:
    """Compute the product of E4M3 activations by SGLang's operator over FlashInfer's ``bmm_fp8``, in bf16."""
    from sglang.srt.layers.quantization.fp8_utils import flashinfer_bmm_fp8

    with tuning(tuned):
        y: torch.Tensor = flashinfer_bmm_fp8(
            x, weight["weight"], weight["input_scale"], weight["scale"], torch.bfloat16
        )
    return y


def _run_bmm(tuned: bool, x: torch.Tensor, weight: Mapping[str, Any], out_dtype: torch.dtype) -> torch.Tensor:
    return bmm(x, weight, tuned).to(out_dtype)


def _run_linear(x: torch.Tensor, weight: Mapping[str, Any], out_dtype: torch.dtype) -> torch.Tensor:
    """Round bf16 activations and multiply, as ``ModelOptFp8LinearMethod.apply`` does from SM90."""
    from sglang.srt.layers.quantization.fp8_utils import apply_fp8_linear_bmm_flashinfer

    with tuning(True):
        y: torch.Tensor = apply_fp8_linear_bmm_flashinfer(
            input=x, weight=weight["weight"], weight_scale=weight["scale"], input_scale=weight["input_scale"], bias=None
        )
    return y.to(out_dtype)


def _run_columns(x: torch.Tensor, weight: Mapping[str, Any], out_dtype: torch.dtype) -> torch.Tensor:
    """Multiply E4M3 activations with a scale for each column, by sgl_kernel or whatever SGLang prefers for the shape."""
    from sglang.srt.layers.quantization.fp8_utils import apply_fp8_linear

    y: torch.Tensor = apply_fp8_linear(
        input=x,
        weight=weight["weight"],
        weight_scale=weight["scale"],
        input_scale=weight["input_scale"],
        bias=None,
        cutlass_fp8_supported=True,
    )
    return y.to(out_dtype)


def gptq_codes(codes: torch.Tensor) -> torch.Tensor:
    """Return 4-bit codes uint8 ``[N, K / 2]``, the even k in the low nibble, in GPTQ's packing: int32 ``[K / 8, N]``."""
    return codes.view(torch.int32).T.contiguous()


def int4_values(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Read 4-bit codes, uint8 ``[N, K / 2]``, less 8 under scales ``[N, K / 128]``: float64 ``[N, K]``."""
    return (e2m1.unpack_codes(codes).double() - 8) * scale.double().repeat_interleave(GROUP, dim=1)


def nvfp4_values(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Read E2M1 codes, uint8 ``[N, K / 2]``, under scales E4M3 ``[N, K / 16]``: float64 ``[N, K]``."""
    return e2m1.decode(e2m1.unpack_codes(codes)).double() * scale.double().repeat_interleave(16, dim=1)


def naive_nvfp4(x: torch.Tensor, weight: Mapping[str, Any]) -> torch.Tensor:
    """Multiply in float64 by the values that an NVFP4 weight stores."""
    return x.double() @ nvfp4_values(*weight["stored"]).T


def _marlin_int4_weight(n: int, k: int) -> dict[str, Any]:
    """Make a random INT4 weight under bf16 scales, in Marlin's packing as ``GPTQMarlinLinearKernel`` makes it."""
    from sglang.kernels.ops.quantization.gptq_marlin_repack import gptq_marlin_repack
    from sglang.srt.layers.quantization.marlin_utils import (
        marlin_make_empty_g_idx,
        marlin_make_workspace,
        marlin_permute_scales,
    )

    codes = random_codes(n, k)
    scale = (torch.rand(n, k // GROUP, device="cuda") + 0.5).bfloat16()
    empty = marlin_make_empty_g_idx(codes.device)
    packed = gptq_marlin_repack(gptq_codes(codes), perm=empty, size_k=k, size_n=n, num_bits=4)
    permuted = marlin_permute_scales(scale.T.contiguous(), size_k=k, size_n=n, group_size=GROUP)
    workspace = marlin_make_workspace(codes.device)
    return {"codes": packed, "scale": permuted, "empty": empty, "workspace": workspace, "stored": (codes, scale)}


def _run_marlin_int4(x: torch.Tensor, weight: Mapping[str, Any], out_dtype: torch.dtype) -> torch.Tensor:
    """Multiply bf16 activations as SGLang does for symmetric GPTQ checkpoints."""
    from sglang.srt.layers.quantization.marlin_utils import apply_gptq_marlin_linear
    from sglang.srt.layers.quantization.utils import get_scalar_types

    y: torch.Tensor = apply_gptq_marlin_linear(
        input=x,
        weight=weight["codes"],
        weight_scale=weight["scale"],
        weight_zp=weight["empty"],
        g_idx=weight["empty"],
        g_idx_sort_indices=weight["empty"],
        workspace=weight["workspace"],
        wtype=get_scalar_types()[1].uint4b8,
        output_size_per_partition=weight["stored"][0].shape[0],
        input_size_per_partition=x.shape[1],
        is_k_full=True,
    )
    return y.to(out_dtype)


def _marlin_nvfp4_weight(n: int, k: int) -> dict[str, Any]:
    """Make a random NVFP4 weight in the packing that SGLang serves ``W4A16_NVFP4`` with; its global scale is 1."""
    from sglang.srt.layers.quantization.marlin_utils_fp4 import prepare_nvfp4_layer_for_marlin

    codes, scale = random_codes(n, k), random_scale("nvfp4", n, k)
    layer: Any = torch.nn.Module()
    layer.output_size_per_partition, layer.input_size_per_partition, layer.params_dtype = n, k, torch.bfloat16
    for name, value in (
        ("weight", codes),
        ("weight_scale", scale),
        ("weight_global_scale", torch.ones(1, device="cuda")),
    ):
        setattr(layer, name, torch.nn.Parameter(value, requires_grad=False))
    prepare_nvfp4_layer_for_marlin(layer)
    return {"codes": layer.weight, "scale": layer.weight_scale, "layer": layer, "stored": (codes, scale)}


def _run_marlin_nvfp4(x: torch.Tensor, weight: Mapping[str, Any], out_dtype: torch.dtype) -> torch.Tensor:
    """Multiply bf16 activations as ``ModelOptNvFp4A16LinearMethod`` does."""
    from sglang.srt.layers.quantization.marlin_utils_fp4 import apply_fp4_marlin_linear

    layer = weight["layer"]
    y: torch.Tensor = apply_fp4_marlin_linear(
        input=x,
        weight=layer.weight,
        weight_scale=layer.weight_scale,
        weight_global_scale=layer.weight_global_scale,
        workspace=layer.workspace,
        size_n=layer.output_size_per_partition,
        size_k=layer.input_size_per_partition,
        bias=None,
    )
    return y.to(out_dtype)


def _by_flashinfer(capability: int) -> bool:
    """Return whether SGLang multiplies static FP8 by FlashInfer there."""
    return capability in (90, 100, 103, 120)


def _is_marlin_there(capability: int) -> bool:
    return capability >= 80


STOCK = {
    "stock fp8": Product(_by_flashinfer, _fp8_weight, random_fp8, partial(_run_bmm, True), _naive_fp8, TOLERANCE, 1040),
    "stock fp8 untuned": Product(
        _by_flashinfer, _fp8_weight, random_fp8, partial(_run_bmm, False), _naive_fp8, TOLERANCE, 1040
    ),
    "stock fp8 linear": Product(_by_flashinfer, _fp8_weight, random_bf16, _run_linear, _naive_fp8, TOLERANCE, 1040),
    "stock fp8 columns": Product(
        lambda capability: capability in (89, 90), _column_weight, random_fp8, _run_columns, _naive_fp8, TOLERANCE, 1040
    ),
}
"""FP8 products of bf16 results under one scale for the weight and one for the activations, which are rounded already but for
"linear", whose time includes the launch that rounds them. "untuned" has cuBLAS's own choice; "columns" the weight's scale once for
each column. A result errs by its rounding to bf16, at most 2^-9 of itself, and by the matrix instruction's sum."""

MARLIN = {
    "marlin int4": Product(
        _is_marlin_there,
        _marlin_int4_weight,
        random_bf16,
        _run_marlin_int4,
        lambda x, weight: x.double() @ int4_values(*weight["stored"]).T,
        TOLERANCE,
        ROWS,
    ),
    "marlin nvfp4": Product(
        _is_marlin_there,
        _marlin_nvfp4_weight,
        random_bf16,
        _run_marlin_nvfp4,
        naive_nvfp4,
        TOLERANCE,
        ROWS,
    ),
}
"""4-bit weights by unrounded activations. A result is rounded to bf16, by at most 2^-9 of itself. Marlin multiplies a code by its
scale in bf16: that is exact of E2M1 by E4M3, six bits at most; of INT4 by a bf16 scale, eleven bits, it rounds each weight by at
most 2^-9, which adds at most 2^-9 of a row's norm where the activations are independent of each other. Together 2^-8."""
