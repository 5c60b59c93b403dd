"""Recipes by name, the user's changes to them, and their descriptions."""

from __future__ import annotations

from pathlib import Path

import pytest

from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.schemes.table import SCHEMES
from sglang_modelopt_ext.workflow.quantize.library import SEARCH, library
from sglang_modelopt_ext.workflow.quantize.listing import (
    describe,
    describe_search,
    format_recipes,
    list_kv_caches,
    list_recipes,
    stored_bits,
)
from sglang_modelopt_ext.workflow.quantize.recipes import Changes, build, configurations, find_recipe, presets

pytest.importorskip("modelopt")


@pytest.mark.parametrize("name", ["W4A8_NVFP4_FP8", "w4a8_nvfp4_fp8_cfg", "W4A8_NVFP4_FP8_CFG"])
def test_a_configuration_by_any_spelling(name: str) -> None:
    import modelopt.torch.quantization as mtq

    recorded, config = find_recipe(name)
    assert recorded == "W4A8_NVFP4_FP8"
    assert config == mtq.W4A8_NVFP4_FP8_CFG
    config["quant_cfg"].clear()
    assert mtq.W4A8_NVFP4_FP8_CFG["quant_cfg"], "ModelOpt's own stays as it is"


def test_every_name_modelopt_has_is_found() -> None:
    """Recipe files are tests/unit/test_recipe_files.py's."""
    models, _ = presets()
    for name in (*configurations(), *models):
        recorded, config = find_recipe(name)
        # Of a preset and a configuration of one name, either will do: they are the same.
        assert recorded.lower() == name.lower()
        assert build(config, Changes())["quant_cfg"]


def test_a_recipe_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "metadata:\n  recipe_type: ptq\nquantize:\n  algorithm: {method: awq_lite, alpha_step: 0.5}\n  quant_cfg:\n"
        "    - {quantizer_name: '*', enable: false}\n"
        "    - {quantizer_name: '*mlp*weight_quantizer', cfg: {num_bits: 8, axis: 0}}\n"
    )
    recorded, config = find_recipe(str(file))
    assert recorded == str(file)
    assert build(config, Changes())["algorithm"] == [{"method": "awq_lite", "alpha_step": 0.5, "debug": False}]
    row = describe(str(file), (), config)
    assert (row.algorithms, row.bits, row.served) == (("W8A16",), pytest.approx(8, abs=0.01), True)


def algorithm(recipe: str, changes: Changes) -> dict[str, object]:
    """Return the one calibration step of a changed recipe."""
    (step,) = build(find_recipe(recipe)[1], changes)["algorithm"]
    return dict(step)


def test_changes() -> None:
    assert algorithm("int8", Changes(algorithm="smoothquant", alpha=0.25)) == {"method": "smoothquant", "alpha": 0.25}
    assert algorithm("int8_smoothquant", Changes(alpha=0.5))["alpha"] == 0.5
    own = algorithm("nvfp4_four_over_six", Changes(algorithm="mse"))
    assert own["step_size"] == 0.5, "a recipe's own algorithm keeps its options"
    assert algorithm("nvfp4", Changes(algorithm="mse"))["step_size"] == 0.1
    assert algorithm("mxfp4", Changes(kv="fp8"))["method"] == "max", "a KV cache's scales have to be calibrated"
    assert build(find_recipe("mxfp4")[1], Changes())["algorithm"] == []
    changed = build(
        find_recipe("nvfp4")[1], Changes(overrides=("quant_cfg.1.enable=false", "algorithm.method=awq_lite"))
    )
    assert changed["quant_cfg"][1]["enable"] is False
    assert changed["algorithm"][0]["method"] == "awq_lite"


@pytest.mark.parametrize(
    ("recipe", "changes", "message"),
    [
        ("fp8", Changes(kv="fp9"), "--kv: fp9: expected a known name, such as fp8"),
        ("fp8", Changes(algorithm="awq"), "--calibration-algorithm: awq: expected a known name, such as awq_"),
        ("fp8", Changes(algorithm="lsq"), "--calibration-algorithm: lsq: expected a known name"),
        ("fp8", Changes(alpha=0.5), "--alpha: expected smoothquant as calibration algorithm, got max"),
        ("int8_smoothquant", Changes(alpha=1.5), "--alpha: expected a number from 0 to 1, got 1.5"),
        ("nvfp4_awq_lite", Changes(overrides=("algorithm.alpha_stp=1",)), "expected options of awq_lite"),
        ("nvfp4", Changes(overrides=("quant_cfg.99.enable=false",)), "--override: expected a field of the recipe"),
        ("nvfp4", Changes(overrides=("quant_cfg.1.cfg.num_bts=4",)), "--override: expected values ModelOpt takes"),
        ("nvfp4", Changes(overrides=("algorithm",)), "--override: expected algorithm.OPTION=VALUE or"),
        ("nvfp4", Changes(overrides=("device=cpu",)), "--override: expected algorithm.OPTION=VALUE or"),
    ],
)
def test_changes_that_are_refused(recipe: str, changes: Changes, message: str) -> None:
    with pytest.raises(ModelOptExtError, match=message):
        build(find_recipe(recipe)[1], changes)


def test_rows() -> None:
    rows = {name: describe(name, (), find_recipe(name)[1]) for name in ("nvfp4_awq_lite", "mxfp6", "nvfp4_fp8_mha")}
    awq = rows["nvfp4_awq_lite"]
    assert (awq.algorithms, awq.bits, awq.served_by) == (("NVFP4_AWQ",), pytest.approx(4.5, abs=0.01), "modelopt_ext")
    assert (awq.activations, awq.calibration) == (("nvfp4_dynamic",), ("awq_lite",))
    assert "pre_quant_scale is not applied" in awq.stock
    assert not rows["mxfp6"].served
    assert "num_bits (3, 2)" in rows["mxfp6"].served_by
    assert rows["nvfp4_fp8_mha"].kv_cache == "fp8"
    assert "not served: " in format_recipes(rows.values(), [])


def test_rows_of_recipe_files() -> None:
    search = describe_search("general/auto_quantize/w4a8_awq_beta_fp8_at_6p0bits")
    assert (search.kind, search.algorithms, search.bits, search.served) == (SEARCH, ("W4A8_AWQ", "FP8"), 6.0, True)
    assert " search " in format_recipes([search], [])
    for name, algorithms, why in (
        ("models/nvidia/NVIDIA-Nemotron-3-Nano-4B-BF16/ptq/nvfp4_w4a16", ("NVFP4", "FP8"), "modelopt_ext"),
        ("huggingface/nemotron_llama/ptq/fp8_output_quant_proj", (), "no server has a quantized output"),
        (
            "general/qad/nvfp4_lsq-mse_init-fp8_kv",
            (),
            "recipe: algorithm: expected one that needs no training, got lsq",
        ),
    ):
        row = describe(name, (), find_recipe(name)[1])
        assert (row.algorithms, row.served, row.served_by) == (algorithms, bool(algorithms), why)


def test_calibrated_mxfp4_is_static() -> None:
    """The preset is not calibrated; any calibration leaves a static scale of the input."""
    _, config = find_recipe("W4A8_MXFP4_FP8")
    assert describe("W4A8_MXFP4_FP8", (), config).activations == ("fp8_per_token",)
    calibrated = describe("calibrated", (), {**config, "algorithm": "max"})
    assert (calibrated.activations, calibrated.served, calibrated.bits) == (("fp8_static",), True, 4.25)


def test_kv_rows() -> None:
    rows = {row.name: row for row in list_kv_caches()}
    assert rows.keys() == {"fp8", "fp8_affine", "fp8_cast", "nvfp4", "nvfp4_affine", "nvfp4_cast", "nvfp4_rotate"}
    assert rows["nvfp4_rotate"].recipe == "nvfp4_rotate"
    assert (rows["nvfp4_cast"].recipe, rows["nvfp4_cast"].calibrated) == ("nvfp4", False)


@pytest.mark.parametrize("algo", SCHEMES)
def test_stored_bits(algo: str) -> None:
    """Codes, and a scale of 8 bits for FP4 and MX blocks, of 32 bits for integer blocks and rows."""
    scheme = SCHEMES[algo]
    for name, size in zip(scheme.weights, scheme.group_sizes, strict=True):
        codes = 4 if name.startswith(("nvfp4", "mxfp4", "int4")) else 8
        scale = 32 if name.startswith("int4") else 8
        expected = codes + (scale / size if size and name != "fp8_block" else 0)
        assert stored_bits(algo, size) == pytest.approx(expected, abs=0.01)


@pytest.mark.full
def test_list_names_every_recipe_once() -> None:
    rows = list_recipes(progress=False)
    names = [name for row in rows for name in (row.name, *row.aliases)]
    assert sorted(names) == sorted([*configurations(), *presets()[0], *library()])
    served = {row.name: row.served for row in rows}
    assert not served["MXFP6_DEFAULT"]
    assert not served["MXINT8_DEFAULT"]
    assert all(
        served[name] for name in ("NVFP4_DEFAULT", "W4A8_NVFP4_FP8", "FP8_DEFAULT", "general/ptq/fp8_default-kv_fp8")
    )
