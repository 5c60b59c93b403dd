"""FP8 weights and activations through ``torch._scaled_mm``, against float64: on a CPU, and on a GPU from SM89."""

from __future__ import annotations

import pytest
import torch

from sglang_modelopt_ext.backends.base import ShardWeight
from sglang_modelopt_ext.backends.linear.fp8 import Fp8
from sglang_modelopt_ext.schemes.table import SCHEMES
from sglang_modelopt_kernels.formats import WEIGHT_FORMATS
from sglang_modelopt_kernels.formats.base import DecodedWeight
from sglang_modelopt_kernels.gemm.fp8 import fp8_linear, naive_fp8_linear
from sglang_modelopt_kernels.gemm.reference import prepare_dense

EPSILON = {torch.float32: 2**-13, torch.bfloat16: 2**-9, torch.float16: 2**-11}
"""Half an epsilon of the result, and for float32 what FP8 matrix instructions keep of a sum (Hopper: 13 bits and more)."""


def check(
    m: int, n: int, k: int, dtype: torch.dtype, row: str, has_bias: bool, device: str, uniform: bool = False
) -> None:
    generator = torch.Generator().manual_seed(m + n)
    unit = (torch.randn(n, k, generator=generator) * 50).to(torch.float8_e4m3fn).float()
    out = torch.rand(n, 1, generator=generator) / 64 + 2**-10
    if uniform:
        out = out[:1].expand(n, 1)
    x = (torch.randn(m, k, generator=generator) * 50).to(torch.float8_e4m3fn)
    row_scale = {"none": None, "static": torch.tensor(0.3), "token": torch.rand(m, 1, generator=generator) + 0.1}[row]
    bias = torch.randn(n, generator=generator).to(dtype) if has_bias else None
    stored, out_scale = prepare_dense(DecodedWeight(unit, out), torch.float8_e4m3fn)
    moved = [None if t is None else t.to(device) for t in (x, row_scale, stored, out_scale, bias)]
    y = fp8_linear(*moved, dtype, uniform)  # type: ignore[arg-type]
    assert (y.shape, y.dtype) == ((m, n), dtype)
    right = naive_fp8_linear(x, row_scale, unit, out.flatten(), bias)
    error = (y.double().cpu() - right).norm(dim=1) / right.norm(dim=1)
    assert bool((error < 2 * EPSILON[dtype]).all()), float(error.max())


CASES = [
    (m, n, k, dtype, row, bias)
    for m, n, k in [(0, 32, 64), (1, 48, 64), (17, 80, 272), (200, 256, 1040)]
    for dtype in EPSILON
    for row, bias in [("none", False), ("static", True), ("token", False), ("token", True)]
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_against_float64(case: tuple[int, int, int, torch.dtype, str, bool], device: str) -> None:
    check(*case, device)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_one_scale_for_all_rows(case: tuple[int, int, int, torch.dtype, str, bool], device: str) -> None:
    check(*case, device, uniform=True)


@pytest.mark.parametrize("uniform", [False, True])
def test_the_operator(uniform: bool) -> None:
    """torch.compile and CUDA graphs hold it as one operator."""
    x, unit = (torch.randn(rows, 64).to(torch.float8_e4m3fn) for rows in (3, 32))
    arguments = (x, torch.ones(1), unit, torch.full((32,), 0.5), None, torch.bfloat16, uniform)
    # The other checks compare the arguments before and after, for which torch has no E4M3 arithmetic on a CPU.
    torch.library.opcheck(torch.ops.modelopt_ext.fp8_linear.default, arguments, test_utils=("test_faketensor",))


def test_a_weight_is_uniform_where_its_shards_have_one_scale() -> None:
    def shard(scale: float) -> ShardWeight:
        tensors = {
            "weight": torch.randn(16, 32).to(torch.float8_e4m3fn),
            "weight_scale": torch.tensor(scale),
        }
        return ShardWeight(WEIGHT_FORMATS[SCHEMES["FP8"].weights[0]], tensors)

    assert Fp8().prepare([shard(0.5), shard(0.5)]).uniform
    assert not Fp8().prepare([shard(0.5), shard(0.25)]).uniform


def test_weights_off_the_grid_are_refused() -> None:
    with pytest.raises(ValueError, match=r"not exact in torch\.float8_e4m3fn"):
        prepare_dense(DecodedWeight(torch.full((16, 16), 1.0625), torch.ones(())), torch.float8_e4m3fn)
