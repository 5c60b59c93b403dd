"""Served models over two ranks that are not tensor parallel alone: pipeline stages, replicas, attention data parallel, experts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.serving.checks import check_batch_against_single, check_logprobs, check_prefill_against_decode
from tests.support import stand_ins
from tests.support.exports import export
from tests.support.kv_exports import kv_export
from tests.support.models import TinyModel, model_dir
from tests.support.moe import tiny
from tests.support.server import Server, server_variables

pytestmark = [pytest.mark.server, pytest.mark.full]

NVFP4, MXFP4, KV = "W4A8_NVFP4_FP8_CFG", "W4A8_MXFP4_FP8_CFG", "nvfp4_affine"
PIPELINE, REPLICAS = ("--pp-size", "2"), ("--dp-size", "2")
STAGES, COPIES = ("PP0", "PP1"), ("DP0", "DP1")
ATTENTION = ("--attn-dp-size", "2")


def check(
    folder: Path, args: tuple[str, ...], ranks: tuple[str, str], kv_cache: str = "none", **options: object
) -> None:
    """Serve the checkpoint over two ranks, and compare it with its reading and with itself."""
    env = {**server_variables(2), **options.pop("env", {})}  # type: ignore[dict-item]
    with Server(folder, dtype="float32", args=args, env=env, **options) as server:  # type: ignore[arg-type]
        check_logprobs(server, folder, "float32", kv_cache=kv_cache)
        check_prefill_against_decode(server)
        check_batch_against_single(server)
        for rank in ranks:
            assert f" {rank}] Prefill batch" in server.output(), f"no request got to {rank}"


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


def test_an_update_of_stages() -> None:
    """SGLang updates the stages one after the other; each takes its tensors of the other checkpoint."""
    folder, other = (export(model_dir(TinyModel("llama", seed=seed)), NVFP4) for seed in (0, 5))
    with Server(folder, dtype="float32", args=PIPELINE, env=server_variables(2)) as server:
        answer = server.request("/update_weights_from_disk", {"model_path": str(other), "flush_cache": True})
        assert answer["success"], answer
        check_logprobs(server, other, "float32")


def test_tied_embeddings_over_stages() -> None:
    """The last stage has a copy of the first one's embedding as its head."""
    check(export(model_dir(TinyModel("qwen3", tied=True)), MXFP4), PIPELINE, STAGES)


@pytest.mark.parametrize("experts", [(), ("--ep-size", "2")])
def test_attention_data_parallel(experts: tuple[str, ...], tmp_path: Path) -> None:
    """With a stand-in for the length that SGLang 0.5.23 fills batches up with, which its torch_native attention lacks."""
    env = stand_ins.environment(tmp_path)
    folder = export(model_dir(tiny("qwen3_moe")), NVFP4)
    check(folder, (*ATTENTION, *experts), ("DP0 TP0", "DP1 TP1"), tp=2, env=env)
