"""``sglang-modelopt inspect`` on real exports, edited ones, and one with the headers of 70B parameters."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from sglang_modelopt_ext.backends.select import BACKENDS
from sglang_modelopt_ext.cli.main import main
from sglang_modelopt_ext.device import Device
from sglang_modelopt_ext.env import MXFP4_ACTIVATIONS
from sglang_modelopt_ext.workflow.inspect.loading import rehearse_loading
from sglang_modelopt_ext.workflow.inspect.run import _joined_name
from tests.layers.test_recipes import mixed_checkpoint
from tests.support import edits
from tests.support.exports import export, mixed_recipe
from tests.support.kv_exports import kv_export
from tests.support.models import TinyModel, model_dir
from tests.support.sparse import llama_70b

W4A8 = "W4A8_NVFP4_FP8_CFG"
REHEARSE = "rehearse"
"""Among the arguments of :func:`inspect`: without ``--headers-only``, which takes a process that imports SGLang."""


@pytest.fixture(scope="module")
def folder() -> Path:
    return export(model_dir(TinyModel("qwen2")), W4A8)


def inspect(capsys: pytest.CaptureFixture[str], *args: object, code: int = 0) -> dict[str, Any]:
    """Return the ``contents`` of ``inspect --json``."""
    capsys.readouterr()  # what making an export printed
    extra = [] if REHEARSE in args else ["--headers-only"]
    assert main(["inspect", *(str(arg) for arg in args if arg != REHEARSE), *extra, "--json"]) == code
    contents: dict[str, Any] = json.loads(capsys.readouterr().out)["contents"]
    return contents


def headers(folder: Path) -> dict[str, tuple[str, list[int]]]:
    """Return type and shape of every stored tensor."""
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                part = opened.get_slice(name)
                found[name] = (part.get_dtype(), part.get_shape())
    return found


def test_an_export(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    found = inspect(capsys, folder, "--gpu", "cpu")
    stored = headers(folder)
    assert found["algo"] == "W4A8_NVFP4_FP8"
    assert found["architecture"] == "Qwen2ForCausalLM"
    assert found["serving"]["owner"] == "sglang-modelopt-ext"
    assert found["serving"]["flags"] == ["modelopt_w4a8", "modelopt_ext"]
    assert found["problems"] == []
    weights = [name for name, (dtype, _) in stored.items() if dtype == "U8"]
    assert sum(group["count"] for group in found["layers"]) == len(weights)
    assert {group["kernel"] for group in found["layers"]} == {"dense_float32"}
    by_name = {group["name"]: group for group in found["layers"]}
    down = by_name["model.layers.[0-1].mlp.down_proj"]
    n, half_k = stored["model.layers.0.mlp.down_proj.weight"][1]
    assert (down["n"], down["k"], down["group_size"]) == (n, 2 * half_k, 32)
    assert down["tensors"]["weight_scale"] == f"float8_e4m3fn [{n}, {2 * half_k // 32}]"
    # Codes and scales of two layers, and two float32 scalars each.
    assert down["bytes"] == 2 * (n * half_k + n * 2 * half_k // 32 + 8)
    listed = sum(group["bytes"] for group in (*found["layers"], *found["plain"]))
    assert listed == found["bytes"]
    assert found["quantized_bytes"] == sum(group["bytes"] for group in found["layers"])


def test_targets(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    for gpu in ("sm80", "SM90", "100", "sm_120"):
        found = inspect(capsys, folder, "--gpu", gpu)
        expected = "gluon_streamed" if gpu == "SM90" else "triton_block_scaled"
        assert {group["kernel"] for group in found["layers"]} == {expected}
        reasons = found["layers"][0]["rejected"]
        asked = [backend.name for backend in BACKENDS]
        assert list(reasons) == asked[: asked.index(expected)], "what dispatch asks first"
    mxfp4 = inspect(capsys, export(model_dir(TinyModel("llama")), "W4A8_MXFP4_FP8_CFG"), "--gpu", "sm100")
    assert {group["kernel"] for group in mxfp4["layers"]} == {"triton_mxfp4_tcgen05"}


def test_another_accelerator(capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of this package serves there, and no flag makes it."""
    monkeypatch.setattr(Device, "here", lambda: Device.other("rocm"))
    found = inspect(capsys, folder)
    why = "this package has no kernels for rocm"
    serving = {name: found["serving"][name] for name in ("target", "owner", "flags", "why")}
    assert serving == {"target": "rocm", "owner": "SGLang", "flags": [], "why": why}
    assert (found["problems"], {group["kernel"] for group in found["layers"]}) == ([], {None})


def test_what_is_left_to_sglang(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    fp8 = export(model_dir(TinyModel("llama")), "FP8_DEFAULT_CFG")
    found = inspect(capsys, fp8, "--gpu", "sm90")
    assert found["serving"]["owner"] == "SGLang"
    assert {group["kernel"] for group in found["layers"]} == {None}
    assert inspect(capsys, fp8, "--gpu", "sm80")["serving"]["owner"] == "sglang-modelopt-ext"
    name = "model.layers.0.mlp.up_proj.pre_quant_scale"
    smoothed = edits.copy_with(fp8, tmp_path / "smoothed", [edits.add_tensors({name: torch.ones(256)})])
    found = inspect(capsys, smoothed, "--gpu", "sm90", code=1)
    assert found["serving"]["owner"] == "sglang-modelopt-ext"
    assert len(found["problems"]) == 1, "gate_proj has no such scale"
    assert "gate_proj.pre_quant_scale: expected a tensor, as model.layers.0.mlp.up_proj it is" in found["problems"][0]


def test_a_mix_with_calibrated_mxfp4(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The activation format of each layer, by its own tensors; layers that differ in it are groups of their own."""
    recipe = mixed_recipe({"*self_attn*": "W4A8_MXFP4_FP8_CFG", "*mlp*": "FP8_DEFAULT_CFG"})
    source = export(model_dir(TinyModel("llama")), recipe)
    folder = edits.copy_with(source, tmp_path / "mix", [edits.drop_tensors("*1.self_attn.o_proj.input_scale")])
    for gpu, kernel in (("cpu", "dense_float32"), ("sm90", "gluon_streamed"), ("sm120", "triton_mxfp4_mma")):
        found = inspect(capsys, folder, "--gpu", gpu)
        assert found["problems"] == []
        assert found["serving"]["flags"] == ["modelopt_ext"]
        groups = {group["name"]: group for group in found["layers"] if group["algo"] == "W4A8_MXFP4_FP8"}
        assert {group["kernel"] for group in groups.values()} == {kernel}
        rounded = {name: group["activation"] for name, group in groups.items()}
        assert rounded == {
            **{f"model.layers.[0-1].self_attn.{part}_proj": "fp8_static" for part in "qkv"},
            "model.layers.0.self_attn.o_proj": "fp8_static",
            "model.layers.1.self_attn.o_proj": "fp8_per_token",
        }


def test_mixed_precision_with_a_line_for_every_layer(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = mixed_checkpoint(tmp_path)
    found = inspect(capsys, folder, "--layers")
    declared = json.loads((folder / edits.QUANT_CONFIG).read_text())["quantization"]["quantized_layers"]
    assert {group["name"]: group["algo"] for group in found["layers"]} == {
        name: layer["quant_algo"].upper() for name, layer in declared.items()
    }
    assert found["serving"]["stock"].keys() == {group["algo"] for group in found["layers"]}


def test_an_mxfp4_export_without_an_answer(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """An assumption is a note, not a problem."""
    folder = export(model_dir(TinyModel("llama")), "MXFP4_DEFAULT_CFG")
    monkeypatch.delenv(MXFP4_ACTIVATIONS.variable, raising=False)
    found = inspect(capsys, folder)
    assert found["problems"] == []
    assert {group["activation"] for group in found["layers"]} == {"mxfp4_dynamic"}
    (note,) = found["notes"]
    assert main(["inspect", str(folder)]) == 0
    assert f"note: {note}" in capsys.readouterr().out
    monkeypatch.setenv(MXFP4_ACTIVATIONS.variable, "none")
    found = inspect(capsys, folder)
    assert (found["notes"], {group["activation"] for group in found["layers"]}) == ([], {"none"})


def test_kv_cache(capsys: pytest.CaptureFixture[str]) -> None:
    found = inspect(capsys, kv_export("nvfp4_affine", "mistral", W4A8))
    assert found["kv_cache"]["recipe"] == "nvfp4_affine"
    assert found["kv_cache"]["layers"] == 2
    assert found["kv_cache"]["bits"] == 4.5
    found = inspect(capsys, kv_export("fp8_affine", "qwen3"), "--gpu", "sm90")
    assert found["algo"] is None
    assert found["serving"]["owner"] == "sglang-modelopt-ext"
    assert found["layers"] == []


def test_every_problem_is_listed(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    changes = [
        edits.drop_tensors("model.layers.0.mlp.down_proj.weight_scale_2"),
        edits.drop_tensors("model.layers.1.self_attn.o_proj.input_scale"),
        edits.add_tensors(
            {
                "model.layers.1.mlp.down_proj.surplus_scale": torch.ones(1),
                "model.layers.1.self_attn.k_proj.k_scale": torch.ones(1),
                "model.layers.0.mlp.gate_proj.pre_quant_scale": torch.ones(256, dtype=torch.bfloat16),
            }
        ),
        edits.add_tensors({"model.layers.0.self_attn.v_proj.input_scale": torch.ones(3)}),
    ]
    found = inspect(capsys, edits.copy_with(folder, tmp_path / "bad", changes), code=1)
    subjects = (
        r"layers\.0\.mlp\.down_proj\.weight_scale_2: expected a tensor of",
        r"layers\.1\.self_attn\.o_proj\.input_scale: expected a tensor of",
        r"layers\.0\.mlp\.up_proj\.pre_quant_scale: expected a tensor, as model\.layers\.0\.mlp\.gate_proj",
        r"layers\.0\.self_attn\.v_proj\.input_scale: expected shape \[\], got \[3\]",
        r"layers\.1\.mlp\.down_proj\.surplus_scale: expected only the tensors of",
        r"k_scale: expected no KV cache tensors",
    )
    for subject in subjects:
        assert any(re.search(subject, problem) for problem in found["problems"]), (subject, found["problems"])
    text_code = main(["inspect", str(tmp_path / "bad"), "--headers-only"])
    assert text_code == 1
    assert f"problems: {len(found['problems'])}" in capsys.readouterr().out


def test_a_layer_that_was_left_as_it_was(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.down_proj"
    changes = [
        edits.drop_tensors(f"{name}.*"),
        edits.add_tensors({f"{name}.weight": torch.zeros(256, 512, dtype=torch.bfloat16)}),
    ]
    bad = edits.copy_with(folder, tmp_path / "bad", changes)
    found = inspect(capsys, bad, code=1)
    assert len(found["problems"]) == 1
    assert f"{name}.weight: expected a W4A8_NVFP4_FP8 layer, or it in exclude_modules" in found["problems"][0]
    edits.set_config({"exclude_modules": ["lm_head", name]})(bad)
    edits.set_embedded_config({"ignore": ["lm_head", name]})(bad)
    assert inspect(capsys, bad)["problems"] == []


def test_scales(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    tensors = edits.read_tensors(folder)
    found = inspect(capsys, folder, "--scales")
    groups = {group["name"]: group for group in found["layers"]}
    for kind in ("weight_scale", "weight_scale_2", "input_scale"):
        values = torch.cat([tensors[f"model.layers.{layer}.mlp.up_proj.{kind}"].float().flatten() for layer in (0, 1)])
        shown = groups["model.layers.[0-1].mlp.up_proj"]["scales"][kind]
        assert shown == {"smallest": float(values.min()), "largest": float(values.max())}
    name = "model.layers.1.mlp.up_proj.input_scale"
    bad = edits.copy_with(folder, tmp_path / "bad", [edits.add_tensors({name: torch.tensor(float("nan"))})])
    assert inspect(capsys, bad)["problems"] == [], "headers alone do not show it"
    found = inspect(capsys, bad, "--scales", code=1)
    assert len(found["problems"]) == 1
    assert f"{name}: expected finite, positive" in found["problems"][0]


def test_headers_of_70b_parameters_take_seconds(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = llama_70b(tmp_path / "model")
    begin = time.process_time()
    found = inspect(capsys, folder, "--gpu", "sm100")
    seconds = time.process_time() - begin
    assert found["bytes"] > 40e9
    assert sum(group["count"] for group in found["layers"]) == 80 * 7
    assert len(found["layers"]) == 7
    assert found["kv_cache"]["layers"] == 80
    assert found["problems"] == []
    assert seconds < 5, "measured: under 1 s of CPU time"


def test_an_unquantized_model(capsys: pytest.CaptureFixture[str]) -> None:
    folder = model_dir(TinyModel("llama"))
    found = inspect(capsys, folder)
    assert (found["algo"], found["layers"], found["problems"]) == (None, [], [])
    assert sum(group["count"] for group in found["plain"]) == len(headers(folder))


def test_by_its_name_in_an_offline_hub_cache(folder: Path, tmp_path: Path) -> None:
    """The console command, run like a user runs it."""
    revision = "0" * 40
    repository = tmp_path / "hub" / "models--someone--model"
    snapshot = edits.copy_with(folder, repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "sglang_modelopt_ext.cli", "inspect", "someone/model", "--headers-only", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["contents"]["folder"] == str(snapshot)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("/no/such/folder",), "CHECKPOINT /no/such/folder: expected a folder or a model on the Hugging Face Hub"),
        (("a/b/c",), "got no such folder"),
        ((".", "--gpu", "sm70"), "--gpu: expected cpu or one of sm80, sm86"),
    ],
)
def test_bad_input(capsys: pytest.CaptureFixture[str], args: tuple[str, ...], message: str) -> None:
    assert main(["inspect", *args]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_an_empty_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["inspect", str(tmp_path)]) == 2
    assert "expected at least one safetensors file, got none" in capsys.readouterr().err


# Loading, rehearsed by a process of SGLang's


BLOCK = {
    "mtp.fc.weight": torch.zeros(4, 8),
    "mtp.layers.0.self_attn.q_proj.weight": torch.zeros(4, 4),
}


def test_it_loads(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In SGLang's own class, with an MTP block that this model has no part for, and code that is not run."""
    pytest.importorskip("sglang")
    model = edits.copy_with(folder, tmp_path / "model", [edits.add_tensors(BLOCK)])
    (model / "socket.py").write_text("raise SystemExit('code of the checkpoint was run')\n")
    monkeypatch.chdir(model)
    before = {file: file.stat().st_mtime_ns for file in model.iterdir()}
    found = inspect(capsys, model, "--gpu", "sm90", REHEARSE)
    assert found["loading"]["checked"], found["loading"]["why_not"]
    assert found["loading"]["model"] == "Qwen2ForCausalLM"
    assert found["loading"]["left_out"] == len(BLOCK)
    assert found["problems"] == []
    assert before == {file: file.stat().st_mtime_ns for file in model.iterdir()}, "nothing is written"


def test_it_does_not_load(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    """The line of the server, and everything that is missing or left over."""
    pytest.importorskip("sglang")
    changes = [
        edits.drop_tensors("model.norm.weight"),
        edits.drop_tensors("model.layers.1.input_layernorm.weight"),
        edits.add_tensors({"model.layers.0.stray.weight": torch.zeros(3)}),
    ]
    model = edits.copy_with(folder, tmp_path / "model", changes)
    loading = inspect(capsys, model, REHEARSE, code=1)["loading"]
    assert loading["checked"], loading["why_not"]
    assert len(loading["missing"]) == 2
    assert loading["left_over"] == ["model.layers.0.stray.weight"]
    assert (
        "input_layernorm.weight: expected a tensor for this parameter of the model, got none" in loading["problems"][0]
    )
    assert "stray.weight: expected a tensor the model uses, got one nothing reads" in loading["problems"][1]


@pytest.mark.full
def test_a_cache_of_ours_asks_for_the_models_layers(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("sglang")
    export_ = kv_export("nvfp4", "mistral", W4A8)
    assert inspect(capsys, export_, "--gpu", "sm90", REHEARSE)["problems"] == []
    bad = edits.copy_with(export_, tmp_path / "bad", [edits.drop_tensors("*1.self_attn.v_proj.v_scale")])
    found = inspect(capsys, bad, "--gpu", "sm90", REHEARSE, code=1)
    assert "layers.1.self_attn: v_scale: expected one for every attention layer" in found["loading"]["problems"][0]


def test_it_never_says_loads_unchecked(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    assert main(["inspect", str(folder), "--headers-only"]) == 0
    assert "loads: not checked: headers only" in capsys.readouterr().out
    stock = export(model_dir(TinyModel("llama")), "FP8_DEFAULT_CFG")
    assert main(["inspect", str(stock), "--gpu", "sm90"]) == 0
    assert "loads: not checked: SGLang serves it by itself on sm90" in capsys.readouterr().out


def test_a_missing_sglang_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    found = rehearse_loading(folder, Device.cpu(), stock_kv_cache=False)
    assert (found.checked, found.loads, found.why_not) == (False, False, "SGLang is not installed")


def test_what_sglang_serves_is_not_a_problem(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A cache of SGLang's own with a scale missing: this package would object to it, and is not asked."""
    bad = edits.copy_with(
        kv_export("fp8", "qwen2", "FP8_DEFAULT_CFG"),
        tmp_path / "bad",
        [edits.drop_tensors("*1.self_attn.v_proj.v_scale")],
    )
    found = inspect(capsys, bad, "--gpu", "sm90")
    assert (found["serving"]["owner"], found["problems"]) == ("SGLang", [])
    assert "v_scale: expected one for every attention layer" in found["remarks"][0]
    found = inspect(capsys, bad, "--gpu", "cpu", code=1)
    assert "v_scale: expected one for every attention layer" in found["problems"][0]


def test_joined_names() -> None:
    names = [f"model.layers.{number}.mlp.up_proj" for number in (0, 1, 2, 5, 7, 8)]
    assert _joined_name(names) == "model.layers.[0-2,5,7-8].mlp.up_proj"
    assert _joined_name(names[:1]) == names[0]
