"""Rows of the kernels around the products of a layer of experts: sorting, activation and weighted sum."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.registry.base import Case, Kernel, Launch, StressCase
from sglang_modelopt_kernels.moe.activation import SWIGLU, Activation, activate, naive_activate
from sglang_modelopt_kernels.moe.activation.kernel import activation_kernel
from sglang_modelopt_kernels.moe.combine import combine, naive_combine
from sglang_modelopt_kernels.moe.combine.kernel import combine_kernel
from sglang_modelopt_kernels.moe.route import naive_route, route
from sglang_modelopt_kernels.moe.route.kernel import route_kernel


def _route_cases(arch: int) -> Iterator[Case]:
    types = dict.fromkeys(("experts_ptr", "sorted_ptr", "owner_ptr", "first_ptr"), "*i32")
    types |= dict.fromkeys(("pairs", "experts", "blocks"), "i32")
    for chunk, warps in ((128, 4), (4096, 8)):
        constexprs = {"BLOCK": 16, "CHUNK": chunk, "BINS": 256, "PDL": arch >= 90}
        yield Case(f"route {chunk} pairs", route_kernel, types, constexprs, {"num_warps": warps})


ACTIVATIONS = {
    "silu": SWIGLU,
    "gpt-oss": Activation(alpha=1.702, offset=1.0, limit=7.0, bias=True),
    "silu limited": Activation(limit=10.0, limits_function=True),
    "relu2": Activation("relu2", gated=False),
    "gelu": Activation("gelu"),
    "gelu_tanh": Activation("gelu_tanh"),
}
"""The forms that models have, one for each path through the kernel."""


def _activation_cases(arch: int) -> Iterator[Case]:
    for name, activation in ACTIVATIONS.items():
        # With a bias the sum is fp32 until the bias is added.
        h = "*fp32" if activation.bias else "*bf16"
        types = {"h_ptr": h, "bias_ptr": "*fp32" if activation.bias else h, "y_ptr": "*bf16", "inner": "i32"}
        types["expert_ptr"] = "*i32" if activation.bias else h
        constexprs = {
            "FUNCTION": activation.function,
            "GATED": activation.gated,
            "ALPHA": activation.alpha,
            "OFFSET": activation.offset,
            "LIMIT": activation.limit or 0.0,
            "HAS_LIMIT": activation.limit is not None,
            "LIMITS_FUNCTION": activation.limits_function,
            "HAS_BIAS": activation.bias,
            "PDL": arch >= 90,
            "BLOCK": 1024,
        }
        yield Case(f"activation {name}", activation_kernel, types, constexprs, {}, ("inner",))


def _combine_cases(arch: int) -> Iterator[Case]:
    types = {"y_ptr": "*bf16", "weight_ptr": "*fp32", "out_ptr": "*bf16", "n": "i32"}
    constexprs = {"HAS_WEIGHTS": True, "TOP_K": 8, "PDL": arch >= 90, "BLOCK": 1024}
    yield Case("combine", combine_kernel, types, constexprs, {}, ("n",))


def _random(rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(columns)
    return torch.randn(rows, columns, generator=generator, device="cuda").bfloat16()


def _launch_activation(activation: Activation) -> Launch:
    h = _random(4096, 4096)
    if not activation.bias:
        return Launch(lambda: activate(h, activation), None)
    bias, experts = _random(32, 4096).float(), torch.arange(-1, 4095, device="cuda", dtype=torch.int32) % 32
    return Launch(lambda: activate(h.float(), activation, torch.bfloat16, bias, experts), None)


def _activation_stress(arch: int) -> tuple[StressCase, ...]:
    del arch
    return tuple(
        StressCase(f"activation {name}", lambda activation=activation: _launch_activation(activation))  # type: ignore[misc]
        for name, activation in ACTIVATIONS.items()
    )


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


ACTIVATION = Kernel(
    "activation",
    "moe/activation",
    naive_activate,
    compile=_activation_cases,
    stress=_activation_stress,
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
