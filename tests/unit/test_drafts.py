"""Which drafts of speculative decoding are left to SGLang, and which combinations are refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("sglang")

from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.configs.model_config import ModelConfig

from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.integration import config, drafts
from sglang_modelopt_ext.integration.adapters import check_targets
from sglang_modelopt_ext.integration.config import ModelOptExtConfig, register_methods
from sglang_modelopt_ext.integration.linear_method import ModelOptExtLinearMethod
from sglang_modelopt_ext.integration.moe_method import ExtFusedMoEMethod
from tests.support import edits
from tests.support.decisions import _model_config
from tests.support.exports import export
from tests.support.models import TinyModel, model_dir

W4A8, MXFP4 = "W4A8_NVFP4_FP8_CFG", "W4A8_MXFP4_FP8_CFG"


@pytest.fixture(scope="module")
def target() -> Path:
    return export(model_dir(TinyModel("llama")), W4A8)


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch, target: Path) -> SimpleNamespace:
    """Return SGLang's state in a scheduler that drafts for ``target``."""
    import sglang.srt.runtime_context as context

    register_methods()
    state = SimpleNamespace(algorithm="EAGLE")
    monkeypatch.setattr(context, "get_spec", lambda: SimpleNamespace(speculative_algorithm=state.algorithm))
    monkeypatch.setattr(context, "get_model", lambda: SimpleNamespace(model_path=str(target)))
    return state


def draft_of(folder: Path, flag: str | None, explicit: bool = False) -> Any:
    """Return SGLang's configuration of a draft, after the quantization was settled."""
    found = _model_config(folder, flag)
    found.is_draft_model, found.is_draft_quantization_explicit = True, explicit
    original = ModelConfig._verify_quantization
    config._verify_quantization(getattr(original, "__wrapped__", original), found)
    return found


def built(model_config: Any) -> Any:
    """Return the configuration that the draft's layers are built with."""
    return config._get_quant_config(lambda *args: None, model_config, LoadConfig(load_format="safetensors"), {})


@pytest.mark.parametrize("flag", [None, "modelopt_ext", "modelopt_w4a8"])
def test_an_unquantized_draft_does_not_inherit_the_flag(flag: str | None, runtime: SimpleNamespace) -> None:
    assert draft_of(model_dir(TinyModel("llama", seed=9)), flag).quantization is None


def test_a_flag_that_the_draft_was_given_itself_is_checked(runtime: SimpleNamespace) -> None:
    with pytest.raises(ModelOptExtError, match="modelopt_ext: expected a checkpoint quantized by ModelOpt"):
        draft_of(model_dir(TinyModel("llama", seed=9)), "modelopt_ext", explicit=True)


def test_a_whole_model_that_drafts_is_served_by_its_own_recipe(runtime: SimpleNamespace) -> None:
    """Whatever the target's flag is."""
    runtime.algorithm = "STANDALONE"
    found = draft_of(export(model_dir(TinyModel("llama")), "INT8_SMOOTHQUANT_CFG"), "modelopt_w4a8")
    served = built(found)
    assert isinstance(served, ModelOptExtConfig)
    assert served.config.algo == "W8A8_SQ_PER_CHANNEL"


@pytest.mark.parametrize("prefix", ["mtp.layers.0.", "model.layers.2."])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_a_block_of_the_targets_checkpoint(
    prefix: str, dtype: torch.dtype, runtime: SimpleNamespace, target: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """An unquantized one is SGLang's, and a quantized one is refused, however many layers of the target are quantized."""
    import sglang.srt.runtime_context as context

    weight = {f"{prefix}self_attn.o_proj.weight": torch.zeros(256, 256, dtype=dtype)}
    changes = [edits.add_tensors(weight), edits.set_fields("config.json", {"num_nextn_predict_layers": 1})]
    folder = edits.copy_with(target, tmp_path / "model", changes)
    monkeypatch.setattr(context, "get_model", lambda: SimpleNamespace(model_path=str(folder)))
    found = draft_of(folder, None)
    if dtype == torch.bfloat16:
        assert built(found) is None
        assert found.quantization is None
    else:
        with pytest.raises(
            ModelOptExtError, match=rf"{prefix}self_attn\.o_proj\.weight: expected an unquantized tensor"
        ):
            built(found)


@pytest.mark.parametrize("quantized", [False, True])
def test_a_draft_with_a_folder_of_its_own(quantized: bool, runtime: SimpleNamespace, tmp_path: Path) -> None:
    """One that declares a KV cache only is unquantized, whatever its map of tokens; a quantized layer of it is refused."""
    dtype = torch.int8 if quantized else torch.bfloat16
    folder = tmp_path / "draft"
    folder.mkdir()
    save_file(
        {"t2d": torch.ones(8, dtype=torch.bool), "fc.weight": torch.zeros(4, 4, dtype=dtype)},
        folder / "model.safetensors",
    )
    section = {"quant_method": "modelopt", "quant_algo": None, "kv_cache_quant_algo": "FP8"}
    content = {"architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "quantization_config": section}
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    found = draft_of(folder, None)
    if quantized:
        with pytest.raises(ModelOptExtError, match=r"fc\.weight: expected an unquantized tensor .* got int8"):
            built(found)
    else:
        assert built(found) is None


def vocabulary(served: bool = True) -> torch.nn.Module:
    """Return a stand-in for an embedding or a head, served by this package or not."""
    module = torch.nn.Module()
    module.org_vocab_size = 512
    module.quant_method = object.__new__(ModelOptExtLinearMethod) if served else object()
    return module


class TestQuantizedHead:
    """SGLang hands the weight of a target's embedding and head to a draft, and multiplies by it beside adapters."""

    @pytest.mark.parametrize("algorithm", [None, "NGRAM", "STANDALONE"])
    def test_nobody_takes_it(self, algorithm: str | None, runtime: SimpleNamespace) -> None:
        runtime.algorithm = algorithm
        model = torch.nn.Module()
        model.lm_head = vocabulary()
        drafts.check_vocabularies(model)

    @pytest.mark.parametrize("algorithm", ["EAGLE", "EAGLE3", "FROZEN_KV_MTP", "DFLASH"])
    def test_a_draft_takes_it(self, algorithm: str, runtime: SimpleNamespace) -> None:
        runtime.algorithm = algorithm
        model = torch.nn.Module()
        model.lm_head = vocabulary(served=False)
        drafts.check_vocabularies(model)
        model.lm_head = vocabulary()
        with pytest.raises(ModelOptExtError, match=f"STANDALONE with a quantized lm_head: .* got {algorithm}"):
            drafts.check_vocabularies(model)

    def test_adapters(self) -> None:
        """A tied head is the embedding, and is wrapped as a head with its weight."""
        model = torch.nn.Module()
        model.embed_tokens = model.lm_head = vocabulary(served=False)
        check_targets(model, {"lm_head", "embed_tokens"})
        model.embed_tokens = model.lm_head = vocabulary()
        check_targets(model, {"q_proj"})
        with pytest.raises(
            ModelOptExtError, match="--lora-target-modules: expected no lm_head with a quantized embed_"
        ):
            check_targets(model, {"q_proj", "lm_head"})
        with pytest.raises(ModelOptExtError, match="no embed_tokens or lm_head with a quantized embed_tokens"):
            check_targets(model, {"lm_head", "embed_tokens"})


def test_adapters_of_quantized_experts() -> None:
    model = torch.nn.Module()
    model.experts = torch.nn.Module()
    model.experts.quant_method = object.__new__(ExtFusedMoEMethod)
    check_targets(model, {"qkv_proj", "down_proj"})
    with pytest.raises(ModelOptExtError, match="not both of down_proj and gate_up_proj with quantized experts"):
        check_targets(model, {"qkv_proj", "gate_up_proj", "down_proj"})
