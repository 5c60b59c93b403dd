"""Questions to the ``weight`` of a prepared layer: SGLang's classes may ask for shape and device, and for no value."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from sglang.kernels.ops.gemm import fused_a_gemm
from sglang.srt.layers.linear import ReplicatedLinear

from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.integration.linear_method import ModelOptExtLinearMethod
from sglang_modelopt_ext.integration.stand_in import StandIn
from sglang_modelopt_ext.layers.linear import dense_weight
from tests.layers.test_layouts import build, load, scheme_of, store

N, K = 256, 256
CODES = {"nvfp4_w4a8": (torch.uint8, K // 2), "fp8_block": (torch.float8_e4m3fn, K)}
"""By format: the type of its codes, and their number of columns."""

X = torch.ones(2, K)


@pytest.fixture(params=CODES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def prepared(name: str) -> tuple[Any, torch.Tensor]:
    """Return a prepared layer with DeepSeek's sizes of the check, and the weight that its tensors stand for."""
    scheme = scheme_of(name)
    layer = build(ReplicatedLinear, (K, N), scheme, [N], name="model.fused_qkv_a_proj_with_mqa")
    stored = store(scheme, N, seed=1)
    load(layer, stored)
    method = layer.quant_method
    assert isinstance(method, ModelOptExtLinearMethod)
    method.verified = True
    method.process_weights_after_loading(layer)
    return layer, dense_weight(scheme, stored)


def test_it_answers(name: str) -> None:
    layer, _ = prepared(name)
    weight, columns = layer.weight, CODES[name][1]
    assert weight.shape == weight.size() == torch.Size([N, columns])
    assert (weight.shape[0], weight.size(1), weight.ndim, weight.dim()) == (N, columns, 2, 2)
    assert weight.numel() == N * columns
    assert (weight.device, weight.is_cuda, weight.is_contiguous()) == (torch.device("cpu"), False, False)
    types = {one for one in vars(torch).values() if isinstance(one, torch.dtype)}
    assert torch.bfloat16 in types
    assert all(weight.dtype != one for one in types)
    assert not isinstance(weight, torch.Tensor)
    assert not hasattr(weight, "weight_loader")
    assert repr(copy.deepcopy(weight)) == repr(weight)


def test_it_is_no_parameter(name: str) -> None:
    layer, _ = prepared(name)
    names = [one for one, _ in (*layer.named_parameters(), *layer.named_buffers())]
    assert names
    assert "weight" not in names
    assert "weight" not in layer.state_dict()


READS: dict[str, Callable[[Any], object]] = {
    "linear": lambda weight: torch.nn.functional.linear(X, weight),
    "mm": lambda weight: torch.mm(X, weight),
    "product": lambda weight: X @ weight,
    "product from the left": lambda weight: weight @ X,
    "cat": lambda weight: torch.cat([weight, X]),
    "copy": lambda weight: X.clone().copy_(weight),
    "transposed": lambda weight: weight.T,
    "data": lambda weight: weight.data,
    "view": lambda weight: weight.view(-1),
    "address": lambda weight: weight.data_ptr(),
    "rows": lambda weight: weight[:3],
    "every row": lambda weight: list(weight),
    "its type": lambda weight: weight.to(torch.float32),
    "as its type": lambda weight: X.to(weight.dtype),
    "as its type, by name": lambda weight: X.to(dtype=weight.dtype),
    "its device and type": lambda weight: X.to(weight),
    "numbers": lambda weight: torch.ops.aten.mm(X, weight),
}


@pytest.mark.parametrize("read", READS)
def test_no_value_is_read(read: str) -> None:
    layer, _ = prepared("nvfp4_w4a8")
    expected = r"^model\.fused_qkv_a_proj_with_mqa: weight: expected no use of a prepared weight [^\n]*$"
    with pytest.raises(ModelOptExtError, match=expected):
        READS[read](layer.weight)


@pytest.mark.parametrize("make", [torch.empty, torch.zeros])
def test_nothing_is_made_of_its_type(make: Callable[..., torch.Tensor]) -> None:
    layer, _ = prepared("nvfp4_w4a8")
    with pytest.raises((TypeError, ModelOptExtError)):
        make(3, dtype=layer.weight.dtype)


def test_sglang_takes_the_layers_own_product(name: str) -> None:
    """DeepSeek's and Nemotron-H's check for a kernel that reads the weight, as on a Hopper GPU."""
    layer, weight = prepared(name)
    plain = ReplicatedLinear(K, N, bias=False, params_dtype=torch.bfloat16)
    with mock.patch.multiple(fused_a_gemm, _IS_CUDA=True, _DEVICE_SM=90):
        assert fused_a_gemm.fused_a_gemm_weight_eligible(plain)
        assert not fused_a_gemm.fused_a_gemm_weight_eligible(layer)
        with pytest.raises(ModelOptExtError, match="fused_qkv_a_proj_with_mqa"):
            fused_a_gemm.linear_with_fused_a_gemm(layer, X)
    y, _ = layer(X)
    # Both are sums of K products in float32, in any order.
    assert torch.allclose(y, X @ weight.T, rtol=0, atol=2 * K * 2**-24 * float(weight.abs().sum(1).max()))


def test_an_update_from_disk_brings_the_parameters_back(name: str) -> None:
    layer, _ = prepared(name)
    method = layer.quant_method
    for seed in (2, 3):
        method.restore_weights_before_loading(layer)
        assert layer.get_parameter("weight").dtype == CODES[name][0]
        load(layer, store(method.scheme, N, seed))
        method.verified = True
        method.process_weights_after_loading(layer)
        assert isinstance(layer.weight, StandIn)
