"""Row of the product of SM90 with 4-bit weights that are kept tile by tile."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.registry.base import Case, Kernel, Launch, Product, StressCase
from benchmarks.registry.operands import (
    MANY,
    SPLIT,
    WIDTHS,
    N,
    dense_values,
    product_case,
    random_codes,
    random_fp8,
    random_scale,
    stress_activations,
    tokens_for,
)
from sglang_modelopt_kernels.formats import WEIGHT_FORMATS
from sglang_modelopt_kernels.gemm.common.launch import Plan
from sglang_modelopt_kernels.gemm.mxfp4_fp8_hopper import fold
from sglang_modelopt_kernels.gemm.w4_stream import (
    StreamedWeight,
    launch,
    missing,
    naive_streamed_linear,
    stream_folded,
    stream_nvfp4,
    streamed_linear,
)
from sglang_modelopt_kernels.gemm.w4_stream.packing import BLOCKS, Kind

ARCHITECTURES = (90,)
FORMATS: dict[Kind, str] = {"folded": "mxfp4", "scaled_16": "nvfp4", "scaled_32": "nvfp4_w4a8"}
"""The weight format of each kind."""


def _compile(arch: int) -> Iterator[Case]:
    """Yield every configuration that the launcher can choose, and the decoding for many tokens."""
    if missing() is not None:
        return
    from sglang_modelopt_kernels.gemm.w4_stream.kernel import streamed_kernel, unstream_kernel

    for kind, configs in launch.STREAMED.items():
        fp8 = kind == "folded"
        numerics: dict[str, Any] = {"FP8": fp8, "BLOCKS": BLOCKS[kind]}
        operands = {"x_ptr": "*fp8e4nv" if fp8 else "*fp16", "w_ptr": "*u8", "s_ptr": "*u8"}
        for config in configs:
            own = numerics | {"STAGES": config.stages, "EVEN_M": False, "PDL": arch >= 90}
            case = product_case(f"streamed {kind}", streamed_kernel, config, operands, own, "e4m3" if fp8 else "f16")
            yield dataclasses.replace(case, fragments=True, copies=("cp.async",))
        types = {"w_ptr": "*i32", "s_ptr": "*u8", "y_ptr": "*i32", "first": "i32", "k": "i32"}
        if not fp8:
            types |= {"w_ptr": "*i16", "y_ptr": "*fp16"}
        yield Case(f"unstream {kind}", unstream_kernel, types, numerics | {"ASM": True}, {}, ("k",))


def _stress(capability: int) -> Iterator[StressCase]:
    if capability not in ARCHITECTURES or missing() is not None:
        return
    for kind, configs in launch.STREAMED.items():
        for config in (*configs, *(launch.TILED if kind == "folded" else ())):
            for split in (1, SPLIT):
                yield StressCase(f"streamed {kind} {config} split {split}", partial(_launch, kind, (config, split)))
        yield StressCase(f"streamed {kind} dense", partial(_launch, kind, None))


def _pack(kind: Kind, stored: dict[str, torch.Tensor]) -> StreamedWeight:
    if kind == "folded":
        return stream_folded(fold(stored["weight"], stored["weight_scale"]))
    blocks = WEIGHT_FORMATS[FORMATS[kind]].blocks(stored)
    assert blocks is not None
    return stream_nvfp4(blocks)


def _launch(kind: Kind, plan: Plan | None) -> Launch:
    found, k = WEIGHT_FORMATS[FORMATS[kind]], WIDTHS["whole"]
    generator = torch.Generator("cuda").manual_seed(k)
    stored = found.quantize(torch.randn(N, k, generator=generator, device="cuda").to(torch.bfloat16))
    weight = _pack(kind, stored)
    x, row_scale = stress_activations(tokens_for(*plan) if plan else MANY[-1], k, "fp8" if kind == "folded" else "fp16")
    expected = (x.double() @ dense_values(found.decode(stored)).T) * row_scale.double()
    if plan is None:
        return Launch(lambda: launch.run_dense(x, weight, row_scale, None, torch.bfloat16), expected)
    return Launch(lambda: launch.run(x, weight, row_scale, None, torch.bfloat16, plan), expected)


def _weight(kind: Kind, n: int, k: int) -> dict[str, Any]:
    """Pack a random weight."""
    stored = {"weight": random_codes(n, k), "weight_scale": random_scale(FORMATS[kind], n, k)}
    if kind != "folded":
        stored["weight_scale"] = stored["weight_scale"][:, : BLOCKS[kind] * k // 256].contiguous()
        stored["weight_scale_2"] = torch.ones((), device="cuda")
    packed = _pack(kind, stored)
    return {"weight": packed, "codes": packed.codes, "scale": packed.scale}


def _product(kind: Kind) -> Product:
    return Product(
        lambda capability: capability in ARCHITECTURES and missing() is None,
        partial(_weight, kind),
        random_fp8 if kind == "folded" else lambda m, k: random_fp8(m, k).to(torch.float16),
        lambda x, weight, out_dtype: streamed_linear(x, weight["weight"], out_dtype=out_dtype),
        lambda x, weight: naive_streamed_linear(x, weight["weight"]),
        2.0**-10 if kind == "folded" else 1e-5,
        rows=1088,
    )


W4_STREAM = Kernel(
    "streamed",
    "gemm/w4_stream",
    naive_streamed_linear,
    ARCHITECTURES,
    compile=_compile,
    stress=_stress,
    measured={f"{kind} streamed": _product(kind) for kind in FORMATS},
)
