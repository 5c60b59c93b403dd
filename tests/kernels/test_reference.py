"""The dense reference path against its naive twin, on a CPU and, marked ``gpu``, on CUDA."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sglang_modelopt_kernels.formats import ACTIVATION_FORMATS, WEIGHT_FORMATS
from sglang_modelopt_kernels.formats.base import DecodedWeight
from sglang_modelopt_kernels.gemm.reference import dense_linear, naive_linear, prepare_dense

GPU = pytest.param("cuda", marks=pytest.mark.gpu)
K = 384  # whole blocks of 16, 32 and 128

# Higham, Accuracy and Stability of Numerical Algorithms, 3.1: a float32 sum of K products errs by at most about K * 2^-24 times
# the sum of their magnitudes, in whatever order it is taken; scales and bias add a few roundings of the result.
TOLERANCE = (K + 8) * 2.0**-24


def decoded(name: str, n: int, device: str, seed: int) -> DecodedWeight:
    """A random weight in the named format."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, K, generator=generator) * torch.logspace(-2, 1, n).unsqueeze(1)
    weight_format = WEIGHT_FORMATS[name]
    tensors = {key: tensor.to(device) for key, tensor in weight_format.quantize(weight).items()}
    return weight_format.decode(tensors)


def worst_error(y: torch.Tensor, x: torch.Tensor, weight: DecodedWeight, *rest: Any) -> float:
    """The largest error of ``y`` relative to the sum of the magnitudes of the products behind it."""
    expected = naive_linear(x, weight, *rest)
    magnitudes = DecodedWeight(weight.unit.abs(), weight.out_scale)
    activation, scale, bias = rest
    values, row_scale = activation.quantize(x, scale) if activation else (x, None)
    rounded = values if row_scale is None else values * row_scale
    bound = naive_linear(rounded.abs(), magnitudes, None, None, None if bias is None else bias.abs())
    return float(((y.double() - expected).abs() / bound.clamp(min=1e-300)).max())


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("m", [1, 3, 17])
@pytest.mark.parametrize("activation_name", [None, *ACTIVATION_FORMATS])
@pytest.mark.parametrize("weight_name", WEIGHT_FORMATS)
def test_matches_the_naive_twin(weight_name: str, activation_name: str | None, m: int, device: str) -> None:
    weight = decoded(weight_name, 128, device, seed=m)
    activation = ACTIVATION_FORMATS[activation_name] if activation_name else None
    x = (torch.randn(m, K, generator=torch.Generator().manual_seed(9)) * 3.0).to(device)
    scale = torch.tensor(0.01, device=device) if activation and activation.tensors else None
    bias = torch.randn(128, generator=torch.Generator().manual_seed(3)).to(device)
    values, row_scale = activation.quantize(x, scale) if activation else (x, None)

    dtypes = [torch.float32]
    if (
        device == "cuda"
        and WEIGHT_FORMATS[weight_name].exact_in_bf16
        and bool((values.bfloat16().float() == values).all())
    ):
        dtypes.append(torch.bfloat16)
    for dtype in dtypes:
        unit, out_scale = prepare_dense(weight, dtype)
        y = dense_linear(values, row_scale, unit, out_scale, bias)
        assert y.dtype == torch.float32
        assert worst_error(y, x, weight, activation, scale, bias) < TOLERANCE, dtype


def test_a_weight_that_is_not_exact_is_not_rounded() -> None:
    weight = decoded("int4_awq", 128, "cpu", seed=0)
    with pytest.raises(ValueError, match=r"not exact in torch\.bfloat16"):
        prepare_dense(weight, torch.bfloat16)


@pytest.mark.gpu
def test_under_cuda_graph_capture() -> None:
    """The whole layer, activation rounding included, replays on new inputs."""
    weight = decoded("nvfp4_w4a8", 128, "cuda", seed=0)
    activation = ACTIVATION_FORMATS["fp8_static"]
    scale = torch.tensor(0.02, device="cuda")
    unit, out_scale = prepare_dense(weight, torch.bfloat16)
    x = torch.randn(16, K, device="cuda")

    def layer() -> torch.Tensor:
        values, row_scale = activation.quantize(x, scale)
        return dense_linear(values, row_scale, unit, out_scale, None)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        layer()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer()
    x.copy_(torch.randn(16, K, device="cuda") * 2)
    y.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert worst_error(y, x, weight, activation, scale, None) < TOLERANCE
