"""The linear products of the stress run (:mod:`benchmarks.stress`): every kernel, configuration and way by tokens."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.stress_case import Launch, StressCase
from sglang_modelopt_kernels.formats import WEIGHT_FORMATS
from sglang_modelopt_kernels.gemm.common import KernelConfig, machine
from sglang_modelopt_kernels.gemm.common.launch import Plan
from sglang_modelopt_kernels.gemm.fp8 import fp8_linear
from sglang_modelopt_kernels.gemm.mxfp4_fp8_hopper import fold
from sglang_modelopt_kernels.gemm.mxfp4_fp8_hopper import linear as folded
from sglang_modelopt_kernels.gemm.w4_decode import launch as block_scaled
from sglang_modelopt_kernels.gemm.w4_decode import pack, unpack
from sglang_modelopt_kernels.gemm.w8_decode import eight_bit_linear, packing
from sglang_modelopt_kernels.gemm.w8_decode import launch as eight_bit
from sglang_modelopt_kernels.gemm.w8_decode.packing import ByteWeight
from sglang_modelopt_kernels.gemm.w8_decode.packing import Kind as EightBitKind

N = 4096
FILLING = 3
"""Programs for each SM, at the least."""
MOST_TOKENS = 2301
MANY = (300, 900, 2304)
"""Tokens of the ways that decode the weight first."""

FORMATS = ("nvfp4", "nvfp4_w4a8", "mxfp4", "int4_awq")
INPUTS = {"whole": 4096, "half": 4096 - 128, "tail": 4096 - 32}
"""K: whole tiles of every configuration, whole tiles of the narrow ones, and neither."""
DTYPES = {"fp8": torch.float8_e4m3fn, "bf16": torch.bfloat16, "fp16": torch.float16}
SPLIT = 4


def product_cases(capability: int) -> Iterator[StressCase]:
    """Yield every linear product that the launches can choose on compute capability ``capability`` (times ten)."""
    dtypes = [name for name in DTYPES if name != "fp8" or capability >= 89]
    for number in FORMATS:
        for inputs, k in INPUTS.items():
            if k % WEIGHT_FORMATS[number].group_size:
                continue
            yield from _block_scaled_cases(capability, number, inputs, k, dtypes)
    if capability in (89, 90):
        for inputs, k in INPUTS.items():
            for config in folded.configs(capability, k):
                for split in (1, SPLIT) if inputs == "whole" else (1,):
                    name = f"folded mxfp4 fp8 {inputs} {config} split {split}"
                    yield StressCase(name, partial(_folded, k, (config, split)))
            yield StressCase(f"folded mxfp4 fp8 {inputs} dense", partial(_folded, k, None))
    for kind, dtypes_of in eight_bit.TAKEN.items():
        for dtype in dtypes_of:
            for inputs, k in INPUTS.items():
                if inputs == "half" or (inputs == "tail" and kind == "e4m3_float"):
                    continue
                for plan in _eight_bit_plans(kind, dtype, capability, inputs):
                    way = f"{plan[0]} split {plan[1]}" if plan else "decoded"
                    name = f"eight_bit {kind} {str(dtype).removeprefix('torch.')} {inputs} {way}"
                    yield StressCase(name, partial(_eight_bit, kind, dtype, k, plan))
    if capability >= 89:
        for tokens in (1, 64, 2048):
            yield StressCase(f"fp8_linear {tokens} tokens", partial(_fp8, tokens))


def _block_scaled_cases(capability: int, number: str, inputs: str, k: int, dtypes: list[str]) -> Iterator[StressCase]:
    kind = {"mxfp4": "e2m1_exponent", "int4_awq": "int4_float"}.get(number, "e2m1_e4m3")
    known = block_scaled.configs(kind, capability, k)  # type: ignore[arg-type]  # one of the three
    for dtype in dtypes:
        if dtype == "fp16" and inputs != "whole":
            continue
        for config in known:
            for split in (1, SPLIT) if inputs == "whole" and dtype != "fp16" else (1,):
                name = f"block_scaled {number} {dtype} {inputs} {config} split {split}"
                yield StressCase(name, partial(_block_scaled, number, k, dtype, (config, split)))
        if inputs == "whole":
            ways = ["groups"] if kind == "int4_float" else ["dense"]
            ways += ["fp8"] if number == "mxfp4" and dtype == "fp8" else []
            for way in ways:
                for tokens in MANY:
                    name = f"block_scaled {number} {dtype} {way} {tokens} tokens"
                    yield StressCase(name, partial(_decoded, number, k, dtype, way, tokens))


def tokens_for(config: KernelConfig, split: int) -> int:
    """Tokens, not whole tiles, for which the programs of a configuration fill the GPU."""
    tiles = FILLING * machine(torch.device("cuda", 0))[1] // (-(-N // config.bn) * split) + 1
    return min(tiles * config.bm, max(MOST_TOKENS, config.bm)) - (3 if config.bm > 4 else 0)


def _weight(number: str, k: int) -> tuple[Any, torch.Tensor]:
    """A packed random weight whose rows differ in size, and its float64 reading ``[K, N]``."""
    generator = torch.Generator("cuda").manual_seed(k)
    weight = torch.randn(N, k, generator=generator, device="cuda")
    weight *= torch.exp2(-(torch.arange(N, device="cuda") % 8)).unsqueeze(1)
    found = WEIGHT_FORMATS[number]
    blocks = found.blocks(found.quantize(weight.to(torch.bfloat16)))
    if blocks is None:
        raise ValueError(f"{number} has no blocks")
    packed = pack(blocks)
    return packed, (unpack(packed) * packed.out_scale.double().unsqueeze(1)).T


def _activations(tokens: int, k: int, dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(tokens)
    x = torch.randn(tokens, k, generator=generator, device="cuda").to(torch.float8_e4m3fn)
    row_scale = torch.rand(tokens, 1, generator=generator, device="cuda") + 0.5
    return x.to(DTYPES[dtype]), row_scale


def _block_scaled(number: str, k: int, dtype: str, plan: Plan) -> Launch:
    packed, weight = _weight(number, k)
    x, row_scale = _activations(tokens_for(*plan), k, dtype)
    expected = (x.double() @ weight) * row_scale.double()
    return Launch(lambda: block_scaled.run(x, packed, row_scale, None, torch.bfloat16, plan), expected)


def _decoded(number: str, k: int, dtype: str, way: str, tokens: int) -> Launch:
    packed, weight = _weight(number, k)
    x, row_scale = _activations(tokens, k, dtype)
    expected = (x.double() @ weight) * row_scale.double()
    run: Any = {"dense": block_scaled.run_dense, "groups": block_scaled.run_groups, "fp8": block_scaled.run_fp8}[way]
    return Launch(lambda: run(x, packed, row_scale, None, torch.bfloat16), expected)


def _folded(k: int, plan: Plan | None) -> Launch:
    found = WEIGHT_FORMATS["mxfp4"]
    generator = torch.Generator("cuda").manual_seed(k)
    stored = found.quantize(torch.randn(N, k, generator=generator, device="cuda").to(torch.bfloat16))
    weight = fold(stored["weight"], stored["weight_scale"])
    decoded = found.decode(stored)
    x, row_scale = _activations(tokens_for(*plan) if plan else MANY[-1], k, "fp8")
    expected = (x.double() @ (decoded.unit.double() * decoded.out_scale.double()).T) * row_scale.double()
    if plan is None:
        return Launch(lambda: folded.run_dense(x, weight, row_scale, None, torch.bfloat16), expected)
    return Launch(lambda: folded.run(x, weight, row_scale, None, torch.bfloat16, plan), expected)


def _eight_bit_plans(kind: EightBitKind, dtype: torch.dtype, capability: int, inputs: str) -> list[Plan | None]:
    """Every configuration, the smallest with partial sums too, and None for the way of many tokens."""
    known = eight_bit.configs(kind, eight_bit.math_of(kind, dtype), capability)
    plans: list[Plan | None] = [(config, 1) for config in known]
    return [*plans, (known[0], SPLIT), None] if inputs == "whole" else plans


def _eight_bit(kind: EightBitKind, dtype: torch.dtype, k: int, plan: Plan | None) -> Launch:
    generator = torch.Generator("cuda").manual_seed(k)
    number = WEIGHT_FORMATS[
        {"int8": "int8_per_channel", "e4m3": "fp8_per_channel", "e4m3_float": "fp8_block", "e4m3_exponent": "mxfp8"}[
            kind
        ]
    ]
    stored = number.quantize(torch.randn(N, k, generator=generator, device="cuda").bfloat16())
    decoded = number.decode(stored)
    weight = _bytes(kind, stored)
    tokens = tokens_for(*plan) if plan else MANY[-1]
    x = torch.randn(tokens, k, generator=generator, device="cuda").to(torch.float8_e4m3fn).float()
    x = (x * 20).clamp(-128, 127).round().to(dtype) if dtype == torch.int8 else x.to(dtype)
    row_scale = torch.rand(tokens, 1, generator=generator, device="cuda") + 0.5
    expected = (x.double() @ (decoded.unit.double() * decoded.out_scale.double()).T) * row_scale.double()
    if plan is None:
        return Launch(lambda: eight_bit_linear(x, weight, row_scale, None, torch.bfloat16), expected)
    return Launch(lambda: eight_bit.run(x, weight, row_scale, None, torch.bfloat16, plan), expected)


def _bytes(kind: EightBitKind, stored: dict[str, torch.Tensor]) -> ByteWeight:
    codes, scale = stored["weight"], stored["weight_scale"]
    if kind == "e4m3_float":
        return packing.float_blocks([(codes, scale.squeeze(3).squeeze(1))])
    if kind == "e4m3_exponent":
        return packing.mxfp8(codes, scale)
    return packing.whole(codes, scale.float().reshape(-1).expand(codes.shape[0]).contiguous())


def _fp8(tokens: int) -> Launch:
    generator = torch.Generator("cuda").manual_seed(tokens)
    unit = torch.randn(N, 4096, generator=generator, device="cuda").to(torch.float8_e4m3fn)
    out_scale = torch.rand(N, generator=generator, device="cuda") + 0.5
    x, row_scale = _activations(tokens, 4096, "fp8")
    expected = (x.double() @ unit.double().T) * out_scale.double() * row_scale.double()
    return Launch(lambda: fp8_linear(x, row_scale, unit, out_scale, None, torch.bfloat16), expected)
