"""Tensors without a part in the served model: those that are ignored, and those that are errors."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sglang_modelopt_ext.checkpoint.leftovers import ServedLayers
from tests.support import edits
from tests.support.exports import export
from tests.support.models import TinyModel, model_dir

GLM = {"num_hidden_layers": 3, "num_nextn_predict_layers": 1}
LEFT_OUT = [
    ("model.layers.3.eh_proj.weight", GLM),
    ("model.language_model.layers.3.self_attn.q_proj.weight", GLM),
    ("mtp.fc.weight", {"num_hidden_layers": 3}),
    ("mtp.layers.0.self_attn.q_proj.weight", {"num_hidden_layers": 3}),
    ("model.mtp.layers.0.mlp.experts.0.up_proj.weight_scale", {}),
    ("model.mtp_layers.0.mlp.up_proj.weight", {}),
    ("model.layers.0.self_attn.rotary_emb.inv_freq", {}),
]
OF_THE_MODEL = [
    ("model.layers.2.eh_proj.weight", GLM),
    ("model.layers.4.eh_proj.weight", GLM),
    ("model.layers.3.mlp.up_proj.weight", {"num_hidden_layers": 3}),  # config.json of a smaller model
    ("model.layers.3.mlp.up_proj.weight", {"num_hidden_layers": 3, "num_nextn_predict_layers": None}),
    ("model.vision_tower.layers.3.mlp.up_proj.weight", GLM),
    ("model.layers.0.mtp.weight", GLM),
    ("model.mtpx.weight", GLM),
    ("lm_head.weight", GLM),
]


@pytest.mark.parametrize(("name", "fields"), LEFT_OUT)
def test_what_a_decoder_has_no_part_for(name: str, fields: dict[str, int]) -> None:
    assert ServedLayers.of(fields).leaves_out(name)


@pytest.mark.parametrize(("name", "fields"), OF_THE_MODEL)
def test_what_may_be_missing(name: str, fields: dict[str, int]) -> None:
    assert not ServedLayers.of(fields).leaves_out(name)


def test_a_model_loads_without_them(tmp_path: Path) -> None:
    """Neither handed to the model, whose loader may fail on them, nor an error; a stray layer that is not declared still is one."""
    pytest.importorskip("sglang")
    from sglang_modelopt_ext.checkpoint.reader import read_checkpoint
    from sglang_modelopt_ext.errors import ModelOptExtError
    from sglang_modelopt_ext.integration.loading import quantized_modules
    from tests.layers.harness import build, load

    folder = edits.copy_with(export(model_dir(TinyModel("qwen2")), "W4A8_NVFP4_FP8_CFG"), tmp_path / "model")
    model, _ = build(folder)
    model.config = SimpleNamespace(num_hidden_layers=2, num_nextn_predict_layers=1)
    # With names that a loader takes for shards of its own: SGLang's Qwen3 fails on such.
    block = {f"{place}.self_attn.{side}_proj.weight": torch.zeros(4) for place in BLOCKS for side in "qkv"}
    edits.add_tensors(block)(folder)
    exclude = ["lm_head", "mtp*", "model.layers.2*"]
    edits.set_file_config({"exclude_modules": exclude})(folder)
    edits.set_embedded_config({"ignore": exclude})(folder)
    handed: list[str] = []
    original = model.load_weights

    def noting(weights: object) -> None:
        original((handed.append(name) or (name, tensor)) for name, tensor in weights)  # type: ignore[func-returns-value, attr-defined]

    model.load_weights = noting  # type: ignore[method-assign]
    for module, method in quantized_modules(model):
        method.restore_weights_before_loading(module)
    load(model, read_checkpoint(folder))
    assert handed
    assert not set(handed) & block.keys()
    model.config.num_nextn_predict_layers = 0
    for module, method in quantized_modules(model):
        method.restore_weights_before_loading(module)
    with pytest.raises(ModelOptExtError, match=r"layers\.2\.self_attn\.\w_proj\.weight: expected a tensor"):
        load(model, read_checkpoint(folder))


BLOCKS = ("model.layers.2", "mtp.layers.0")


def test_a_buffer_of_a_rotary_embedding_that_the_model_has(tmp_path: Path) -> None:
    """SGLang's loaders skip it, whether or not the module is there; any other tensor they skip is an error."""
    pytest.importorskip("sglang")
    from sglang_modelopt_ext.checkpoint.reader import read_checkpoint
    from sglang_modelopt_ext.integration.loading import StrictLoad

    folder = edits.copy_with(export(model_dir(TinyModel("qwen2")), "W4A8_NVFP4_FP8_CFG"), tmp_path / "model")
    names = ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.0.self_attn.rotary_emb.weight"]
    edits.add_tensors({name: torch.ones(4) for name in names})(folder)
    checkpoint = read_checkpoint(folder)
    model = torch.nn.ModuleDict({"model": torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.Module()])})})
    layer = model.get_submodule("model.layers.0")
    layer.self_attn = torch.nn.ModuleDict({"rotary_emb": torch.nn.Module()})
    strict = StrictLoad(model, checkpoint)
    assert strict.unused(set(checkpoint.tensors) - set(names)) == names[1:]


def test_a_classifier_without_bias(tmp_path: Path) -> None:
    """Hugging Face's have none, SGLang's keep the one they were made with: zero, and only for the head."""
    pytest.importorskip("sglang")
    from sglang_modelopt_ext.checkpoint.reader import read_checkpoint
    from sglang_modelopt_ext.errors import ModelOptExtError
    from sglang_modelopt_ext.integration.loading import quantized_modules
    from tests.layers.harness import build, load

    folder = edits.copy_with(export(model_dir(TinyModel("qwen2")), "W4A8_NVFP4_FP8_CFG"), tmp_path / "model")
    model, _ = build(folder)
    model.put("score", torch.nn.Linear(256, 2))
    edits.add_tensors({"score.weight": torch.ones(2, 256)})(folder)
    exclude = ["lm_head", "score"]
    edits.set_file_config({"exclude_modules": exclude})(folder)
    edits.set_embedded_config({"ignore": exclude})(folder)
    for module, method in quantized_modules(model):
        method.restore_weights_before_loading(module)
    load(model, read_checkpoint(folder))
    assert torch.equal(model.score.weight, torch.ones(2, 256))
    assert torch.equal(model.score.bias, torch.zeros(2))
    edits.drop_tensors("score.weight")(folder)
    for module, method in quantized_modules(model):
        method.restore_weights_before_loading(module)
    with pytest.raises(
        ModelOptExtError, match=r"score\.\w+: expected a tensor for this parameter of the model, got none"
    ):
        load(model, read_checkpoint(folder))


@pytest.mark.parametrize(
    ("ranks", "cpu", "expected"),
    [
        (1, True, "config.json has it"),
        (2, False, "config.json has it"),
        (2, True, "SGLang pads config.json for --tp-size 2 on a CPU"),
    ],
)
def test_whose_sizes_a_message_names(ranks: int, cpu: bool, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a layer of SGLang's with more outputs than are stored."""
    utils = pytest.importorskip("sglang.srt.utils")
    from sglang.srt.layers.linear import ColumnParallelLinear

    from sglang_modelopt_ext.checkpoint.reader import read_checkpoint
    from sglang_modelopt_ext.errors import ModelOptExtError
    from sglang_modelopt_ext.integration.config import ModelOptExtConfig
    from sglang_modelopt_ext.schemes.table import UMBRELLA
    from tests.layers.harness import parallel_rank

    monkeypatch.setattr(utils, "is_cpu", lambda: cpu)
    checkpoint = read_checkpoint(export(model_dir(TinyModel("qwen2")), "W4A8_NVFP4_FP8_CFG"))
    config = ModelOptExtConfig(UMBRELLA, checkpoint.config, checkpoint)
    name = "model.layers.0.mlp.down_proj"
    with (
        parallel_rank(0, ranks),
        pytest.raises(ModelOptExtError, match=rf"expected N = \[384\], as {expected}, got"),
    ):
        ColumnParallelLinear(512, 384, bias=False, quant_config=config, prefix=name)
