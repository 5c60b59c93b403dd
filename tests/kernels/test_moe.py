"""The kernels for mixtures of experts against their naive twins: in Triton's interpreter, and, marked ``gpu``, on CUDA."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_modelopt_ext.backends import self_test
from sglang_modelopt_kernels.formats import WEIGHT_FORMATS, ue8m0
from sglang_modelopt_kernels.gemm.mxfp4_fp8_hopper import fold
from sglang_modelopt_kernels.gemm.reference import prepare_dense
from sglang_modelopt_kernels.gemm.w4_decode import pack
from sglang_modelopt_kernels.gemm.w4_stream import stream_folded, stream_nvfp4
from sglang_modelopt_kernels.moe import grouped
from sglang_modelopt_kernels.moe.combine import combine, naive_combine
from sglang_modelopt_kernels.moe.grouped import GroupedWeight, grouped_linear, naive_grouped_linear, unpack
from sglang_modelopt_kernels.moe.grouped import grouped as grouped_op
from sglang_modelopt_kernels.moe.grouped import launch as grouped_launch
from sglang_modelopt_kernels.moe.grouped.dense import decode as dense_decode
from sglang_modelopt_kernels.moe.grouped.dense import launch as dense_launch
from sglang_modelopt_kernels.moe.grouped.weights import KINDS
from sglang_modelopt_kernels.moe.route import Routed, most_blocks, naive_route, route

DTYPES = {"fp8": torch.float8_e4m3fn, "fp16": torch.float16, "bf16": torch.bfloat16}
FORMATS = {
    # kind: a format that is kept so
    "e2m1_e4m3/16": "nvfp4",
    "e2m1_e4m3/32": "nvfp4_w4a8",
    "e2m1_exponent": "mxfp4",
    "int4_float": "int4_awq",
    "mxfp4": "mxfp4",
    "e4m3": "fp8_per_channel",
    "e4m3_float": "fp8_block",
    "e4m3_exponent": "mxfp8",
    "int8": "int8_per_channel",
    "bf16": "nvfp4",
}


TILES = {"mxfp4_tiles": "mxfp4", "nvfp4_tiles/16": "nvfp4", "nvfp4_tiles": "nvfp4_w4a8"}
"""Kinds whose product without dense tiles no interpreter runs (``test_moe_streamed.py``), and the format of each."""
TILE_TYPES = {"mxfp4_tiles": "fp8", "nvfp4_tiles/16": "fp16", "nvfp4_tiles": "fp16"}
"""The activations of each."""
WHOLE = {"e4m3": torch.float8_e4m3fn, "int8": torch.int8, "bf16": torch.bfloat16}


def name_of(dtype: torch.dtype) -> str:
    return next(name for name, known in DTYPES.items() if known == dtype)


def one_expert(kind: str, n: int, k: int, generator: torch.Generator) -> GroupedWeight:
    """A random weight, its rows of uneven size, as the reference quantizer stores it."""
    number = WEIGHT_FORMATS[(FORMATS | TILES)[kind]]
    weight = torch.randn(n, k, generator=generator) * torch.randn(n, 1, generator=generator).exp()
    stored = number.quantize(weight)
    if kind == "mxfp4_tiles":
        return grouped.tiled(stream_folded(fold(stored["weight"], stored["weight_scale"])))
    if kind == "mxfp4":
        return grouped.mxfp4_as_stored(stored["weight"], stored["weight_scale"])
    if kind == "e4m3_exponent":
        return grouped.mxfp8(stored["weight"], stored["weight_scale"])
    if kind == "e4m3_float":
        rows = stored["weight_scale"].reshape(-(-n // 128), -1).repeat_interleave(128, dim=0)[:n]
        return grouped.float_blocks(stored["weight"], rows.contiguous())
    if kind in WHOLE:
        return grouped.whole(*prepare_dense(number.decode(stored), WHOLE[kind]))
    blocks = number.blocks(stored)
    assert blocks is not None
    return grouped.tiled(stream_nvfp4(blocks)) if kind in TILES else grouped.packed(pack(blocks))


def moved(weight: GroupedWeight, device: str) -> GroupedWeight:
    scale = None if weight.scale is None else weight.scale.to(device)
    return GroupedWeight(weight.codes.to(device), scale, weight.out_scale.to(device), weight.kind, weight.fp8)


def activations(rows: int, k: int, dtype: str, generator: torch.Generator) -> torch.Tensor:
    return (torch.randn(rows, k, generator=generator) * 20).to(DTYPES[dtype])


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
    """A product: ``spread`` says where pairs go: everywhere, to one expert, or to an invalid expert too."""

    kind: str
    dtype: str
    tokens: int
    top_k: int = 2
    experts: int = 4
    n: int = 70
    k: int = 288
    shared: bool = True
    scaled_tokens: bool = False
    spread: str = "nobody"
    block: int | None = None
    dense: bool = False
    scratch: int = 256 << 20


def tolerance(k: int) -> float:
    """Return the limit relative to the sum of magnitudes: a float32 sum of k exact products errs by k * 2^-24."""
    return (2 * k + 16) * 2.0**-24


def choices(case: Case, generator: torch.Generator) -> torch.Tensor:
    pairs = case.tokens * case.top_k
    if case.spread == "one":
        return torch.full((pairs,), case.experts - 1, dtype=torch.int32)
    lowest = -1 if case.spread == "nobody" else 0
    return torch.randint(
        lowest, case.experts - 1, (pairs,), generator=generator, dtype=torch.int32
    )  # none for the last


def check(case: Case, device: str, out_dtype: torch.dtype = torch.float32) -> float:
    """The largest error of an output, relative to the sum of magnitudes; infinite where an output is not written or not zero."""
    generator = torch.Generator().manual_seed(case.tokens + case.n)
    on_cpu = grouped.stack([one_expert(case.kind, case.n, case.k, generator) for _ in range(case.experts)])
    owners = choices(case, generator)
    pairs = owners.shape[0]
    x = activations(case.tokens if case.shared else pairs, case.k, case.dtype, generator)
    row_scale = (torch.rand(pairs, 2, generator=generator) + 0.5)[:, :1] if case.tokens % 2 else None
    if case.scaled_tokens and row_scale is not None:  # the choices of a token have one scale
        row_scale = row_scale[: case.tokens]
    weight = moved(on_cpu, device)
    block = case.block or grouped.tile(weight, x.dtype, pairs, case.dense)
    dense_launch.SCRATCH_BYTES = case.scratch
    with poisoned():
        routed = route(owners.to(device), case.experts, block)
        scale = None if row_scale is None else row_scale.to(device)
        y = grouped_linear(x.to(device), weight, routed, pairs, scale, out_dtype, case.dense).double().cpu()
    if row_scale is not None:
        row_scale = row_scale.repeat_interleave(pairs // row_scale.shape[0], dim=0)
    expected = naive_grouped_linear(x, on_cpu, owners, row_scale)
    units = [
        unpack(on_cpu, expert).abs() * on_cpu.out_scale[expert].double().unsqueeze(1) for expert in range(case.experts)
    ]
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
    found, first = [], routed.first.tolist()
    pairs = owners.shape[0]
    owned = [expert for expert in range(experts + 1) for _ in range(first[expert], first[expert + 1])]
    if owned != [owner for owner in routed.owner.tolist() if owner >= 0]:
        return True
    for index, owner in enumerate(routed.owner.tolist()):
        if owner < 0:
            continue
        members = routed.pairs[index * block : (index + 1) * block].tolist()
        found.append((owner, [pair for pair in members if pair != pairs]))
    unused = [owner for owner in routed.owner.tolist() if not 0 <= owner <= experts]
    return found != naive_route(owners, experts, block) or any(owner != -1 for owner in unused)


EVERY = [(kind, name_of(dtype)) for kind in FORMATS for dtype in grouped_launch.TAKEN[kind.split("/")[0]]]  # type: ignore[index]
INTERPRETED = [
    *[Case(kind, dtype, 5, spread="all", k=384 if kind == "int4_float" else 288) for kind, dtype in EVERY],
    Case("e2m1_e4m3/16", "fp8", 3, shared=False),
    Case("e4m3", "fp8", 3, scaled_tokens=True),
    Case("e2m1_exponent", "bf16", 20, spread="one", block=64),
    Case("e4m3", "fp8", 1, top_k=1, experts=1, spread="one"),
    Case("e4m3_float", "bf16", 2, n=140, k=200),  # a short block of inputs
    Case("e4m3", "fp16", 40, top_k=3, experts=2, n=34, k=272, block=64),
    Case("int8", "fp16", 4, top_k=8, experts=16, n=20, k=80, shared=False),
    Case("mxfp4", "fp8", 4, n=130, k=544),
]
DENSE = [
    *[
        Case(kind, dtype, 5, spread="all", k=384 if kind == "int4_float" else 288, dense=True)
        for kind, dtype in EVERY
        if kind != "mxfp4"
    ],
    Case("e2m1_e4m3/16", "bf16", 70, spread="one", block=128, dense=True),  # two blocks of one expert
    Case("e2m1_e4m3/16", "bf16", 9, experts=7, top_k=1, n=44, spread="one", dense=True),  # the others are not decoded
    Case("e2m1_e4m3/32", "fp8", 140, top_k=4, k=64, dense=True, scratch=2 * 70 * 64 * 2),  # two experts at a time
    Case("int4_float", "bf16", 6, n=300, k=128, shared=False, dense=True, scratch=70000),  # each in two parts
    Case("int4_float", "fp8", 7, experts=5, n=300, k=384, block=128, dense=True, scratch=1),
    Case("e4m3_float", "fp16", 3, n=140, k=200, dense=True, scratch=140 * 200 * 2),
    Case("e4m3", "fp8", 1, top_k=1, experts=1, spread="one", dense=True),
    *(
        case
        for kind in TILES
        for case in (
            Case(kind, TILE_TYPES[kind], 5, spread="all", n=192, k=512, dense=True),
            # Each expert in three parts.
            Case(kind, TILE_TYPES[kind], 70, n=320, k=256, shared=False, dense=True, scratch=1),
        )
    ),
    Case("bf16", "bf16", 300, top_k=8, experts=9, n=20, k=80, dense=True),  # more than one stripe of blocks
]
DENSE_FP8 = [case for case in DENSE if case.dtype == "fp8" and case.kind in ("int4_float", "e2m1_exponent")]
"""What is decoded to E4M3 where the result is not float32."""
OLDER = [
    Case("e4m3", "fp8", 3),
    Case("e4m3_float", "bf16", 3),
    Case("e4m3_float", "fp16", 3),
    Case("e4m3_exponent", "bf16", 3),
    Case("e4m3", "fp8", 3, dense=True),
    Case("e2m1_exponent", "fp8", 3, dense=True),
]
"""As on sm_80, which reads E4M3 by its bits."""
ROUTED = [
    # pairs, experts, pairs to a block, lowest and highest number of an expert
    (1, 1, 16, 0, 0),
    (16, 4, 16, 0, 3),
    (40, 8, 16, -1, 9),
    (70, 3, 32, 1, 1),
    (5, 100, 16, -1, 99),
    (300, 5, 16, -1, 4),
    (200, 4, 64, -1, -1),
]


def rowwise(device: str) -> list[float]:
    """Largest relative errors of the weighted sum, in float32, in units of what is tolerated."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(5 * 3, 1030, generator=generator)
    weights = torch.rand(5, 3, generator=generator)
    with poisoned():
        summed = combine(y.to(device), 3, weights.to(device), torch.float32).double().cpu()
        plain = combine(y.to(device), 3, None, torch.float32).double().cpu()
    errors = []
    for found, factor in ((summed, weights), (plain, None)):
        bound = naive_combine(y.abs(), 3, factor) * 4 * 2.0**-24
        errors.append(((found - naive_combine(y, 3, factor)).abs() / bound).max())
    return [float(error) for error in errors]


def everything(device: str) -> list[list[Any]]:
    """Errors of the products in units of what is tolerated, whether pairs were sorted wrongly, errors of the rest."""
    generator = torch.Generator().manual_seed(0)
    errors = [check(case, device) / tolerance(case.k) for case in [*INTERPRETED, *DENSE]]
    wrong = []
    for pairs, experts, block, low, high in ROUTED:
        owners = torch.randint(low, high + 1, (pairs,), generator=generator)
        wrong.append(routed_wrongly(owners, experts, block, device))
    # The interpreter cuts float32 off to make bf16 of it.
    rounded = [check(case, device, torch.bfloat16) / (tolerance(case.k) + 2.0**-7) for case in DENSE_FP8]
    return [errors + rounded, wrong, rowwise(device)]


def older() -> list[float]:
    """Run the cases for SM80, in the interpreter."""
    machines = (grouped_launch, grouped_op, dense_launch)
    for module in machines:
        module.machine = lambda device: (80, 108)  # type: ignore[attr-defined]
    return [check(case, "cpu") / tolerance(case.k) for case in OLDER]


def test_in_the_interpreter() -> None:
    """One process for all cases: Triton decides at import whether it interprets."""
    script = (
        "import json, sys, importlib.util as u\n"
        f"spec = u.spec_from_file_location('cases', {str(Path(__file__))!r}); cases = u.module_from_spec(spec)\n"
        "sys.modules['cases'] = cases; spec.loader.exec_module(cases)\n"
        "print(json.dumps([*cases.everything('cpu'), cases.older()]))\n"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    errors, wrong, rest, on_older = json.loads(done.stdout.splitlines()[-1])
    cases = [*INTERPRETED, *DENSE, *(f"{case} in bf16" for case in DENSE_FP8)]
    assert len(errors) == len(cases)
    assert len(on_older) == len(OLDER)
    assert max(errors) < 1, dict(zip(map(str, cases), errors, strict=True))
    assert max(on_older) < 1, dict(zip(map(str, OLDER), on_older, strict=True))
    assert wrong == [False] * len(ROUTED)
    assert max(rest) < 1, rest


def test_every_kind_is_covered() -> None:
    assert {kind.split("/")[0] for kind in (*FORMATS, *TILES)} == set(KINDS) == set(grouped_launch.TAKEN)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_weight_survives(kind: str) -> None:
    """The kept weight decodes to that of the format."""
    generator = torch.Generator().manual_seed(1)
    experts = [one_expert(kind, 130, 384, generator) for _ in range(2)]
    again = grouped.stack(experts)
    assert again.kind == kind.split("/")[0]
    assert again.fp8 == (kind == "e2m1_exponent")
    assert (again.n, again.k, again.experts) == (130, 384, 2)
    generator = torch.Generator().manual_seed(1)
    for expert in range(2):
        number = WEIGHT_FORMATS[FORMATS[kind]]
        source = torch.randn(130, 384, generator=generator) * torch.randn(130, 1, generator=generator).exp()
        decoded = number.decode(number.quantize(source))
        expected = decoded.unit.double() * decoded.out_scale.double()
        kept = unpack(again, expert) * again.out_scale[expert].double().unsqueeze(1)
        # Formats with float32 block scales round code * scale to float32; what is kept does not.
        torch.testing.assert_close(kept, expected, rtol=2.0**-24 if kind.endswith("float") else 0, atol=0)


def test_mxfp8_of_too_wide_a_range_is_refused() -> None:
    codes = torch.ones(2, 64).to(torch.float8_e4m3fn)
    scale = torch.tensor([[127, 27], [200, 100]], dtype=torch.uint8)
    weight = grouped.stack([grouped.mxfp8(codes, scale)])
    expected = torch.exp2(scale.double() - ue8m0.BIAS).repeat_interleave(32, dim=1)
    assert torch.equal(unpack(weight, 0) * weight.out_scale[0].double().unsqueeze(1), expected)
    scale[0, 1] = 26
    with pytest.raises(ValueError, match=r"span 2\^101"):
        grouped.mxfp8(codes, scale)
    scale[0, 1] = 255
    pairs = codes.view(torch.uint8)[:, :32]
    for refuse in (lambda: grouped.mxfp8(codes, scale), lambda: grouped.mxfp4_as_stored(pairs, scale)):
        with pytest.raises(ValueError, match="NaN"):
            refuse()


def test_experts_that_differ_are_refused() -> None:
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(ValueError, match="experts of one layer differ"):
        grouped.stack([one_expert(kind, 32, 128, generator) for kind in ("e4m3", "int8")])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(-1, 9), min_size=1, max_size=200), st.integers(1, 9), st.sampled_from([1, 16, 64]))
def test_blocks_are_never_too_few(owners: list[int], experts: int, block: int) -> None:
    assert len(naive_route(torch.tensor(owners), experts, block)) <= most_blocks(len(owners), experts, block)


@pytest.mark.parametrize("capability", [80, 89, 90, 100, 103, 120])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in TILES])
def test_blocks_follow_the_load(kind: Any, capability: int) -> None:
    for dtype in grouped_launch.TAKEN[kind]:
        blocks = [grouped_launch.choose_block(kind, dtype, pairs, 128, capability) for pairs in (8, 2048, 8192)]
        assert blocks == sorted(blocks)
        assert blocks[:2] == [16, 16]


@pytest.mark.parametrize("capability", [80, 89, 90, 100, 103, 120])
@pytest.mark.parametrize("kind", FORMATS)
def test_many_pairs_take_dense_tiles(kind: str, capability: int) -> None:
    weight = grouped.stack([one_expert(kind, 16, 128, torch.Generator().manual_seed(0))] * self_test.EXPERTS)
    checked = range(2, 8192, 2)
    for dtype in grouped_launch.TAKEN[weight.kind]:
        dense = [pairs for pairs in checked if dense_launch.takes_dense(weight, dtype, pairs, capability)]
        blocks = {dense_launch.dense_block(weight, dtype, pairs, capability) for pairs in dense}
        operand = dense_decode.operand_of(weight, dtype, torch.bfloat16, capability)
        # INT4 comes to dense tiles when blocks are large already.
        both = kind != "int4_float" and (operand == torch.float8_e4m3fn or kind == "bf16")
        assert blocks == (set() if kind == "mxfp4" else {64, 128} if both else {128})
        assert not dense_launch.takes_dense(weight, dtype, 16 * self_test.EXPERTS, capability)
        whole = weight.codes.dtype == operand and weight.scale is None
        assert any(pairs > 16 * self_test.EXPERTS and pairs not in dense for pairs in checked) != whole


@pytest.mark.parametrize(
    ("experts", "n", "k", "scratch"),
    [(128, 1536, 2048, 256 << 20), (8, 28672, 4096, 64 << 20), (3, 300, 64, 300 * 64 * 4), (2, 130, 64, 1)],
)
def test_parts_are_all_of_it_and_bounded(experts: int, n: int, k: int, scratch: int) -> None:
    seen = torch.zeros(experts, n, dtype=torch.int32)
    for part in dense_decode.parts(experts, n, k, 2, scratch):
        seen[part.experts, part.rows] += 1
        of_it = part.shape[0] * part.shape[1]
        assert of_it * k * 2 <= max(scratch, 2 * k * dense_decode.ROWS)
        assert of_it == part.shape[0] * n or part.shape[0] == 1
    assert bool((seen == 1).all())


def test_what_would_be_misread_is_refused() -> None:
    weight = grouped.stack([one_expert("e4m3", 16, 64, torch.Generator().manual_seed(0))])
    x = torch.zeros(2, 64, dtype=torch.float16)
    owner, pairs = torch.zeros(2, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    routed = Routed(pairs, owner, torch.zeros(3, dtype=torch.int32), 16)
    for arguments, message in (
        ((x[:, :32], weight, routed, 2), r"x must be \[R, 64\]"),
        ((x, weight, routed, 3), "share"),
        ((x.bfloat16(), weight, routed, 2), "e4m3 weights are multiplied by"),
        ((x, weight, replace(routed, owner=owner[:1]), 2), "sorted for another size"),
        ((x, weight, routed, 2, torch.ones(2)), "row_scale"),
        ((x, weight, routed, 2, torch.ones(3, 1)), "row_scale"),
        ((x, weight, routed, 2, torch.ones(2, 1, dtype=torch.float16)), "row_scale"),
    ):
        with pytest.raises(ValueError, match=message):
            grouped_linear(*arguments)  # type: ignore[arg-type]
    for arguments in ((owner.float(), 1, 16), (owner, 0, 16), (owner, 1, 24), (owner.reshape(1, 2), 1, 16)):
        with pytest.raises(ValueError, match=r"experts must|needs an expert"):
            route(*arguments)
    with pytest.raises(ValueError, match="y must"):
        combine(torch.zeros(3, 4), 2, None, torch.float32)
    with pytest.raises(ValueError, match="weights must"):
        combine(torch.zeros(4, 4), 2, torch.zeros(4, 1), torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 3, 33, 300])
@pytest.mark.parametrize(("kind", "dtype"), EVERY)
def test_on_a_gpu(kind: str, dtype: str, tokens: int) -> None:
    if kind == "mxfp4" and torch.cuda.get_device_capability()[0] != 10:
        pytest.skip("tcgen05 is for SM100 and SM103")
    # FP8 matrix instructions keep about 13 bits of a sum on Hopper.
    matrix = 2.0**-12 if kind in ("e4m3", "mxfp4") and dtype == "fp8" else 0.0
    for spread, shared in (("nobody", True), ("one", False)):
        case = Case(kind, dtype, tokens, top_k=4, experts=8, n=258, k=1152, spread=spread, shared=shared)
        assert check(case, "cuda") < tolerance(case.k) + matrix
        assert check(case, "cuda", torch.bfloat16) < tolerance(case.k) + matrix + 2.0**-8
        if kind == "mxfp4":
            continue
        # In parts of three experts of 16 bits to a weight.
        dense = replace(case, dense=True, scratch=3 * 2 * case.n * case.k)
        assert check(dense, "cuda") < tolerance(case.k) + matrix
        # With results in bf16, E4M3 activations meet INT4 and MXFP4 in FP8 matrix instructions too.
        assert check(dense, "cuda", torch.bfloat16) < tolerance(case.k) + 2.0**-12 + 2.0**-8


@pytest.mark.gpu
def test_the_rest_on_a_gpu() -> None:
    generator = torch.Generator().manual_seed(0)
    for pairs, experts, block, low, high in [*ROUTED, (40000, 128, 64, -1, 127), (9000, 256, 16, 0, 255)]:
        owners = torch.randint(low, high + 1, (pairs,), generator=generator)
        assert not routed_wrongly(owners, experts, block, "cuda")
    assert max(rowwise("cuda")) < 1


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 70])
def test_under_cuda_graph_capture(tokens: int) -> None:
    """A graph follows the routing that is written into its inputs afterwards."""
    generator = torch.Generator().manual_seed(0)
    on_cpu = grouped.stack([one_expert("e2m1_e4m3/16", 64, 512, generator) for _ in range(4)])
    weight = moved(on_cpu, "cuda")
    x = activations(tokens, 512, "bf16", generator)
    owners = torch.zeros(2 * tokens, dtype=torch.int32, device="cuda")
    inputs = x.cuda()

    def product() -> torch.Tensor:
        routed = route(owners, 4, grouped.tile(weight, inputs.dtype, 2 * tokens))
        return grouped_linear(inputs, weight, routed, 2 * tokens, None, torch.float32)

    product()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = product()
    chosen = torch.randint(-1, 4, (2 * tokens,), generator=generator, dtype=torch.int32)
    owners.copy_(chosen)
    y.fill_(float("nan"))
    graph.replay()
    expected = naive_grouped_linear(x, on_cpu, chosen)
    assert float((y.double().cpu() - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.gpu
def test_operators_are_well_formed() -> None:
    generator = torch.Generator().manual_seed(0)
    # Codes in bytes: PyTorch's check of operators multiplies the tensors it is given, which E4M3 has no kernel for.
    weight = moved(grouped.stack([one_expert("e2m1_e4m3/16", 32, 128, generator) for _ in range(2)]), "cuda")
    owners = torch.tensor([0, 1, -1, 1], dtype=torch.int32, device="cuda")
    operators = torch.ops.modelopt_ext
    torch.library.opcheck(operators.route_pairs.default, (owners, 2, 16))
    x = activations(4, 128, "bf16", generator).cuda()
    weights = (weight.codes, weight.scale, weight.out_scale, weight.kind, weight.fp8)
    for dense in (False, True):
        block = grouped.tile(weight, x.dtype, 4, dense)
        routed = route(owners, 2, block)
        sorted_pairs = (routed.pairs, routed.owner, routed.first)
        arguments = (x, *weights, *sorted_pairs, block, False, 4, None, torch.bfloat16, dense, False)
        torch.library.opcheck(operators.grouped_linear.default, arguments)
    torch.library.opcheck(operators.combine_experts.default, (x, 2, None, torch.bfloat16))
