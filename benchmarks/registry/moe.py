"""Rows of the kernels around the products of a layer of experts: sorting, activation and weighted sum."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.registry.base import Case, Kernel, Launch, StressCase
from sglang_modelopt_kernels.moe.combine import combine, naive_combine
from sglang_modelopt_kernels.moe.combine.kernel import combine_kernel
from sglang_modelopt_kernels.moe.route import naive_route, route
from sglang_modelopt_kernels.moe.route.kernel import route_kernel
from sglang_modelopt_kernels.moe.swiglu import naive_swiglu, swiglu
from sglang_modelopt_kernels.moe.swiglu.kernel import swiglu_kernel


def _route_cases(arch: int) -> Iterator[Case]:
    del arch
    types = dict.fromkeys(("experts_ptr", "sorted_ptr", "owner_ptr", "first_ptr"), "*i32")
    types |= dict.fromkeys(("pairs", "experts", "blocks"), "i32")
    for chunk, warps in ((128, 4), (4096, 8)):
        constexprs = {"BLOCK": 16, "CHUNK": chunk, "BINS": 256}
        yield Case(f"route {chunk} pairs", route_kernel, types, constexprs, {"num_warps": warps})


def _swiglu_cases(arch: int) -> Iterator[Case]:
    del arch
    types = {"h_ptr": "*bf16", "y_ptr": "*bf16", "inner": "i32"}
    yield Case("swiglu", swiglu_kernel, types, {"BLOCK": 1024}, {}, ("inner",))


def _combine_cases(arch: int) -> Iterator[Case]:
    del arch
    types = {"y_ptr": "*bf16", "weight_ptr": "*fp32", "out_ptr": "*bf16", "n": "i32"}
    yield Case("combine", combine_kernel, types, {"HAS_WEIGHTS": True, "TOP_K": 8, "BLOCK": 1024}, {}, ("n",))


def _random(rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(columns)
    return torch.randn(rows, columns, generator=generator, device="cuda").bfloat16()


def _launch_swiglu() -> Launch:
    x = _random(4096, 4096)
    return Launch(lambda: swiglu(x), None)


def _launch_combine() -> Launch:
    y, weights = _random(8192, 2048), torch.rand(2048, 4, device="cuda")
    return Launch(lambda: combine(y, 4, weights, torch.bfloat16), None)


def _launch_route() -> Launch:
    chosen = torch.randint(-1, 128, (8192,), device="cuda", dtype=torch.int32)

    def call() -> torch.Tensor:
        routed = route(chosen, 128, 16)
        # Pairs behind the last block are undefined.
        filled = routed.owner.ge(0).repeat_interleave(16)
        return torch.cat([routed.pairs.where(filled, -1), routed.owner, routed.first]).unsqueeze(0)

    return Launch(call, None)


SWIGLU = Kernel(
    "swiglu",
    "moe/swiglu",
    naive_swiglu,
    compile=_swiglu_cases,
    stress=lambda _: (StressCase("swiglu", _launch_swiglu),),
)
COMBINE = Kernel(
    "combine",
    "moe/combine",
    naive_combine,
    compile=_combine_cases,
    stress=lambda _: (StressCase("combine", _launch_combine),),
)
ROUTE = Kernel(
    "route",
    "moe/route",
    naive_route,
    compile=_route_cases,
    stress=lambda _: (StressCase("route", _launch_route),),
)
