"""The kernels for mixtures of experts against their naive twins: in Triton's interpreter, and, marked ``gpu``, on CUDA."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_modelopt_kernels.formats import WEIGHT_FORMATS, ue8m0
from sglang_modelopt_kernels.gemm.block_scaled import pack
from sglang_modelopt_kernels.gemm.dense import prepare_dense
from sglang_modelopt_kernels.moe import grouped
from sglang_modelopt_kernels.moe.combine import combine, naive_combine
from sglang_modelopt_kernels.moe.grouped import GroupedWeight, grouped_linear, naive_grouped_linear, unpack
from sglang_modelopt_kernels.moe.grouped import launch as grouped_launch
from sglang_modelopt_kernels.moe.grouped.weights import KINDS
from sglang_modelopt_kernels.moe.route import most_blocks, naive_route, route
from sglang_modelopt_kernels.moe.swiglu import naive_swiglu, swiglu

DTYPES = {"fp8": torch.float8_e4m3fn, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8}
FORMATS = {
    # kind: (format, activations it is multiplied by)
    "e2m1_e4m3/16": ("nvfp4", ("fp8", "fp16", "bf16")),
    "e2m1_e4m3/32": ("nvfp4_w4a8", ("fp8", "fp16", "bf16")),
    "e2m1_exponent": ("mxfp4", ("fp8", "fp16", "bf16")),
    "int4_float": ("int4_awq", ("fp8", "fp16", "bf16")),
    "mxfp4": ("mxfp4", ("fp8",)),
    "e4m3": ("fp8_per_channel", ("fp8", "fp16", "bf16")),
    "e4m3_float": ("fp8_block", ("fp8", "fp16", "bf16")),
    "e4m3_exponent": ("mxfp8", ("bf16",)),
    "int8": ("int8_per_channel", ("fp16", "bf16", "int8")),
}


def one_expert(kind: str, n: int, k: int, generator: torch.Generator) -> GroupedWeight:
    """A random weight, its rows of uneven size, as the reference quantizer stores it."""
    name = FORMATS[kind][0]
    number = WEIGHT_FORMATS[name]
    weight = torch.randn(n, k, generator=generator) * torch.randn(n, 1, generator=generator).exp()
    stored = number.quantize(weight)
    if kind == "mxfp4":
        return grouped.mxfp4_as_stored(stored["weight"], stored["weight_scale"])
    if kind == "e4m3_exponent":
        return grouped.mxfp8(stored["weight"], stored["weight_scale"])
    if kind == "e4m3_float":
        rows = stored["weight_scale"].reshape(-(-n // 128), -1).repeat_interleave(128, dim=0)[:n]
        return grouped.float_blocks(stored["weight"], rows.contiguous())
    if kind in ("e4m3", "int8"):
        dtype = torch.int8 if kind == "int8" else torch.float8_e4m3fn
        return grouped.eight_bit(*prepare_dense(number.decode(stored), dtype))
    blocks = number.blocks(stored)
    assert blocks is not None
    return grouped.packed(pack(blocks))


def moved(weight: GroupedWeight, device: str) -> GroupedWeight:
    scale = None if weight.scale is None else weight.scale.to(device)
    return GroupedWeight(weight.codes.to(device), scale, weight.out_scale.to(device), weight.kind)


def activations(rows: int, k: int, dtype: str, generator: torch.Generator) -> torch.Tensor:
    x = torch.randn(rows, k, generator=generator) * 20
    return x.round().clamp(-128, 127).to(torch.int8) if dtype == "int8" else x.to(DTYPES[dtype])


@contextmanager
def poisoned() -> Iterator[None]:
    """Every new float tensor starts as NaN, and every integer one as its largest number."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@dataclass(frozen=True)
class Case:
    """A product: ``spread`` says where pairs go: everywhere, to one expert, or to nobody too."""

    kind: str
    dtype: str
    tokens: int
    top_k: int = 2
    experts: int = 4
    n: int = 70
    k: int = 288
    shared: bool = True
    spread: str = "nobody"
    block: int | None = None


def tolerance(k: int) -> float:
    """As for one weight: relative to the sum of magnitudes, whose float32 sum of exact products errs by k * 2^-24."""
    return (2 * k + 16) * 2.0**-24


def choices(case: Case, generator: torch.Generator) -> torch.Tensor:
    pairs = case.tokens * case.top_k
    if case.spread == "one":
        return torch.full((pairs,), case.experts - 1, dtype=torch.int32)
    lowest = -1 if case.spread == "nobody" else 0
    return torch.randint(lowest, case.experts - 1, (pairs,), generator=generator, dtype=torch.int32)  # none for the last


def check(case: Case, device: str, out_dtype: torch.dtype = torch.float32) -> float:
    """The largest error of an output, relative to the sum of magnitudes; infinite where an output is not written or not zero."""
    generator = torch.Generator().manual_seed(case.tokens + case.n)
    on_cpu = grouped.stack([one_expert(case.kind, case.n, case.k, generator) for _ in range(case.experts)])
    owners = choices(case, generator)
    pairs = owners.shape[0]
    x = activations(case.tokens if case.shared else pairs, case.k, case.dtype, generator)
    row_scale = (torch.rand(pairs, 2, generator=generator) + 0.5)[:, :1] if case.tokens % 2 else None
    weight = moved(on_cpu, device)
    block = case.block or grouped.tile(weight, x.dtype, pairs)
    with poisoned():
        routed = route(owners.to(device), case.experts, block)
        scale = None if row_scale is None else row_scale.to(device)
        y = grouped_linear(x.to(device), weight, routed, pairs, scale, out_dtype).double().cpu()
    expected = naive_grouped_linear(x, on_cpu, owners, row_scale)
    units = [unpack(on_cpu, expert).abs() * on_cpu.out_scale[expert].double().unsqueeze(1) for expert in range(case.experts)]
    nobody = (owners < 0) | (owners >= case.experts)
    if bool(y.isnan().any()) or bool((y[nobody] != 0).any()):
        return float("inf")
    wide = x.to(torch.float32).double().abs().repeat_interleave(pairs // x.shape[0], dim=0)
    scales = torch.ones(pairs, 1) if row_scale is None else row_scale
    worst = 0.0
    for pair in (~nobody).nonzero().flatten().tolist():
        bound = units[int(owners[pair])] @ wide[pair] * float(scales[pair])
        worst = max(worst, float(((y[pair] - expected[pair]).abs() / bound.clamp(min=1e-300)).max()))
    return worst


def routed_wrongly(owners: torch.Tensor, experts: int, block: int, device: str) -> bool:
    """Whether :func:`route` differs from the naive twin, or leaves a block unmarked."""
    with poisoned():
        routed = route(owners.to(device), experts, block)
    found = []
    pairs = owners.shape[0]
    for index, owner in enumerate(routed.owner.tolist()):
        if owner < 0:
            continue
        members = routed.pairs[index * block : (index + 1) * block].tolist()
        found.append((owner, [pair for pair in members if pair != pairs]))
    unused = [owner for owner in routed.owner.tolist() if not 0 <= owner <= experts]
    return found != naive_route(owners, experts, block) or any(owner != -1 for owner in unused)


INTERPRETED = [
    *[Case(kind, dtype, 5, spread="all") for kind, (_, dtypes) in FORMATS.items() for dtype in dtypes if kind != "int4_float"],
    *[Case("int4_float", dtype, 3, k=384) for dtype in FORMATS["int4_float"][1]],
    Case("e2m1_e4m3/16", "fp8", 3, shared=False),
    Case("e2m1_exponent", "bf16", 20, spread="one", block=32),
    Case("e4m3", "fp8", 1, top_k=1, experts=1, spread="one"),
    Case("e4m3_float", "bf16", 2, n=140, k=200),  # a short block of inputs
    Case("e4m3", "fp8", 40, top_k=3, experts=2, n=34, k=272, block=64),
    Case("int8", "int8", 4, top_k=8, experts=16, n=20, k=80, shared=False),
    Case("mxfp4", "fp8", 4, n=130, k=544),
]
ROUTED = [
    # (pairs, experts, block, lowest, highest expert, chunk)
    (1, 1, 16, 0, 0),
    (16, 4, 16, 0, 3),
    (40, 8, 16, -1, 9),
    (70, 3, 32, 1, 1),
    (5, 130, 16, -1, 129),
    (300, 5, 16, -1, 4),
]


def all_cases() -> list[object]:
    """What the interpreter's process prints."""
    from sglang_modelopt_kernels.moe.route import route as _  # noqa: F401  # the module below is the package's
    from sglang_modelopt_kernels.moe.route.route import most_blocks as _blocks  # noqa: F401

    errors = [check(case, "cpu") for case in INTERPRETED]
    generator = torch.Generator().manual_seed(0)
    wrong = []
    for pairs, experts, block, low, high in ROUTED:
        owners = torch.randint(low, high + 1, (pairs,), generator=generator)
        wrong.append(routed_wrongly(owners, experts, block, "cpu"))
    return [errors, wrong, rowwise("cpu")]
