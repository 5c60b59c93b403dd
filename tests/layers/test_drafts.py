"""Drafts of speculative decoding, loaded by SGLang's own classes beside quantized targets, as SGLang alone loads them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support import edits
from tests.support.draft_process import load_draft
from tests.support.drafts import eagle3, random
from tests.support.expert_models import HIDDEN, VOCABULARY
from tests.support.expert_models import model_dir as expert_model_dir
from tests.support.exports import export
from tests.support.models import TinyModel, model_dir

pytestmark = pytest.mark.full

W4A8 = "W4A8_NVFP4_FP8_CFG"
MTP_FLAGS = ("--speculative-algorithm", "NEXTN", "--speculative-num-steps", "1", "--speculative-eagle-topk", "1")
FLAGS = (*MTP_FLAGS, "--speculative-num-draft-tokens", "2")


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
