"""Served models with layers stored fused, as their Hugging Face classes have them, and with quantized heads."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.serving.checks import check_logprobs
from tests.support import edits
from tests.support.exports import export
from tests.support.models import Family, TinyModel, model_dir
from tests.support.moe import tiny
from tests.support.server import Server

pytestmark = pytest.mark.server

NVFP4, MXFP4 = "W4A8_NVFP4_FP8_CFG", "W4A8_MXFP4_FP8_CFG"


@pytest.mark.parametrize(
    ("family", "recipe", "tp"),
    [
        pytest.param("phi3", NVFP4, 2, marks=pytest.mark.full),
        pytest.param("glm4", "W4A8_AWQ_BETA_CFG", 1, marks=pytest.mark.full),
        pytest.param("phi3", MXFP4, 1, marks=pytest.mark.full),
        pytest.param("phi3", "W4A8_AWQ_BETA_CFG", 1, marks=pytest.mark.full),
        pytest.param("phi3", "NVFP4_SVDQUANT_DEFAULT_CFG", 2, marks=pytest.mark.full),
        pytest.param("glm4", NVFP4, 2, marks=pytest.mark.full),
        pytest.param("glm4", MXFP4, 1, marks=pytest.mark.full),
    ],
)
def test_stored_fused(family: Family, recipe: str, tp: int) -> None:
    """A real export of Phi-3 or GLM-4 is served as its float32 reading says, on one rank and on two."""
    folder = export(model_dir(TinyModel(family)), recipe)
    with Server(folder, dtype="float32", tp=tp) as server:
        check_logprobs(server, folder, "float32")


@pytest.mark.full
@pytest.mark.parametrize("model", [tiny("mixtral", layers=1), TinyModel("llama", tied=True)])
def test_quantized_vocabulary(model: TinyModel, tmp_path: Path) -> None:
    """NVFP4_FP8_MHA's weights, on a class that builds head and embedding without a config (Mixtral), and on one without a head.

    The FP8 KV cache is taken out of the checkpoint.
    """
    changes = [
        edits.drop_embedded_config,
        edits.set_file_config({"kv_cache_quant_algo": None}),
        edits.drop_tensors("*.[kv]_scale"),
    ]
    folder = edits.copy_with(export(model_dir(model), "NVFP4_FP8_MHA_CONFIG"), tmp_path / "checkpoint", changes)
    with Server(folder, dtype="float32") as server:
        check_logprobs(server, folder, "float32")
