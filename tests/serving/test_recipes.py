"""Served models of the other dense recipes: the fast set, three starts. Every recipe is covered layer by layer in tests/layers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.layers.test_recipes import mixed_checkpoint
from tests.layers.test_weight_only_head import weight_only_head
from tests.serving.checks import check_logprobs
from tests.support import edits
from tests.support.exports import export
from tests.support.models import TinyModel, model_dir
from tests.support.server import Server

pytestmark = pytest.mark.server


def test_mixed_precision(tmp_path: Path) -> None:
    """FP8, MXFP8, W4A8_NVFP4_FP8 and W4A8_AWQ with smoothing in one checkpoint, detected from hf_quant_config.json, in bf16."""
    folder = mixed_checkpoint(tmp_path)
    with Server(folder, dtype="bfloat16") as server:
        check_logprobs(server, folder, "bfloat16")
        served = server.output()
    for scheme in (
        "2 linear layers MXFP8",
        "2 linear layers FP8",
        "1 linear layers W4A8_AWQ",
        "2 linear layers W4A8_NVFP4_FP8",
    ):
        assert f"modelopt_ext: {scheme} (" in served


@pytest.mark.full
def test_low_rank_and_smoothing_over_ranks() -> None:
    """SVDQuant under SGLang's own flag for NVFP4, split over two ranks."""
    folder = export(model_dir(TinyModel("qwen2")), "NVFP4_SVDQUANT_DEFAULT_CFG")
    with Server(folder, dtype="float32", tp=2, args=("--quantization", "modelopt_ext")) as server:
        check_logprobs(server, folder, "float32")


@pytest.mark.full
def test_weight_only_head() -> None:
    """The recipe of Nemotron-3-Nano-4B: NVFP4 and FP8 layers, an NVFP4 embedding and an FP8 head without rounded inputs."""
    folder = weight_only_head()
    with Server(folder, dtype="float32") as server:
        check_logprobs(server, folder, "float32")


@pytest.mark.full
def test_quantized_vocabulary(tmp_path: Path) -> None:
    """NVFP4_FP8_MHA's weights: lm_head and embedding quantized too. Its FP8 KV cache is taken out of the checkpoint.

    In float32: four-bit activations of a four-bit embedding make this model so sensitive that two bf16 runs differ in most tokens.
    """
    source = export(model_dir(TinyModel("llama")), "NVFP4_FP8_MHA_CONFIG")
    changes = [
        edits.drop_embedded_config,
        edits.set_file_config({"kv_cache_quant_algo": None}),
        edits.drop_tensors("*.[kv]_scale"),
    ]
    folder = edits.copy_with(source, tmp_path / "checkpoint", changes)
    with Server(folder, dtype="float32") as server:
        check_logprobs(server, folder, "float32")
