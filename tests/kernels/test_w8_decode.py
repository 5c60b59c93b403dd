"""The product with 8-bit weights against its naive twin: on a CPU in Triton's interpreter, and, marked ``gpu``, on CUDA."""

from __future__ import annotations

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

from sglang_modelopt_kernels.formats import WEIGHT_FORMATS
from sglang_modelopt_kernels.gemm.common import KernelConfig, choose
from sglang_modelopt_kernels.gemm.w8_decode import (
    ByteWeight,
    eight_bit_linear,
    float_blocks,
    mxfp8,
    naive_eight_bit_linear,
    rows_of,
    unpack,
    whole,
)
from sglang_modelopt_kernels.gemm.w8_decode import launch as launch_module
from sglang_modelopt_kernels.gemm.w8_decode.launch import TAKEN, configs, decode_rows, run, run_dense, run_int8
from sglang_modelopt_kernels.gemm.w8_decode.packing import KINDS, SPAN

DTYPES = {"i8": torch.int8, "fp16": torch.float16, "bf16": torch.bfloat16}
PAIRS = [(kind, name) for kind in KINDS for name, dtype in DTYPES.items() if dtype in TAKEN[kind]]
FORMATS = {"int8": "int8_per_channel", "e4m3": "fp8_per_channel", "e4m3_float": "fp8_block", "e4m3_exponent": "mxfp8"}


def tolerance(k: int) -> float:
    """Relative to the sum of magnitudes. Products are exact; a sum of k of them in float32 errs by k * 2^-24, or twice that in
    tensor cores, which truncate; scales and bias add a few roundings, FP8's blocks one each. An int32 sum is exact."""
    return (2 * k + 16) * 2.0**-24


def stored_weight(kind: str, n: int, k: int, seed: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A stored weight whose rows are of uneven size, and what it stands for, float64."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator) * torch.randn(n, 1, generator=generator).exp()
    if kind == "e4m3_exponent":  # blocks of uneven size too
        weight = weight * torch.exp2(torch.randint(-30, 30, (n, k // 32), generator=generator)).repeat_interleave(32, 1)
    stored = WEIGHT_FORMATS[FORMATS[kind]].quantize(weight)
    decoded = WEIGHT_FORMATS[FORMATS[kind]].decode(stored)
    unit = decoded.unit.double()
    if kind == "e4m3_float":  # decode() rounds code * scale to float32, the kernel does not
        blocks = stored["weight_scale"].double().squeeze(3).squeeze(1)
        spread = blocks.repeat_interleave(128, dim=0).repeat_interleave(128, dim=1)[:n, :k]
        unit = stored["weight"].double() * spread
    return stored, unit * decoded.out_scale.double()


def kept(kind: str, *shards: dict[str, torch.Tensor]) -> ByteWeight:
    if kind == "e4m3_float":
        return float_blocks([(shard["weight"], shard["weight_scale"].squeeze(3).squeeze(1)) for shard in shards])
    codes, scale = (torch.cat([shard[name] for shard in shards]) for name in ("weight", "weight_scale"))
    return mxfp8(codes, scale) if kind == "e4m3_exponent" else whole(codes, scale)


def random_weight(kind: str, n: int, k: int, seed: int, device: str = "cpu") -> ByteWeight:
    weight = kept(kind, stored_weight(kind, n, k, seed)[0])
    scale = None if weight.scale is None else weight.scale.to(device)
    return ByteWeight(weight.codes.to(device), scale, weight.out_scale.to(device), weight.kind)


def activations(m: int, k: int, dtype: str, seed: int, device: str = "cpu") -> torch.Tensor:
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(seed)) * 20
    if dtype == "i8":
        x = (x * 4).round().clamp(-128, 127)
    return x.to(DTYPES[dtype]).to(device)


@contextmanager
def poisoned() -> Iterator[None]:
    """Every new float tensor starts as NaN, and every integer one as its largest number."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def worst_error(
    y: torch.Tensor, x: torch.Tensor, weight: ByteWeight, row_scale: torch.Tensor | None, bias: torch.Tensor | None
) -> float:
    expected = naive_eight_bit_linear(x, weight, row_scale, bias)
    bound = (x.double().abs() @ unpack(weight).abs().T) * weight.out_scale.double()
    bound = bound if row_scale is None else bound * row_scale.double()
    bound = bound if bias is None else bound + bias.double().abs()
    assert not bool(y.isnan().any()), "not every output was written"
    return float(((y.double() - expected).abs() / bound.clamp(min=1e-300)).max())


def check(kind: str, dtype: str, m: int, n: int, k: int, device: str, plan: Any = None) -> float:
    """The worst error in units of the tolerance."""
    weight = random_weight(kind, n, k, m + n, device)
    x = activations(m, k, dtype, k, device)
    # A column of a matrix: its entries do not lie side by side.
    row_scale = (
        (torch.rand(m, 2, generator=torch.Generator().manual_seed(2)).to(device) + 0.5)[:, :1] if m % 2 else None
    )
    bias = torch.randn(n, generator=torch.Generator().manual_seed(3)).to(device) if n % 2 == 0 else None
    chosen = None if plan is None else (KernelConfig(*plan[:5]), plan[5])
    with poisoned():
        y = run(x, weight, row_scale, bias, torch.float32, chosen)
    return worst_error(y, x, weight, row_scale, bias) / tolerance(k)


def decoded_wrongly(kind: str, dtype: str, device: str) -> int:
    """Entries of ``decode_rows`` that are not the weight, over rows and inputs that end within a tile."""
    weight = random_weight(kind, 40, 672, 4, device)
    expected = unpack(weight)
    if kind == "e4m3_float":
        expected = unpack(whole(weight.codes, weight.out_scale))
    with poisoned():
        rows = decode_rows(weight, 3, 35, DTYPES[dtype])
    return int((rows.double() != expected[3:38]).sum())


def many_error(kind: str, dtype: str, m: int, n: int, k: int, device: str) -> float:
    """Of many tokens, in parts of 128 rows and the rest."""
    weight = random_weight(kind, n, k, m + n, device)
    x = activations(m, k, dtype, k, device)
    row_scale = torch.rand(m, 1, generator=torch.Generator().manual_seed(2)).to(device) + 0.5
    bias = torch.randn(n, generator=torch.Generator().manual_seed(3)).to(device)
    scratch, launch_module.SCRATCH_BYTES = launch_module.SCRATCH_BYTES, 1
    try:
        with poisoned():
            many = run_int8 if dtype == "i8" else run_dense
            y = many(x, weight, row_scale, bias, torch.float32)
    finally:
        launch_module.SCRATCH_BYTES = scratch
    return worst_error(y, x, weight, row_scale, bias) / tolerance(k)


INTERPRETED = [
    # (kind, activations, m, n, k, (bn, bm, bk, warps, stages, split) or None for the chosen one)
    *[(*pair, 3, 34, 384, None) for pair in PAIRS],
    *[(*pair, 17, 70, 288, (32, 16, 128, 4, 2, 1)) for pair in PAIRS],  # tails of N, M and K
    *[(*pair, 1, 33, 416, (32, 16, 128, 4, 2, 2)) for pair in PAIRS],  # a split that ends early
    *[(*pair, 2, 40, 384, (16, 16, 128, 4, 2, 4)) for pair in PAIRS],  # a split with nothing to do
    ("int8", "i8", 2, 40, 1024, (32, 16, 256, 4, 2, 2)),
    ("e4m3_float", "bf16", 5, 300, 256, None),  # three rows of block scales
]
# On a CPU torch has no product of 16-bit numbers with float32 results.
INTERPRETED_MANY = [
    ("e4m3_float", "fp16", 37, 150, 384),
    ("e4m3_float", "bf16", 17, 300, 256),
    ("int8", "i8", 37, 152, 384),
]


def test_in_the_interpreter() -> None:
    """One process for all cases: Triton decides at import whether it interprets."""
    script = (
        "import json, sys, importlib.util as u\n"
        f"spec = u.spec_from_file_location('cases', {str(Path(__file__))!r}); cases = u.module_from_spec(spec)\n"
        "spec.loader.exec_module(cases)\n"
        "errors = [cases.check(*case[:5], 'cpu', case[5]) for case in cases.INTERPRETED]\n"
        "errors += [cases.many_error(*case, 'cpu') for case in cases.INTERPRETED_MANY]\n"
        "wrong = [cases.decoded_wrongly(*pair, 'cpu') for pair in cases.PAIRS if pair[1] != 'i8']\n"
        "print(json.dumps([errors, wrong]))\n"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    errors, wrong = json.loads(done.stdout.splitlines()[-1])
    assert wrong == [0] * (len(PAIRS) - 1)
    cases = [*INTERPRETED, *INTERPRETED_MANY]
    assert max(errors) < 1, dict(zip(map(str, cases), errors, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_the_weight_is_kept(kind: str) -> None:
    """Every code under every scale, shards one below the other, which for FP8's blocks start anew; in its stored size."""
    stored, expected = zip(*(stored_weight(kind, n, 384, n) for n in (256, 64, 150)), strict=True)
    weight = kept(kind, *stored)
    right = torch.cat(expected)
    assert torch.equal(unpack(weight) * weight.out_scale.double().unsqueeze(1), right)
    assert weight.scale_rows == (64 if kind == "e4m3_float" else 1)
    indices = torch.tensor([[0, 469], [320, 255]])
    looked_up = rows_of(weight, indices)
    assert looked_up.shape == (2, 2, 384)
    torch.testing.assert_close(looked_up.double(), right[indices], rtol=2.0**-23, atol=0)


@pytest.mark.parametrize(
    ("sizes", "rows"), [((200,), 128), ((128, 3), 128), ((96, 96), 32), ((5, 7, 2), 1), ((2,), 128)]
)
def test_rows_that_share_scales(sizes: tuple[int, ...], rows: int) -> None:
    """A scale has as many rows as every shard but the last has whole ones of; where there are fewer, the first such number."""
    shards = [stored_weight("e4m3_float", n, 256, n) for n in sizes]
    weight = kept("e4m3_float", *(stored for stored, _ in shards))
    assert weight.scale_rows == rows
    assert torch.equal(unpack(weight), torch.cat([expected for _, expected in shards]))


def test_what_does_not_fit_is_refused() -> None:
    codes = torch.full((2, 64), 0x77, dtype=torch.uint8).view(torch.float8_e4m3fn)
    scale = torch.tensor([[100, 100], [20, 20 + SPAN + 1]], dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"span 2\^101, more than 2\^100"):
        mxfp8(codes, scale)
    scale[1, 1] = 255
    with pytest.raises(ValueError, match="NaN"):
        mxfp8(codes, scale)


@pytest.mark.parametrize("low", [0, 1, 154])
def test_the_smallest_code_under_the_largest_span(low: int) -> None:
    codes = torch.ones((1, 64), dtype=torch.uint8).view(torch.float8_e4m3fn)
    weight = mxfp8(codes, torch.tensor([[low, low + SPAN]], dtype=torch.uint8))
    assert unpack(weight)[0, 0] == 2.0 ** (-9 - SPAN)
    assert torch.equal(unpack(weight).to(torch.bfloat16).double(), unpack(weight))
    assert (unpack(weight) * weight.out_scale.double())[0, 0] == 2.0 ** (-9 + low - 127)


@pytest.mark.parametrize("capability", [80, 89, 90, 100, 103, 120])
@pytest.mark.parametrize("m", [1, 16, 17, 64, 65, 5000])
def test_choice(m: int, capability: int) -> None:
    for kind, dtype in PAIRS:
        math = launch_module.math_of(kind, DTYPES[dtype])
        known = configs(kind, math, capability)
        config, split = choose(known, m, 4096, 4096, 132)
        assert m <= config.bm or config is known[-1]
        assert kind != "e4m3_float" or config.bk == 128
        assert split in (1, 2, 4, 8, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 64)}, "multiplied by"),
        ({"x": torch.zeros(2, 32, dtype=torch.bfloat16)}, "x must"),
        ({"row_scale": torch.ones(3)}, "row_scale"),
        ({"bias": torch.ones(9)}, "bias"),
        ({"x": torch.zeros(1, 1 << 17, dtype=torch.int8)}, "K must be at most 131071 .*, got 131072"),
    ],
)
def test_what_would_be_misread_is_refused(change: dict[str, torch.Tensor], message: str) -> None:
    x = change.get("x", torch.zeros(2, 64, dtype=torch.bfloat16))
    k = x.shape[1] if x.dtype == torch.int8 else 64
    weight = whole(torch.zeros(8, k, dtype=torch.int8), torch.ones(8))
    with pytest.raises(ValueError, match=message):
        eight_bit_linear(**({"x": x, "weight": weight} | change))  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@pytest.mark.parametrize("m", [1, 2, 7, 16, 17, 33, 64, 65, 130, 300, 700, 1024, 2050])
def test_on_a_gpu(pair: tuple[str, str], m: int) -> None:
    for n, k in ((258, 1152), (1024, 4096), (512, 1056)):
        weight = random_weight(pair[0], n, k, m, "cuda")
        x = activations(m, k, pair[1], m, "cuda")
        row_scale = torch.rand(m, 1, device="cuda") + 0.5
        bias = torch.randn(n, device="cuda")
        with poisoned():
            y = eight_bit_linear(x, weight, row_scale, bias, torch.float32)
        assert worst_error(y, x, weight, row_scale, bias) < tolerance(k)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*INTERPRETED, *((*pair, 300, 1152, 1152, None) for pair in PAIRS)], ids=str)
def test_cases_on_a_gpu(case: tuple[str, str, int, int, int, Any]) -> None:
    assert check(*case[:5], "cuda", case[5]) < 1


@pytest.mark.gpu
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_parts_and_decoding_on_a_gpu(pair: tuple[str, str]) -> None:
    assert many_error(*pair, 300, 1160, 1152, "cuda") < 1
    assert pair[1] == "i8" or decoded_wrongly(*pair, "cuda") == 0


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 40, 300, 1500])
def test_sums_of_int8_are_the_same_for_any_number_of_tokens(m: int) -> None:
    weight, x = random_weight("int8", 1024, 4096, 0, "cuda"), activations(m, 4096, "i8", 1, "cuda")
    alone = torch.cat([eight_bit_linear(x[i : i + 1], weight) for i in range(0, m, max(m // 8, 1))])
    assert torch.equal(eight_bit_linear(x, weight)[:: max(m // 8, 1)], alone)


@pytest.mark.gpu
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@pytest.mark.parametrize("m", [1, 16, 32, 64, 128, 900])
def test_results_repeat_on_a_gpu(pair: tuple[str, str], m: int) -> None:
    """Matrix instructions read registers while the next codes are decoded: were any overwritten too early, results would vary."""
    weight, x = random_weight(pair[0], 4096, 8192, m, "cuda"), activations(m, 8192, pair[1], m, "cuda")
    y = run(x, weight, None, None, torch.float32)
    assert worst_error(y, x, weight, None, None) < tolerance(8192)
    assert all(torch.equal(run(x, weight, None, None, torch.float32), y) for _ in range(30))


@pytest.mark.gpu
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@pytest.mark.parametrize("m", [1, 40, 1500])
def test_under_cuda_graph_capture(pair: tuple[str, str], m: int) -> None:
    weight, x = random_weight(pair[0], 512, 2048, 0, "cuda"), activations(m, 2048, pair[1], 1, "cuda")
    indices = torch.arange(m, device="cuda") % 512
    eight_bit_linear(x, weight, out_dtype=torch.float32)
    rows_of(weight, indices)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = eight_bit_linear(x, weight, out_dtype=torch.float32)
        rows = rows_of(weight, indices)
    x.copy_(activations(m, 2048, pair[1], 2, "cuda"))
    indices.copy_(indices.flip(0))
    y.fill_(float("nan"))
    graph.replay()
    assert worst_error(y, x, weight, None, None) < tolerance(2048)
    assert torch.equal(rows, rows_of(weight, indices))


@pytest.mark.gpu
def test_operator_is_well_formed() -> None:
    operator = torch.ops.modelopt_ext.eight_bit_linear.default
    x = activations(4, 256, "bf16", 1, "cuda")
    for kind in KINDS:
        weight = random_weight(kind, 64, 256, 0, "cuda")
        arguments = (x, weight.codes, weight.scale, weight.out_scale, weight.kind, None, None, torch.bfloat16)
        if weight.codes.dtype == torch.float8_e4m3fn:
            # torch's check of the schema compares arguments by a product, which CUDA has none of for E4M3.
            torch.library.opcheck(operator, arguments, test_utils=("test_autograd_registration", "test_faketensor"))
        else:
            torch.library.opcheck(operator, arguments)
