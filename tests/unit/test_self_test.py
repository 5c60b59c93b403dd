"""The self-test keeps a kernel that errs on this machine from serving."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence

import pytest
import torch
import triton

from sglang_modelopt_ext.backends import select, self_test
from sglang_modelopt_ext.backends.base import LinearRequest, ShardWeight
from sglang_modelopt_ext.backends.experts.base import ExpertRequest, ReferenceExperts
from sglang_modelopt_ext.backends.linear.dense import Dense, DenseWeight
from sglang_modelopt_ext.backends.linear.eight_bit import EightBit
from sglang_modelopt_ext.backends.linear.fp4 import MmaFp4
from sglang_modelopt_ext.device import Device
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.layers.experts import ExpertProduct
from sglang_modelopt_ext.layers.linear import LinearProduct
from sglang_modelopt_ext.schemes.base import LayerScheme
from sglang_modelopt_ext.schemes.table import SCHEMES
from sglang_modelopt_kernels.formats import WEIGHT_FORMATS
from sglang_modelopt_kernels.gemm.fp4_blackwell import naive_fp4_linear
from sglang_modelopt_kernels.gemm.w8_decode import ByteWeight


class Wrong(Dense):
    """A backend that errs in its last output for many tokens."""

    name = "wrong"

    def __init__(self, factor: float) -> None:
        super().__init__(torch.float32, ("cpu",))
        self.name = "wrong"
        self.factor = factor

    def matmul(self, *arguments: object) -> torch.Tensor:  # type: ignore[override]
        y = super().matmul(*arguments).clone()  # type: ignore[arg-type]
        if y.shape[0] > 100:
            y[-1] *= self.factor
        return y


class Blocks(MmaFp4):
    """A backend that multiplies codes on a CPU; with ``wrong``, every block by its neighbour's scale."""

    def __init__(self, wrong: bool) -> None:
        self.wrong = wrong

    def objection(self, request: LinearRequest) -> str | None:
        return super().objection(dataclasses.replace(request, target=Device.cuda(120)))

    def matmul_blocks(self, prepared, x, bias, out_dtype):  # type: ignore[no-untyped-def, override]
        scale = prepared.block_scale.roll(1, dims=1) if self.wrong else prepared.block_scale
        y = naive_fp4_linear(x, prepared.codes, scale, None) * prepared.out_scale.double()
        return (y if bias is None else y + bias.double()).to(out_dtype)


class Broken(Dense):
    """A backend that does not run."""

    def matmul(self, *arguments: object) -> torch.Tensor:  # type: ignore[override]
        raise RuntimeError("no kernel image is available\nfor execution on the device")


class Full(Dense):
    """A backend that runs out of memory."""

    def __init__(self) -> None:
        super().__init__(torch.float32, ("cpu",))
        self.name = "full"

    def matmul(self, *arguments: object) -> torch.Tensor:  # type: ignore[override]
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


class Flushed(Dense):
    """A backend that loses its smallest outputs, like a kernel that takes subnormal scales for zero."""

    def matmul(self, *arguments: object) -> torch.Tensor:  # type: ignore[override]
        y = super().matmul(*arguments).clone()  # type: ignore[arg-type]
        y[:, self_test.SIZES - 1 :: self_test.SIZES] = 0.0
        return y


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    self_test._passed.clear()
    yield
    self_test._passed.clear()


def request(algo: str, weight: str) -> LinearRequest:
    layer = LayerScheme(algo, WEIGHT_FORMATS[weight], SCHEMES[algo].activation_format())
    return LinearRequest(layer, Device.cpu(), 64, 256, dtype=torch.float32)


@pytest.mark.parametrize(("algo", "weight"), [(row.algo, weight) for row in SCHEMES.values() for weight in row.weights])
def test_what_serves_passes(algo: str, weight: str) -> None:
    asked = request(algo, weight)
    self_test.check_backend(select.candidates(asked, "layer")[0], asked, torch.device("cpu"))
    assert len(self_test._passed) == 1


BYTES = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "MXFP8", "W8A8_SQ_PER_CHANNEL", "W8A16")


def check_bytes(wrong: bool) -> list[str]:
    """Return the self-test's result for the 8-bit backend by recipe, in the interpreter; ``wrong`` negates its last row."""
    backend, found = EightBit(), []
    if wrong:
        prepare = backend.prepare

        def negated(shards: Sequence[ShardWeight]) -> ByteWeight:
            prepared = prepare(shards)
            prepared.out_scale[-1] *= -1
            return prepared

        backend.prepare = negated  # type: ignore[method-assign]
    backend.check_tokens = lambda prepared, request: (1, 24)  # type: ignore[method-assign]
    for algo in BYTES:
        for dtype in (torch.bfloat16, torch.float16):
            asked = dataclasses.replace(request(algo, SCHEMES[algo].weights[0]), target=Device.cuda(80), dtype=dtype)
            assert backend.supports(asked) is None
            try:
                self_test.check_backend(backend, asked, torch.device("cpu"))
                found.append("right")
            except ValueError as error:
                found.append(str(error))
    return found


@pytest.mark.parametrize("wrong", [False, True])
def test_8_bit_weights_in_the_interpreter(wrong: bool) -> None:
    script = f"import json; from tests.unit.test_self_test import check_bytes; print(json.dumps(check_bytes({wrong})))"
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 2 * len(BYTES)
    assert all(one.startswith("is wrong on cpu" if wrong else "right") for one in found), found


def test_defaults_of_the_caller_do_not_matter() -> None:
    """SGLang loads under its own default type and device."""
    asked = request("NVFP4", "nvfp4")
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device("meta"):
            self_test.check_backend(Dense(torch.float32, ("cpu",)), asked, torch.device("cpu"))
    finally:
        torch.set_default_dtype(previous)


@pytest.mark.parametrize("factor", [1.02, 0.98, float("nan"), float("inf"), -1.0])
def test_what_is_wrong_does_not(factor: float) -> None:
    with pytest.raises(ValueError, match=r"is wrong on cpu: relative error .* with 300 tokens"):
        self_test.check_backend(Wrong(factor), request("FP8", "fp8"), torch.device("cpu"))
    assert not self_test._passed


class Tail(Dense):
    """A backend that leaves out the last K elements where they are no whole tile."""

    def matmul(self, weight: DenseWeight, x: torch.Tensor, *rest: object) -> torch.Tensor:  # type: ignore[override]
        inside = torch.arange(x.shape[1]) < x.shape[1] // 128 * 128
        return super().matmul(weight, x * inside, *rest)  # type: ignore[arg-type]


def test_the_check_ends_within_a_tile_where_the_layer_does() -> None:
    backend, asked, device = Tail(torch.float32, ("cpu",)), request("NVFP4", "nvfp4"), torch.device("cpu")
    self_test.check_backend(backend, asked, device)
    for k in (1376, 2880, 336):
        with pytest.raises(ValueError, match="is wrong on cpu"):
            self_test.check_backend(backend, dataclasses.replace(asked, k=k), device)
    assert len(self_test._passed) == 1
    self_test.check_backend(Dense(torch.float32, ("cpu",)), dataclasses.replace(asked, k=336), device)
    assert len(self_test._passed) == 2


@pytest.mark.parametrize(("algo", "weight"), [("NVFP4", "nvfp4"), ("MXFP4", "mxfp4")])
def test_what_reads_codes(algo: str, weight: str) -> None:
    """A backend that reads codes gets activations in its own format, and its result is held to that format's values."""
    asked = dataclasses.replace(request(algo, weight), dtype=torch.bfloat16)
    assert Blocks(False).supports(asked) is None
    self_test.check_backend(Blocks(False), asked, torch.device("cpu"))
    with pytest.raises(ValueError, match="is wrong on cpu"):
        self_test.check_backend(Blocks(True), asked, torch.device("cpu"))


@pytest.mark.parametrize("algo", ["NVFP4_AWQ", "NVFP4_SVD", "MXFP4"])
def test_a_layer_whose_backend_reads_codes(algo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two shards with scales of their own, smoothing, bias and low rank, against the reference backend's result."""
    generator = torch.Generator().manual_seed(0)
    scheme = SCHEMES[algo]
    smoothing, rank = algo != "MXFP4", 4 if algo == "NVFP4_SVD" else 0
    activation = scheme.activation_format()
    layer = LayerScheme(algo, WEIGHT_FORMATS[scheme.weights[0]], activation, smoothing, rank)
    shards = []
    for scale in (0.002, 0.003):
        shard = layer.weight.quantize(torch.randn(32, 96, generator=generator) * scale)
        shard |= {"input_scale": torch.tensor(scale)} if activation and activation.tensors else {}
        shard |= {"pre_quant_scale": torch.rand(96, generator=generator) + 0.5} if smoothing else {}
        if rank:
            shard["svdquant_lora_a"] = torch.randn(rank, 96, generator=generator) * 0.1
            shard["svdquant_lora_b"] = torch.randn(32, rank, generator=generator) * 0.1
        shards.append(shard)
    x, bias = torch.randn(5, 96, generator=generator).bfloat16(), torch.randn(64, generator=generator).bfloat16()
    results = []
    for backend in (Blocks(False), Dense(torch.float32, ("cpu",))):
        monkeypatch.setattr(select, "BACKENDS", (backend,))
        product, module = LinearProduct(layer, "folder", "layer"), torch.nn.Module()
        product.prepare(module, shards, 64, 96)
        results.append(product.apply(module, x, bias).double())
        assert product.backend is backend
    error = (results[0] - results[1]).norm(dim=1) / results[1].norm(dim=1)
    assert float(error.max()) < 2**-8  # each rounded to bf16 once


@pytest.mark.parametrize(("algo", "weight"), [("NVFP4", "nvfp4"), ("W4A8_MXFP4_FP8", "mxfp4"), ("MXFP8", "mxfp8")])
def test_small_outputs_count(algo: str, weight: str) -> None:
    with pytest.raises(ValueError, match=r"is wrong on cpu: relative error 1 with 24 tokens"):
        self_test.check_backend(Flushed(torch.float32, ("cpu",)), request(algo, weight), torch.device("cpu"))


def test_block_scales_of_every_size() -> None:
    """Of the check's own layer: E4M3 block scales below the smallest normal number, and not only those."""
    seen: list[torch.Tensor] = []

    class Looking(Dense):
        def prepare(self, shards: Sequence[ShardWeight]) -> DenseWeight:
            seen.append(shards[0].tensors["weight_scale"].float())
            return super().prepare(shards)

    self_test.check_backend(Looking(torch.float32, ("cpu",)), request("NVFP4", "nvfp4"), torch.device("cpu"))
    assert float(seen[0].min()) < 2.0**-6 < 2.0**4 < float(seen[0].max())


def test_the_next_backend_serves(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    right = Dense(torch.float32, ("cpu",))
    stored = WEIGHT_FORMATS["fp8"].quantize(torch.randn(64, 256))
    product = LinearProduct(request("FP8", "fp8").scheme, "folder", "layer", dtype=torch.float32)
    stored["input_scale"] = torch.tensor(0.1)
    monkeypatch.setattr(select, "BACKENDS", (Wrong(2.0), right))
    product.prepare(torch.nn.Module(), [stored], 64, 256)
    assert product.backend is right
    assert ["rejected wrong: is wrong on cpu" in message for message in caplog.messages] == [True]
    monkeypatch.setattr(select, "BACKENDS", (Wrong(2.0), Broken(torch.float32, ("cpu",))))
    other = LinearProduct(request("FP8", "fp8").scheme, "folder", "layer", dtype=torch.float32)
    with pytest.raises(
        ModelOptExtError, match=r"wrong: is wrong on cpu.*; dense_float32: does not run on cpu: no kernel image"
    ):
        other.prepare(torch.nn.Module(), [stored], 64, 256)


def test_a_lack_of_memory_is_no_fault_of_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise ranks would serve one layer by different kernels, by what each had free."""
    stored = WEIGHT_FORMATS["fp8"].quantize(torch.randn(64, 256)) | {"input_scale": torch.tensor(0.1)}
    monkeypatch.setattr(select, "BACKENDS", (Full(), Dense(torch.float32, ("cpu",))))
    product = LinearProduct(request("FP8", "fp8").scheme, "folder", "layer", dtype=torch.float32)
    with pytest.raises(torch.OutOfMemoryError):
        product.prepare(torch.nn.Module(), [stored], 64, 256)


def expert_request(algo: str, weight: str) -> ExpertRequest:
    layer = LayerScheme(algo, WEIGHT_FORMATS[weight], SCHEMES[algo].activation_format())
    return ExpertRequest(layer, Device.cpu(), 64, 256, dtype=torch.float32, experts=2, top_k=1)


@pytest.mark.parametrize(("algo", "weight"), [(row.algo, weight) for row in SCHEMES.values() for weight in row.weights])
def test_what_serves_experts_passes(algo: str, weight: str) -> None:
    asked = expert_request(algo, weight)
    self_test.check_expert_backend(select.expert_candidates(asked, "layer")[0], asked, torch.device("cpu"))
    assert len(self_test._passed) == 1


class WrongExperts(ReferenceExperts):
    """A backend that errs for some experts, or some rows."""

    name = "wrong_experts"

    def __init__(self, fault: str) -> None:
        self.fault = fault

    def matmul(self, prepared, values, row_scale, routing, out_dtype):  # type: ignore[no-untyped-def]
        if self.fault == "last expert":
            routing = dataclasses.replace(routing, experts=torch.where(routing.experts == 3, 2, routing.experts))
        y = super().matmul(prepared, values, row_scale, routing, out_dtype)
        if self.fault == "no expert":
            y[routing.experts == -1] = 1e-3
        if self.fault == "shared rows" and values.shape[0] != routing.rows:
            y = y.flip(0)
        return y


@pytest.mark.parametrize("fault", ["last expert", "no expert", "shared rows"])
def test_what_is_wrong_for_some_experts_does_not(fault: str) -> None:
    with pytest.raises(ValueError, match="is wrong on cpu: relative error"):
        self_test.check_expert_backend(WrongExperts(fault), expert_request("FP8", "fp8"), torch.device("cpu"))
    assert not self_test._passed


def test_the_next_backend_serves_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ReferenceExperts()
    stored = WEIGHT_FORMATS["fp8"].quantize(torch.randn(64, 256)) | {"input_scale": torch.tensor(0.1)}
    for backends, served in (((WrongExperts("no expert"), right), True), ((WrongExperts("no expert"),), False)):
        monkeypatch.setattr(select, "EXPERT_BACKENDS", backends)
        product = ExpertProduct(expert_request("FP8", "fp8").scheme, "folder", "experts.w2", dtype=torch.float32)
        if served:
            product.prepare(torch.nn.Module(), "w2", [[stored], [stored]], 64, 256, 1)
            assert product.backend is right
        else:
            with pytest.raises(ModelOptExtError, match=r"experts\.w2\.weight: expected .* got wrong_experts: is wrong"):
                product.prepare(torch.nn.Module(), "w2", [[stored], [stored]], 64, 256, 1)


def test_a_race_in_one_launch_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product that does not repeat bit for bit is launched again and again, too, and held to float64 each time."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    expected, count = torch.ones(8, 4, dtype=torch.float64), 0

    def launch() -> torch.Tensor:
        nonlocal count
        count += 1
        return expected * (1 + 2.0**-9) ** (count % 2) * (100 if count == last else 1)

    last = self_test.REPEATS
    with pytest.raises(ValueError, match="is wrong on cuda: relative error 99 with 8 tokens"):
        self_test._compare_again(launch, expected, torch.device("cuda"), 8)
    last = 0
    self_test._compare_again(launch, expected, torch.device("cuda"), 8)
    assert count == 2 * self_test.REPEATS
    self_test._compare_again(launch, expected, torch.device("cpu"), 8)
    assert count == 2 * self_test.REPEATS


def w4a8(sizes: tuple[int, int]) -> LinearRequest:
    layer = LayerScheme("W4A8_NVFP4_FP8", WEIGHT_FORMATS["nvfp4_w4a8"], SCHEMES["W4A8_NVFP4_FP8"].activation_format())
    return LinearRequest(layer, Device.cuda(90), *sizes)


def check_racing() -> list[int]:
    """Check the racing kernel's numerics in the interpreter, where nothing is in flight; return the numbers of tokens."""
    from tests.support.racing import Racing

    backend, asked, tokens = Racing(waits=False), w4a8((128, 512)), []
    matmul = backend.matmul

    def counted(weight: object, values: torch.Tensor, *rest: object) -> torch.Tensor:
        tokens.append(values.shape[0])
        return matmul(weight, values, *rest)  # type: ignore[arg-type]

    backend.matmul = counted  # type: ignore[method-assign, assignment]
    assert backend.supports(asked) is None
    self_test.check_backend(backend, asked, torch.device("cpu"))
    return tokens


def test_the_racing_kernel_is_right_but_for_its_race() -> None:
    script = "import json; from tests.unit.test_self_test import check_racing; print(json.dumps(check_racing()))"
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {300, 900} <= set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(4096, 4096), (256, 768)])
def test_a_racing_kernel_does_not_get_a_layer(sizes: tuple[int, int]) -> None:
    """The kernel that raced, put back: found in 20 of 20 starts, and passed with a wait, so that nothing else is wrong with it."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the race is one of wgmma")
    if not triton.__version__.startswith("3.8."):
        pytest.skip("only Triton 3.8 compiles the kernel to the loop that raced")
    from tests.support.racing import Racing

    asked, device = w4a8(sizes), torch.device("cuda", 0)
    self_test.check_backend(Racing(waits=True), asked, device)
    found = []
    for _ in range(20):
        self_test._passed.clear()  # each round is a server's start
        try:
            self_test.check_backend(Racing(waits=False), asked, device)
            found.append("passed")
        except ValueError as error:
            found.append(str(error))
    assert sum("races on" in one or "is wrong on" in one for one in found) == 20, found


@pytest.mark.gpu
def test_a_shipped_kernel_without_its_wait_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before its results are looked at, which need not differ: what it was compiled to breaks the rule."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the race is one of wgmma")
    from sglang_modelopt_ext.backends.linear.block_scaled import BlockScaled

    launch = importlib.import_module("sglang_modelopt_kernels.gemm.w4_decode.launch")
    asked, device = w4a8((4096, 4096)), torch.device("cuda", 0)
    self_test.check_backend(BlockScaled(), asked, device)
    self_test._passed.clear()
    monkeypatch.setattr(launch, "needs_drain", lambda x: False)
    with pytest.raises(ValueError, match="was compiled to a race"):
        self_test.check_backend(BlockScaled(), asked, device)
