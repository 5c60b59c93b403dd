"""Served mixtures of experts: the fast set, one start. Every recipe is covered layer by layer in tests/layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import requests

from sglang_modelopt_ext.cli.main import main
from tests.serving.checks import check_batch_against_single, check_logprobs, check_prefill_against_decode
from tests.support import edits
from tests.support.exports import Variant, export
from tests.support.models import MOE_FAMILIES, Family, TinyModel, model_dir
from tests.support.moe import mixed_checkpoint, one_expert_off, tiny
from tests.support.server import Server, failing_start

pytestmark = pytest.mark.server

NVFP4, MXFP4 = "W4A8_NVFP4_FP8_CFG", "W4A8_MXFP4_FP8_CFG"


def test_mixed_precision(tmp_path: Path) -> None:
    """Mixtral: W4A8_NVFP4_FP8 experts, each with scales of its own, and FP8 attention, detected from one file."""
    folder = mixed_checkpoint("mixtral", tmp_path / "mixed")
    edits.distinct_expert_scales()(folder)
    with Server(folder, dtype="float32") as server:
        check_logprobs(server, folder, "float32")
        check_prefill_against_decode(server)
        check_batch_against_single(server)
        served = server.output()
        for line in (
            "2 layers of 4 experts, gate and up: W4A8_NVFP4_FP8 (",
            "2 layers of 4 experts, down: W4A8_NVFP4_FP8 (",
            "4 linear layers FP8 (",
        ):
            assert f"modelopt_ext: {line}" in served
        refused = requests.post(
            f"{server.url}/update_weights_from_disk",
            json={"model_path": str(export(model_dir(tiny("mixtral")), MXFP4))},
        ).json()
        assert not refused["success"]
        answer = server.request("/update_weights_from_disk", {"model_path": str(folder), "flush_cache": True})
        assert answer["success"], answer
        check_logprobs(server, folder, "float32")


@pytest.mark.full
def test_a_repaired_mixture(tmp_path: Path) -> None:
    """An expert that calibration never reached has no input scale: rejected as it is, served like its reading once repaired."""
    drop = edits.drop_tensors("model.layers.0.mlp.experts.3.*_proj.input_scale")
    broken = edits.copy_with(export(model_dir(tiny("qwen3_moe")), NVFP4), tmp_path / "broken", [drop])
    failed = failing_start(broken, dtype="float32")
    assert "experts.3" in failed.output
    assert "input_scale: expected a tensor" in failed.output
    folder = tmp_path / "repaired"
    assert main(["repair", str(broken), "--output", str(folder)]) == 0
    assert main(["inspect", str(folder), "--gpu", "cpu"]) == 0
    with Server(folder, dtype="float32") as server:
        check_logprobs(server, folder, "float32")


@pytest.mark.full
@pytest.mark.parametrize(
    ("family", "recipe", "tp", "ep"),
    [
        ("qwen3_moe", NVFP4, 1, 1),
        ("qwen3_moe", MXFP4, 2, 1),
        ("qwen3_moe", "NVFP4_EXPERTS_ONLY_CFG", 2, 2),
        ("mixtral", MXFP4, 2, 1),
        ("mixtral", NVFP4, 2, 2),
        ("mixtral", "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG", 1, 1),
        ("mixtral", "INT8_SMOOTHQUANT_CFG", 2, 1),
        ("qwen3_moe", "FP8_DEFAULT_CFG", 2, 2),
        ("qwen3_moe", "MXFP8_DEFAULT_CFG", 2, 1),
        ("qwen3_moe", f"{MXFP4} without an expert", 1, 1),
        ("mixtral", f"{NVFP4} without an expert", 2, 1),
        ("qwen3_moe", f"{NVFP4} without an expert", 2, 2),
    ],
)
def test_over_ranks(family: Family, recipe: str, tp: int, ep: int) -> None:
    """Ranks that hold slices of every expert, and ranks that hold some experts whole; one expert may be unquantized."""
    name, _, without = recipe.partition(" ")
    folder = export(model_dir(tiny(family)), one_expert_off(name) if without else name)
    with Server(folder, dtype="float32", tp=tp, args=("--ep-size", str(ep))) as server:
        check_logprobs(server, folder, "float32")


@pytest.mark.full
def test_an_expert_that_was_never_calibrated(tmp_path: Path) -> None:
    """An expert without an ``input_scale`` is served where activations are not rounded, and an error where they are."""
    whole = export(model_dir(tiny("qwen3_moe")), "NVFP4_DEFAULT_CFG")
    folder = edits.copy_with(whole, tmp_path / "model", [edits.drop_tensors("*.1.mlp.experts.2.*.input_scale")])
    with Server(folder, dtype="float32", env={"SGLANG_MODELOPT_EXT_FP4_ACTIVATIONS": "keep"}) as server:
        check_logprobs(server, whole, "float32", activation="none")
    refused = failing_start(folder, dtype="float32")
    assert "mlp.experts.2.down_proj.input_scale: expected a tensor of NVFP4" in refused.output


@pytest.mark.full
@pytest.mark.parametrize("recipe", [NVFP4, MXFP4, "NVFP4_MLP_WEIGHT_ONLY_CFG"])
@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_at_the_bf16_noise_floor(family: Family, recipe: str) -> None:
    folder = export(model_dir(tiny(family)), recipe)
    with Server(folder, dtype="bfloat16") as server:
        check_logprobs(server, folder, "bfloat16")


@pytest.mark.full
@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_held_out_checkpoints(family: Family) -> None:
    """A seed, sizes and numbers of experts that no other test has."""
    spec = TinyModel(family, seed=77, hidden=384, intermediate=384, heads=6, kv_heads=3, experts=6, top_k=3)
    folder = export(model_dir(spec), NVFP4)
    with Server(folder, dtype="float32", args=("--quantization", "modelopt_ext")) as server:
        check_logprobs(server, folder, "float32")
        check_prefill_against_decode(server)
        check_batch_against_single(server)


@pytest.mark.full
@pytest.mark.parametrize(("family", "kv_cache"), [("qwen3_moe", "NVFP4_KV_CFG"), ("mixtral", "FP8_AFFINE_KV_CFG")])
def test_with_a_quantized_kv_cache(family: Family, kv_cache: str) -> None:
    folder = export(model_dir(tiny(family)), NVFP4, Variant(kv_cache=kv_cache))
    recipe = kv_cache.removesuffix("_KV_CFG").lower()
    with Server(folder, dtype="float32") as server:
        check_logprobs(server, folder, "float32", kv_cache=recipe)


@pytest.mark.full
def test_dummy_weights(tmp_path: Path) -> None:
    """``--load-format dummy`` serves finite logits without reading a tensor."""
    import torch

    folder = edits.copy_with(export(model_dir(tiny("qwen3_moe")), NVFP4), tmp_path / "checkpoint")
    (folder / edits.WEIGHTS).unlink()
    with Server(folder, dtype="float32", args=("--load-format", "dummy")) as server:
        assert bool(torch.isfinite(server.full_logprobs([5, 6, 7])).all())


@pytest.mark.full
def test_a_missing_expert_stops_the_server_with_one_line(tmp_path: Path) -> None:
    change = edits.drop_tensors("*.0.mlp.experts.2.up_proj.weight_scale_2")
    folder = edits.copy_with(export(model_dir(tiny("qwen3_moe")), NVFP4), tmp_path / "checkpoint", [change])
    refusal = failing_start(folder)
    assert refusal.exit_code != 0
    assert not refusal.left_behind
    lines = [line for line in refusal.output.splitlines() if line.startswith("ModelOptExtError: ")]
    assert len(lines) == 1, refusal.output[-3000:]
    assert "experts.2.up_proj.weight_scale_2: expected a tensor of W4A8_NVFP4_FP8" in lines[0]
    assert "Traceback" not in refusal.output, refusal.output[-3000:]
