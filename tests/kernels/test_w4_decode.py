"""The block-scaled product against its naive twin: on a CPU in Triton's interpreter, and, marked ``gpu``, on CUDA."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_modelopt_kernels.formats import WEIGHT_FORMATS
from sglang_modelopt_kernels.formats.base import BlockWeight
from sglang_modelopt_kernels.gemm.common import KernelConfig
from sglang_modelopt_kernels.gemm.w4_decode import (
    PackedWeight,
    block_scaled_linear,
    block_scaled_rows,
    naive_block_scaled_linear,
    pack,
    unpack,
)
from sglang_modelopt_kernels.gemm.w4_decode import launch as launch_module
from sglang_modelopt_kernels.gemm.w4_decode import packing as packing_module
from sglang_modelopt_kernels.gemm.w4_decode.launch import decode_rows, descale, run, run_groups

E2M1_FORMATS = ("nvfp4", "nvfp4_bs32", "nvfp4_w4a8", "mxfp4")
BLOCK_FORMATS = (*E2M1_FORMATS, "int4_awq", "int4_awq_w4a8")
DTYPES = {"fp8": torch.float8_e4m3fn, "fp16": torch.float16, "bf16": torch.bfloat16}


def tolerance(k: int) -> float:
    """Relative to the sum of magnitudes. Products are exact; a sum of k of them in float32 errs by k * 2^-24, or twice that in
    tensor cores, which truncate; scales and bias add a few roundings (INT4's scales one for each block)."""
    return (2 * k + 16) * 2.0**-24


def block_weight(name: str, n: int, k: int, seed: int, device: str = "cpu") -> BlockWeight:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(n, 1, generator=generator).exp()
    weight = torch.randn(n, k, generator=generator) * spread
    tensors = {key: tensor.to(device) for key, tensor in WEIGHT_FORMATS[name].quantize(weight).items()}
    blocks = WEIGHT_FORMATS[name].blocks(tensors)
    assert blocks is not None
    return blocks


def activations(m: int, k: int, dtype: str, seed: int, device: str = "cpu") -> torch.Tensor:
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(seed)) * 20
    return x.to(DTYPES[dtype]).to(device)


def worst_error(
    y: torch.Tensor, x: torch.Tensor, weight: PackedWeight, row_scale: torch.Tensor | None, bias: torch.Tensor | None
) -> float:
    expected = naive_block_scaled_linear(x, weight, row_scale, bias)
    bound = (x.double().abs() @ unpack(weight).abs().T) * weight.out_scale.double()
    bound = bound if row_scale is None else bound * row_scale.double()
    bound = bound if bias is None else bound + bias.double().abs()
    assert not bool(y.isnan().any()), "not every output was written"
    return float(((y.double() - expected).abs() / bound.clamp(min=1e-300)).max())


@pytest.mark.parametrize("entries", [1, 3000, 1 << 24])
@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_packing_keeps_every_weight(name: str, entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row by row, seven rows at a time, and all at once."""
    monkeypatch.setattr(packing_module, "PACK_ENTRIES", entries)
    tensors = WEIGHT_FORMATS[name].quantize(torch.randn(20, 384, generator=torch.Generator().manual_seed(5)))
    blocks = WEIGHT_FORMATS[name].blocks(tensors)
    assert blocks is not None
    decoded = WEIGHT_FORMATS[name].decode(tensors)
    packed = pack(blocks)
    expected = decoded.unit.double() * decoded.out_scale.double()
    if packed.kind == "int4_float":  # decode() rounds code * scale to float32, the kernel does not
        torch.testing.assert_close(unpack(packed), expected, rtol=2.0**-24, atol=0)
    else:
        assert torch.equal(unpack(packed) * packed.out_scale.double().unsqueeze(1), expected)


def test_every_format_with_four_bit_blocks_is_covered() -> None:
    tensors = {
        name: weight_format.quantize(torch.randn(128, 128, generator=torch.Generator().manual_seed(0)))
        for name, weight_format in WEIGHT_FORMATS.items()
    }
    assert {name for name, stored in tensors.items() if WEIGHT_FORMATS[name].blocks(stored) is not None} == set(
        BLOCK_FORMATS
    )


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 254), st.integers(0, 30), st.integers(0, 2**31))
def test_exponents_are_kept_or_refused(top: int, span: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(1, 8, (1, 64), generator=generator, dtype=torch.uint8)
    scale = torch.tensor([[top, max(top - span, 0)]], dtype=torch.uint8)
    blocks = BlockWeight(codes, scale, torch.ones(()), "e2m1", 32)
    if top - max(top - span, 0) > 24:
        with pytest.raises(ValueError, match="span"):
            pack(blocks)
        return
    packed = pack(blocks)
    factor = torch.exp2(scale.double() - 127).repeat_interleave(32, dim=1)
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)[codes.long()]
    assert torch.equal(unpack(packed) * packed.out_scale.double(), values * factor)


def test_a_zero_block_has_no_exponent() -> None:
    codes = torch.tensor([[0, 8] * 16 + [7] * 32], dtype=torch.uint8)
    packed = pack(BlockWeight(codes, torch.tensor([[254, 3]], dtype=torch.uint8), torch.ones(()), "e2m1", 32))
    assert float((unpack(packed) * packed.out_scale.double())[0, 32]) == 6 * 2.0**-124


@pytest.mark.parametrize("k", [24, 8])
def test_a_k_that_is_not_whole_elements_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match="multiple of 16"):
        pack(BlockWeight(torch.zeros(2, k, dtype=torch.uint8), torch.ones(2, 1), torch.ones(()), "e2m1", k))


@pytest.mark.parametrize(("scale", "message"), [(0x7F, "E4M3"), (0x81, "E4M3"), (255, "UE8M0")])
def test_scales_whose_bits_would_be_misread_are_refused(scale: int, message: str) -> None:
    dtype = torch.float8_e4m3fn if message == "E4M3" else torch.uint8
    scales = torch.tensor([[scale, 1]], dtype=torch.uint8).view(dtype)
    with pytest.raises(ValueError, match=message):
        pack(BlockWeight(torch.ones(1, 64, dtype=torch.uint8), scales, torch.ones(()), "e2m1", 32))


@pytest.mark.parametrize(
    ("row_scale", "bias", "message"),
    [
        (torch.ones(3, dtype=torch.float16), None, "row_scale"),
        (torch.ones(2), None, "row_scale"),
        (None, torch.ones(33), "bias"),
        (None, torch.ones(1, 34), "bias"),
    ],
)
def test_what_would_be_read_out_of_place_is_refused(
    row_scale: torch.Tensor | None, bias: torch.Tensor | None, message: str
) -> None:
    weight = pack(block_weight("nvfp4", 34, 64, seed=0))
    with pytest.raises(ValueError, match=message):
        block_scaled_linear(activations(3, 64, "bf16", seed=0), weight, row_scale, bias)


def check(name: str, dtype: str, m: int, n: int, k: int, device: str, plan: Any = None) -> float:
    weight = pack(block_weight(name, n, k, seed=m + n, device=device))
    x = activations(m, k, dtype, seed=k, device=device)
    # A column of a matrix: its entries do not lie side by side.
    row_scale = (
        (torch.rand(m, 2, generator=torch.Generator().manual_seed(2)).to(device) + 0.5)[:, :1] if m % 2 else None
    )
    bias = torch.randn(n, generator=torch.Generator().manual_seed(3)).to(device) if n % 2 == 0 else None
    chosen = None if plan is None else (KernelConfig(*plan[:5]), plan[5])
    with poisoned():
        y = run(x, weight, row_scale, bias, torch.float32, chosen)
    return worst_error(y, x, weight, row_scale, bias) / tolerance(k)


@contextmanager
def poisoned() -> Iterator[None]:
    """Every new float tensor starts as NaN, so that what a kernel does not write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def decoded_wrongly(name: str, dtype: str, device: str) -> int:
    """Entries of ``decode_rows`` that are not the packed weight, over rows and inputs that end within a tile."""
    weight = pack(block_weight(name, 40, 384 if name.startswith("int4") else 416, seed=4, device=device))
    expected = unpack(weight)
    if weight.kind == "int4_float":
        factor, expected = 1.0, unpack(dataclasses.replace(weight, scale=torch.ones_like(weight.scale)))
    elif dtype == "fp8":
        if not weight.fp8:
            return 0
        factor = 2.0**9
    else:
        factor = descale(weight.kind, dtype == "fp16")
    with poisoned():
        rows = decode_rows(weight, 3, 35, DTYPES[dtype])
    return int((rows.double() * factor != expected[3:38]).sum())


def groups_error(dtype: str, m: int, n: int, k: int, device: str, config: Any = None) -> float:
    """INT4 for many tokens in two parts of the rows: of 128 and the rest."""
    weight = pack(block_weight("int4_awq", n, k, seed=m + n, device=device))
    x = activations(m, k, dtype, seed=k, device=device)
    row_scale = torch.rand(m, 1, generator=torch.Generator().manual_seed(2)).to(device) + 0.5
    bias = torch.randn(n, generator=torch.Generator().manual_seed(3)).to(device) if n % 2 == 0 else None
    scratch, launch_module.SCRATCH_BYTES = launch_module.SCRATCH_BYTES, 1
    with poisoned():
        y = run_groups(
            x, weight, row_scale, bias, torch.float32, None if config is None else (KernelConfig(*config), 1)
        )
    launch_module.SCRATCH_BYTES = scratch
    return worst_error(y, x, weight, row_scale, bias) / tolerance(k)


INTERPRETED_GROUPS = [
    # (activations, m, n, k, (bn, bm, bk, warps, stages))
    *[(dtype, 37, 150, 384, (64, 16, 128, 4, 2)) for dtype in DTYPES],
    *[(dtype, 17, 130, 256, (32, 32, 64, 4, 2)) for dtype in DTYPES],
    ("fp8", 130, 1154, 128, (128, 128, 128, 8, 2)),  # more tiles than go together
]

INTERPRETED = [
    # (format, activations, m, n, k, (bn, bm, bk, warps, stages, split) or None for the chosen one)
    *[(name, dtype, 3, 34, 384, None) for name in BLOCK_FORMATS for dtype in DTYPES],
    *[("nvfp4", dtype, 17, 70, 272, (32, 16, 128, 4, 2, 1)) for dtype in DTYPES],  # tails of N, M and K
    *[("mxfp4", dtype, 1, 33, 416, (32, 16, 128, 4, 2, 2)) for dtype in DTYPES],  # a split that ends early
    *[("int4_awq", dtype, 2, 40, 384, (16, 16, 128, 4, 2, 4)) for dtype in DTYPES],  # a split with nothing to do
    *[("int4_awq", dtype, 40, 34, 256, (32, 32, 128, 4, 2, 1)) for dtype in DTYPES],  # in order before the kernel
    *[("nvfp4_bs32", dtype, 40, 34, 320, (32, 32, 128, 4, 2, 1)) for dtype in DTYPES],  # likewise, with a tail of K
    *[("nvfp4", dtype, 40, 34, 336, (32, 32, 128, 4, 2, 1)) for dtype in DTYPES],  # not whole 64s: in order within
]


def test_in_the_interpreter() -> None:
    """One process for all cases: Triton decides at import whether it interprets."""
    script = (
        "import json, sys, importlib.util as u\n"
        f"spec = u.spec_from_file_location('cases', {str(Path(__file__))!r}); cases = u.module_from_spec(spec)\n"
        "spec.loader.exec_module(cases)\n"
        "errors = [cases.check(*case[:5], 'cpu', case[5]) for case in cases.INTERPRETED]\n"
        "errors += [cases.groups_error(*case[:4], 'cpu', case[4]) for case in cases.INTERPRETED_GROUPS]\n"
        "wrong = [cases.decoded_wrongly(name, dtype, 'cpu') for name in cases.BLOCK_FORMATS for dtype in cases.DTYPES]\n"
        "print(json.dumps([errors, wrong]))\n"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    errors, wrong = json.loads(done.stdout.splitlines()[-1])
    assert wrong == [0] * len(wrong)
    assert len(errors) == len(INTERPRETED) + len(INTERPRETED_GROUPS)
    assert max(errors) < 1, dict(zip(INTERPRETED, errors, strict=True))


@pytest.mark.parametrize(
    ("span", "zero", "fp8"), [(14, False, True), (15, False, False), (20, True, True), (24, False, False)]
)
def test_which_exponents_fit_e4m3(span: int, zero: bool, fp8: bool) -> None:
    """All of E2M1 under exponents ``span`` apart is E4M3 under one scale for the row, or is said not to be; zeros do not count."""
    codes = torch.arange(16, dtype=torch.uint8).repeat(2, 4)
    if zero:
        codes[:, 32:] = 8
    scale = torch.tensor([[127, 127 - span], [60 + span, 60]], dtype=torch.uint8)
    if zero:
        scale = scale.sort(dim=1, descending=True).values
    weight = pack(BlockWeight(codes, scale, torch.ones(()), "e2m1", 32))
    assert weight.fp8 == fp8
    units = unpack(weight) / 2**9
    assert bool((units.float().to(torch.float8_e4m3fn).double() == units).all()) == fp8


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BLOCK_FORMATS)
@pytest.mark.parametrize("m", [1, 2, 7, 16, 17, 33, 64, 65, 130, 300, 700])
def test_on_a_gpu(name: str, dtype: str, m: int) -> None:
    for n, k in ((258, 1152), (1024, 4096)):
        weight = pack(block_weight(name, n, k, seed=m, device="cuda"))
        x = activations(m, k, dtype, seed=m, device="cuda")
        row_scale = torch.rand(m, 1, device="cuda") + 0.5
        bias = torch.randn(n, device="cuda")
        with poisoned():
            y = block_scaled_linear(x, weight, row_scale, bias, torch.float32)
        assert worst_error(y, x, weight, row_scale, bias) < tolerance(k)
        y = block_scaled_linear(x, weight, row_scale, bias, torch.bfloat16)
        # A rounding to bf16, and FP8 matrix instructions, which keep about 13 bits of a sum on Hopper.
        assert worst_error(y, x, weight, row_scale, bias) < 2**-8 + 2**-12


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "int4_awq"])
@pytest.mark.parametrize("m", [16, 32, 64, 128])
def test_results_repeat_on_a_gpu(name: str, m: int) -> None:
    """Matrix instructions read registers while the next codes are decoded: were any overwritten too early, results would vary."""
    weight = pack(block_weight(name, 4096, 8192, seed=m, device="cuda"))
    x = activations(m, 8192, "fp8", seed=m, device="cuda")
    y = run(x, weight, None, None, torch.float32)
    assert worst_error(y, x, weight, None, None) < tolerance(8192)
    assert all(torch.equal(run(x, weight, None, None, torch.float32), y) for _ in range(30))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 65, 300, 1000])
def test_groups_on_a_gpu(dtype: str, m: int) -> None:
    """FP8 activations in float16, as the result is float32; FP8 matrix instructions are held to bf16 with the others above."""
    assert groups_error(dtype, m, 1154, 1152, "cuda") < 1


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 40, 600])
def test_under_cuda_graph_capture(m: int) -> None:
    weight = pack(block_weight("nvfp4_w4a8", 512, 2048, seed=0, device="cuda"))
    x = activations(m, 2048, "fp8", seed=1, device="cuda")
    block_scaled_linear(x, weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = block_scaled_linear(x, weight)
    x.copy_(activations(m, 2048, "fp8", seed=2, device="cuda"))
    y.fill_(float("nan"))
    graph.replay()
    assert worst_error(y, x, weight, None, None) < tolerance(2048) + 2.0**-8  # the result is bf16


@pytest.mark.gpu
@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_rows_on_a_gpu(name: str) -> None:
    """A lookup is the decoded weight, with other indices in a captured graph too."""
    weight = pack(block_weight(name, 300, 384, seed=0, device="cuda"))
    expected = (unpack(weight) * weight.out_scale.double().unsqueeze(1)).float()
    indices = torch.arange(14, device="cuda").reshape(2, 7) * 21
    block_scaled_rows(weight, indices)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rows = block_scaled_rows(weight, indices)
    indices.copy_(299 - indices)
    rows.fill_(float("nan"))
    graph.replay()
    torch.testing.assert_close(rows, expected[indices], rtol=2.0**-22 if name.startswith("int4") else 0, atol=0)
    assert block_scaled_rows(weight, indices[:0]).shape == (0, 7, 384)


@pytest.mark.gpu
def test_operator_is_well_formed() -> None:
    weight = pack(block_weight("nvfp4", 64, 256, seed=0, device="cuda"))
    x = activations(4, 256, "bf16", seed=1, device="cuda")
    arguments = (
        x,
        weight.codes,
        weight.scale,
        weight.out_scale,
        weight.kind,
        weight.group,
        weight.fp8,
        None,
        None,
        torch.bfloat16,
    )
    torch.library.opcheck(torch.ops.modelopt_ext.block_scaled_linear.default, arguments)
