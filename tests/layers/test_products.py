"""Linear layers built from real exports without SGLang, against float64: on a GPU, eagerly and in a captured CUDA graph.

Where ModelOpt is not installed, ``SGLANG_MODELOPT_EXT_TEST_EXPORTS`` names a folder of exports, ``RECIPE/FAMILY`` each, as
``python -m tests.layers.test_products FOLDER`` makes it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sglang_modelopt_ext.backends.base import LinearRequest, ShardWeight, round_to_blocks
from sglang_modelopt_ext.backends.linear.block_scaled import BlockScaled
from sglang_modelopt_ext.backends.linear.eight_bit import EightBit
from sglang_modelopt_ext.backends.linear.fp4 import BlackwellFp4, MmaFp4
from sglang_modelopt_ext.checkpoint.linears import QuantizedLinear
from sglang_modelopt_ext.checkpoint.quant_config import canonical_name
from sglang_modelopt_ext.checkpoint.reader import FUSED_SHARDS, read_checkpoint
from sglang_modelopt_ext.checkpoint.tensors import read_tensors
from sglang_modelopt_ext.device import Device
from sglang_modelopt_ext.env import FP4_ACTIVATIONS, GEMM, MXFP4_ACTIVATIONS
from sglang_modelopt_ext.layers.linear import LinearProduct, round_input
from sglang_modelopt_ext.schemes.base import LORA_A, LORA_B
from sglang_modelopt_ext.schemes.table import SCHEMES
from sglang_modelopt_kernels.gemm.reference import naive_linear

EXPORTS = "SGLANG_MODELOPT_EXT_TEST_EXPORTS"
RECIPES = (
    "W4A8_NVFP4_FP8_CFG",
    "W4A8_MXFP4_FP8_CFG",
    "W4A8_MXFP4_FP8_CFG+max",
    "W4A8_AWQ_BETA_CFG",
    "INT4_AWQ_CFG",
    "NVFP4_DEFAULT_CFG",
    "NVFP4_AWQ_LITE_CFG",
    "NVFP4_SVDQUANT_DEFAULT_CFG",
    "W4A16_NVFP4_CFG",
    "NVFP4_MLP_WEIGHT_ONLY_CFG",
    "MXFP4_DEFAULT_CFG",
    "MXFP8_DEFAULT_CFG",
    "FP8_DEFAULT_CFG",
    "FP8_PER_CHANNEL_PER_TOKEN_CFG",
    "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG",
    "INT8_SMOOTHQUANT_CFG",
    "INT8_WEIGHT_ONLY_CFG",
)
"""Presets; after a plus, another calibration algorithm. Calibrated MXFP4 layers store an ``input_scale``."""
FAMILIES = ("llama", "qwen2")  # without and with biases
TOLERANCE = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 1e-5}
"""Two roundings to the model's type, of the input after smoothing and of the output, each by at most half its epsilon; float32 sums
of some hundred products. FP8 matrix instructions of Hopper sum at about 2^-13: a float32 model, which would notice, does
not get them."""


def folder_of(recipe: str, family: str) -> Path:
    if EXPORTS in os.environ:
        return Path(os.environ[EXPORTS]) / recipe / family
    pytest.importorskip("modelopt", reason="needs nvidia-modelopt to make exports")
    from tests.support.exports import Variant, export
    from tests.support.models import TinyModel, model_dir

    preset, _, algorithm = recipe.partition("+")
    return export(model_dir(TinyModel(family)), preset, Variant(algorithm=algorithm or None))  # type: ignore[arg-type]


def layers_of(folder: Path) -> Iterator[tuple[str, list[QuantizedLinear], list[dict[str, torch.Tensor]]]]:
    """Yield every quantized layer, fused like in a server: its name, shards, and their stored tensors."""
    checkpoint = read_checkpoint(folder)
    tensors = {stored.name: tensor for stored, tensor in read_tensors(list(checkpoint.tensors.values()))}
    seen = set()
    for linear in checkpoint.linears.values():
        parent, _, leaf = linear.name.rpartition(".")
        if linear.name in seen or not parent:
            continue
        names = next((shards for shards in FUSED_SHARDS.values() if leaf in shards), (leaf,))
        shards = [checkpoint.linears[canonical_name(f"{parent}.{name}")] for name in names]
        seen.update(shard.name for shard in shards)
        yield (
            linear.name,
            shards,
            [{spec: tensors[stored.name] for spec, stored in shard.stored.items()} for shard in shards],
        )


def expected(product: LinearProduct, shards: list[dict[str, torch.Tensor]], x: torch.Tensor) -> torch.Tensor:
    """Return the layer's output in float64, shard by shard, with the served activation rounding."""
    outputs = []
    for shard in shards:
        wide = x.float()
        if "pre_quant_scale" in shard:
            wide = wide * shard["pre_quant_scale"].float()
        scheme = product.scheme
        decoded = scheme.weight.decode(shard)
        y = naive_linear(wide, decoded, scheme.activation, shard.get("input_scale"), shard.get("bias"))
        if scheme.low_rank:
            y += wide.double() @ shard[LORA_A].double().T @ shard[LORA_B].double().T
        outputs.append(y)
    return torch.cat(outputs, dim=1)


def check_export(folder: Path, dtype: torch.dtype, device: str) -> dict[str, float]:
    """Return the worst relative error of any token by layer; on a GPU also of a captured graph replayed on another input."""
    errors = {}
    for name, linears, stored in layers_of(folder):
        product = LinearProduct(linears[0].scheme, folder, name, "exact", dtype)
        layer = torch.nn.Module()
        moved = [{key: tensor.to(device) for key, tensor in shard.items()} for shard in stored]
        product.prepare(layer, moved, sum(linear.n for linear in linears), linears[0].k)
        bias = torch.cat([shard["bias"] for shard in moved]).to(dtype) if "bias" in moved[0] else None
        for m in (1, 5, 33, 600):
            x, other = (
                torch.randn(m, linears[0].k, generator=torch.Generator().manual_seed(s)).to(dtype) for s in (m, m + 1)
            )
            target = x.to(device)
            y = product.apply(layer, target, bias)
            assert y.dtype == dtype
            right = expected(product, stored, x)
            error = float(((y.double().cpu() - right).norm(dim=1) / right.norm(dim=1)).max())
            errors[f"{name} m={m} {product.backend.name}"] = error
            if device == "cuda":
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    replayed = product.apply(layer, target, bias)
                target.copy_(other)
                replayed.fill_(float("nan"))
                graph.replay()
                assert torch.equal(replayed, product.apply(layer, target, bias))
    assert errors
    return errors


@pytest.fixture(autouse=True)
def mxfp4_rounds_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MXFP4_ACTIVATIONS.variable, "mxfp4")


def assert_within(errors: dict[str, float], dtype: torch.dtype) -> None:
    wrong = {name: error for name, error in errors.items() if not error < TOLERANCE[dtype]}
    assert not wrong, wrong


@pytest.mark.parametrize("recipe", RECIPES)
def test_on_a_cpu(recipe: str) -> None:
    assert_within(check_export(folder_of(recipe, "qwen2"), torch.float32, "cpu"), torch.float32)


def test_every_algorithm_is_covered() -> None:
    assert {read_checkpoint(folder_of(recipe, "llama")).config.algo for recipe in RECIPES} == SCHEMES.keys()


FP4 = ("NVFP4_DEFAULT_CFG", "NVFP4_AWQ_LITE_CFG", "MXFP4_DEFAULT_CFG")
BYTES = [recipe for recipe in RECIPES if "8" in recipe and "4" not in recipe]
INTERPRETED = [recipe for recipe in RECIPES if "4" in recipe.replace("W4A8_AWQ_BETA", "INT4")]


def interpreted_errors(folder: Path) -> float:
    """Return the worst error of the block-scaled backend on an export's first fused layer, in Triton's interpreter."""
    _, linears, stored = next(layers_of(folder))
    backend, scheme = BlockScaled(), linears[0].scheme
    request = LinearRequest(scheme, Device.cuda(90), sum(linear.n for linear in linears), linears[0].k)
    assert backend.supports(request) is None
    prepared = backend.prepare([ShardWeight(scheme.weight, shard) for shard in stored])
    x = torch.randn(3, linears[0].k, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    x = x.to(backend.operand(request))
    y = backend.matmul(prepared, x, None, None, torch.float32).double()
    right = torch.cat([naive_linear(x, scheme.weight.decode(shard), None, None) for shard in stored], dim=1)
    return float(((y - right).norm(dim=1) / right.norm(dim=1)).max())


def interpreted_fp4_errors(folder: Path) -> float:
    """Return the worst errors of the FP4 backends in the interpreter, on rounded activations, against float64."""
    _, linears, stored = next(layers_of(folder))
    scheme, worst = linears[0].scheme, 0.0
    scale, smoothing = stored[0].get("input_scale"), stored[0].get("pre_quant_scale")
    for backend, capability, tokens in ((BlackwellFp4(), 100, 3), (BlackwellFp4(), 100, 70), (MmaFp4(), 120, 3)):
        request = LinearRequest(scheme, Device.cuda(capability), sum(linear.n for linear in linears), linears[0].k)
        assert backend.supports(request) is None
        prepared = backend.prepare([ShardWeight(scheme.weight, shard) for shard in stored])
        x = torch.randn(tokens, linears[0].k, generator=torch.Generator().manual_seed(0))
        rounded = round_to_blocks(scheme.activation, x, smoothing, scale, backend.swizzles(tokens))
        y = backend.matmul_blocks(prepared, rounded, None, torch.float32).double()
        wide = x if smoothing is None else x * smoothing.float()
        right = [naive_linear(wide, scheme.weight.decode(shard), scheme.activation, scale, None) for shard in stored]
        expected = torch.cat(right, dim=1)
        worst = max(worst, float(((y - expected).norm(dim=1) / expected.norm(dim=1)).max()))
    return worst


def interpreted_byte_errors(folder: Path) -> float:
    """Return the worst errors of the 8-bit backend in the interpreter, on rounded activations, against float64."""
    _, linears, stored = next(layers_of(folder))
    backend, scheme = EightBit(), linears[0].scheme
    request = LinearRequest(scheme, Device.cuda(80), sum(linear.n for linear in linears), linears[0].k)
    assert backend.supports(request) is None
    prepared = backend.prepare([ShardWeight(scheme.weight, shard) for shard in stored])
    x = torch.randn(3, linears[0].k, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    values, row_scale = round_input(x, scheme.activation, backend.operand(request), stored[0])
    y = backend.matmul(prepared, values, row_scale, None, torch.float32).double()
    wide = x.float() * stored[0]["pre_quant_scale"].float() if "pre_quant_scale" in stored[0] else x
    scale = stored[0].get("input_scale")
    right = [naive_linear(wide, scheme.weight.decode(shard), scheme.activation, scale, None) for shard in stored]
    expected = torch.cat(right, dim=1)
    return float(((y - expected).norm(dim=1) / expected.norm(dim=1)).max())


IN_THE_INTERPRETER = {
    # error function of a backend, the recipes of its exports, and their minimum number
    "interpreted_errors": (INTERPRETED, 9),
    "interpreted_fp4_errors": (FP4, 3),
    "interpreted_byte_errors": (BYTES, 6),
}


@pytest.mark.parametrize("function", IN_THE_INTERPRETER)
def test_backends_in_the_interpreter(function: str) -> None:
    """Real exports through ``prepare`` and the product like on a GPU, shards with scales of their own merged."""
    recipes, least = IN_THE_INTERPRETER[function]
    folders = [str(folder_of(recipe, "llama")) for recipe in recipes]
    script = (
        "import sys; from pathlib import Path\n"
        f"from tests.layers.test_products import {function} as errors\n"
        "print(*[errors(Path(folder)) for folder in sys.argv[1:]])\n"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, *folders]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    errors = [float(word) for word in done.stdout.split()]
    assert len(errors) == len(recipes) >= least
    assert max(errors) < TOLERANCE[torch.float32], dict(zip(recipes, errors, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_on_a_gpu(recipe: str, family: str, dtype: torch.dtype) -> None:
    assert_within(check_export(folder_of(recipe, family), dtype, "cuda"), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ["NVFP4_DEFAULT_CFG", "NVFP4_SVDQUANT_DEFAULT_CFG", "MXFP4_DEFAULT_CFG"])
def test_rounded_fp4_activations_on_a_gpu(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FP4_ACTIVATIONS.variable, "round")
    errors = check_export(folder_of(recipe, "llama"), torch.bfloat16, "cuda")
    assert all(any(kernel in name for kernel in ("triton_block_scaled", "triton_fp4", "flashinfer")) for name in errors)
    assert_within(errors, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("gemm", ["dense_bfloat16", "dense_float32"])
def test_the_reference_path_on_a_gpu(gemm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(GEMM.variable, gemm)
    errors = check_export(folder_of("W4A8_NVFP4_FP8_CFG", "llama"), torch.bfloat16, "cuda")
    assert all(gemm in name for name in errors)
    assert_within(errors, torch.bfloat16)


def main(folder: Path) -> None:
    """Make every export of this file in ``folder``."""
    for recipe in RECIPES:
        for family in FAMILIES:
            target = folder / recipe / family
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(folder_of(recipe, family), target)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
