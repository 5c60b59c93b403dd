"""Served models with layers stored fused, as their Hugging Face classes have them, and with quantized heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_modelopt_kernels.formats import WEIGHT_FORMATS
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
        ("phi3", NVFP4, 2),
        ("glm4", "W4A8_AWQ_BETA_CFG", 1),
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


def quantized_head(tensors: edits.Tensors) -> None:
    """Quantize ``lm_head`` as ModelOpt's W4A8_NVFP4_FP8 does."""
    stored = WEIGHT_FORMATS["nvfp4_w4a8"].quantize(tensors.pop("lm_head.weight").to(torch.float32))
    stored["input_scale"] = torch.tensor(0.05)
    tensors.update({f"lm_head.{name}": tensor for name, tensor in stored.items()})


def include_head(content: dict[str, Any]) -> None:
    """Declare the head as quantized."""
    excluded = content["quantization"]["exclude_modules"]
    content["quantization"]["exclude_modules"] = [pattern for pattern in excluded if "lm_head" not in pattern]


def test_a_head_that_its_class_builds_without_a_config(tmp_path: Path) -> None:
    """Mixtral's head is quantized; ModelOpt fails to export that, so that it is written as ModelOpt writes others."""
    changes = [
        edits.edit_tensors(quantized_head),
        edits.drop_embedded_config,
        edits.edit_json(edits.QUANT_CONFIG, include_head),
    ]
    folder = edits.copy_with(export(model_dir(tiny("mixtral", layers=1)), NVFP4), tmp_path / "checkpoint", changes)
    with Server(folder, dtype="float32") as server:
        check_logprobs(server, folder, "float32")


@pytest.mark.full
def test_a_quantized_head_of_tied_embeddings(tmp_path: Path) -> None:
    """NVFP4_FP8_MHA's real export of a tied model: a bf16 embedding and an NVFP4 head, without its FP8 KV cache."""
    source = export(model_dir(TinyModel("llama", tied=True)), "NVFP4_FP8_MHA_CONFIG")
    changes = [
        edits.drop_embedded_config,
        edits.set_file_config({"kv_cache_quant_algo": None}),
        edits.drop_tensors("*.[kv]_scale"),
    ]
    folder = edits.copy_with(source, tmp_path / "checkpoint", changes)
    with Server(folder, dtype="float32") as server:
        check_logprobs(server, folder, "float32")
