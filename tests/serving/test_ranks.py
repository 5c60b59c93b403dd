"""Served models over two ranks that are not tensor parallel alone: pipeline stages, replicas, attention data parallel, experts."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
import torch

from sglang_modelopt_ext.errors import ModelOptExtError
from tests.serving.checks import (
    check_batch_against_single,
    check_logprobs,
    check_prefill_against_decode,
    send_weights,
)
from tests.support import edits, stand_ins
from tests.support.exports import export
from tests.support.kv_exports import kv_export
from tests.support.models import TinyModel, model_dir
from tests.support.moe import tiny
from tests.support.server import Server, failing_start, server_variables

pytestmark = [pytest.mark.server, pytest.mark.full]

NVFP4, MXFP4, KV = "W4A8_NVFP4_FP8_CFG", "W4A8_MXFP4_FP8_CFG", "nvfp4_affine"
PIPELINE, REPLICAS = ("--pp-size", "2"), ("--dp-size", "2")
STAGES, COPIES = ("PP0", "PP1"), ("DP0", "DP1")
ATTENTION = ("--attn-dp-size", "2")
EXPERTS = ("--ep-size", "2", "--boundary-reduction", "ar")
"""With the default, SGLang 0.5.23 returns the experts' outputs to their ranks through NCCL."""
NORM = "model.layers.1.input_layernorm.weight"


class PatientServer(Server):
    """A server whose last request may still be under way in a later stage when its answer is there."""

    def flush_cache(self) -> None:
        """Remove the prefixes of earlier requests, as soon as the server has none under way."""
        for _ in range(20):
            try:
                super().flush_cache()
            except ModelOptExtError:
                time.sleep(0.5)
            else:
                return
        super().flush_cache()


def check(
    folder: Path, args: tuple[str, ...], ranks: tuple[str, str], kv_cache: str = "none", **options: object
) -> None:
    """Serve the checkpoint over two ranks, and compare it with its reading and with itself."""
    env = {**server_variables(2), **options.pop("env", {})}  # type: ignore[dict-item]
    with PatientServer(folder, dtype="float32", args=args, env=env, **options) as server:  # type: ignore[arg-type]
        check_logprobs(server, folder, "float32", kv_cache=kv_cache)
        check_prefill_against_decode(server)
        check_batch_against_single(server)
        for rank in ranks:
            assert re.search(rf" {rank}( EP\d)?\] Prefill batch", server.output()), f"no request got to {rank}"


@pytest.mark.parametrize(("args", "ranks"), [(PIPELINE, STAGES), (REPLICAS, COPIES)])
class TestStagesAndReplicas:
    """Each stage has a part of the layers, each replica all of them."""

    def test_dense(self, args: tuple[str, ...], ranks: tuple[str, str]) -> None:
        check(export(model_dir(TinyModel("llama")), MXFP4), args, ranks)

    def test_experts(self, args: tuple[str, ...], ranks: tuple[str, str]) -> None:
        check(export(model_dir(tiny("qwen3_moe")), NVFP4), args, ranks)

    def test_a_quantized_kv_cache(self, args: tuple[str, ...], ranks: tuple[str, str]) -> None:
        """A stage's pool has the scales of its own layers."""
        check(kv_export(KV, "mistral", NVFP4), args, ranks, kv_cache=KV)


@pytest.mark.parametrize("args", [PIPELINE, REPLICAS])
def test_an_update_from_disk(args: tuple[str, ...]) -> None:
    """SGLang updates stages and replicas one after the other; each takes its tensors of the other checkpoint."""
    folder, other = (export(model_dir(TinyModel("llama", seed=seed)), NVFP4) for seed in (0, 5))
    with Server(folder, dtype="float32", args=args, env=server_variables(2)) as server:
        answer = server.request("/update_weights_from_disk", {"model_path": str(other), "flush_cache": True})
        assert answer["success"], answer
        check_logprobs(server, other, "float32")


def test_a_session_of_tensors() -> None:
    """Two ranks take the tensors of another model with experts, or neither of them does."""
    folder, other = (export(model_dir(tiny("qwen3_moe", seed=seed)), NVFP4) for seed in (0, 5))
    tensors = edits.read_tensors(other)
    scale = "model.layers.1.mlp.experts.3.up_proj.weight_scale"  # of the second rank
    nan = torch.full_like(tensors[scale].view(torch.uint8), 0x7F).view(torch.float8_e4m3fn)
    bad = {**tensors, scale: nan}
    with Server(folder, dtype="float32", tp=2, args=("--ep-size", "2")) as server:
        with pytest.raises(ModelOptExtError, match=r"experts\.3\.up_proj\.weight_scale: expected finite e4m3"):
            send_weights(server, tensors, bad)
        check_logprobs(server, folder, "float32")
        send_weights(server, tensors, tensors)
        check_logprobs(server, other, "float32")


def test_tied_embeddings_over_stages() -> None:
    """The last stage has a copy of the first one's embedding as its head."""
    check(export(model_dir(TinyModel("qwen3", tied=True)), MXFP4), PIPELINE, STAGES)


@pytest.mark.parametrize(("recipe", "experts"), [(MXFP4, ()), (NVFP4, EXPERTS)])
def test_attention_data_parallel(recipe: str, experts: tuple[str, ...], tmp_path: Path) -> None:
    """With a stand-in for the length that SGLang 0.5.23 fills batches up with, which its torch_native attention lacks."""
    env = stand_ins.environment(tmp_path)
    folder = export(model_dir(tiny("qwen3_moe")), recipe)
    check(folder, (*ATTENTION, *experts), ("DP0 TP0", "DP1 TP1"), tp=2, env=env)


@pytest.mark.parametrize("layer", [0, 1])
def test_a_fault_of_one_stage_stops_all(layer: int, tmp_path: Path) -> None:
    """One line says why, whichever stage has the layer."""
    norm = NORM.replace(".1.", f".{layer}.")
    change = edits.drop_tensors(norm)
    folder = edits.copy_with(export(model_dir(TinyModel("llama")), NVFP4), tmp_path / "checkpoint", [change])
    refusal = failing_start(folder, args=PIPELINE, env=server_variables(2))
    assert refusal.exit_code != 0
    assert not refusal.left_behind
    (said,) = {line for line in refusal.output.splitlines() if line.startswith("ModelOptExtError: ")}
    assert f"{norm}: expected a tensor for this parameter of the model" in said


def test_a_fault_of_replicas_stops_all(tmp_path: Path) -> None:
    """One line says why, in the process that the user started; no process is left."""
    change = edits.drop_tensors(NORM)  # which the preflight does not see
    folder = edits.copy_with(export(model_dir(TinyModel("llama")), NVFP4), tmp_path / "checkpoint", [change])
    refusal = failing_start(folder, args=REPLICAS, env=server_variables(2))
    assert refusal.exit_code != 0
    assert not refusal.left_behind
    lines = {line for line in refusal.output.splitlines() if line.startswith("ModelOptExtError: ")}
    assert len(lines) == 1, refusal.output[-3000:]
    assert f"{NORM}: expected a tensor for this parameter of the model" in lines.pop()
