"""What calibration on a CPU saves: products of 16-bit tensors are computed in fp32, and logits that nothing needs are not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from sglang_modelopt_ext.workflow.common import products
from sglang_modelopt_ext.workflow.common.products import FastProducts
from sglang_modelopt_ext.workflow.quantize.quantizers import can_skip_logits

TYPES = (torch.bfloat16, torch.float16)
PRODUCTS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "linear": lambda x, w: nn.functional.linear(x, w),
    "bias": lambda x, w: nn.functional.linear(x, w, bias=w[:, 0]),
    "operator": lambda x, w: x @ w.T,
    "matmul": lambda x, w: torch.matmul(x, w.T),
    "bmm": lambda x, w: torch.bmm(x[None], w.T[None])[0],
}


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_product_is_rounded_once(dtype: torch.dtype, name: str) -> None:
    """It is the fp32 product of the values, rounded to their type: no worse than torch's own, and of the same type."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(rows, 64, generator=generator).to(dtype) for rows in (5, 7))
    with FastProducts(frozenset(TYPES)):
        found = PRODUCTS[name](x, w)
    assert found.dtype == dtype
    assert torch.equal(found, PRODUCTS[name](x.float(), w.float()).to(dtype))


def test_other_types_are_left_to_torch() -> None:
    x, w = torch.randn(5, 64).bfloat16(), torch.randn(7, 64).bfloat16()
    with FastProducts(frozenset()):
        assert torch.equal(x @ w.T, torch.matmul(x, w.T))
    with FastProducts(frozenset(TYPES)):
        assert (x.double() @ w.double().T).dtype == torch.float64
        out = torch.empty(5, 7, dtype=torch.bfloat16)
        assert torch.mm(x, w.T, out=out) is out
        with pytest.raises(RuntimeError):
            x @ w.float().T


def test_only_a_cpu_gains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "slow_types", lambda: frozenset(TYPES))
    assert isinstance(products.fast_products(torch.device("cpu")), FastProducts)
    assert not isinstance(products.fast_products(torch.device("cuda")), FastProducts)
    monkeypatch.setattr(products, "slow_types", frozenset)
    assert not isinstance(products.fast_products(torch.device("cpu")), FastProducts)


def test_gradients_pass_through() -> None:
    layer, x = nn.Linear(8, 4).bfloat16(), torch.randn(3, 8).bfloat16()
    with FastProducts(frozenset(TYPES)):
        layer(x).float().sum().backward()
    assert layer.weight.grad is not None
    expected = x.float().sum(dim=0).expand(4, 8)
    torch.testing.assert_close(layer.weight.grad.float(), expected, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("quantized", [False, True])
def test_logits_are_skipped_unless_the_head_has_a_quantizer(quantized: bool) -> None:
    """Calibration needs what reaches a quantizer, and no more."""
    model = LlamaForCausalLM(
        LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=16)
    )
    for head in (model.lm_head, model.model.layers[0].mlp.up_proj):
        head.input_quantizer = nn.Identity()
        head.input_quantizer.is_enabled = True
    model.lm_head.input_quantizer.is_enabled = quantized
    assert can_skip_logits(model) == (not quantized)
    assert model(torch.tensor([[1, 2, 3]]), logits_to_keep=1).logits.shape == (1, 1, 16)


def test_logits_are_not_skipped_where_the_model_cannot() -> None:
    class Model(nn.Module):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return ids

    assert not can_skip_logits(Model())
