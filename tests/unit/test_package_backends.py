"""Backends of other packages' kernels, with a kernel in PyTorch in place of each: it checks its arguments with the package's own
checks, reads scales and codes in the package's order, and computes in float64.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from sglang_modelopt_ext.backends import packages, select, self_test
from sglang_modelopt_ext.backends.base import Backend, BlockBackend, LinearRequest, ShardWeight, round_to_blocks
from sglang_modelopt_ext.backends.linear.flashinfer import FlashInferFp4, FlashInferMxfp8, FlashInferSvdquant
from sglang_modelopt_ext.backends.linear.humming import Humming
from sglang_modelopt_ext.backends.linear.weight_only import FlashInferWeightOnly, QuackWeightOnly
from sglang_modelopt_ext.device import Device
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.layers.linear import LinearProduct
from sglang_modelopt_ext.schemes.base import LORA_A, LORA_B, LayerScheme
from sglang_modelopt_ext.schemes.table import SCHEMES
from sglang_modelopt_ext.tuning.run import random_shard
from sglang_modelopt_kernels.formats import WEIGHT_FORMATS
from sglang_modelopt_kernels.formats.base import BlockActivation
from sglang_modelopt_kernels.gemm.reference import naive_linear
from tests.support import package_kernels


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    if request.node.get_closest_marker("gpu"):  # the packages' own
        yield
        return
    package_kernels.install(monkeypatch)
    self_test._passed.clear()
    yield
    self_test._passed.clear()


def asked_for(algo: str, weight: str | None = None, capability: int = 100, **fields: Any) -> LinearRequest:
    scheme = SCHEMES[algo]
    layer = LayerScheme(
        algo,
        WEIGHT_FORMATS[weight or scheme.weights[0]],
        scheme.activation_format(),
        low_rank=fields.pop("low_rank", 0),
    )
    arguments = {"n": 128, "k": 512, "packages": packages.VERSIONS} | fields
    return LinearRequest(layer, Device.cuda(capability), **arguments)


CASES = [
    (FlashInferFp4(), asked_for("NVFP4")),
    (FlashInferFp4(), asked_for("NVFP4_AWQ", capability=120)),
    (FlashInferFp4(), asked_for("MXFP4", dtype=torch.float16)),
    (FlashInferSvdquant(), asked_for("NVFP4_SVD", low_rank=32)),
    (FlashInferMxfp8(), asked_for("MXFP8")),
    (FlashInferWeightOnly(), asked_for("W4A16_NVFP4")),
    (FlashInferWeightOnly(), asked_for("W4A16_NVFP4", "nvfp4_bs32")),
    (QuackWeightOnly(), asked_for("W4A16_NVFP4", capability=90)),
    (QuackWeightOnly(), asked_for("W4A16_NVFP4", "nvfp4_bs32", capability=90)),
    (Humming(), asked_for("W4A8_MXFP4_FP8", capability=90)),
]


@pytest.mark.parametrize(("backend", "asked"), CASES)
def test_backends_serve_what_they_say(backend: Backend, asked: LinearRequest) -> None:
    assert backend.supports(asked) is None
    self_test.check_backend(backend, asked, torch.device("cpu"))


@pytest.mark.parametrize(("backend", "asked"), CASES)
def test_without_the_package(backend: Backend, asked: LinearRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing package is a reason at the choice, one that does not load a reason at the check."""
    fields = {name: getattr(asked, name) for name in asked.__dataclass_fields__}
    assert "is not installed" in str(backend.supports(LinearRequest(**fields | {"packages": {}})))
    other = dict.fromkeys(packages.VERSIONS, "9.9")
    assert "not 9.9" in str(backend.supports(LinearRequest(**fields | {"packages": other})))
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    monkeypatch.setitem(sys.modules, "quack.gemm_w4", None)
    monkeypatch.setitem(sys.modules, "humming.transform", None)
    with pytest.raises(ValueError, match="does not run on cpu: import of"):
        self_test.check_backend(backend, asked, torch.device("cpu"))


@pytest.mark.parametrize(
    ("backend", "asked", "reason"),
    [
        (FlashInferFp4(), asked_for("NVFP4", capability=90), "is for SM100"),
        (FlashInferFp4(), asked_for("MXFP4", capability=120), "is for SM100, SM103"),
        (FlashInferFp4(), asked_for("NVFP4", n=144), "in 32s"),
        (FlashInferFp4(), asked_for("NVFP4", dtype=torch.float32), "float32 output"),
        (FlashInferFp4(), asked_for("NVFP4_SVD", low_rank=32), "low-rank"),
        (FlashInferSvdquant(), asked_for("NVFP4_SVD", low_rank=16), "a rank in 32s, not 16"),
        (FlashInferSvdquant(), asked_for("NVFP4"), "a rank in 32s, not 0"),
        (FlashInferSvdquant(), asked_for("NVFP4_SVD", low_rank=32, dtype=torch.float16), "output"),
        (FlashInferSvdquant(), asked_for("NVFP4_SVD", low_rank=32, capability=110), "is for SM100, SM103, SM120"),
        (FlashInferFp4(), asked_for("W4A16_NVFP4"), "unrounded"),
        (FlashInferFp4(), asked_for("W4A8_MXFP4_FP8"), "fp8_per_token"),
        (FlashInferFp4(), asked_for("NVFP4", vocabulary=True), "vocabulary"),
        (FlashInferMxfp8(), asked_for("MXFP8", k=96), "from 128"),
        (FlashInferMxfp8(), asked_for("FP8"), "MXFP8"),
        (FlashInferWeightOnly(), asked_for("W4A16_NVFP4", capability=120), "is for SM100, SM103"),
        (FlashInferWeightOnly(), asked_for("W4A16_NVFP4", dtype=torch.float16), "bf16"),
        (FlashInferWeightOnly(), asked_for("W4A8_NVFP4_FP8"), "unrounded"),
        (QuackWeightOnly(), asked_for("W4A16_NVFP4"), "is for SM90"),
        (QuackWeightOnly(), asked_for("W4A16_NVFP4", capability=90, k=96), "in 64s"),
        (QuackWeightOnly(), asked_for("W4A16_AWQ", capability=90), "NVFP4"),
        (Humming(), asked_for("W4A8_MXFP4_FP8"), "is for SM89, SM90"),
        (Humming(), asked_for("W4A8_NVFP4_FP8", capability=90), "UE8M0"),
        (Humming(), asked_for("MXFP4", capability=90), "needs FP8 activations"),
        (Humming(), asked_for("W4A8_MXFP4_FP8", capability=90, dtype=torch.float16), "output"),
        (Humming(), asked_for("W4A8_MXFP4_FP8", capability=90, k=96), "K in 128s"),
    ],
)
def test_reasons(backend: Backend, asked: LinearRequest, reason: str) -> None:
    assert reason in str(backend.supports(asked))


def blocks(backend: BlockBackend, asked: LinearRequest, x: torch.Tensor, scale: torch.Tensor | None) -> BlockActivation:
    return round_to_blocks(asked.scheme.activation, x, None, scale, backend.swizzles(x.shape[0]))


def shards(weight: str, rows: Sequence[int], k: int, one_scale: bool) -> list[ShardWeight]:
    """Return shards like ModelOpt exports them, with one global scale or with one each."""
    generator = torch.Generator().manual_seed(3)
    form = WEIGHT_FORMATS[weight]
    whole = torch.randn(sum(rows), k, generator=generator)
    stored = [form.quantize(part * (2 if index else 1)) for index, part in enumerate(whole.split(list(rows)))]
    if one_scale:
        together = form.quantize(whole)
        stored = []
        start = 0
        for count in rows:
            part = {name: t[start : start + count] if t.dim() else t for name, t in together.items()}
            stored.append(part)
            start += count
    for tensors, count in zip(stored, rows, strict=True):  # read by the backend with a low-rank branch, and by it alone
        tensors[LORA_B] = torch.randn(count, 32, generator=generator).to(torch.bfloat16)
    return [ShardWeight(form, tensors) for tensors in stored]


@pytest.mark.parametrize(("backend", "asked"), CASES)
def test_fused_shards(backend: Backend, asked: LinearRequest) -> None:
    """Fused shards are merged where they have one global scale, and rejected where they do not."""
    parts = shards(asked.scheme.weight.name, (128, 64), 256, one_scale=True)
    prepared = backend.prepare(parts)
    decoded = [part.decode() for part in parts]
    expected = torch.cat([part.unit.double() * part.out_scale.double() for part in decoded])
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(4)).to(torch.bfloat16).float()
    bias = torch.randn(192, generator=torch.Generator().manual_seed(5))
    if isinstance(backend, BlockBackend):
        activation = asked.scheme.activation
        assert activation is not None
        scale = torch.tensor(0.002) if activation.tensors else None
        y = backend.matmul_blocks(prepared, blocks(backend, asked, x, scale), bias, torch.bfloat16)
        values, row_scale = activation.quantize(x, scale)
        x = values if row_scale is None else values * row_scale
    else:
        operand = backend.operand(asked)
        x = x.to(operand).float()
        y = backend.matmul(prepared, x.to(operand), None, bias, torch.bfloat16)
    right = x.double() @ expected.T + bias.double()
    assert y.dtype == torch.bfloat16
    assert float((y.double() - right).norm() / right.norm()) < 2**-8  # two roundings to bf16
    if "weight_scale_2" in parts[0].tensors:
        with pytest.raises(ValueError, match="one global scale"):
            backend.prepare(shards(asked.scheme.weight.name, (128, 64), 256, one_scale=False))


@pytest.mark.parametrize("backend", [backend for backend, _ in CASES])
def test_shards_apart_may_be_too_uneven(backend: Backend) -> None:
    weight = {FlashInferMxfp8: "mxfp8", Humming: "mxfp4"}.get(type(backend), "nvfp4")  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="rows of shards"):
        backend.prepare(shards(weight, (44,), 256, one_scale=True))


@pytest.mark.parametrize(
    ("lowest", "highest", "reason"),
    [
        (100, 111, None),
        (100, 112, "differ by more than 11"),
        (19, 19, None),
        (18, 18, "are below -108"),
        (241, 252, None),
    ],
)
def test_what_humming_holds(lowest: int, highest: int, reason: str | None) -> None:
    """Every code under every exponent of a row, exactly, or an error; an empty block may have any exponent."""
    codes = torch.arange(256, dtype=torch.uint8).view(1, 256).repeat(8, 1)
    exponents = torch.linspace(lowest, highest, 16).round().to(torch.uint8).repeat(8, 1)
    codes[:, 16:32], exponents[:, 1] = 0x80, 0
    shard = ShardWeight(WEIGHT_FORMATS["mxfp4"], {"weight": codes, "weight_scale": exponents})
    backend = Humming()
    if reason is not None:
        with pytest.raises(ValueError, match=reason):
            backend.prepare([shard])
        return
    prepared = backend.prepare([shard])
    x = torch.eye(512)[::37].to(torch.float8_e4m3fn)
    y = backend.matmul(prepared, x, None, None, torch.bfloat16)
    assert torch.equal(y.float(), shard.decode().unit.T[::37].to(torch.bfloat16).float())


@pytest.mark.parametrize("algo", ["NVFP4", "NVFP4_AWQ", "MXFP8"])
def test_a_layer_through_them(algo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole product, smoothing and rounding included, equals the recipe's."""
    backend = FlashInferMxfp8() if algo == "MXFP8" else FlashInferFp4()
    monkeypatch.setattr(select, "BACKENDS", (backend,))
    monkeypatch.setattr(type(backend), "supports", lambda *_: None)
    asked = asked_for(algo)
    scheme = LayerScheme(algo, asked.scheme.weight, asked.scheme.activation, smoothing=algo == "NVFP4_AWQ")
    generator = torch.Generator().manual_seed(7)
    stored = asked.scheme.weight.quantize(torch.randn(128, 256, generator=generator))
    x = torch.randn(3, 256, generator=generator).to(torch.bfloat16)
    wide = x.float()
    scale = None
    if algo != "MXFP8":
        scale = stored["input_scale"] = torch.tensor(0.002)
    if scheme.smoothing:
        stored["pre_quant_scale"] = torch.rand(256, generator=generator) + 0.5
        wide = wide * stored["pre_quant_scale"]
    product, layer = LinearProduct(scheme, "folder", "layer"), torch.nn.Module()
    product.prepare(layer, [stored], 128, 256)
    y = product.apply(layer, x)
    right = naive_linear(wide, scheme.weight.decode(stored), scheme.activation, scale)
    assert product.backend is backend
    assert y.dtype == torch.bfloat16
    assert float((y.double() - right).norm() / right.norm()) < 2**-9


@pytest.mark.parametrize("shared", [True, False])
def test_a_low_rank_layer(shared: bool) -> None:
    """Fused shards with factors of their own; with input scales of their own, too, they are computed apart."""
    backend = FlashInferSvdquant()
    scheme = dataclasses.replace(asked_for("NVFP4_SVD", low_rank=32).scheme, smoothing=True)
    parts, smoothing = [], torch.rand(256) + 0.5
    for index, part in enumerate(shards("nvfp4", (128, 64), 256, one_scale=True)):
        factor = torch.randn(32, 256).to(torch.bfloat16)
        input_scale = torch.tensor(0.002 if shared else 0.002 * (index + 1))
        parts.append({**part.tensors, LORA_A: factor, "input_scale": input_scale, "pre_quant_scale": smoothing})
    product, module_ = LinearProduct(scheme, "folder", "layer"), torch.nn.Module()
    product.prepare(module_, parts, 192, 256, backends=[backend])
    assert len(product.groups) == (1 if shared else 2)
    assert not [name for name, _ in module_.named_parameters() if LORA_B in name], "one copy of each factor"
    x, bias = torch.randn(5, 256).to(torch.bfloat16), torch.randn(192).to(torch.bfloat16)
    y = product.apply(module_, x, bias)
    wide = x.float() * smoothing
    right = torch.cat(
        [
            naive_linear(wide, scheme.weight.decode(part), scheme.activation, part["input_scale"])
            + wide.double() @ part[LORA_A].double().T @ part[LORA_B].double().T
            for part in parts
        ],
        dim=1,
    )
    right += bias.double()
    assert float(((y.double() - right).norm(dim=1) / right.norm(dim=1)).max()) < 2**-8
    parts[0][LORA_B] = parts[0][LORA_B].float() * 1.001
    with pytest.raises(ModelOptExtError, match="svdquant_lora_b is not exact in bf16"):
        LinearProduct(scheme, "folder", "layer").prepare(torch.nn.Module(), parts, 192, 256, backends=[backend])


def test_no_tokens() -> None:
    for backend, asked in CASES:
        prepared = backend.prepare(shards(asked.scheme.weight.name, (128,), 256, one_scale=True))
        if isinstance(backend, BlockBackend):
            scale = torch.tensor(0.5) if asked.scheme.activation and asked.scheme.activation.tensors else None
            y = backend.matmul_blocks(
                prepared, blocks(backend, asked, torch.zeros(0, 256), scale), None, torch.bfloat16
            )
        else:
            y = backend.matmul(prepared, torch.zeros(0, 256).to(backend.operand(asked)), None, None, torch.bfloat16)
        assert y.shape == (0, 128)


@pytest.mark.gpu
@pytest.mark.parametrize(("backend", "asked"), CASES)
def test_on_a_gpu(backend: Backend, asked: LinearRequest) -> None:
    """The package's own kernel, eagerly and in a captured graph, where package and GPU are there."""
    product = LinearProduct(asked.scheme, "folder", "layer", dtype=asked.dtype)
    device = torch.device("cuda")
    here = product.request(device, 1024, 2048)
    reason = backend.supports(dataclasses.replace(here, scheme=asked.scheme))
    if reason is not None:
        pytest.skip(f"{backend.name} {reason}")
    module = torch.nn.Module()
    stored = random_shard(asked.scheme, here.n, here.k, asked.dtype, device)
    product.prepare(module, [stored], here.n, here.k, backends=[backend])
    for m in (1, 7, 64, 300):
        x = torch.randn(m, here.k, generator=torch.Generator().manual_seed(m)).to(asked.dtype)
        target = x.to(device)
        y = product.apply(module, target)
        wide = {name: tensor.cpu() for name, tensor in stored.items()}
        right = naive_linear(
            x.float(), asked.scheme.weight.decode(wide), product.scheme.activation, wide.get("input_scale")
        )
        if asked.scheme.low_rank:
            right += x.double() @ wide[LORA_A].double().T @ wide[LORA_B].double().T
        assert float(((y.double().cpu() - right).norm(dim=1) / right.norm(dim=1)).max()) < 2**-8
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replayed = product.apply(module, target)
        target.mul_(0.5)
        replayed.fill_(float("nan"))
        graph.replay()
        again = product.apply(module, target)
        assert torch.equal(replayed, again)
