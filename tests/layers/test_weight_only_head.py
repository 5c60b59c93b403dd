"""A head and an embedding whose inputs are not rounded, by ModelOpt's recipe of Nemotron-3-Nano-4B; tests/serving serves it."""

from __future__ import annotations

from pathlib import Path

import pytest

from sglang_modelopt_ext.checkpoint.reader import check_all_values, read_checkpoint
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.workflow.quantize.recipes import find_recipe
from tests.support import edits
from tests.support.exports import export
from tests.support.models import TinyModel, model_dir

pytest.importorskip("modelopt")


def weight_only_head() -> Path:
    """Return a Llama by ModelOpt's recipe of Nemotron-3-Nano-4B: an FP8 head and an NVFP4 embedding without rounded inputs."""
    _, config = find_recipe("models/nvidia/NVIDIA-Nemotron-3-Nano-4B-BF16/ptq/nvfp4_w4a16")
    names = {"*embeddings*weight_quantizer": "*embed_tokens*weight_quantizer"}
    for entry in config["quant_cfg"]:
        name = entry["quantizer_name"].replace(".mixer.", ".mlp.")
        entry["quantizer_name"] = names.get(name, name)
    return export(model_dir(TinyModel()), config)


def test_weight_only_head(tmp_path: Path) -> None:
    """ModelOpt exports an FP8 head whose input is not rounded as FP8 without input_scale; of any other layer that is a fault."""
    folder = weight_only_head()
    checkpoint = read_checkpoint(folder)
    check_all_values(checkpoint)
    assert checkpoint.linears["lm_head"].scheme.describe() == "FP8 (weights fp8, activations none)"
    assert checkpoint.linears["layers.1.mlp.down_proj"].scheme.describe() == "FP8 (weights fp8, activations fp8_static)"
    broken = edits.copy_with(folder, tmp_path / "broken", [edits.drop_tensors("*1.mlp.down_proj.input_scale")])
    with pytest.raises(ModelOptExtError, match=r"down_proj\.input_scale: expected a tensor of FP8"):
        read_checkpoint(broken)
