"""The launch of an unquantized model: which path SGLang's processes are given, and what is left as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sglang")

from sglang_modelopt_ext.checkpoint.quant_config import read_quant_config
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.integration import devices, online, processes
from tests.support import edits
from tests.support.exports import export
from tests.support.models import TinyModel, model_dir

SMALL = TinyModel("llama", hidden=128, intermediate=256, heads=2, kv_heads=1, layers=1)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SGLANG_MODELOPT_EXT_ONLINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(devices, "_settled", None)
    return tmp_path / "cache"


def launched(model: Path | str, **arguments: Any) -> Any:
    """Return the arguments of a server on a CPU after the checks before its start."""
    from sglang.srt.arg_groups.overrides import resolving_view
    from sglang.srt.server_args import ServerArgs

    args = ServerArgs(model_path=str(model), device="cpu", **arguments)
    processes.preflight(args)
    return resolving_view(args)


@pytest.mark.parametrize(
    ("flag", "algo"), [("modelopt_w4a8", "W4A8_MXFP4_FP8"), ("modelopt_mxfp4", "MXFP4"), ("MODELOPT_W4A8", None)]
)
def test_a_flag_that_names_a_recipe_quantizes(flag: str, algo: str | None, cache: Path) -> None:
    args = launched(model_dir(SMALL), quantization=flag)
    folder = Path(args.model_path)
    assert folder.parent == cache
    config = read_quant_config(folder)
    assert config is not None
    assert config.algo == (algo or "W4A8_MXFP4_FP8")
    assert args.served_model_name == str(model_dir(SMALL)), "clients ask for the model by its own name"
    assert args.tokenizer_path == str(model_dir(SMALL))
    again = launched(folder, quantization=flag)
    assert again.model_path == str(folder), "it is quantized now"


def test_a_name_for_clients_stays(cache: Path) -> None:
    args = launched(model_dir(SMALL), quantization="modelopt_w4a8", served_model_name="mine")
    assert args.served_model_name == "mine"


def test_a_tokenizer_of_its_own_stays(cache: Path) -> None:
    args = launched(model_dir(SMALL), quantization="modelopt_w4a8", tokenizer_path="elsewhere")
    assert args.tokenizer_path == "elsewhere"


@pytest.mark.parametrize("flag", [None, "unquant", "fp8", "nvfp4_online", "modelopt", "modelopt_fp4"])
def test_other_flags_leave_an_unquantized_model_alone(flag: str | None, cache: Path) -> None:
    args = launched(model_dir(SMALL), quantization=flag)
    assert (args.model_path, args.served_model_name) == (str(model_dir(SMALL)), None)
    assert not cache.exists()


def test_the_flag_for_all_recipes_names_none(cache: Path) -> None:
    with pytest.raises(
        ModelOptExtError, match="--quantization modelopt_ext: expected a checkpoint quantized by ModelOpt"
    ):
        launched(model_dir(SMALL), quantization="modelopt_ext")
    assert not cache.exists()


def test_a_quantized_checkpoint_is_served_as_it_is(cache: Path) -> None:
    folder = export(model_dir(SMALL), "W4A8_NVFP4_FP8_CFG")
    assert launched(folder, quantization="modelopt_w4a8").model_path == str(folder)
    assert not cache.exists()


def test_a_checkpoint_of_another_method_is_not_quantized_again(tmp_path: Path, cache: Path) -> None:
    section = {"quantization_config": {"quant_method": "awq"}}
    folder = edits.copy_with(model_dir(SMALL), tmp_path / "awq", [edits.set_fields(edits.CONFIG, section)])
    with pytest.raises(ModelOptExtError, match="expected a checkpoint quantized by ModelOpt"):
        launched(folder, quantization="modelopt_w4a8")
    assert not cache.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"load_format": "sharded_state"},
            "--load-format: expected one of auto, safetensors, fastsafetensors, runai_streamer, dummy, got sharded_state",
        ),
        ({"load_format": "dummy"}, "expected a checkpoint quantized by ModelOpt, got an unquantized one"),
        ({"use_ray": True}, "--use-ray: expected no Ray"),
    ],
)
def test_arguments_are_checked_before_the_work(arguments: dict[str, Any], message: str, cache: Path) -> None:
    with pytest.raises(ModelOptExtError, match=message):
        launched(model_dir(SMALL), quantization="modelopt_w4a8", **arguments)
    assert not cache.exists()


def test_a_wrong_setting_is_an_error(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setenv("SGLANG_MODELOPT_EXT_ONLINE_RECIPE", "W4A8_AWQ")
    with pytest.raises(ModelOptExtError, match="ONLINE_RECIPE: expected one of W4A8_MXFP4_FP8, W4A8_NVFP4_FP8"):
        launched(model_dir(SMALL), quantization="modelopt_w4a8")
    assert not cache.exists()


def test_a_hub_model_is_kept_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    model = tmp_path / "hub" / "models--someone--model"
    edits.copy_with(model_dir(SMALL), model / "snapshots" / ("0" * 40))
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("0" * 40)
    args = launched("someone/model", quantization="modelopt_w4a8")
    assert Path(args.model_path).name.startswith("someone--model-W4A8_MXFP4_FP8-")
    assert args.served_model_name == "someone/model"


def test_a_model_that_is_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    args = SimpleNamespace(model_path="no/model", revision=None, download_dir=None, trust_remote_code=False)
    with pytest.raises(
        ModelOptExtError, match="--model-path no/model: expected a folder or a model on the Hugging Face Hub"
    ):
        online._downloaded(args)
