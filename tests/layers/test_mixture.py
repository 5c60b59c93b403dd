"""A layer of experts between and after its products: by PyTorch on a CPU, by the kernels on a GPU. Needs no SGLang."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sglang_modelopt_ext.backends.experts.base import NO_EXPERT, Routing
from sglang_modelopt_ext.env import FP4_ACTIVATIONS
from sglang_modelopt_ext.layers.experts import ExpertProduct
from sglang_modelopt_ext.layers.handover import Producer, hand_over, observe
from sglang_modelopt_ext.layers.mixture import Biases, Choices, activate, add_choices, mix, weighted_bias
from sglang_modelopt_ext.schemes.base import LayerScheme
from sglang_modelopt_ext.schemes.table import SCHEMES
from sglang_modelopt_kernels.formats import WEIGHT_FORMATS
from sglang_modelopt_kernels.moe import activation as kernel
from sglang_modelopt_kernels.moe.activation import SWIGLU, Activation, naive_activate
from sglang_modelopt_kernels.moe.combine import combine, naive_combine
from sglang_modelopt_kernels.quantize.fp8.naive import naive_quantize_fp8
from sglang_modelopt_kernels.quantize.gated.naive import naive_swiglu_fp8

TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
KERNELS = {"modelopt_ext.activate.default", "modelopt_ext.combine_experts.default"}
FORMS = {
    "swiglu": SWIGLU,
    "gpt-oss": Activation(alpha=1.702, offset=1.0, limit=7.0, bias=True),
    "limit of the gate": Activation(limit=3.0),
    "limit of silu": Activation(limit=3.0, limits_function=True),
    "relu2": Activation("relu2", gated=False),
    "relu2 and bias": Activation("relu2", gated=False, bias=True),
    "gelu": Activation("gelu"),
    "gelu_tanh": Activation("gelu_tanh", bias=True),
}
HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 256, 192, 5, 2


class Recorder(TorchDispatchMode):
    """A recorder of the operators that run inside, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append((str(func), args))
        return func(*args, **(kwargs or {}))

    @property
    def names(self) -> set[str]:
        return {name for name, _ in self.calls}


@pytest.mark.parametrize("factor", [None, 2.5])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_gpu_gets_the_kernels(device: str, factor: float | None) -> None:
    """Operators alone: tensors that hold nothing need no GPU. A factor is applied between the sum and the last rounding."""
    with FakeTensorMode(), Recorder() as recorder:
        h = torch.empty(6, 8, dtype=torch.bfloat16, device=device)
        y = torch.empty(6, 8, device=device)
        hidden, total = activate(h), add_choices(y, 3, factor, torch.bfloat16)
    assert (hidden.shape, hidden.dtype, hidden.device.type) == ((6, 4), torch.bfloat16, device)
    assert (total.shape, total.dtype, total.device.type) == ((2, 8), torch.bfloat16, device)
    assert recorder.names & KERNELS == (KERNELS if device == "cuda" else set())
    assert ("aten.mul.Tensor" in recorder.names) == (device == "cpu" or factor is not None)
    if device == "cuda":
        assert "aten.silu.default" not in recorder.names
        (arguments,) = [args for name, args in recorder.calls if name == "modelopt_ext.combine_experts.default"]
        assert arguments[1:] == (3, None, torch.bfloat16 if factor is None else torch.float32)


def samples() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(12, 74, generator=generator) * 4, torch.randn(12, 37, generator=generator)


def biases(form: Activation) -> dict[str, torch.Tensor]:
    """Return the bias of five experts and the expert of each of 12 rows, of which some have none; nothing without a bias."""
    generator = torch.Generator().manual_seed(1)
    if not form.bias:
        return {}
    experts = torch.arange(12, dtype=torch.int32) % 6 - 1
    return {"bias": torch.randn(5, 74, generator=generator), "experts": experts}


def both_ways() -> dict[str, list[float]]:
    """Return the largest differences of the kernels from PyTorch by type, in units in the last place, and those of sums."""
    h, y = samples()
    found = {}
    for name, dtype in TYPES.items():
        narrow = h.to(dtype)
        ulp = torch.finfo(dtype).eps
        apart = []
        for form in FORMS.values():
            given = (form, dtype, *biases(form).values())
            by_torch, by_kernel = activate(narrow, *given).double(), kernel.activate(narrow, *given).double()
            size = by_torch.abs().clamp(min=2.0**-6)
            if dtype == torch.float32:  # where a factor cancels, its own error remains
                size = size + naive_activate(narrow.abs(), form, **biases(form)).abs()
            apart.append(((by_torch - by_kernel).abs() / size / ulp).max())
        summed, by_combine = add_choices(y, 3, None, dtype).double(), combine(y, 3, None, dtype).double()
        # A sum may cancel: relative to the magnitudes.
        size = naive_combine(y.abs(), 3)
        found[name] = [
            float(max(apart)),
            float(((summed - by_combine).abs() / size / ulp).max()),
        ]
    return found


def test_the_kernels_do_what_pytorch_does() -> None:
    """In Triton's interpreter, in a process of its own: Triton decides at import whether it interprets."""
    script = (
        "import json, sys, types, importlib.util as u\n"
        f"spec = u.spec_from_file_location('cases', {str(Path(__file__))!r}); cases = u.module_from_spec(spec)\n"
        "sys.modules['cases'] = cases; spec.loader.exec_module(cases)\n"
        "print(json.dumps(cases.both_ways()))\n"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == TYPES.keys()
    for name, (activated, summed) in found.items():
        # One rounding each: they differ by a unit where float32 lies at the middle of two numbers; in float32, exp adds some.
        assert activated <= (8 if name == "float32" else 1), found
        assert summed <= 1, found


@pytest.mark.parametrize("dtype", TYPES.values())
def test_on_a_cpu(dtype: torch.dtype) -> None:
    """Against float64."""
    h, y = samples()
    narrow, eps = h.to(dtype), torch.finfo(dtype).eps
    for name, form in FORMS.items():
        given = biases(form)
        expected = naive_activate(narrow, form, **given)
        error = (activate(narrow, form, **given).double() - expected).abs()
        assert bool((error <= expected.abs() * (eps / 2 + 2**-20) + 2**-18).all()), name
    for factor in (None, 2.5):
        wide = naive_combine(y, 3) * (factor or 1.0)
        bound = naive_combine(y.abs(), 3) * (factor or 1.0) * (eps / 2 + 4 * 2.0**-24)
        assert bool(((add_choices(y, 3, factor, dtype).double() - wide).abs() <= bound).all())


@pytest.mark.parametrize("weights_input", [False, True])
def test_the_bias_of_a_sum(weights_input: bool) -> None:
    """The bias of every expert that this rank has, by the router's weight unless that multiplies the input."""
    bias = torch.randn(EXPERTS, 37, generator=torch.Generator().manual_seed(0))
    choices = Choices(**choose(9, "cpu"), weights_input=weights_input)
    expected = torch.zeros(9, 37, dtype=torch.float64)
    for token, (numbers, weights) in enumerate(zip(choices.numbers.tolist(), choices.weights.tolist(), strict=True)):
        for number, weight in zip(numbers, weights, strict=True):
            if number != NO_EXPERT:
                expected[token] += bias[number].double() * (1.0 if weights_input else weight)
    assert torch.allclose(weighted_bias(bias, choices).double(), expected, atol=1e-6)
    assert NO_EXPERT in choices.numbers


@pytest.mark.parametrize("name", FORMS)
def test_a_layer_of_every_form(name: str) -> None:
    """Both products, the activation, both biases, and a second rank that adds none of the sum's."""
    form = FORMS[name]
    layer, first, down = products("FP8_PB_WO", "cpu", torch.float32, form)
    generator = torch.Generator().manual_seed(3)
    own = Biases(
        torch.randn(EXPERTS, form.parts * INTERMEDIATE, generator=generator),
        torch.randn(EXPERTS, HIDDEN, generator=generator),
    )
    x, choices = torch.randn(7, HIDDEN, generator=generator), Choices(**choose(7, "cpu"))
    y = mix(layer, first, down, x, choices, form, own if form.bias else None)
    units = [
        product.groups[0].build(**{field: getattr(layer, at) for field, at in product.groups[0].prepared.items()})
        for product in (first, down)
    ]
    weight1, weight2 = (unit.unit.double() * unit.out_scale.double().unsqueeze(2) for unit in units)
    expected = torch.zeros(7, HIDDEN, dtype=torch.float64)
    for token in range(7):
        for number, weight in zip(choices.numbers[token].tolist(), choices.weights[token].tolist(), strict=True):
            if number == NO_EXPERT:
                continue
            h = (weight1[number] @ x[token].double()).unsqueeze(0)
            of_expert = {"bias": own.first, "experts": torch.tensor([number])} if form.bias else {}
            out = weight2[number] @ naive_activate(h, form, **of_expert)[0]
            expected[token] += weight * (out + own.down[number].double() if form.bias and own.down is not None else out)
    assert float((y.double() - expected).norm() / expected.norm()) < 1e-5
    if form.bias:
        without = mix(layer, first, down, x, choices, form, Biases(own.first, None))
        assert own.down is not None
        assert torch.allclose(y - without, weighted_bias(own.down, choices), atol=1e-4)


def products(
    algo: str, device: str, dtype: torch.dtype, activation: Activation = SWIGLU
) -> tuple[torch.nn.Module, ExpertProduct, ExpertProduct]:
    """Return both products of a layer of random experts, the same on every device."""
    row = SCHEMES[algo]
    scheme = LayerScheme(algo, WEIGHT_FORMATS[row.weights[0]], row.activation_format())
    generator = torch.Generator().manual_seed(0)

    def stored(n: int, k: int) -> dict[str, torch.Tensor]:
        tensors = scheme.weight.quantize((torch.randn(n, k, generator=generator) / k**0.5).to(torch.bfloat16))
        for spec in scheme.activation.tensors if scheme.activation else ():
            largest = {"nvfp4_dynamic": 2688, "int8_static": 127}.get(row.activation or "", 448)
            tensors[spec.name] = torch.tensor(4.0 / largest)
        return {key: tensor.to(device) for key, tensor in tensors.items()}

    layer, made = torch.nn.Module(), []
    for name, n, k, shards in (("w13", INTERMEDIATE, HIDDEN, activation.parts), ("w2", HIDDEN, INTERMEDIATE, 1)):
        product = ExpertProduct(scheme, "folder", f"experts.{name}", dtype=dtype)
        experts = [[stored(n, k) for _ in range(shards)] for _ in range(EXPERTS)]
        product.prepare(layer, name, experts, n * shards, k, TOP_K)
        made.append(product)
    return layer, *made


def choose(tokens: int, device: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    weights, numbers = torch.rand(tokens, EXPERTS, generator=generator).topk(TOP_K, dim=-1)
    numbers[::3, 0] = NO_EXPERT
    return {"numbers": numbers.to(device), "weights": weights.to(device)}


@pytest.mark.gpu
@pytest.mark.parametrize(
    "algo", ["W4A8_NVFP4_FP8", "W4A8_MXFP4_FP8", "NVFP4", "FP8", "FP8_PB_WO", "W8A8_SQ_PER_CHANNEL"]
)
def test_a_layer_on_a_gpu(algo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole layer as on a CPU, but for the rounding to bf16 on the way and what it moves; weighted inputs and a factor too."""
    monkeypatch.setenv(FP4_ACTIVATIONS.variable, "round")
    on_cpu, on_gpu = products(algo, "cpu", torch.bfloat16), products(algo, "cuda", torch.bfloat16)
    for tokens in (1, 7, 80):
        x = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(tokens)).to(torch.bfloat16)
        for options in ({}, {"factor": 2.5}, {"weights_input": True}):
            expected = mix(*on_cpu, x, Choices(**choose(tokens, "cpu"), **options)).double()
            y = mix(*on_gpu, x.cuda(), Choices(**choose(tokens, "cuda"), **options))
            assert y.dtype == torch.bfloat16
            assert float((y.double().cpu() - expected).norm() / expected.norm()) < 2**-6, (tokens, options)


@pytest.mark.gpu
@pytest.mark.parametrize("name", FORMS)
def test_every_form_on_a_gpu(name: str) -> None:
    """As on a CPU, and captured: a replay follows the routing that is written afterwards."""
    form = FORMS[name]
    given = (torch.randn(EXPERTS, form.parts * INTERMEDIATE), torch.randn(EXPERTS, HIDDEN)) if form.bias else None
    x = torch.randn(8, HIDDEN, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    on_cpu, on_gpu = (products("W4A8_NVFP4_FP8", device, torch.bfloat16, form) for device in ("cpu", "cuda"))
    own = None if given is None else Biases(*(bias.cuda() for bias in given))
    chosen = choose(8, "cuda")
    choices = Choices(**chosen)
    mix(*on_gpu, x.cuda(), choices, form, own)
    graph, moved = torch.cuda.CUDAGraph(), x.cuda()
    with torch.cuda.graph(graph):
        y = mix(*on_gpu, moved, choices, form, own)
    for numbers in (choose(8, "cpu")["numbers"], choose(8, "cpu")["numbers"].flip(0)):
        chosen["numbers"].copy_(numbers)
        graph.replay()
        on_host = Choices(numbers, choose(8, "cpu")["weights"])
        expected = mix(*on_cpu, x, on_host, form, None if given is None else Biases(*given)).double()
        assert float((y.double().cpu() - expected).norm() / expected.norm()) < 2**-6


@pytest.mark.gpu
def test_under_cuda_graph_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """A captured layer follows the input and the routing that are written afterwards."""
    monkeypatch.setenv(FP4_ACTIVATIONS.variable, "round")
    layer = products("W4A8_NVFP4_FP8", "cuda", torch.bfloat16)
    x, chosen = torch.randn(8, HIDDEN).to(torch.bfloat16).cuda(), choose(8, "cuda")
    choices = Choices(**chosen, factor=2.5)
    mix(*layer, x, choices)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = mix(*layer, x, choices)
    x.mul_(0.5)
    chosen["numbers"].copy_(chosen["numbers"].flip(0))
    y.fill_(float("nan"))
    graph.replay()
    assert torch.equal(y, mix(*layer, x, choices))


class OnGpu(torch.Tensor):
    """A tensor that says that it is on a GPU."""

    is_cuda = True


@pytest.mark.parametrize("algo", ["W4A8_MXFP4_FP8", "FP8"])
def test_swiglu_and_rounding_in_one_kernel(algo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same as one after the other, with the kernel's naive twin: under a scale for each row, and under a static one."""
    generator = torch.Generator().manual_seed(2)
    scheme, number = SCHEMES[algo], WEIGHT_FORMATS[SCHEMES[algo].weights[0]]
    static = {"input_scale": torch.tensor(0.01)} if algo == "FP8" else {}
    product = ExpertProduct(LayerScheme(algo, number, scheme.activation_format(static)), "here", "experts")
    experts = [[number.quantize(torch.randn(32, 64, generator=generator)) | static] for _ in range(3)]
    module = torch.nn.Module()
    product.prepare(module, "down", experts, 32, 64, 2)
    h = torch.randn(8, 128, generator=generator).to(torch.bfloat16)
    routing = Routing(torch.tensor([0, 1, 2, -1, 0, 2, 1, 1], dtype=torch.int32), 2)
    expected = product.apply(module, activate(h), routing, torch.float32)
    assert not product.rounds_gated(h)
    assert product.rounds_gated(h.as_subclass(OnGpu))
    assert not product.rounds_gated(torch.empty(1, 40000).as_subclass(OnGpu)), "more than the kernel holds"

    def naive(h: torch.Tensor, smoothing: torch.Tensor | None, scale: torch.Tensor | None, dtype: torch.dtype) -> Any:
        gated, values, row_scale = naive_swiglu_fp8(h, smoothing, scale)
        return gated, values.to(dtype), scale if row_scale is None else row_scale

    monkeypatch.setattr("sglang_modelopt_ext.layers.experts.swiglu_fp8", naive)
    assert torch.equal(product.apply_gated(module, h, routing, torch.float32), expected)
    product.rank_amax = lambda amax: amax
    assert not product.rounds_gated(h.as_subclass(OnGpu)), "the ranks' maxima are not known to the kernel"


@pytest.mark.parametrize("algo", ["W4A8_NVFP4_FP8", "W4A8_MXFP4_FP8", "NVFP4"])
def test_input_that_the_module_before_has_rounded(algo: str) -> None:
    """Taken as it is, through the view that a block of experts passes on, where one scale serves all experts in E4M3."""
    layer, first, _ = products(algo, "cpu", torch.bfloat16)
    x = torch.randn(6, HIDDEN, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    routing = Routing(choose(6, "cpu")["numbers"].reshape(-1).to(torch.int32), TOP_K)
    expected = first.apply(layer, x, routing, torch.float32)
    producer = Producer()
    observe(x, producer)
    assert torch.equal(first.apply(layer, x.view(-1, HIDDEN), routing, torch.float32), expected)
    if algo == "NVFP4":
        assert producer.wanted is None, "it is rounded in blocks"
        return
    assert producer.wanted is not None
    values, row_scale = naive_quantize_fp8(x, None, producer.wanted.static_scale, None)
    scale = producer.wanted.static_scale if row_scale is None else row_scale
    assert scale is not None
    hand_over(x, producer, producer.wanted, 2 * values, scale)
    assert torch.equal(first.apply(layer, x.view(-1, HIDDEN), routing, torch.float32), 2 * expected)
    first.rank_amax = lambda amax: amax
    hand_over(x, producer, producer.wanted, 2 * values, scale)
    assert torch.equal(first.apply(layer, x, routing, torch.float32), expected), "the ranks' maxima are not known to it"
