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

from sglang_modelopt_ext.backends.experts.base import NO_EXPERT
from sglang_modelopt_ext.env import FP4_ACTIVATIONS
from sglang_modelopt_ext.layers.experts import ExpertProduct
from sglang_modelopt_ext.layers.mixture import Choices, activate, add_choices, mix
from sglang_modelopt_ext.schemes.base import LayerScheme
from sglang_modelopt_ext.schemes.table import SCHEMES
from sglang_modelopt_kernels.formats import WEIGHT_FORMATS
from sglang_modelopt_kernels.moe.combine import combine, naive_combine
from sglang_modelopt_kernels.moe.swiglu import naive_swiglu, swiglu

TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
KERNELS = {"modelopt_ext.swiglu.default", "modelopt_ext.combine_experts.default"}
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


def both_ways() -> dict[str, list[float]]:
    """Return the largest differences of the kernels from PyTorch by type, in units in the last place, and those of sums."""
    h, y = samples()
    found = {}
    for name, dtype in TYPES.items():
        narrow = h.to(dtype)
        ulp = torch.finfo(dtype).eps
        by_torch, by_kernel = activate(narrow).double(), swiglu(narrow).double()
        summed, by_combine = add_choices(y, 3, None, dtype).double(), combine(y, 3, None, dtype).double()
        # A sum may cancel: relative to the magnitudes.
        size = naive_combine(y.abs(), 3)
        found[name] = [
            float(((by_torch - by_kernel).abs() / by_torch.abs().clamp(min=2.0**-14) / ulp).max()),
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
    expected = naive_swiglu(narrow)
    assert bool(((activate(narrow).double() - expected).abs() <= expected.abs() * (eps / 2 + 2**-21) + 2**-24).all())
    for factor in (None, 2.5):
        wide = naive_combine(y, 3) * (factor or 1.0)
        bound = naive_combine(y.abs(), 3) * (factor or 1.0) * (eps / 2 + 4 * 2.0**-24)
        assert bool(((add_choices(y, 3, factor, dtype).double() - wide).abs() <= bound).all())


def products(algo: str, device: str, dtype: torch.dtype) -> tuple[torch.nn.Module, ExpertProduct, ExpertProduct]:
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
    for name, n, k, shards in (("w13", INTERMEDIATE, HIDDEN, 2), ("w2", HIDDEN, INTERMEDIATE, 1)):
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
