"""Kernels for a whole layer of experts, with one in PyTorch in their place: it reads codes and scales in the package's order and
rounds where the package does (``tests/support/fused_kernel.py``). The calls are held against the package's sources.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_modelopt_ext.backends import packages, self_test
from sglang_modelopt_ext.backends.base import tensors_of
from sglang_modelopt_ext.backends.experts import flashinfer as experts_flashinfer
from sglang_modelopt_ext.backends.experts.base import NO_EXPERT, ExpertRequest
from sglang_modelopt_ext.backends.experts.flashinfer import (
    FOUR_OVER_SIX,
    CutlassMxfp8Experts,
    CutlassNvfp4Experts,
    CutlassWeights,
)
from sglang_modelopt_ext.backends.experts.fused import FusedExperts, FusedRequest, StoredExperts
from sglang_modelopt_ext.backends.select import EXPERT_BACKENDS, FUSED_BACKENDS, expert_candidates, fused_candidates
from sglang_modelopt_ext.device import Device
from sglang_modelopt_ext.env import EXPERTS
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.layers.experts import ExpertProduct
from sglang_modelopt_ext.layers.fused import PREFIX, FusedProduct
from sglang_modelopt_ext.layers.mixture import Choices, mix
from sglang_modelopt_ext.schemes.base import LayerScheme
from sglang_modelopt_ext.schemes.table import SCHEMES
from sglang_modelopt_kernels.formats import WEIGHT_FORMATS
from tests.support import fused_kernel
from tests.support.contracts import assigned, bind, calls, function, parse, source_folder

NAMES = [backend.name for backend in FUSED_BACKENDS]
HIDDEN, INNER, COUNT, TOP_K = 256, 128, 5, 2
API, PREPARE = "flashinfer/fused_moe/api.py", "flashinfer/fused_moe/prepare.py"


@pytest.fixture(autouse=True)
def kernel(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    if request.node.get_closest_marker("gpu"):  # the package's own
        yield
        return
    monkeypatch.setitem(sys.modules, "flashinfer.fused_moe", fused_kernel.module())
    monkeypatch.delenv(FOUR_OVER_SIX, raising=False)
    self_test._passed.clear()
    yield
    self_test._passed.clear()


def scheme_of(algo: str) -> LayerScheme:
    row = SCHEMES[algo]
    return LayerScheme(algo, WEIGHT_FORMATS[row.weights[0]], row.activation_format())


def asked_for(
    algo: str, capability: int = 100, hidden: int = HIDDEN, inner: int = INNER, **fields: Any
) -> FusedRequest:
    weights_input = fields.pop("weights_input", False)
    arguments = {"packages": packages.VERSIONS, "experts": COUNT, "top_k": TOP_K} | fields
    scheme = arguments.pop("scheme", scheme_of(algo))
    gate_up = ExpertRequest(scheme, Device.cuda(capability), 2 * inner, hidden, **arguments)
    return FusedRequest(gate_up, dataclasses.replace(gate_up, n=hidden, k=inner), weights_input)


CASES = [
    (CutlassNvfp4Experts(), asked_for("NVFP4")),
    (CutlassNvfp4Experts(), asked_for("NVFP4", 120, dtype=torch.float16)),
    (CutlassMxfp8Experts(), asked_for("MXFP8")),
]


@pytest.mark.parametrize(("backend", "asked"), CASES)
def test_backends_serve_what_they_say(backend: FusedExperts, asked: FusedRequest) -> None:
    assert backend.supports(asked) is None
    self_test.check_fused_backend(backend, asked, torch.device("cpu"))
    assert len(self_test._passed) == 1


@pytest.mark.parametrize(
    ("backend", "asked", "reason"),
    [
        (CutlassNvfp4Experts(), asked_for("NVFP4", 90), "is for SM100"),
        (CutlassNvfp4Experts(), asked_for("W4A16_NVFP4"), "nvfp4 weights by unrounded activations"),
        (CutlassNvfp4Experts(), asked_for("W4A8_NVFP4_FP8"), "nvfp4_w4a8 weights by fp8_static activations"),
        (CutlassNvfp4Experts(), asked_for("MXFP4"), "mxfp4 weights by mxfp4_dynamic activations"),
        (CutlassNvfp4Experts(), asked_for("NVFP4", dtype=torch.float32), "float32 output"),
        (CutlassNvfp4Experts(), asked_for("NVFP4", hidden=96), "in 64s and 64s, not hidden 96"),
        (CutlassNvfp4Experts(), asked_for("NVFP4", inner=80), "not hidden 256 and intermediate 80"),
        (CutlassNvfp4Experts(), asked_for("NVFP4", weights_input=True), "not what they read"),
        (CutlassNvfp4Experts(), asked_for("NVFP4", packages={}), "is not installed"),
        (CutlassNvfp4Experts(), asked_for("NVFP4", packages={"flashinfer-python": "0.6.0"}), "not 0.6.0"),
        (
            CutlassNvfp4Experts(),
            asked_for("NVFP4", scheme=dataclasses.replace(scheme_of("NVFP4"), smoothing=True)),
            "does not smooth",
        ),
        (CutlassMxfp8Experts(), asked_for("MXFP8", 120), "is for SM100, SM103"),
        (CutlassMxfp8Experts(), asked_for("NVFP4"), "does not multiply nvfp4"),
        (CutlassMxfp8Experts(), asked_for("MXFP8", inner=192), "in 128s and 128s"),
    ],
)
def test_reasons(backend: FusedExperts, asked: FusedRequest, reason: str) -> None:
    assert reason in str(backend.supports(asked))


def test_another_rounding_by_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashInfer can be told to round NVFP4 by another rule than ModelOpt's."""
    monkeypatch.setenv(FOUR_OVER_SIX, "1")
    assert FOUR_OVER_SIX in str(CutlassNvfp4Experts().supports(asked_for("NVFP4")))
    assert CutlassMxfp8Experts().supports(asked_for("MXFP8")) is None
    assert f'"{FOUR_OVER_SIX}",' in (source_folder() / "flashinfer/quantization/fp4_quantization.py").read_text()


def stored(algo: str, scales: str = "one") -> dict[str, list[list[dict[str, torch.Tensor]]]]:
    """Return stored tensors on a CPU. Input scales: ``one`` for all, one for each of the ``experts``, or ``shards``."""
    form, generator = WEIGHT_FORMATS[SCHEMES[algo].weights[0]], torch.Generator().manual_seed(1)
    made: dict[str, list[list[dict[str, torch.Tensor]]]] = {}
    for name, rows, k, shards in (("w13", INNER, HIDDEN, 2), ("w2", HIDDEN, INNER, 1)):
        made[name] = []
        for expert in range(COUNT):
            weight = torch.randn(rows * shards, k, generator=generator) / k**0.5 * (1 + expert)
            whole = form.quantize(weight.to(torch.bfloat16))
            parts = [{key: t.chunk(shards)[i] if t.dim() else t for key, t in whole.items()} for i in range(shards)]
            for index, part in enumerate(parts if algo == "NVFP4" else ()):
                factor = {"one": 1, "experts": 1 + expert, "shards": 1 + index}[scales]
                part["input_scale"] = torch.tensor(0.0017 * factor)
            made[name].append(parts)
    return made


def choices(tokens: int, factor: float | None = None) -> Choices:
    """Return a routing: the last expert gets no token, the first one several, some tokens one expert only."""
    generator = torch.Generator().manual_seed(tokens)
    weights, numbers = torch.rand(tokens, COUNT - 1, generator=generator).topk(TOP_K, dim=-1)
    numbers[::3, 0] = NO_EXPERT
    return Choices(numbers, weights, factor=factor)


def served(monkeypatch: pytest.MonkeyPatch, algo: str, tensors: Any) -> tuple[FusedProduct, torch.nn.Module]:
    """Return a layer on a CPU, as it would be on the GPU the backend is for."""
    backend = CutlassMxfp8Experts() if algo == "MXFP8" else CutlassNvfp4Experts()
    monkeypatch.setenv(EXPERTS.variable, backend.name)
    product, layer = FusedProduct("folder", "experts"), torch.nn.Module()
    assert product.prepare(layer, asked_for(algo), tensors["w13"], tensors["w2"])
    return product, layer


@pytest.mark.parametrize(("algo", "scales"), [("NVFP4", "one"), ("NVFP4", "experts"), ("MXFP8", "one")])
def test_a_layer_is_the_recipes(monkeypatch: pytest.MonkeyPatch, algo: str, scales: str) -> None:
    """Like the two products of the reference path: every expert, projection and token has its own scale."""
    tensors = stored(algo, scales)
    module = torch.nn.Module()
    pair = [ExpertProduct(scheme_of(algo), "folder", f"experts.{name}") for name in tensors]
    for product, name, n, k in zip(pair, tensors, (2 * INNER, HIDDEN), (HIDDEN, INNER), strict=True):
        product.prepare(module, name, tensors[name], n, k, TOP_K)
    fused, layer = served(monkeypatch, algo, tensors)
    for tokens, factor in ((1, None), (40, 2.5)):
        x = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(tokens)).to(torch.bfloat16)
        given = choices(tokens, factor)
        expected, y = mix(module, *pair, x, given).double(), fused.apply(layer, x, given)
        assert y.dtype == torch.bfloat16
        errors = (y.double() - expected).norm(dim=1) / expected.norm(dim=1)
        # Each expert's output is rounded to bf16 once more; a code of the middle that falls to the other side moves a token.
        assert float(errors.median()) < 2**-8, errors
        assert float(errors.max()) < 2**-5, errors
    fused.release(layer)
    assert not list(layer.parameters())


def test_codes_are_kept_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = stored("NVFP4")
    product, layer = served(monkeypatch, "NVFP4", tensors)
    codes = sum(part["weight"].numel() for experts in tensors.values() for parts in experts for part in parts)
    assert (
        sum(p.numel() for name, p in layer.named_parameters() if name in (f"{PREFIX}gate_up", f"{PREFIX}down")) == codes
    )
    first = product.tensors(layer)["gate_up"][2]
    up, gate = (tensors["w13"][2][index]["weight"] for index in (1, 0))
    assert torch.equal(first, torch.cat([up, gate]))


def test_what_it_cannot_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales that would have to be replaced by another's: an error with the reason where nothing else is named, else the next."""
    tensors = stored("NVFP4")
    tensors["w13"][3][1]["weight_scale_2"] = tensors["w13"][3][1]["weight_scale_2"] * 2
    for spoilt, reason in ((tensors, "takes one global scale"), (stored("NVFP4", "shards"), "an input_scale each")):
        with pytest.raises(ModelOptExtError, match=f"{EXPERTS.variable} takes, got {NAMES[0]}: .*{reason}"):
            served(monkeypatch, "NVFP4", spoilt)
        monkeypatch.setenv(EXPERTS.variable, f"{NAMES[0]},experts_reference")
        product, layer = FusedProduct("folder", "experts"), torch.nn.Module()
        assert not product.prepare(layer, asked_for("NVFP4"), spoilt["w13"], spoilt["w2"])
        assert not list(layer.parameters())
    monkeypatch.setenv(EXPERTS.variable, NAMES[0])
    with pytest.raises(ModelOptExtError, match=f"{NAMES[0]} does not multiply mxfp8"):
        FusedProduct("folder", "experts").prepare(
            torch.nn.Module(), asked_for("MXFP8"), *(stored("MXFP8")[name] for name in ("w13", "w2"))
        )


def test_by_name_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = asked_for("NVFP4")
    monkeypatch.delenv(EXPERTS.variable, raising=False)
    assert fused_candidates(asked) == ([], {})
    assert not FusedProduct("folder", "experts").prepare(torch.nn.Module(), asked, *stored("NVFP4").values())
    monkeypatch.setenv(EXPERTS.variable, f"triton_grouped_bf16,{','.join(NAMES)}")
    taking, refused = fused_candidates(asked)
    assert [backend.name for backend in taking] == NAMES[:1]
    assert list(refused) == NAMES[1:]
    assert [backend.name for backend in expert_candidates(asked.gate_up, "experts")] == ["triton_grouped_bf16"]
    monkeypatch.setenv(EXPERTS.variable, "flashinfer")
    with pytest.raises(
        ModelOptExtError, match=f"{EXPERTS.variable}: expected names among .*, got flashinfer"
    ) as caught:
        expert_candidates(asked.gate_up, "experts")
    assert all(backend.name in str(caught.value) for backend in (*EXPERT_BACKENDS, *FUSED_BACKENDS))


class Wrong(CutlassNvfp4Experts):
    """A backend that reads back another weight than it keeps."""

    def __init__(self, fault: str) -> None:
        self.fault = fault

    def prepare(self, gate_up: StoredExperts, down: StoredExperts) -> CutlassWeights:
        prepared = tensors_of(super().prepare(gate_up, down))
        if self.fault == "gate for up":
            for name in ("gate_up", "gate_up_scale"):
                prepared[name] = torch.cat(prepared[name].chunk(2, dim=1)[::-1], dim=1).contiguous()
        if self.fault == "the largest input scale":
            prepared["down_input"] = prepared["down_input"].min()
        if self.fault == "the first input scale" and prepared["gate_up_input"].dim():
            prepared["gate_up_input"] = prepared["gate_up_input"][:1].expand(COUNT).contiguous()
        if self.fault == "linear scales":
            scales = [torch.cat([s.tensors["weight_scale"] for s in shards]) for shards in down.weights]
            prepared["down_scale"] = torch.stack(scales).view(torch.uint8)
        return CutlassWeights(**prepared)

    def run(self, prepared: Any, x: torch.Tensor, numbers: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        if self.fault == "no expert":
            numbers = numbers.clamp(min=0)
        return super().run(prepared, x, numbers, weights)


@pytest.mark.parametrize(
    "fault", ["gate for up", "the first input scale", "the largest input scale", "linear scales", "no expert"]
)
def test_the_check_at_load_finds_out(fault: str) -> None:
    with pytest.raises(ValueError, match="is wrong on cpu: relative error"):
        self_test.check_fused_backend(Wrong(fault), asked_for("NVFP4"), torch.device("cpu"))
    assert not self_test._passed


def test_a_package_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer.fused_moe", None)
    with pytest.raises(ValueError, match="does not run on cpu: import of"):
        self_test.check_fused_backend(*CASES[0], torch.device("cpu"))


def test_the_operator_has_a_fake() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(3, HIDDEN // 2, dtype=torch.uint8, device="cuda")
        numbers, weights = torch.empty(3, 2, dtype=torch.int32, device="cuda"), torch.empty(3, 2, device="cuda")
        down = torch.empty(COUNT, HIDDEN, INNER // 2, dtype=torch.uint8, device="cuda")
        y = torch.ops.modelopt_ext.flashinfer_cutlass_fused_moe(
            x, None, numbers, weights, down, down, [weights], False, torch.bfloat16
        )
    assert (y.shape, y.dtype) == ((3, HIDDEN), torch.bfloat16)


def test_the_call_fits_its_function() -> None:
    (call,) = calls(Path(inspect.getfile(experts_flashinfer)), "cutlass_fused_moe")
    bound = bind(call, function(fused_kernel.CORE, "cutlass_fused_moe"))
    assert bound["use_fused_finalize"] == "False"
    assert [bound[name] for name in ("fc1_expert_weights", "fc2_expert_weights")] == [
        f"{name} if is_mxfp8 else {name}.view(torch.int64)" for name in ("gate_up", "down")
    ]
    # Absent arguments: SwiGLU without parameters of its own, one rank, no bias.
    text = ast.unparse(function(fused_kernel.CORE, "cutlass_fused_moe"))
    for default in ("activation_type: ActivationType=ActivationType.Swiglu", "ep_size: int=1", "tp_size: int=1"):
        assert default in text
    exported = (source_folder() / "flashinfer/fused_moe/__init__.py").read_text()
    assert "    cutlass_fused_moe,\n" in exported


def test_architectures_and_sizes() -> None:
    """The architectures that our backends name are those that the package's own runners let through."""
    assert set(CutlassNvfp4Experts.capabilities) <= set(assigned(API, "_CUTLASS_NVFP4_ARCHS"))
    assert set(CutlassMxfp8Experts.capabilities) <= set(assigned(API, "_CUTLASS_MXFP8_ARCHS"))
    assert CutlassNvfp4Experts.multiples[0] % assigned(PREPARE, "_CUTLASS_NVFP4_HIDDEN_ALIGNMENT") == 0
    built = ast.unparse(function(fused_kernel.CORE, "get_cutlass_fused_moe_module"))
    for capability in {*CutlassNvfp4Experts.capabilities, *CutlassMxfp8Experts.capabilities}:
        assert f"'{capability}'" in built


def test_the_order_of_the_shards() -> None:
    """The package's own words; its kernel reads up in the first rows, gate behind them."""
    for name in ("prepare_cutlass_nvfp4_weights", "prepare_cutlass_mxfp8_weights"):
        assert any(isinstance(node, ast.FunctionDef) and node.name == name for node in parse(PREPARE).body)
    words = " ".join((ast.get_docstring(function(PREPARE, "prepare_cutlass_nvfp4_weights")) or "").split())
    assert "``2*I`` in semantic ``[up, gate]`` order for gated activations" in words


@pytest.mark.gpu
@pytest.mark.parametrize(("backend", "asked"), CASES)
def test_on_a_gpu(backend: FusedExperts, asked: FusedRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package's own kernel, eagerly and in a captured graph, where package and GPU are there."""
    device = torch.device("cuda")
    scheme, algo = asked.gate_up.scheme, asked.gate_up.scheme.algo
    dtype = asked.gate_up.dtype
    tensors = stored(algo)
    placed = {
        name: [[{key: t.to(device) for key, t in part.items()} for part in parts] for parts in experts]
        for name, experts in tensors.items()
    }
    pair = [ExpertProduct(scheme, "folder", f"experts.{name}", dtype=dtype) for name in tensors]
    sizes = ((2 * INNER, HIDDEN), (HIDDEN, INNER))
    here = FusedRequest(*(p.request(device, *size, COUNT, TOP_K) for p, size in zip(pair, sizes, strict=True)))
    reason = backend.supports(here)
    if reason is not None:
        pytest.skip(f"{backend.name} {reason}")
    module = torch.nn.Module()
    for product, name, size in zip(pair, tensors, sizes, strict=True):
        product.prepare(module, name, tensors[name], *size, TOP_K)
    monkeypatch.setenv(EXPERTS.variable, backend.name)
    fused, layer = FusedProduct("folder", "experts"), torch.nn.Module()
    assert fused.prepare(layer, here, placed["w13"], placed["w2"])
    for tokens in (1, 40, 300):
        x, given = torch.randn(tokens, HIDDEN).to(dtype), choices(tokens)
        on_gpu = Choices(given.numbers.to(device), given.weights.to(device))
        target = x.to(device)
        y = fused.apply(layer, target, on_gpu)
        expected = mix(module, *pair, x, given).double()
        errors = (y.double().cpu() - expected).norm(dim=1) / expected.norm(dim=1)
        assert float(errors.max()) < 2**-4
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replayed = fused.apply(layer, target, on_gpu)
        target.mul_(0.5)
        replayed.fill_(float("nan"))
        graph.replay()
        assert torch.equal(replayed, fused.apply(layer, target, on_gpu))
