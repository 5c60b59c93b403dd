"""Real SGLang servers on real ModelOpt W4A8 exports: the fast set, four starts."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
import torch

from sglang_modelopt_ext.errors import ModelOptExtError
from tests.serving.checks import (
    FP32_MEDIAN,
    PROMPT,
    check_batch_against_single,
    check_logprobs,
    check_prefill_against_decode,
    median_apart,
    send_weights,
)
from tests.support import edits
from tests.support.exports import export
from tests.support.models import TinyModel, model_dir
from tests.support.reference import Reference, difference
from tests.support.server import Server, failing_start, server_environment

pytestmark = pytest.mark.server

NVFP4, MXFP4 = "W4A8_NVFP4_FP8_CFG", "W4A8_MXFP4_FP8_CFG"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an NVFP4 checkpoint with a scale of its own for every shard of the fused layers."""
    folder = tmp_path_factory.mktemp("llama") / "checkpoint"
    return edits.copy_with(export(model_dir(TinyModel("llama")), NVFP4), folder, [edits.distinct_shard_scales])


@pytest.fixture(scope="module")
def server(llama: Path) -> Iterator[Server]:
    """Yield one float32 server with the flag, for every test of this module that can share it."""
    with Server(llama, dtype="float32", args=("--quantization", "modelopt_w4a8")) as running:
        yield running


class TestFlag:
    """``python -m sglang.launch_server --quantization modelopt_w4a8``."""

    def test_logprobs(self, server: Server, llama: Path) -> None:
        check_logprobs(server, llama, "float32")

    def test_says_what_serves_what(self, server: Server) -> None:
        expected = (
            "modelopt_ext: 8 linear layers W4A8_NVFP4_FP8 (weights nvfp4_w4a8, activations fp8_static), math exact"
        )
        assert expected in server.output()

    def test_prefill_against_decode(self, server: Server) -> None:
        check_prefill_against_decode(server)

    def test_greedy_repeats(self, server: Server) -> None:
        answers = set()
        for _ in range(3):
            server.flush_cache()
            answers.add(tuple(server.generate_ids(PROMPT, 24)))
        assert len(answers) == 1

    def test_batch_against_single(self, server: Server) -> None:
        check_batch_against_single(server)

    def test_update_from_tensors(self, server: Server, llama: Path) -> None:
        """A session in two calls replaces the weights, one with a fault leaves them, and so does one that lacks a tensor."""
        before = server.full_logprobs(PROMPT)
        other = edits.read_tensors(export(model_dir(TinyModel("llama", seed=5)), NVFP4))
        other["model.norm.weight"] = other["model.norm.weight"].float()
        with pytest.raises(ModelOptExtError, match=r"model\.norm\.weight: expected bfloat16"):
            send_weights(server, other)
        del other["model.norm.weight"]
        with pytest.raises(ModelOptExtError, match=r"model\.norm\.weight: expected every tensor of"):
            send_weights(server, other)
        server.flush_cache()
        assert torch.equal(server.full_logprobs(PROMPT), before)
        for folder in (export(model_dir(TinyModel("llama", seed=5)), NVFP4), llama):
            send_weights(server, edits.read_tensors(folder))
            check_logprobs(server, folder, "float32")

    def test_update_from_disk(self, server: Server, llama: Path, tmp_path: Path) -> None:
        """Another model of the same recipe replaces the first; one that does not fit is rejected and changes nothing."""
        before = server.full_logprobs(PROMPT)
        other = export(model_dir(TinyModel("llama", seed=5)), NVFP4)
        broken = edits.copy_with(other, tmp_path / "broken", [edits.drop_tensors("*1.mlp.down_proj.input_scale")])
        nan = edits.copy_with(other, tmp_path / "nan", [edits.map_tensors("*0.mlp.down_proj.weight_scale", _with_nan)])
        for folder, reason in (
            (export(model_dir(TinyModel("llama")), MXFP4), "W4A8_NVFP4_FP8"),
            (broken, "down_proj.input_scale: expected a tensor"),
            (nan, "down_proj.weight_scale: expected finite e4m3 block scales, got NaN"),
        ):
            refused = requests.post(
                f"{server.url}/update_weights_from_disk", json={"model_path": str(folder)}, timeout=120
            ).json()
            assert not refused["success"]
            assert reason in refused["message"]
            server.flush_cache()
            assert torch.equal(server.full_logprobs(PROMPT), before), "a refused update changed the weights"
        for folder in (other, llama):
            answer = server.request("/update_weights_from_disk", {"model_path": str(folder), "flush_cache": True})
            assert answer["success"], answer
            check_logprobs(server, folder, "float32")
        assert difference(server.full_logprobs(PROMPT), before).median < FP32_MEDIAN


def _with_nan(scale: torch.Tensor) -> torch.Tensor:
    raw = scale.view(torch.uint8).clone()
    raw[0, 0] = 0x7F
    return raw.view(torch.float8_e4m3fn)


def test_serve_detects_and_splits_over_ranks(tmp_path: Path) -> None:
    """``sglang serve`` without a flag, configuration in hf_quant_config.json alone, two ranks in float32."""
    folder = edits.copy_with(
        export(model_dir(TinyModel("qwen3")), MXFP4),
        tmp_path / "checkpoint",
        [edits.drop_embedded_config, edits.shard()],
    )
    with Server(folder, dtype="float32", tp=2, entrypoint="serve") as server:
        check_logprobs(server, folder, "float32")
        assert "W4A8_MXFP4_FP8 (weights mxfp4, activations fp8_per_token)" in server.output()


ENGINE = """
import json, sys
import sglang

if __name__ == "__main__":
    folder, ids = sys.argv[1], json.loads(sys.argv[2])
    engine = sglang.Engine(
        model_path=folder, device="cpu", attention_backend="torch_native", dtype="float32",
        max_total_tokens=4096, max_running_requests=4, skip_tokenizer_init=True,
    )
    sampling = {"temperature": 0.0, "max_new_tokens": 1, "ignore_eos": True}
    answer = engine.generate(input_ids=ids, sampling_params=sampling, return_logprob=True, logprob_start_len=0)
    print("LOGPROBS", json.dumps(answer["meta_info"]["input_token_logprobs"]))
    engine.shutdown()
"""


def test_engine_and_fp8_math(tmp_path: Path) -> None:
    """``sglang.Engine`` on Qwen2 (QKV bias), config.json alone, with the other numerics."""
    folder = edits.copy_with(
        export(model_dir(TinyModel("qwen2")), NVFP4), tmp_path / "checkpoint", [edits.drop_file_config]
    )
    script = tmp_path / "engine.py"
    script.write_text(ENGINE)
    env = server_environment(1) | {"SGLANG_MODELOPT_EXT_W4A8_MATH": "fp8"}
    result = subprocess.run(
        [sys.executable, str(script), str(folder), json.dumps(PROMPT)],
        capture_output=True,
        text=True,
        timeout=300,
        env=env,
        check=False,
    )
    lines = [line for line in result.stdout.splitlines() if line.startswith("LOGPROBS ")]
    assert lines, result.stdout[-2000:] + result.stderr[-4000:]
    served = [entry[0] for entry in json.loads(lines[0].removeprefix("LOGPROBS "))[1:]]
    for math, near in (("fp8", True), ("exact", False)):
        apart = median_apart(served, Reference(folder, math=math).input_logprobs(PROMPT).tolist())
        assert (apart < FP32_MEDIAN) == near, f"{math}: {apart}"


@pytest.mark.full
def test_a_fault_found_while_loading_stops_every_process_with_one_line(tmp_path: Path) -> None:
    folder = edits.copy_with(
        export(model_dir(TinyModel("mistral")), NVFP4),
        tmp_path / "checkpoint",
        [edits.map_tensors("*0.mlp.down_proj.weight_scale", _with_nan)],
    )
    refusal = failing_start(folder, tp=2)
    assert refusal.exit_code != 0
    assert not refusal.left_behind
    lines = [line for line in refusal.output.splitlines() if "ModelOptExtError" in line]
    expected = (
        f"ModelOptExtError: {folder}/model.safetensors: model.layers.0.mlp.down_proj.weight_scale: expected finite"
    )
    assert len(lines) == 1, refusal.output[-3000:]
    assert lines[0].startswith(expected)
    assert "Traceback" not in refusal.output, refusal.output[-3000:]
