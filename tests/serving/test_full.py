"""Every served combination: run by ``make test-full``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sglang_modelopt_ext.checkpoint.reader import read_checkpoint
from sglang_modelopt_ext.cli.main import main
from tests.serving.checks import check_batch_against_single, check_logprobs, check_prefill_against_decode
from tests.support import edits
from tests.support.exports import export, mixed_recipe
from tests.support.models import FAMILIES, Family, TinyModel, model_dir
from tests.support.server import Server, failing_start

pytestmark = [pytest.mark.server, pytest.mark.full]

NVFP4, MXFP4 = "W4A8_NVFP4_FP8_CFG", "W4A8_MXFP4_FP8_CFG"


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("recipe", [NVFP4, MXFP4])
@pytest.mark.parametrize("family", FAMILIES)
def test_w4a8_at_the_bf16_noise_floor(family: Family, recipe: str, tp: int) -> None:
    folder = export(model_dir(TinyModel(family)), recipe)
    with Server(folder, dtype="bfloat16", tp=tp, args=("--quantization", "modelopt_w4a8")) as server:
        check_logprobs(server, folder, "bfloat16")


@pytest.mark.parametrize("family", FAMILIES)
def test_held_out_checkpoints(family: Family) -> None:
    """Seeds and sizes no other test serves, in float32 with the umbrella flag."""
    folder = export(model_dir(TinyModel(family, seed=77, hidden=384, intermediate=768, heads=6)), NVFP4)
    with Server(folder, dtype="float32", args=("--quantization", "modelopt_ext")) as server:
        check_logprobs(server, folder, "float32")
        check_prefill_against_decode(server)
        check_batch_against_single(server)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_tied_embeddings(family: Family) -> None:
    folder = export(model_dir(TinyModel(family, tied=True)), MXFP4)
    with Server(folder, dtype="float32") as server:
        check_logprobs(server, folder, "float32")


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_second_generation_model_loaders(family: Family) -> None:
    """``SGLANG_ENABLE_WEIGHT_LOADER_V2`` takes Llama and Qwen2 through another loading path."""
    folder = export(model_dir(TinyModel(family)), NVFP4)
    with Server(folder, dtype="float32", env={"SGLANG_ENABLE_WEIGHT_LOADER_V2": "1"}) as server:
        check_logprobs(server, folder, "float32")


def test_half_precision() -> None:
    folder = export(model_dir(TinyModel("llama", dtype="float16")), NVFP4)
    with Server(folder, dtype="float16") as server:
        check_logprobs(server, folder, "float16")


def test_dummy_weights(tmp_path: Path) -> None:
    """``--load-format dummy`` serves finite logits without reading a tensor."""
    folder = edits.copy_with(export(model_dir(TinyModel("llama")), NVFP4), tmp_path / "checkpoint")
    (folder / edits.WEIGHTS).unlink()
    with Server(folder, dtype="float32", args=("--load-format", "dummy")) as server:
        assert bool(torch.isfinite(server.full_logprobs([5, 6, 7])).all())


@pytest.mark.parametrize(
    "recipe",
    [
        "NVFP4_DEFAULT_CFG",
        "NVFP4_AWQ_LITE_CFG",
        "NVFP4_MLP_WEIGHT_ONLY_CFG",
        "MXFP8_DEFAULT_CFG",
        "FP8_DEFAULT_CFG",
        "FP8_PER_CHANNEL_PER_TOKEN_CFG",
        "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG",
        "INT4_AWQ_CFG",
        "W4A8_AWQ_BETA_CFG",
        "INT8_SMOOTHQUANT_CFG",
        "INT8_WEIGHT_ONLY_CFG",
    ],
)
def test_every_parameter_layout_over_ranks(recipe: str) -> None:
    folder = export(model_dir(TinyModel("qwen3")), recipe)
    with Server(folder, dtype="float32", tp=2) as server:
        check_logprobs(server, folder, "float32")


@pytest.mark.parametrize(("answer", "tp"), [("mxfp4", 1), (None, 1), (None, 2)])
def test_mxfp4_activations(answer: str | None, tp: int) -> None:
    """Without an answer the checkpoint is taken for MXFP4_DEFAULT, and the log says so once, however many ranks there are."""
    folder = export(model_dir(TinyModel("mistral")), "MXFP4_DEFAULT_CFG")
    env = {"SGLANG_MODELOPT_EXT_MXFP4_ACTIVATIONS": answer}
    with Server(folder, dtype="float32", tp=tp, args=("--quantization", "modelopt_mxfp4"), env=env) as server:
        check_logprobs(server, folder, "float32")
        said = [line for line in server.output().splitlines() if "does not say whether activations are rounded" in line]
    assert len(said) == (0 if answer else 1)
    assert all("taken for MXFP4_DEFAULT" in line and "MXFP4_ACTIVATIONS=mxfp4" in line for line in said)


@pytest.mark.parametrize("tp", [1, 2])
def test_a_mix_with_calibrated_mxfp4(tmp_path: Path, tp: int) -> None:
    """W4A8_MXFP4_FP8 attention and FP8 MLPs calibrated together; one layer without its scale, which goes by token."""
    source = export(model_dir(TinyModel("qwen2")), mixed_recipe({"*self_attn*": MXFP4, "*mlp*": "FP8_DEFAULT_CFG"}))
    folder = edits.copy_with(source, tmp_path / "mix", [edits.drop_tensors("*1.self_attn.o_proj.input_scale")])
    with Server(folder, dtype="float32", tp=tp) as server:
        check_logprobs(server, folder, "float32")
        for activation in ("fp8_static", "fp8_per_token"):
            assert f"W4A8_MXFP4_FP8 (weights mxfp4, activations {activation})" in server.output()


def test_auto_quantized(tmp_path: Path) -> None:
    """A mix that a search chose is served as an independent reading of it computes, smoothing included."""
    text = Path(__file__).resolve().parents[2] / "examples/stdlib_lm/heldout.txt"
    command = ["auto-quantize", str(model_dir(TinyModel())), "--formats", "W4A8_NVFP4_FP8,FP8,NVFP4_AWQ", "--bits", "6"]
    sizes = ["--samples", "12", "--score-samples", "8", "--sequence-length", "48"]
    folder = tmp_path / "out"
    assert main([*command, *sizes, "--data", str(text), "--output", str(folder), "--device", "cpu"]) == 0
    assert read_checkpoint(folder).config.algo == "MIXED_PRECISION"
    with Server(folder, dtype="float32") as server:
        check_logprobs(server, folder, "float32")


def nan_scale(scale: torch.Tensor) -> torch.Tensor:
    raw = scale.view(torch.uint8).clone()
    raw[0, 0] = 0x7F
    return raw.view(torch.float8_e4m3fn)


REFUSALS: dict[str, tuple[list[edits.Edit], tuple[str, ...], str]] = {
    "config.json is no JSON": ([edits.overwrite(edits.CONFIG, b"{")], (), "config.json: file: expected a JSON object"),
    "unknown algo": (
        [edits.set_config({"quant_algo": "W3A5"})],
        ("--quantization", "modelopt_ext"),
        "quant_algo: expected one of",
    ),
    "truncated weights": ([edits.truncate()], (), "model.safetensors: file: expected a readable safetensors file"),
    "wrong flag": ([], ("--quantization", "modelopt_fp4"), "which --quantization modelopt_w4a8"),
    "bypassing load format": (
        [],
        ("--load-format", "sharded_state"),
        "--load-format: expected one of auto, safetensors",
    ),
    "tokenizer workers": ([], ("--tokenizer-worker-num", "2"), "--tokenizer-worker-num: expected 1"),
    "stray tensor": (
        [edits.add_tensors({"model.layers.0.stray.weight": torch.zeros(3)})],
        (),
        "model.layers.0.stray.weight: expected a tensor",
    ),
    "model of another size": (
        [edits.set_fields(edits.CONFIG, {"intermediate_size": 768})],
        (),
        "expected N = [768, 768], as config.json has it",
    ),
    "NaN block scale": (
        [edits.map_tensors("*0.mlp.up_proj.weight_scale", nan_scale)],
        (),
        "expected finite e4m3 block",
    ),
}


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("fault", REFUSALS)
def test_refusals(tmp_path: Path, fault: str, family: Family) -> None:
    """The server does not start, says why in one line within a minute, and leaves no process behind."""
    changes, args, message = REFUSALS[fault]
    folder = edits.copy_with(export(model_dir(TinyModel(family)), NVFP4), tmp_path / "checkpoint", changes)
    refusal = failing_start(folder, args=args)
    assert refusal.exit_code != 0
    assert not refusal.left_behind
    lines = [line for line in refusal.output.splitlines() if line.startswith("ModelOptExtError: ")]
    assert len(lines) == 1, refusal.output[-3000:]
    assert message in lines[0]
    assert "Traceback" not in refusal.output, refusal.output[-3000:]
