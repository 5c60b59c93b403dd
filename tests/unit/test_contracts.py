"""The plugin's calls of other packages' kernels, compared with the sources of the versions that SGLang pins."""

from __future__ import annotations

import ast
import json
import math
import re
import sys
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy
import pytest
import torch

from sglang_modelopt_ext.backends import packages
from sglang_modelopt_ext.backends.linear import flashinfer, humming, weight_only
from sglang_modelopt_kernels.formats import WEIGHT_FORMATS
from sglang_modelopt_kernels.quantize.blocks import naive_swizzle
from tests.support.contracts import (
    bind,
    calls,
    decorator,
    evaluate,
    function,
    method,
    parameters,
    source_folder,
    version_of,
)

ROOT = Path(__file__).resolve().parents[2]
GEMM = "flashinfer/gemm/gemm_base.py"
WEIGHT_ONLY = "flashinfer/gemm/gemm_bf16_fp4.py"
SVDQUANT = "flashinfer/gemm/gemm_svdquant.py"
QUACK = "quack/gemm_w4.py"
FUNCTIONS = {
    # function: the module that imports it, the source that has it, the module it is imported from
    "mm_fp4": (flashinfer, GEMM, "flashinfer"),
    "mm_mxfp8": (flashinfer, GEMM, "flashinfer"),
    "mm_nvfp4_svdquant": (flashinfer, SVDQUANT, "flashinfer"),
    "mm_bf16_fp4": (weight_only, WEIGHT_ONLY, "flashinfer"),
    "prepare_bf16_fp4_weights": (weight_only, WEIGHT_ONLY, "flashinfer"),
    "gemm_w4a16": (weight_only, QUACK, "quack.gemm_w4"),
    "prepare_w4_weight": (weight_only, QUACK, "quack.gemm_w4"),
    "prepare_layer_config": (humming, "humming/transform.py", "humming.transform"),
    "transform_humming_tensors": (humming, "humming/transform.py", "humming.transform"),
    "humming_forward": (humming, "humming/forward.py", "humming.forward"),
    "get_heuristics_config": (humming, "humming/tune/__init__.py", "humming.tune"),
}


def bound(name: str) -> dict[str, str]:
    """Return the arguments of our only call of ``name``."""
    module, source, _ = FUNCTIONS[name]
    (call,) = calls(Path(str(module.__file__)), name)
    return bind(call, function(source, name))


def capabilities(name: str, path: str = GEMM) -> set[int]:
    return set(ast.literal_eval(decorator(function(path, name), "supported_compute_capability").args[0]))


def requirements(name: str) -> dict[str, str]:
    """Return FlashInfer's backends of a function, and the check of each."""
    (backends,) = decorator(function(FUNCTIONS[name][1], name), "backend_requirement").args
    assert isinstance(backends, ast.Dict)
    return {
        ast.literal_eval(key): ast.unparse(value) for key, value in zip(backends.keys, backends.values, strict=True)
    }  # type: ignore[arg-type]


def test_versions() -> None:
    lines = (ROOT / "cpu_runtime" / "requirements-contracts.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert pins.keys() >= packages.VERSIONS.keys()
    for name, version in pins.items():
        assert version_of(name) == version
        assert packages.VERSIONS.get(name, version) == version


def test_what_sglang_pins() -> None:
    from importlib import metadata

    required = {
        match[1].replace("_", "-"): match[2]
        for line in metadata.requires("sglang") or []
        if (match := re.match(r"([\w-]+)(?:\[[^]]*\])?==([\w.]+)$", line.split(";")[0].strip()))
    }
    assert {name: required[name] for name in packages.VERSIONS} == packages.VERSIONS


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_call_fits_its_function(name: str) -> None:
    assert bound(name)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_import_is_there(name: str) -> None:
    module, source, imported = FUNCTIONS[name]
    tree = ast.parse(Path(str(module.__file__)).read_text())
    ours = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == imported]
    assert name in {alias.name for node in ours for alias in node.names}
    assert not set(ours) & set(tree.body), "imported at module level"
    if imported == "flashinfer":
        init = (source_folder() / "flashinfer/__init__.py").read_text()
        assert re.search(rf"^from \.gemm import {name} as {name}$", init, re.MULTILINE)
    else:
        folder = imported.replace(".", "/")
        assert source in (f"{folder}.py", f"{folder}/__init__.py")


def test_what_the_calls_say() -> None:
    fp4 = bound("mm_fp4")
    assert (fp4["a"], fp4["b"], fp4["a_descale"], fp4["b_descale"]) == ("x", "codes.T", "x_scale", "block_scale.T")
    assert (fp4["alpha"], fp4["out_dtype"]) == ("alpha", "out_dtype")
    assert fp4["backend"] == "'cute-dsl' if is_mx else 'cutlass'"
    svdquant = bound("mm_nvfp4_svdquant")
    assert [svdquant[name] for name in ("b", "d", "l1")] == ["codes", "down", "up"]
    constant = (source_folder() / SVDQUANT).read_text()
    assert f"SVDQUANT_LORA_RANK_GRANULARITY = {flashinfer.FlashInferSvdquant.multiple}\n" in constant
    mxfp8 = bound("mm_mxfp8")
    assert (mxfp8["a"], mxfp8["b"], mxfp8["a_descale"], mxfp8["b_descale"]) == (
        "x",
        "codes.T",
        "x_scale",
        "block_scale",
    )
    assert parameters(function(WEIGHT_ONLY, "mm_bf16_fp4"))["backend"] is None
    assert bound("mm_bf16_fp4")["backend"] == bound("prepare_bf16_fp4_weights")["backend"] == "'cute-dsl'"
    assert bound("gemm_w4a16")["wformat"] == bound("prepare_w4_weight")["wformat"] == "'nvfp4'"


def test_architectures() -> None:
    """The architectures that our backends name are those that the packages' own checks let through."""
    ours = set(flashinfer.CAPABILITIES)
    fp4, mxfp8, weight = requirements("mm_fp4"), requirements("mm_mxfp8"), requirements("mm_bf16_fp4")
    assert ours <= capabilities(fp4["cutlass"])
    assert {100, 103} <= capabilities(fp4["cute-dsl"])
    assert ours <= capabilities(mxfp8["cutlass"])
    assert {100, 103} <= capabilities(weight["cute-dsl"], WEIGHT_ONLY)
    svdquant = requirements("mm_nvfp4_svdquant")
    assert {100, 103} <= capabilities(svdquant["cutlass"], SVDQUANT)
    assert {120, 121} <= capabilities(svdquant["cute-dsl"], SVDQUANT)
    (layout,) = evaluate(WEIGHT_ONLY, "_cute_dsl_uses_sm100_layout")
    assert layout(10, 0)
    assert layout(10, 3)
    assert not layout(12, 0)


@pytest.mark.parametrize("name", ["fp4", "fp4_sm103", "mxfp8", "mxfp8_sm120"])
def test_alignment(name: str) -> None:
    kind, _, arch = name.partition("_")
    file = f"{kind}_gemm_cutlass{'_' * bool(arch)}{arch}.cu"
    source = (source_folder() / "flashinfer/data/csrc" / file).read_text()
    assert "constexpr int alignment = 32;" in source
    assert "k % alignment, 0" in source
    assert "n % alignment, 0" in source


@pytest.mark.parametrize("arch", ["", "_sm103", "_sm120"])
def test_types_of_scales(arch: str) -> None:
    source = (source_folder() / f"flashinfer/data/csrc/fp4_gemm_cutlass{arch}.cu").read_text()
    assert re.search(r"SF_DTYPE = dl_uint8", source)
    assert re.search(r"globalScale, dl_float32|globalScale.dtype\(\), dl_float32", source)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (128, 4), (300, 9), (64, 32), (257, 6)])
def test_the_order_of_scales(rows: int, columns: int) -> None:
    """FlashInfer's own inverse gives back what we put in."""
    scale = torch.randint(0, 256, (rows, columns), dtype=torch.uint8)
    (unswizzle,) = evaluate(WEIGHT_ONLY, "_unswizzle_sf_128x4", torch=torch)
    swizzled = naive_swizzle(scale)
    assert swizzled.shape == (-(-rows // 128) * 128, -(-columns // 4) * 4)
    assert torch.equal(unswizzle(swizzled, rows, columns), scale)
    assert int((swizzled != 0).sum()) == int((scale != 0).sum())


def test_the_length_of_mxfp8_scales() -> None:
    class SfLayout:
        layout_128x4, layout_8x4, layout_linear = range(3)

    _, length = evaluate(GEMM, "_pad_up", "_mxfp8_swizzled_scale_len", SfLayout=SfLayout)
    for m, k in ((1, 128), (77, 160), (300, 4096)):
        assert naive_swizzle(torch.zeros(m, k // 32, dtype=torch.uint8)).numel() == length(m, k, SfLayout.layout_128x4)


def test_quacks_nvfp4_is_modelopts() -> None:
    """Codes, nibbles and scales mean the same in both: its reference decodes what ModelOpt stores."""
    path = "quack/blockscaled/nvfp4_utils.py"
    values = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    (decode,) = evaluate(path, "dequant_nvfp4_reference", torch=torch, FP4_VALUES=values)
    source = (source_folder() / path).read_text()
    assert f"FP4_VALUES = {values}" in source
    stored = WEIGHT_FORMATS["nvfp4"].quantize(torch.randn(8, 64))
    decoded = WEIGHT_FORMATS["nvfp4"].decode(stored)
    assert torch.equal(decode(stored["weight"], stored["weight_scale"]), decoded.unit)


def test_quacks_scalar_may_be_in_device_memory() -> None:
    """The global scale goes as a tensor of one float32: reading it back would stop the stream."""
    tree = ast.parse((source_folder() / "quack/epilogue/ops.py").read_text())
    (scalar,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Scalar"]
    keys = {node.name: ast.unparse(node) for node in scalar.body if isinstance(node, ast.FunctionDef)}
    assert "hasattr(value, 'data_ptr')" in keys["host_arg_key"]
    assert "value.data_ptr()" in keys["host_call_arg"]
    (infer,) = evaluate("quack/epilogue/frontend.py", "_infer_kind")
    assert infer("alpha", torch.ones(1), 64, 64) == "scalar"


def fields(path: str, name: str) -> set[str]:
    """Return the fields of a data class."""
    tree = ast.parse((source_folder() / path).read_text())
    (node,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name]
    return {
        item.target.id for item in node.body if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
    }


@pytest.mark.parametrize("name", ["HummingWeightSchema", "HummingInputSchema"])
def test_hummings_schemas(name: str) -> None:
    (call,) = calls(Path(str(humming.__file__)), name)
    assert {keyword.arg for keyword in call.keywords} <= fields("humming/schema/humming.py", name)
    schema = (source_folder() / "humming/schema/__init__.py").read_text()
    assert f'"{name}",' in schema


def test_hummings_formats() -> None:
    """MXFP4's codes and scales go in as humming's own reader of MXFP4 passes them on."""
    reader = (source_folder() / "humming/schema/mxfp4.py").read_text()
    for line in (
        "b_dtype=dtypes.float4e2m1",
        "bs_dtype=dtypes.float8e8m0",
        "weight_scale_group_size=32",
        'tensors["weight"].view(torch.int32)',
        "weight_scale.view(torch.float8_e8m0fnu)",
    ):
        assert line in reader
    kernel = (source_folder() / "humming/kernel/humming.py").read_text()
    assert "dtypes.float8e4m3: 89" in kernel
    fold = ast.unparse(function("humming/transform.py", "process_fused_e8m0_scale"))
    assert f"max_range_val = {humming.SPAN}" in fold


@pytest.mark.parametrize(("tokens", "shared"), [(300, False), (528, False), (704, True), (2080, True)])
def test_hummings_choice_for_many_tokens(tokens: int, shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """humming itself splits sums, and lets two blocks share loads from four tiles of tokens on; what is passed on does neither."""
    sizes = {"shape_n": 4096, "shape_k": 4096, "num_experts": 0, "use_packed_k_layout": False}
    layer = SimpleNamespace(a_dtype=SimpleNamespace(num_bits=8), b_dtype=SimpleNamespace(num_bits=4), **sizes)
    scope = {"np": numpy, "math": math, "dtypes": SimpleNamespace(int8="int8")}
    kinds = SimpleNamespace(DENSE="dense", INDEXED="indexed")
    source = ("humming/tune/sm90.py", "Sm90Heuristics")
    count = method(*source, "calc_num_block_list", **scope)
    choose = method(*source, "get_config1", **scope, GemmType=kinds)
    kernel = choose(SimpleNamespace(calc_num_block_list=partial(count, None)), layer, tokens)
    assert ("multi_cast_size_a" in kernel) == shared
    assert kernel["use_stream_k"]
    tune = ModuleType("humming.tune")
    tune.get_heuristics_config = lambda config: [[0, 1 << 30, kernel]]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "humming.tune", tune)
    monkeypatch.setattr(humming, "layer_config", lambda n, k: layer)
    passed = json.loads(humming.kernel_choice.__wrapped__(4096, 4096))
    assert passed == [[0, 1 << 30, json.loads(json.dumps(kernel)) | humming.OVERRIDES]]
    assert ("multi_cast_size_a" in kernel) == shared, "humming keeps its choices"
    assert kernel["use_stream_k"], "humming keeps its choices"


def test_how_humming_takes_a_choice() -> None:
    """A choice is JSON of ranges of tokens; nothing but these settings makes blocks share a load or a sum."""
    config = (source_folder() / "humming/config/config.py").read_text()
    assert set(re.findall(r"multi_cast\w+|use_stream_k", config)) == set(humming.OVERRIDES)
    for name in ("multi_cast_size_a", "multi_cast_size_b"):
        assert f"    {name}: int = {humming.OVERRIDES[name]}\n" in config
    assert "    use_stream_k: bool = True\n" in config
    # Locks are for split sums; where there are none, none are passed.
    assert parameters(function("humming/forward.py", "humming_forward"))["locks"] == "None"
    assert parameters(function("humming/forward.py", "humming_forward"))["tuning_config"] == "None"
    kernel = (source_folder() / "humming/kernel/humming.py").read_text()
    for line in (
        "tuning_config_obj = prepare_config_obj(tuning_config)",
        "return json.loads(config)",
        "kernel_config = layer_config_obj | compute_config_obj | tuning_config_obj_single",
        "res += [config[0], config[1], kernel.kernel_id, num_sms]",
    ):
        assert line in kernel
