"""Drafts of speculative decoding, loaded by SGLang's own classes beside quantized targets, as SGLang alone loads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.support import edits
from tests.support.draft_process import load_draft
from tests.support.expert_models import HIDDEN, VOCABULARY
from tests.support.expert_models import model_dir as expert_model_dir
from tests.support.exports import export
from tests.support.models import TinyModel, model_dir

pytestmark = pytest.mark.full

W4A8 = "W4A8_NVFP4_FP8_CFG"
MTP_FLAGS = ("--speculative-algorithm", "NEXTN", "--speculative-num-steps", "1", "--speculative-eagle-topk", "1")
FLAGS = (*MTP_FLAGS, "--speculative-num-draft-tokens", "2")


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def add_glm_block(folder: Path) -> None:
    """Add an MTP block behind the two decoder layers: one more decoder layer, and what joins it to the model."""
    source = edits.read_tensors(expert_model_dir("glm4_moe"))
    inside, prefix = "model.layers.1.", "model.layers.2."
    block = {prefix + name.removeprefix(inside): t.flip(0) for name, t in source.items() if name.startswith(inside)}
    for seed, norm in enumerate(("enorm", "hnorm", "shared_head.norm")):
        block[f"{prefix}{norm}.weight"] = random(HIDDEN, seed=seed)
    block[f"{prefix}eh_proj.weight"] = random(HIDDEN, 2 * HIDDEN, seed=3)
    for name in ("embed_tokens", "shared_head.head"):
        block[f"{prefix}{name}.weight"] = random(VOCABULARY, HIDDEN, seed=4)
    edits.add_tensors({name: tensor.contiguous() for name, tensor in block.items()})(folder)
    edits.set_fields("config.json", {"num_nextn_predict_layers": 1})(folder)


@pytest.fixture(scope="module")
def glm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a GLM-4-MoE with an MTP block, and its W4A8 export, which leaves the block as it is."""
    plain = edits.copy_with(expert_model_dir("glm4_moe"), tmp_path_factory.mktemp("glm") / "plain", [add_glm_block])
    exported = export(expert_model_dir("glm4_moe"), W4A8)
    exclude = {"exclude_modules": ["lm_head", "model.embed_tokens", "model.layers.1.mlp.gate", "model.layers.2*"]}
    config = edits.set_file_config(exclude)
    ignore = edits.set_embedded_config({"ignore": exclude["exclude_modules"]})
    folder = tmp_path_factory.mktemp("glm") / "quantized"
    return plain, edits.copy_with(exported, folder, [add_glm_block, config, ignore])


class TestMtpBlock:
    """A block of the target's own checkpoint, which SGLang's class calls ``model.decoder``."""

    @pytest.mark.parametrize("flag", [(), ("--quantization", "modelopt_w4a8")])
    def test_it_is_as_without_this_package(self, flag: tuple[str, ...], glm: tuple[Path, Path]) -> None:
        plain, quantized = glm
        draft = load_draft(quantized, *FLAGS, *flag)
        assert (draft["class"], draft["quantization"]) == ("Glm4MoeForCausalLMNextN", None)
        assert len(draft["values"]) > 10
        assert draft["values"] == load_draft(plain, *FLAGS, stock=True)["values"]

    def test_a_quantized_one_is_refused_by_name(self, glm: tuple[Path, Path], tmp_path: Path) -> None:
        name = "model.layers.2.self_attn.o_proj.weight"
        folder = edits.copy_with(
            glm[1], tmp_path / "model", [edits.map_tensors(name, lambda weight: weight.to(torch.float8_e4m3fn))]
        )
        error = load_draft(folder, *FLAGS)["error"]
        assert f"{name}: expected an unquantized tensor of a speculative draft, got float8_e4m3fn" in error


def eagle3(folder: Path, **fields: Any) -> Path:
    """Make an EAGLE3 draft of a tiny Llama: one layer whose attention takes twice the hidden size, and a small head."""
    hidden, heads, kv_heads, head_dim, rows, small = 256, 4, 2, 64, 512, 128
    config = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": rows,
        "num_hidden_layers": 1,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": 512,
        "draft_vocab_size": small,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        **fields,
    }
    shapes = {
        "midlayer.self_attn.q_proj": (heads * head_dim, 2 * hidden),
        "midlayer.self_attn.k_proj": (kv_heads * head_dim, 2 * hidden),
        "midlayer.self_attn.v_proj": (kv_heads * head_dim, 2 * hidden),
        "midlayer.self_attn.o_proj": (hidden, heads * head_dim),
        "midlayer.mlp.gate_proj": (rows, hidden),
        "midlayer.mlp.up_proj": (rows, hidden),
        "midlayer.mlp.down_proj": (hidden, rows),
        "midlayer.input_layernorm": (hidden,),
        "midlayer.hidden_norm": (hidden,),
        "midlayer.post_attention_layernorm": (hidden,),
        "fc": (hidden, 3 * hidden),
        "norm": (hidden,),
        "lm_head": (small, hidden),
    }
    tensors = {f"{name}.weight": random(*shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}
    tensors |= {"d2t": torch.arange(small), "t2d": torch.arange(512) < small}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, folder / "model.safetensors")
    return folder


class TestEagle3:
    """A draft with a checkpoint of its own, which SGLang gives the target's flag."""

    @pytest.mark.parametrize("flag", [(), ("--quantization", "modelopt_w4a8"), ("--quantization", "modelopt_ext")])
    def test_it_is_as_without_this_package(self, flag: tuple[str, ...], tmp_path: Path) -> None:
        draft = ("--speculative-draft-model-path", str(eagle3(tmp_path / "draft")))
        flags = ("--speculative-algorithm", "EAGLE3", *FLAGS[2:], *draft)
        model = model_dir(TinyModel("llama"))
        found = load_draft(export(model, W4A8), *flags, *flag)
        assert (found["class"], found["quantization"]) == ("LlamaForCausalLMEagle3", None)
        assert len(found["values"]) > 5
        assert found["values"] == load_draft(model, *flags, stock=True)["values"]

    def test_a_flag_for_the_draft_itself_is_taken_at_its_word(self, tmp_path: Path) -> None:
        draft = ("--speculative-draft-model-path", str(eagle3(tmp_path / "draft")))
        own = ("--speculative-draft-model-quantization", "modelopt_w4a8")
        flags = ("--speculative-algorithm", "EAGLE3", *FLAGS[2:], *draft, *own)
        error = load_draft(export(model_dir(TinyModel("llama")), W4A8), *flags)["error"]
        assert "--quantization modelopt_w4a8: expected a checkpoint quantized by ModelOpt, got an unquantized" in error
