"""4-bit weights kept tile by tile: packing and decoding against the stored weight, and the Gluon kernel on a GPU of SM90.

The kernel itself has no test on a CPU: Triton's interpreter does not run Gluon. ``benchmarks.aot`` compiles every configuration,
where Triton asserts that no value moves between threads on its way from a tile to the matrix instruction.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sglang_modelopt_kernels.formats import WEIGHT_FORMATS
from sglang_modelopt_kernels.formats.base import BlockWeight
from sglang_modelopt_kernels.gemm.common import KernelConfig
from sglang_modelopt_kernels.gemm.mxfp4_fp8_hopper import fold, unfold
from sglang_modelopt_kernels.gemm.w4_decode import launch as w4_decode
from sglang_modelopt_kernels.gemm.w4_stream import (
    StreamedWeight,
    missing,
    naive_streamed_linear,
    path_of,
    stream_folded,
    stream_nvfp4,
    streamed_linear,
    unstream,
)
from sglang_modelopt_kernels.gemm.w4_stream.launch import (
    DENSE_FROM,
    DESCALE,
    STREAMED,
    TILED,
    decode_rows,
    operand,
    plan_of,
    run,
    run_dense,
)
from sglang_modelopt_kernels.gemm.w4_stream.packing import Kind

KINDS: tuple[Kind, ...] = ("folded", "scaled_16", "scaled_32")
FORMAT: dict[Kind, str] = {"folded": "mxfp4", "scaled_16": "nvfp4", "scaled_32": "nvfp4_w4a8"}
"""The weight format of each kind."""


def configs_of(kind: Kind) -> tuple[KernelConfig, ...]:
    """All configurations that products of one kind may have, ascending by BM."""
    return (*STREAMED[kind], *(TILED if kind == "folded" else ()))


def blocks_of(kind: Kind, n: int, k: int, seed: int) -> tuple[BlockWeight, dict[str, torch.Tensor]]:
    """Random codes under scales over all that the kind holds, some of them zero: as blocks, and as stored."""
    generator = torch.Generator().manual_seed(seed)
    found = WEIGHT_FORMATS[FORMAT[kind]]
    magnitude = torch.exp2(torch.rand(n, k, generator=generator) * 8 - 4)
    stored = found.quantize((torch.randn(n, k, generator=generator) * magnitude).to(torch.bfloat16))
    stored["weight"][::3, :32] = 0x80  # zeros, negative and positive
    if kind == "folded":
        stored["weight_scale"] = torch.randint(100, 112, stored["weight_scale"].shape, generator=generator).to(
            torch.uint8
        )
    else:
        scale = torch.randint(0, 127, stored["weight_scale"].shape, generator=generator)
        stored["weight_scale"] = scale.to(torch.uint8).view(torch.float8_e4m3fn)
    blocks = found.blocks(stored)
    assert blocks is not None
    return blocks, stored


def weight_of(kind: Kind, n: int, k: int, seed: int = 0, device: str = "cpu") -> tuple[StreamedWeight, torch.Tensor]:
    """A random weight, packed, and its values as stored, float64 ``[N, K]``."""
    blocks, stored = blocks_of(kind, n, k, seed)
    decoded = WEIGHT_FORMATS[FORMAT[kind]].decode(stored)
    if kind == "folded":
        weight = stream_folded(fold(stored["weight"], stored["weight_scale"]))
    else:
        weight = stream_nvfp4(blocks)
    moved = StreamedWeight(weight.codes.to(device), weight.scale.to(device), weight.out_scale.to(device), kind)
    return moved, decoded.unit.double() * decoded.out_scale.double()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "k"), [(64, 256), (192, 768), (64, 1280)])
def test_tiles_are_the_stored_weight(kind: Kind, n: int, k: int) -> None:
    weight, expected = weight_of(kind, n, k, n + k)
    assert torch.equal(unstream(weight) * weight.out_scale.double().unsqueeze(1), expected)
    assert (
        weight.codes.numel() + weight.scale.numel()
        == n * k // 2 + n * k // {"folded": 32, "scaled_16": 16, "scaled_32": 32}[kind]
    )


def test_folded_and_streamed_are_one_weight() -> None:
    _, stored = blocks_of("folded", 128, 512, 3)
    folded = fold(stored["weight"], stored["weight_scale"])
    assert torch.equal(unstream(stream_folded(folded)), unfold(folded))


def decoded_rows() -> list[bool]:
    """Whether the decoding kernel gives the weight, for every kind: run in Triton's interpreter."""
    same = []
    for kind in KINDS:
        weight, _ = weight_of(kind, 192, 512, 5)
        rows = decode_rows(weight, 64, 128).double() * DESCALE[kind]
        same.append(torch.equal(rows, unstream(weight)[64:]))
    return same


def tiled_errors() -> list[float]:
    """Errors of the kernel for many tokens on a CPU, in Triton's interpreter: whole and partial tiles of tokens, and a split."""
    cases = ((64, 64, 512, 1), (70, 128, 768, 2))
    return [error("folded", m, n, k, (TILED[0], split), torch.float32, "cpu") for m, n, k, split in cases]


def dense_errors() -> list[float]:
    """Errors of the product of many tokens, decoded 128 rows at a time, with PyTorch's product in place of cuBLAS."""
    scratch, multiply = w4_decode.SCRATCH_BYTES, torch.mm
    w4_decode.SCRATCH_BYTES = 1
    torch.mm = lambda a, b, out_dtype: a.to(out_dtype) @ b.to(out_dtype)  # type: ignore[assignment, misc]
    errors = []
    for kind in KINDS:
        weight, _ = weight_of(kind, 320, 512, 7)
        x = torch.randn(19, 512).to(torch.float8_e4m3fn).to(operand(kind))
        row_scale, bias = torch.rand(19, 1) + 0.5, torch.randn(320)
        y, expected = (
            run_dense(x, weight, row_scale, bias, torch.float32),
            naive_streamed_linear(x, weight, row_scale, bias),
        )
        errors.append(float(((y - expected).norm(dim=1) / expected.norm(dim=1)).max()))
    w4_decode.SCRATCH_BYTES, torch.mm = scratch, multiply
    return errors


def test_in_the_interpreter() -> None:
    script = (
        "import json, importlib.util as u\n"
        f"spec = u.spec_from_file_location('cases', {str(Path(__file__))!r}); cases = u.module_from_spec(spec)\n"
        "spec.loader.exec_module(cases)\n"
        "print(json.dumps([cases.decoded_rows(), cases.tiled_errors(), cases.dense_errors()]))\n"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    same, errors, dense = json.loads(done.stdout.splitlines()[-1])
    assert same == [True] * len(KINDS)
    assert max(errors) < 1e-6, "float32 sums of some hundred exact products, relative to the sum of their magnitudes"
    assert max(dense) < 1e-6, "float32 sums of 512 exact products"


def hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0) or missing() is not None:
        pytest.skip(f"the kernel is for SM90 with Gluon: {missing()}")


def error(
    kind: Kind,
    m: int,
    n: int,
    k: int,
    plan: tuple[KernelConfig, int] | None,
    out_dtype: torch.dtype,
    device: str = "cuda",
) -> float:
    """The largest error of any output, relative to the sum of the magnitudes of its products."""
    weight, _ = weight_of(kind, n, k, m + n + k, device)
    generator = torch.Generator().manual_seed(m)
    x = (torch.randn(m, k, generator=generator) * 20).to(torch.float8_e4m3fn).to(operand(kind)).to(device)
    row_scale = (torch.rand(m, 2, generator=generator) + 0.5)[:, :1].to(device) if m % 2 else None
    bias = torch.randn(n, generator=generator).to(device) if n % 128 == 0 else None
    torch.use_deterministic_algorithms(True, warn_only=True)  # new tensors start as NaN
    y = run(x, weight, row_scale, bias, out_dtype, plan).double()
    torch.use_deterministic_algorithms(False)
    assert not bool(y.isnan().any()), "not every output was written"
    expected = naive_streamed_linear(x, weight, row_scale, bias)
    magnitude = StreamedWeight(weight.codes, weight.scale, weight.out_scale, kind)
    bound = (x.double().abs() @ unstream(magnitude).abs().T) * weight.out_scale.double()
    bound = bound * (1 if row_scale is None else row_scale.double()) + (0 if bias is None else bias.double().abs())
    return float(((y - expected).abs() / bound).max())


GPU_CASES = [
    (kind, config, split, m, n, k)
    for kind in KINDS
    for config in configs_of(kind)
    for split, m, n, k in (
        (1, config.bm, 128, 256),
        (1, config.bm - 3, 192, 1280),
        (4, 1, 64, 1280),
        (8, 2 * config.bm + 5, 320, 2048),
    )
]


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES, ids=lambda case: "-".join(map(str, case)))
def test_on_a_gpu(case: tuple[Kind, KernelConfig, int, int, int, int]) -> None:
    hopper()
    kind, config, split, m, n, k = case
    # FP8 instructions cut each of 32 products at 2^-13 of the largest: see test_mxfp4_fp8_hopper.py. fp32 sums of exact products
    # err by at most K rounding errors of 2^-24 of the sum of magnitudes.
    bound = 2.0**-11 if kind == "folded" else k * 2.0**-24
    assert error(kind, m, n, k, (config, split), torch.float32) < bound


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m", [1, 8, 9, 16, 30, 60, 130, 300])
def test_the_choice_on_a_gpu(kind: Kind, m: int) -> None:
    hopper()
    assert error(kind, m, 4096, 4096, None, torch.float32) < (2.0**-11 if kind == "folded" else 4096 * 2.0**-24)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_many_tokens_on_a_gpu(kind: Kind) -> None:
    hopper()
    weight, _ = weight_of(kind, 512, 2048, 9, "cuda")
    x = torch.randn(DENSE_FROM[kind] + 7, 2048).to(torch.float8_e4m3fn).to(operand(kind)).cuda()
    y = streamed_linear(x, weight).double()
    expected = naive_streamed_linear(x, weight)
    assert float(((y - expected).norm(dim=1) / expected.norm(dim=1)).max()) < 2**-8


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "k"), [(64, 256), (4096, 4096), (28672, 4096), (4096, 14336), (64, 131072)])
@pytest.mark.parametrize("m", [1, 8, 9, 64, 65, 300])
def test_choice(kind: Kind, n: int, k: int, m: int) -> None:
    weight = StreamedWeight(torch.empty(n, k // 2, device="meta"), torch.empty(0), torch.empty(0), kind)
    config, split = plan_of(weight, m, torch.device("cpu"))
    twice = kind == "folded" and config is STREAMED[kind][-1] and m <= 2 * config.bm
    assert m <= config.bm or config is configs_of(kind)[-1] or twice
    assert split == 1 or (k // 256 >= 4 * split and config.tiles(m, n) * split <= 4 * 132)
    assert path_of(weight, m, torch.device("cpu"))[:2] == ("run", config)


@pytest.mark.parametrize(("n", "k"), [(65, 256), (64, 128), (32, 512)])
def test_parts_of_tiles_are_rejected(n: int, k: int) -> None:
    blocks, stored = blocks_of("folded", n, k, 1)
    with pytest.raises(ValueError, match="needs N in 64s and K in 256s"):
        stream_folded(fold(stored["weight"], stored["weight_scale"]))
    with pytest.raises(ValueError, match="needs N in 64s and K in 256s"):
        stream_nvfp4(blocks)


def test_other_numbers_are_rejected() -> None:
    blocks, _ = blocks_of("folded", 64, 256, 1)
    with pytest.raises(ValueError, match=r"expected .* got"):
        stream_nvfp4(blocks)
    blocks, _ = blocks_of("scaled_16", 64, 256, 1)
    blocks.scale.view(torch.uint8)[3, 2] = 0x7F
    with pytest.raises(ValueError, match="NaN or negative"):
        stream_nvfp4(blocks)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 256)}, "x must"),
        ({"x": torch.zeros(2, 128).to(torch.float8_e4m3fn)}, "x must"),
        ({"row_scale": torch.ones(3)}, "row_scale"),
        ({"bias": torch.ones(9)}, "bias"),
    ],
)
def test_what_would_be_misread_is_rejected(change: dict[str, torch.Tensor], message: str) -> None:
    weight, _ = weight_of("folded", 64, 256)
    arguments = {"x": torch.zeros(2, 256).to(torch.float8_e4m3fn), "weight": weight}
    with pytest.raises(ValueError, match=message):
        streamed_linear(**(arguments | change))  # type: ignore[arg-type]
