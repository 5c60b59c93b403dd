"""An unquantized model under a flag of this package: quantized before the server starts, and served like its reading."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.serving.checks import check_logprobs, check_prefill_against_decode
from tests.support.models import TinyModel, model_dir
from tests.support.moe import tiny
from tests.support.server import Server, failing_start

pytestmark = [pytest.mark.server, pytest.mark.full]


def test_an_unquantized_model_is_quantized_once(tmp_path: Path) -> None:
    """Two starts, the second on two ranks: one checkpoint, whose reading both serve."""
    model, env = model_dir(TinyModel("llama")), {"SGLANG_MODELOPT_EXT_ONLINE_CACHE": str(tmp_path)}
    for start, tp in enumerate((1, 2)):
        with Server(model, dtype="float32", tp=tp, args=("--quantization", "modelopt_w4a8"), env=env) as server:
            (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
            check_logprobs(server, folder, "float32")
            check_prefill_against_decode(server)
            assert server.request("/v1/models", None)["data"][0]["id"] == str(model)
            output = server.output()
        assert ("modelopt_ext: quantized 14 layers" in output) == (start == 0)
        assert ("kept before in" in output) == (start == 1)
        assert "8 linear layers W4A8_MXFP4_FP8 (weights mxfp4, activations fp8_per_token)" in output


def test_experts_over_ranks(tmp_path: Path) -> None:
    """Qwen3-MoE as mxfp4, with ranks that hold some experts whole."""
    env = {"SGLANG_MODELOPT_EXT_ONLINE_CACHE": str(tmp_path)}
    args = ("--quantization", "modelopt_mxfp4", "--ep-size", "2")
    with Server(model_dir(tiny("qwen3_moe")), dtype="float32", tp=2, args=args, env=env) as server:
        (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
        check_logprobs(server, folder, "float32")


def test_without_the_flag_nothing_is_quantized(tmp_path: Path) -> None:
    env = {"SGLANG_MODELOPT_EXT_ONLINE_CACHE": str(tmp_path)}
    with Server(model_dir(TinyModel("llama")), dtype="float32", env=env) as server:
        assert "modelopt_ext: quantized" not in server.output()
    assert not list(tmp_path.iterdir())


def test_a_launch_that_cannot_be_served_quantizes_nothing(tmp_path: Path) -> None:
    env = {"SGLANG_MODELOPT_EXT_ONLINE_CACHE": str(tmp_path)}
    args = ("--quantization", "modelopt_w4a8", "--tokenizer-worker-num", "2")
    refusal = failing_start(model_dir(TinyModel("llama")), args=args, env=env)
    assert "--tokenizer-worker-num: expected 1" in refusal.output
    assert not list(tmp_path.iterdir())
