"""Peers of ``benchmarks.gemm`` that are SGLang's: they are called as SGLang's sources call them, and read as it packs them."""

from __future__ import annotations

import ast
import functools
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sglang")

from benchmarks import gemm
from benchmarks.registry import gated, peers_sglang
from benchmarks.registry.base import Product
from sglang_modelopt_ext.integration.contract import installed_root
from sglang_modelopt_kernels.formats import WEIGHT_FORMATS
from tests.support.contracts import bind, calls, function, parameters

QUANTIZATION = "srt/layers/quantization"
FP8_UTILS = f"{QUANTIZATION}/fp8_utils.py"
MARLIN = f"{QUANTIZATION}/marlin_utils.py"
MARLIN_FP4 = f"{QUANTIZATION}/marlin_utils_fp4.py"
MODELOPT = f"{QUANTIZATION}/modelopt_quant.py"
DUAL = "kernels/ops/gemm/cutedsl_dual_gemm.py"
AUTOTUNE = "srt/model_executor/runner/flashinfer_autotune.py"
CALLED = {
    # function: our module that calls it, SGLang's that has it
    "flashinfer_bmm_fp8": (peers_sglang, FP8_UTILS),
    "apply_fp8_linear_bmm_flashinfer": (peers_sglang, FP8_UTILS),
    "apply_fp8_linear": (peers_sglang, FP8_UTILS),
    "gptq_marlin_repack": (peers_sglang, "kernels/ops/quantization/gptq_marlin_repack.py"),
    "marlin_make_empty_g_idx": (peers_sglang, MARLIN),
    "marlin_make_workspace": (peers_sglang, MARLIN),
    "marlin_permute_scales": (peers_sglang, MARLIN),
    "apply_gptq_marlin_linear": (peers_sglang, MARLIN),
    "get_scalar_types": (peers_sglang, f"{QUANTIZATION}/utils.py"),
    "prepare_nvfp4_layer_for_marlin": (peers_sglang, MARLIN_FP4),
    "apply_fp4_marlin_linear": (peers_sglang, MARLIN_FP4),
    "static_quant_fp8": (gated, "kernels/ops/quantization/fp8_kernel.py"),
    "silu_and_mul": (gated, "srt/layers/activation.py"),
    "dual_gemm_swiglu_fp8": (gated, "kernels/ops/gemm/__init__.py"),
}


@functools.cache
def parse(path: str) -> ast.Module:
    root = installed_root()
    assert root is not None
    return ast.parse((root / path).read_text(encoding="utf-8"))


def found(path: str, name: str) -> Any:
    """The first function or class ``name`` of a module of SGLang, also under a condition or in a class."""
    nodes = (node for node in ast.walk(parse(path)) if isinstance(node, ast.FunctionDef | ast.ClassDef))
    return next(node for node in nodes if node.name == name)


def calls_in(node: ast.AST, name: str) -> list[ast.Call]:
    return [call for call in ast.walk(node) if isinstance(call, ast.Call) and ast.unparse(call.func) == name]


@pytest.mark.parametrize("name", CALLED)
def test_every_call_fits_its_function_and_is_imported_in_a_function(name: str) -> None:
    module, path = CALLED[name]
    file = Path(str(module.__file__))
    (call,) = calls(file, name)
    assert bind(call, found(path, name)) or name == "get_scalar_types"
    tree = ast.parse(file.read_text(encoding="utf-8"))
    imported = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and name in {a.name for a in n.names}]
    (node,) = imported
    assert node not in tree.body
    dotted = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    assert node.module == f"sglang.{dotted}"


def test_static_fp8_is_multiplied_by_flashinfer_on_the_gpus_that_the_peer_supports() -> None:
    apply = next(n for n in found(MODELOPT, "ModelOptFp8LinearMethod").body if getattr(n, "name", "") == "apply")
    (theirs,) = calls_in(apply, "apply_fp8_linear_bmm_flashinfer")
    (ours,) = calls(Path(str(peers_sglang.__file__)), "apply_fp8_linear_bmm_flashinfer")
    assert {k.arg for k in theirs.keywords} == {k.arg for k in ours.keywords}
    linear = found(FP8_UTILS, "apply_fp8_linear_bmm_flashinfer")
    assert len(calls_in(linear, "static_quant_fp8")) == len(calls_in(linear, "flashinfer_bmm_fp8")) == 1
    (raw,) = calls_in(found(FP8_UTILS, "flashinfer_bmm_fp8"), "_raw_flashinfer_bmm_fp8")
    assert {k.arg: ast.unparse(k.value) for k in raw.keywords} == {"backend": "'cublas'"}
    supported = ast.unparse(found(FP8_UTILS, "flashinfer_per_tensor_fp8_supported"))
    assert [f"is_sm{c}" in supported for c in (90, 100, 120)] == [True] * 3
    assert [peers_sglang.STOCK["stock fp8"].supports(c) for c in (80, 89, 90, 100, 120)] == [False] * 2 + [True] * 3


def test_the_server_tunes_static_fp8_as_the_peer_does() -> None:
    assert "modelopt_fp8" in ast.unparse(found(AUTOTUNE, "should_run_flashinfer_autotune"))
    context = found(AUTOTUNE, "flashinfer_autotune_context")
    (theirs,), (ours,) = calls_in(context, "autotune_v2"), calls(Path(str(peers_sglang.__file__)), "autotune_v2")
    assert ast.unparse(theirs) == ast.unparse(ours)
    assert ast.unparse(calls_in(context, "autotune")[0].args[0]) == "True"
    choose = function("flashinfer/gemm/gemm_base.py", "fp8_gemm_sm100")
    (operator,) = [call.args[0] for call in calls_in(choose, "tuner.choose_one")]
    assert ast.literal_eval(operator) == "fp8_gemm"
    names = parameters(function("flashinfer/autotuner/autotuner.py", "autotune"))
    assert next(iter(names)) == "tune_mode"
    assert "skip_ops" in names


def test_the_dual_gemm_is_for_sm100_and_not_for_modelopt() -> None:
    select = ast.unparse(found("srt/layers/dual_gemm.py", "_select_mode"))
    assert "Fp8LinearMethod" in select
    assert "ModelOpt" not in select
    assert [ast.unparse(base) for base in found(MODELOPT, "ModelOptFp8LinearMethod").bases] == ["LinearMethodBase"]
    (tokens,) = [
        node.value
        for node in parse(DUAL).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "MAX_DUAL_GEMM_DECODE_TOKENS"
    ]
    assert ast.literal_eval(tokens) == gated.DUAL_TOKENS == gated.GATED["stock dual gemm"].most_tokens
    mode = found(DUAL, "DualGemmQuantMode")
    assert "STATIC_PER_TENSOR" in {ast.unparse(node.targets[0]) for node in mode.body if isinstance(node, ast.Assign)}
    assert not gated.GATED["stock dual gemm"].supports(90)


def test_marlin_reads_what_the_layer_has() -> None:
    """The attributes that preparing an NVFP4 layer reads without a default are those that the peer sets."""
    prepare = found(MARLIN_FP4, "prepare_nvfp4_layer_for_marlin")
    layer = {n.attr for n in ast.walk(prepare) if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "layer"}
    ours = {"weight", "weight_scale", "weight_global_scale", "output_size_per_partition", "input_size_per_partition"}
    assert layer - {"quant_config", "bias"} == ours | {"workspace"}
    assert peers_sglang.ROWS % 64 == 0 < peers_sglang.ROWS % 128
    atomic = ast.unparse(found(MARLIN, "should_use_atomic_add_reduce"))
    assert "n >= 2048" in atomic
    assert peers_sglang.ROWS >= 2048


def test_int4_codes_are_packed_as_sglang_packs_gptq() -> None:
    from sglang.srt.layers.quantization.utils import pack_rows

    codes = torch.randint(0, 256, (6, 128), dtype=torch.uint8)
    scale = (torch.rand(6, 2) + 0.5).bfloat16()
    values = peers_sglang.int4_values(codes, scale)
    nibbles = (values / scale.double().repeat_interleave(128, dim=1) + 8).round()
    assert torch.equal(pack_rows(nibbles.T.to(torch.int32), 4, 256, 6), peers_sglang.gptq_codes(codes))
    assert nibbles.min() == 0
    assert nibbles.max() == 15


def test_nvfp4_codes_are_read_as_the_format_reads_them() -> None:
    number = WEIGHT_FORMATS["nvfp4"]
    stored = number.quantize(torch.randn(8, 64, dtype=torch.bfloat16))
    decoded = number.decode({**stored, "weight_scale_2": torch.ones(())})
    values = peers_sglang.nvfp4_values(stored["weight"], stored["weight_scale"])
    assert torch.equal(values, decoded.unit.double() * decoded.out_scale.double())


def test_the_naive_product_of_static_fp8() -> None:
    scale, input_scale = torch.tensor(0.01), torch.tensor(peers_sglang.INPUT_SCALE)
    codes, x = torch.randn(16, 32).to(torch.float8_e4m3fn), torch.randn(3, 32).bfloat16()
    weight = {"codes": codes, "scale": scale, "input_scale": input_scale}
    rounded = (x.float() / input_scale).to(torch.float8_e4m3fn)
    expected = peers_sglang._naive_fp8(rounded, weight)
    assert torch.equal(peers_sglang._naive_fp8(x, weight), expected)
    dense = (rounded.double() * input_scale.double()) @ (codes.double() * scale.double()).T
    assert torch.allclose(expected, dense, rtol=1e-9)
    columns = {**weight, "scale": scale.expand(16, 1)}
    assert torch.equal(peers_sglang._naive_fp8(rounded, columns), expected)


def test_naive_swiglu() -> None:
    h = torch.randn(4, 32, dtype=torch.float64)
    assert torch.allclose(gated.naive_gated(h), torch.nn.functional.silu(h[:, :16]) * h[:, 16:])


def test_options(capsys: pytest.CaptureFixture[str]) -> None:
    options = gemm.parse(["--only", "stock*", "marlin int4", "--tokens", "1", "64", "--shapes", "8B down"])
    assert [name for name in gemm.PRODUCTS if gemm.matches(name, options.only)] == [*peers_sglang.STOCK, "marlin int4"]
    assert (options.tokens, options.shapes, options.tables) == ([1, 64], ["8B down"], list(gemm.TABLES))
    every = gemm.parse([])
    assert (every.tokens, every.shapes) == (list(gemm.TOKENS), list(gemm.SHAPES))
    assert all(gemm.matches(name, every.only) for name in gemm.PRODUCTS)
    for wrong in (["--only", "marlim*"], ["--tokens", "0"], ["--shapes", "8B"]):
        with pytest.raises(SystemExit):
            gemm.parse(wrong)
    assert "marlim" in capsys.readouterr().err


def test_what_does_not_run_is_listed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def product(error: Exception, least: int = 80) -> Product:
        def fail(n: int, k: int) -> dict[str, Any]:
            raise error

        return Product(lambda capability: capability >= least, fail, fail, lambda *a: a[0], lambda *a: a[0])

    peers = {"stock fp8": product(KeyError("gone")), "marlin int4": product(ImportError("no sglang"))}
    monkeypatch.setattr(
        gemm, "PRODUCTS", {**peers, "new": product(RuntimeError("x"), 100), "ours": product(KeyError("y"))}
    )
    monkeypatch.setattr(gemm, "capability", lambda: 90)
    assert gemm.usable(["stock*", "marlin*", "new"]) == {}
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "stock fp8: not measured, does not run: KeyError: 'gone'",
        "marlin int4: not measured, does not run: no sglang",
        "new: not measured, not for SM90",
    ]
    with pytest.raises(KeyError):
        gemm.usable(["ours"])
