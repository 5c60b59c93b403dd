"""SGLang's LoRA wrappers around quantized linear layers of a real export, with its torch backend, against the float32 reading."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sglang.srt.lora.backend.torch_backend import TorchNativeLoRABackend, TorchNativeLoRABatchInfo
from sglang.srt.lora.layers import get_lora_layer

from sglang_modelopt_ext.integration.adapters import has_adapters
from sglang_modelopt_ext.integration.loading import quantized_modules
from tests.layers import harness
from tests.layers.test_recipes import FLIP_TOLERANCE, layer_inputs, relative_error
from tests.support import stand_ins
from tests.support.exports import export
from tests.support.models import TinyModel, model_dir
from tests.support.reference import Reference

RANK, SCALING = 8, 2.0
SHARDS = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "o_proj": ("o_proj",),
    "down_proj": ("down_proj",),
}
"""Wrappers of QKVParallelLinear, MergedColumnParallelLinear and RowParallelLinear, and the stored layers of each."""


@pytest.fixture(scope="module", params=["W4A8_MXFP4_FP8_CFG", "W4A8_NVFP4_FP8_CFG", "W4A8_AWQ_BETA_CFG"])
def folder(request: pytest.FixtureRequest) -> Path:
    return export(model_dir(TinyModel("llama")), request.param)


def batch(tokens: int) -> TorchNativeLoRABatchInfo:
    """Return a batch of two requests: the first half of the tokens without an adapter, the second with it."""
    half = tokens // 2
    sizes = {"seg_lens": [half, tokens - half], "seg_indptr": [0, half, tokens], "weight_indices": [0, 1]}
    ranks = {"lora_ranks": [0, RANK]}
    fields = {name: torch.tensor(values, dtype=torch.int32) for name, values in (sizes | ranks).items()}
    fields["scalings"] = torch.tensor([0.0, SCALING])
    on_cpu = {f"{name}_cpu": tensor for name, tensor in fields.items()}
    return TorchNativeLoRABatchInfo(
        use_cuda_graph=False,
        bs=2,
        num_segments=2,
        max_len=tokens,
        permutation=None,
        has_active_lora=True,
        **fields,
        **on_cpu,
    )


@pytest.mark.parametrize("name", SHARDS)
def test_the_adapters_product_is_added(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To every output of the requests that have one, of the input that no recipe rounds, and to no other."""
    for factory in stand_ins.FACTORIES:
        monkeypatch.setattr(torch, factory, stand_ins.without_pinning(getattr(torch, factory)))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    model, _ = harness.build(folder)
    block = "self_attn" if name in ("qkv_proj", "o_proj") else "mlp"
    prefix = f"model.layers.1.{block}"
    layer = model.get_submodule(f"{prefix}.{name}")
    backend = TorchNativeLoRABackend(2, torch.device("cpu"))
    wrapper = get_lora_layer(layer, backend)
    assert [module for module, _ in quantized_modules(wrapper)] == [layer]
    assert has_adapters(torch.nn.ModuleList([wrapper]))
    assert not has_adapters(model)
    reference = Reference(folder).model
    parts = [reference.get_submodule(f"{prefix}.{shard}") for shard in SHARDS[name]]
    x = layer_inputs(layer.input_size, torch.float32)
    generator = torch.Generator().manual_seed(1)
    downs = [torch.randn(RANK, x.shape[1], generator=generator) / x.shape[1] ** 0.5 for _ in parts]
    ups = []
    for part, down in zip(parts, downs, strict=True):
        base = part(x)
        # As large as the layer's own output, which outlier channels of the input make larger than the adapter's.
        up = torch.randn(base.shape[1], RANK, generator=generator)
        ups.append(up * base.std() / (SCALING * x @ down.T @ up.T).std())
    a, b = torch.cat(downs), torch.cat(ups)
    wrapper.set_lora_info(torch.stack([torch.zeros_like(a), a]), torch.stack([torch.zeros_like(b), b]))
    backend.batch_info = batch(len(x))
    served, _ = wrapper(x)
    has_adapter = torch.arange(len(x)) >= len(x) // 2
    expected = torch.cat(
        [
            part(x) + has_adapter[:, None] * SCALING * (x @ down.T @ up.T)
            for part, down, up in zip(parts, downs, ups, strict=True)
        ],
        dim=-1,
    )
    assert relative_error(served, expected) < FLIP_TOLERANCE
    assert relative_error(layer.quant_method.apply(layer, x), expected) > 10 * FLIP_TOLERANCE, "the adapter is not seen"
