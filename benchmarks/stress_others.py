"""Experts, attention and roundings of the stress run (:mod:`benchmarks.stress`)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.attention import HEADS, Decode, empty, scattered
from benchmarks.stress_case import Launch, StressCase
from sglang_modelopt_kernels.attention.extend import extend_attention
from sglang_modelopt_kernels.attention.naive import naive_decode, naive_extend
from sglang_modelopt_kernels.attention.store import store_kv, rotate_queries
from sglang_modelopt_kernels.attention.store.store import MOST_ROTATED
from sglang_modelopt_kernels.formats import WEIGHT_FORMATS
from sglang_modelopt_kernels.formats.kv_cache import KV_RECIPES
from sglang_modelopt_kernels.gemm.reference import prepare_dense
from sglang_modelopt_kernels.gemm.w4_decode import pack
from sglang_modelopt_kernels.moe import grouped
from sglang_modelopt_kernels.moe.combine import combine
from sglang_modelopt_kernels.moe.grouped import GroupedWeight, grouped_linear, unpack
from sglang_modelopt_kernels.moe.grouped import launch as grouped_launch
from sglang_modelopt_kernels.moe.grouped.dense import launch as dense_launch
from sglang_modelopt_kernels.moe.route import route
from sglang_modelopt_kernels.moe.swiglu import swiglu
from sglang_modelopt_kernels.quantize.blocks import BLOCK_ACTIVATIONS, quantize_blocks, round_blocks
from sglang_modelopt_kernels.quantize.fp8 import quantize_fp8

DTYPES = {torch.float8_e4m3fn: "fp8", torch.bfloat16: "bf16", torch.float16: "fp16"}
EXPERTS, TOP_K, N = 16, 4, 1536
INPUTS = {"whole": 2048, "half": 2048 - 128, "tail": 2048 - 32}
STORED: dict[grouped_launch.Kind, str] = {
    "e2m1_e4m3": "nvfp4_w4a8",
    "e2m1_exponent": "mxfp4",
    "int4_float": "int4_awq",
    "mxfp4": "mxfp4",
    "e4m3": "fp8_per_channel",
    "e4m3_float": "fp8_block",
    "e4m3_exponent": "mxfp8",
    "int8": "int8_per_channel",
    "bf16": "fp8",
}
"""A weight format that is kept as each kind."""
WHOLE = {"e4m3": torch.float8_e4m3fn, "int8": torch.int8, "bf16": torch.bfloat16}
PREFIX, NEW, REQUESTS = 1500, 333, 8
ATTENTION_TOLERANCE = 0.01
"""As in benchmarks.attention: bf16 outputs of float16 weights."""


def expert_cases(capability: int) -> Iterator[StressCase]:
    """Yield the grouped product of every kind of weight, both ways, for every block of pairs."""
    for kind, dtypes in grouped_launch.TAKEN.items():
        if kind == "mxfp4" and not 100 <= capability < 120:
            continue
        for dtype in dtypes:
            if dtype == torch.float8_e4m3fn and capability < 89:
                continue
            for inputs, k in INPUTS.items():
                if (kind == "int4_float" and k % 128) or (inputs == "tail" and dtype == torch.float16):
                    continue
                math = grouped_launch.math_of(kind, dtype, capability)
                blocks = [config.bm for config in grouped_launch.configs(kind, math, capability, k)]
                for dense, block in [(False, block) for block in blocks] + ([(True, 0)] if kind != "mxfp4" else []):
                    sizes = [block] if not dense else [one.bm for one in _dense_configs(kind, dtype, capability)]
                    for size in sizes:
                        name = f"experts {kind} {DTYPES[dtype]} {inputs} {'dense' if dense else 'grouped'} {size} pairs"
                        yield StressCase(name, partial(_experts, kind, dtype, k, dense, size))


def _dense_configs(kind: grouped_launch.Kind, dtype: torch.dtype, capability: int) -> tuple[Any, ...]:
    scaled = kind in ("int4_float", "e4m3_float")
    return dense_launch.configs(dtype, scaled, capability)


def expert_weight(kind: grouped_launch.Kind, k: int) -> GroupedWeight:
    """Random weights of EXPERTS experts in a kind."""
    generator = torch.Generator("cuda").manual_seed(k)
    number = WEIGHT_FORMATS[STORED[kind]]
    every = []
    for _ in range(EXPERTS):
        stored = number.quantize(torch.randn(N, k, generator=generator, device="cuda"))
        if kind == "mxfp4":
            every.append(grouped.mxfp4_as_stored(stored["weight"], stored["weight_scale"]))
        elif kind == "e4m3_exponent":
            every.append(grouped.mxfp8(stored["weight"], stored["weight_scale"]))
        elif kind == "e4m3_float":
            rows = stored["weight_scale"].reshape(-(-N // 128), -1).repeat_interleave(128, dim=0)[:N]
            every.append(grouped.float_blocks(stored["weight"], rows.contiguous()))
        elif kind in WHOLE:
            every.append(grouped.whole(*prepare_dense(number.decode(stored), WHOLE[kind])))
        else:
            blocks = number.blocks(stored)
            if blocks is None:
                raise ValueError(f"{number.name} has no blocks")
            every.append(grouped.packed(pack(blocks)))
    return grouped.stack(every)


def _experts(kind: grouped_launch.Kind, dtype: torch.dtype, k: int, dense: bool, block: int) -> Launch:
    weight = expert_weight(kind, k)
    generator = torch.Generator("cuda").manual_seed(block)
    tokens = 61 * block // TOP_K if block <= 16 else 13 * block // TOP_K
    pairs = tokens * TOP_K
    chosen = torch.randint(-1, EXPERTS - 1, (pairs,), generator=generator, device="cuda", dtype=torch.int32)
    x = torch.randn(tokens, k, generator=generator, device="cuda").to(torch.float8_e4m3fn).to(dtype)
    row_scale = torch.rand(pairs, 1, generator=generator, device="cuda") + 0.5
    routed = route(chosen, EXPERTS, block)
    expected = torch.zeros(pairs, N, dtype=torch.float64, device="cuda")
    rows = x.double().repeat_interleave(TOP_K, dim=0)
    for expert in range(EXPERTS):
        own = chosen == expert
        unit = unpack(weight, expert) * weight.out_scale[expert].double().unsqueeze(1)
        expected[own] = (rows[own] @ unit.T) * row_scale[own].double()
    return Launch(lambda: grouped_linear(x, weight, routed, pairs, row_scale, torch.bfloat16, dense), expected)


def attention_cases(capability: int) -> Iterator[StressCase]:
    """Yield decoding and prefill over every KV recipe, and the writing of new tokens."""
    del capability
    for name, recipe in KV_RECIPES.items():
        for head_dim in (64, 128, 256):
            if recipe.rotate and head_dim > MOST_ROTATED:
                continue
            yield StressCase(f"decode {name} D={head_dim}", partial(_decode, name, head_dim))
            yield StressCase(f"extend {name} D={head_dim}", partial(_extend, name, head_dim))
            yield StressCase(f"store {name} D={head_dim}", partial(_store, name, head_dim))


def _decode(name: str, head_dim: int) -> Launch:
    torch.manual_seed(head_dim)
    step = Decode(KV_RECIPES[name], PREFIX, REQUESTS, 4, head_dim)
    step.copies = 1
    expected = naive_decode(step.q, *step.caches[0], step.indptr, step.indices, 0.01)

    def call() -> torch.Tensor:
        step(0)
        return step.out.flatten(1)

    return Launch(call, expected.flatten(1), ATTENTION_TOLERANCE)


def _extend(name: str, head_dim: int) -> Launch:
    torch.manual_seed(head_dim)
    keys, values = empty(KV_RECIPES[name], PREFIX * REQUESTS, head_dim)
    new = [
        torch.randn(NEW * REQUESTS, heads, head_dim, device="cuda").bfloat16() for heads in (4 * HEADS, HEADS, HEADS)
    ]
    spans = [torch.arange(0, count * REQUESTS + 1, count, device="cuda", dtype=torch.int32) for count in (NEW, PREFIX)]
    slots = scattered(PREFIX * REQUESTS, 1)
    out = torch.empty_like(new[0])
    expected = naive_extend(*new, keys, values, *spans, slots, 0.01)

    def call() -> torch.Tensor:
        extend_attention(*new, out, keys, values, *spans, slots, None, True, None, NEW, sm_scale=0.01)
        return out.flatten(1)

    return Launch(call, expected.flatten(1), ATTENTION_TOLERANCE)


def _store(name: str, head_dim: int) -> Launch:
    torch.manual_seed(head_dim)
    tokens = 4096
    keys, values = empty(KV_RECIPES[name], tokens, head_dim)
    k, v = (torch.randn(tokens, HEADS, head_dim, device="cuda").bfloat16() for _ in range(2))
    slots = torch.randperm(tokens, device="cuda")

    def call() -> torch.Tensor:
        store_kv(keys, values, slots, k, v)
        parts = [keys.codes, values.codes, *([] if keys.block_scales is None else [keys.block_scales])]
        return torch.cat([part.view(torch.uint8).flatten() for part in parts]).unsqueeze(0)

    return Launch(call, None)


def rounding_cases(capability: int) -> Iterator[StressCase]:
    """Yield the roundings of activations and what stands around the experts' products: they must repeat."""
    del capability
    for smoothing in (False, True):
        for way in ("static", "token"):
            yield StressCase(
                f"quantize_fp8 {way}{' smoothed' if smoothing else ''}", partial(_quantize, way, smoothing)
            )
    for activation in BLOCK_ACTIVATIONS:
        yield StressCase(f"quantize_blocks {activation} codes", partial(_blocks, activation, False))
        yield StressCase(f"quantize_blocks {activation} values", partial(_blocks, activation, True))
    for name, call in {"swiglu": _swiglu, "combine": _combine, "route": _route, "turn": _turn}.items():
        yield StressCase(name, call)


def _random(rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(columns)
    return torch.randn(rows, columns, generator=generator, device="cuda").bfloat16()


def _quantize(way: str, smoothing: bool) -> Launch:
    x = _random(2048, 5000)
    smooth = _random(1, 5000)[0].abs() + 0.5 if smoothing else None
    scale = torch.tensor(0.01, device="cuda") if way == "static" else None

    def call() -> torch.Tensor:
        values, row_scale = quantize_fp8(x, smooth, scale)
        wide = row_scale.expand(x.shape[0], 1).contiguous().view(torch.uint8)
        return torch.cat([values.view(torch.uint8), wide], dim=1)

    return Launch(call, None)


def _blocks(activation: str, values: bool) -> Launch:
    x, scale = _random(2048, 4096), torch.tensor(0.01, device="cuda") if activation.startswith("nvfp4") else None

    def call() -> torch.Tensor:
        if values:
            return round_blocks(x, activation, None, scale, torch.bfloat16)[0]
        rounded = quantize_blocks(x, activation, None, scale, False)
        return torch.cat([rounded.codes.view(torch.uint8), rounded.scale.view(torch.uint8)], dim=1)

    return Launch(call, None)


def _swiglu() -> Launch:
    x = _random(4096, 4096)
    return Launch(lambda: swiglu(x), None)


def _combine() -> Launch:
    y, weights = _random(8192, 2048), torch.rand(2048, 4, device="cuda")
    return Launch(lambda: combine(y, 4, weights, torch.bfloat16), None)


def _route() -> Launch:
    chosen = torch.randint(-1, 128, (8192,), device="cuda", dtype=torch.int32)

    def call() -> torch.Tensor:
        routed = route(chosen, 128, 16)
        # What lies behind the last block is undefined.
        filled = routed.owner.ge(0).repeat_interleave(16)
        return torch.cat([routed.pairs.where(filled, -1), routed.owner, routed.first]).unsqueeze(0)

    return Launch(call, None)


def _turn() -> Launch:
    q = _random(4096, 32 * 128).unflatten(1, (32, 128))
    return Launch(lambda: rotate_queries(q).flatten(1), None)
