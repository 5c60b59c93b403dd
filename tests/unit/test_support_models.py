"""The tiny models have the traits the other tests rely on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.cache import folder_digest
from tests.support.edits import read_tensors
from tests.support.models import EOS, FAMILIES, TinyModel, random_ids, save_model

Builder = Callable[..., Path]
IDS = random_ids(64, seed=3)
LAYERS = 2


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logprobs(model: Any) -> torch.Tensor:
    return model(torch.tensor([IDS])).logits[0].log_softmax(dim=-1)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_bytes_again(tiny_model: Builder, tmp_path: Path, family):
    save_model(TinyModel(family), tmp_path)
    assert folder_digest(tmp_path) == folder_digest(tiny_model(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_seeds_and_families_differ(tiny_model: Builder, family):
    name = "model.layers.0.mlp.gate_proj.weight"
    weight = read_tensors(tiny_model(family))[name]
    others = [tiny_model(family, seed=1), *(tiny_model(other) for other in FAMILIES if other != family)]
    for other in others:
        assert not torch.equal(weight, read_tensors(other)[name])


def test_held_out_dimensions(tiny_model: Builder):
    folder = tiny_model("qwen3", seed=77, hidden=384, intermediate=768, layers=3, heads=6, head_dim=32, vocab=2048)
    model = load(folder)
    assert model.config.num_hidden_layers == 3
    assert logprobs(model).shape == (len(IDS), 2048)


def test_qwen2_has_no_head_dim_of_its_own(tiny_model: Builder):
    with pytest.raises(ValueError, match="heads \\* head_dim"):
        tiny_model("qwen2", heads=8)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_traits(tiny_model: Builder, family, tied):
    folder = tiny_model(family, tied=tied)
    model = load(folder)
    stored = read_tensors(folder)
    assert all(tensor.dtype == torch.bfloat16 for tensor in stored.values())
    assert ("lm_head.weight" in stored) == (not tied)
    assert ("model.layers.0.self_attn.k_proj.bias" in stored) == (family == "qwen2")
    assert ("model.layers.0.self_attn.k_norm.weight" in stored) == (family == "qwen3")

    inputs: dict[str, torch.Tensor] = {}
    linears = {name: module for name, module in model.named_modules() if name.endswith("_proj")}
    assert len(linears) == 7 * LAYERS
    for name, module in linears.items():
        module.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0][0]}))
    table = logprobs(model)

    likeliest = table.exp().amax(dim=-1)
    assert 0.2 < likeliest.mean() < 0.6, "neither uniform nor certain"
    assert len(set(table.argmax(dim=-1).tolist())) > len(IDS) // 4, "the answer depends on the prompt"
    for name, x in inputs.items():
        channels = x.abs().amax(dim=0)
        assert channels.max() > 8 * channels.median(), f"{name}: no outlier channel"
    amax = {name: float(x.abs().max()) for name, x in inputs.items()}
    assert max(amax.values()) > 448, "no input overflows an unscaled E4M3"
    assert min(float(x.abs().median()) for x in inputs.values()) < 2**-7, "no input vanishes in an unscaled E4M3"
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        for fused in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            sizes = [float(linears[prefix + name].weight.detach().abs().max()) for name in fused]
            assert max(sizes) > 1.4 * min(sizes), f"{prefix}{fused}: {sizes} are alike"

    for name, module in linears.items():
        if family == "qwen3" and name.endswith(("q_proj", "k_proj")):
            continue  # their norm takes any factor out again
        with torch.no_grad():
            module.weight.mul_(1.1)
            moved = (logprobs(model) - table).abs().mean()
            module.weight.div_(1.1)
        assert moved > 0.02, f"{name} hardly matters: {moved}"


def test_tokenizer(tiny_model: Builder):
    from transformers import AutoTokenizer

    folder = tiny_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == 512
    assert tokenizer.eos_token_id == EOS
    for text in ("Hello, world!", "naïve 日本語 🙂\n\ttabs", ""):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids) == text
        assert len(ids) <= len(text.encode())
    assert all(isinstance(tokenizer.decode([i]), str) for i in range(512))
    assert min(random_ids(1000, seed=0)) > EOS
