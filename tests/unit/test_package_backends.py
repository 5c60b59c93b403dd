"""Backends of other packages' kernels, with a kernel in PyTorch in place of each: it checks its arguments with the package's own
checks, reads scales and codes in the package's order, and computes in float64.
"""

from __future__ import annotations

import dataclasses
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from sglang_modelopt_ext.backends import packages, select, self_test
from sglang_modelopt_ext.backends.base import Backend, BlockBackend, LinearRequest, ShardWeight, round_to_blocks
from sglang_modelopt_ext.backends.linear.flashinfer import FlashInferFp4, FlashInferMxfp8, FlashInferSvdquant
from sglang_modelopt_ext.backends.linear.humming import Humming, layer_config
from sglang_modelopt_ext.backends.linear.weight_only import FlashInferWeightOnly, QuackWeightOnly
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.layers.linear import LinearProduct
from sglang_modelopt_ext.schemes.base import LORA_A, LORA_B, LayerScheme
from sglang_modelopt_ext.schemes.table import SCHEMES
from sglang_modelopt_ext.tuning.run import random_shard
from sglang_modelopt_kernels.formats import WEIGHT_FORMATS, e2m1, e4m3, ue8m0
from sglang_modelopt_kernels.formats.base import BlockActivation
from sglang_modelopt_kernels.formats.checks import scale_blocks
from sglang_modelopt_kernels.gemm.reference import naive_linear
from tests.support.contracts import evaluate

GEMM, WEIGHT_ONLY = "flashinfer/gemm/gemm_base.py", "flashinfer/gemm/gemm_bf16_fp4.py"
NVFP4_UTILS = "quack/blockscaled/nvfp4_utils.py"


class SfLayout:
    layout_128x4, layout_8x4, layout_linear = range(3)


def unswizzled(scale: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    (function,) = evaluate(WEIGHT_ONLY, "_unswizzle_sf_128x4", torch=torch)
    result: torch.Tensor = function(scale, rows, columns)
    return result


def scales(stored: torch.Tensor, mx: bool) -> torch.Tensor:
    return ue8m0.decode(stored) if mx else e4m3.decode(stored.view(torch.float8_e4m3fn))


def fp4(codes: torch.Tensor, scale: torch.Tensor, mx: bool) -> torch.Tensor:
    """Packed codes ``[R, K / 2]`` and swizzled scales as float64 ``[R, K]``."""
    rows, k = codes.shape[0], 2 * codes.shape[1]
    linear = unswizzled(scale, rows, k // (32 if mx else 16))
    return scale_blocks(e2m1.decode(e2m1.unpack_codes(codes)), scales(linear, mx)).double()


def mm_fp4(a: torch.Tensor, b: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    check = evaluate(
        GEMM,
        "_check_mm_fp4_problem_size",
        torch=torch,
        get_native_fp4_dtype=lambda: torch.float4_e2m1fn_x2,
    )[0]
    assert check(a, b, *args, **kwargs)
    a_descale, b_descale, alpha, out_dtype = args
    mx = not kwargs["use_nvfp4"]
    assert alpha.numel() == 1
    assert a.is_contiguous()
    assert b.T.is_contiguous()
    assert a_descale.is_contiguous()
    assert b_descale.T.is_contiguous()
    y = fp4(a, a_descale, mx) @ fp4(b.T, b_descale.T, mx).T
    return (y * alpha.double()).to(out_dtype)


def mm_nvfp4_svdquant(
    a: torch.Tensor,
    b: torch.Tensor,
    a_sf: torch.Tensor,
    b_sf: torch.Tensor,
    alpha: torch.Tensor,
    d: torch.Tensor,
    l1: torch.Tensor,
    backend: str,
) -> torch.Tensor:
    """``alpha * (a @ b^T + d @ l1^T)``."""
    check = evaluate(
        "flashinfer/gemm/gemm_svdquant.py",
        "_check_mm_nvfp4_svdquant_problem",
        "_swizzled_sf_size",
        "_pad_up",
        torch=torch,
        SVDQUANT_LORA_RANK_GRANULARITY=32,
    )[0]
    assert check(a, b, a_sf, b_sf, alpha, d, l1, backend=backend)
    y = fp4(a, a_sf, False) @ fp4(b, b_sf, False).T + d.double() @ l1.double().T
    return (y * alpha.double()).to(torch.bfloat16)


def mm_mxfp8(a: torch.Tensor, b: torch.Tensor, a_descale: Any, b_descale: Any, **kwargs: Any) -> torch.Tensor:
    check = evaluate(
        GEMM,
        "_check_mm_mxfp8_problem_size",
        "_mxfp8_swizzled_scale_len",
        "_pad_up",
        "_validate_mxfp8_output_dtype",
        torch=torch,
        SfLayout=SfLayout,
    )[0]
    assert check(a, b, a_descale, b_descale, **kwargs)
    assert a.is_contiguous()
    assert b.T.is_contiguous()

    def numbers(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        linear = unswizzled(scale, codes.shape[0], codes.shape[1] // 32)
        return scale_blocks(e4m3.decode(codes), ue8m0.decode(linear)).double()

    return (numbers(a, a_descale) @ numbers(b.T, b_descale).T).to(kwargs["out_dtype"])


def prepare_bf16_fp4_weights(
    b: torch.Tensor, b_descale: torch.Tensor, alpha: torch.Tensor, *, backend: str, block_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """SM100's: the weight as it is, and a view of the scales in the kernel's order."""
    function = evaluate(WEIGHT_ONLY, "prepare_bf16_fp4_weights", torch=torch)[0]
    with pytest.raises(ValueError, match="Unknown backend 'none'"):  # the checks before the backends
        function(b, b_descale, alpha, backend="none", block_size=block_size)
    (view, _) = evaluate("flashinfer/cute_dsl/utils.py", "convert_sf_to_mma_layout", "ceil_div", torch=torch)
    n, k = b.shape[0], 2 * b.shape[1]
    return b, view(b_descale, m=n, k=k, num_groups=1, sf_vec_size=block_size), alpha


def mm_bf16_fp4(
    a: torch.Tensor, b: torch.Tensor, b_descale: torch.Tensor, alpha: torch.Tensor, **kwargs: Any
) -> torch.Tensor:
    (check,) = evaluate(WEIGHT_ONLY, "_check_mm_bf16_fp4_problem_size", torch=torch)
    assert check(a, b, b_descale, alpha, **kwargs)
    rows, k = b.shape[0], 2 * b.shape[1]
    outer, inner, row_tile, column, column_tile = torch.meshgrid(
        *(torch.arange(size) for size in b_descale.shape[:5]), indexing="ij"
    )
    linear = torch.zeros(row_tile.max() * 128 + 128, column_tile.max() * 4 + 4)
    linear[row_tile * 128 + inner * 32 + outer, column_tile * 4 + column] = b_descale[..., 0].float()
    weight = scale_blocks(e2m1.decode(e2m1.unpack_codes(b)), linear[:rows, : k // 16])
    return (a.double() @ weight.double().T * alpha.double()).to(kwargs["out_dtype"])


def prepare_w4_weight(q: torch.Tensor, sf: torch.Tensor, wformat: str) -> tuple[torch.Tensor, torch.Tensor]:
    pad, weight, scale = (
        evaluate("quack/operand_transform/formats/__init__.py", "_pad_n128", torch=torch)[0],
        *evaluate(NVFP4_UTILS, "repack_nvfp4_weight", "repack_nvfp4_sf", torch=torch),
    )
    assert wformat == "nvfp4"
    q, sf = pad(q, sf)
    return weight(q), scale(sf)


def unpacked(repack: Callable[[torch.Tensor], torch.Tensor], packed: torch.Tensor, rows: int, columns: int) -> Any:
    """The bytes that ``repack`` put into ``packed``, in their places: it is told where each went, a byte of the place at a time."""
    place = torch.arange(rows * columns).view(rows, columns)
    parts = [repack((place >> shift & 255).to(torch.uint8)).long() << shift for shift in (0, 8, 16)]
    result = torch.zeros(rows * columns, dtype=torch.uint8)
    result[torch.stack(parts).sum(0).flatten()] = packed.flatten()
    return result.view(rows, columns)


def gemm_w4a16(
    act: torch.Tensor, blob: torch.Tensor, sf: torch.Tensor, tensor_scale: torch.Tensor, n_out: int, wformat: str
) -> torch.Tensor:
    weight, scale = evaluate(NVFP4_UTILS, "repack_nvfp4_weight", "repack_nvfp4_sf", torch=torch)
    k = act.shape[1]
    assert wformat == "nvfp4"
    assert act.dtype == torch.bfloat16
    assert act.is_contiguous()
    assert tensor_scale.shape == (1,)
    assert tensor_scale.dtype == torch.float32
    rows = blob.shape[0] * 64
    codes = unpacked(weight, blob, rows, k // 2)
    linear = unpacked(scale, sf, rows, k // 16).view(torch.float8_e4m3fn)
    numbers = scale_blocks(e2m1.decode(e2m1.unpack_codes(codes)), e4m3.decode(linear)).double()
    return (act.double() @ numbers.T * tensor_scale.double()).to(torch.bfloat16)[:, :n_out]


def process_mxfp4_w4a8_weight(weight: torch.Tensor, offsets: torch.Tensor, inplace: bool) -> torch.Tensor:
    """Codes under a scale that was raised by ``offsets``: those that are exact."""
    assert inplace
    codes = e2m1.unpack_codes(weight.view(torch.uint8))
    lowered = scale_blocks(e2m1.decode(codes), torch.exp2(-offsets.view(codes.shape[0], -1).float()))
    weight.view(torch.uint8).copy_(e2m1.pack_codes(e2m1.encode(lowered)))
    return weight


def transform_humming_tensors(config: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Folds the exponents with humming's own function, and leaves everything in its place."""
    (fold,) = evaluate(
        "humming/transform.py",
        "process_fused_e8m0_scale",
        torch=torch,
        dtypes=types.SimpleNamespace(int8="int8", float8e4m3="float8e4m3"),
        WeightScale2Type=types.SimpleNamespace(CHANNEL="channel"),
        ops=types.SimpleNamespace(process_mxfp4_w4a8_weight=process_mxfp4_w4a8_weight),
    )
    ones = torch.ones(config.shape_n, dtype=torch.bfloat16)
    weight, scale, scale_2 = fold(config, tensors["weight"], tensors["weight_scale"], ones)
    return {"weight": weight, "weight_scale": scale, "weight_scale_2": scale_2.to(torch.bfloat16)}


def prepare_layer_config(**arguments: Any) -> Any:
    assert arguments["torch_dtype"] == torch.bfloat16
    assert arguments["weight_schema"] == {
        "b_dtype": "float4e2m1",
        "bs_dtype": "float8e8m0",
        "weight_scale_group_size": 32,
        "weight_scale_2_type": "channel",
    }
    return types.SimpleNamespace(
        num_experts=0,
        weight_scale_2_type="channel",
        shape_n=arguments["shape_n"],
        a_dtype=arguments["input_schema"]["a_dtype"],
    )


def humming_forward(
    config: Any,
    inputs: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_scale_2: torch.Tensor,
    input_scale: torch.Tensor,
    locks: torch.Tensor,
) -> torch.Tensor:
    """A code times 2^scale is what humming keeps in E4M3: its exponent is at most 12, of which the last is for code 6 alone."""
    assert inputs.dtype == torch.float8_e4m3fn
    assert input_scale.shape == (inputs.shape[0], 1)
    assert input_scale.dtype == torch.float32
    assert locks.dtype == torch.int32
    assert not locks.any()
    exponent = weight_scale.view(torch.uint8).float()
    used = scale_blocks(torch.ones(weight.shape[0], 8 * weight.shape[1]), exponent)
    numbers = e2m1.decode(e2m1.unpack_codes(weight.view(torch.uint8)))
    folded = numbers * torch.exp2(used - 7)  # into the range of E4M3
    assert torch.equal(e4m3.round_to_e4m3(folded), folded)
    y = inputs.double() @ (folded.double() * 2.0**7 * weight_scale_2.double()[:, None]).T
    return (y * input_scale.double()).to(torch.bfloat16)


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    if request.node.get_closest_marker("gpu"):  # the packages' own
        yield
        return
    monkeypatch.setitem(
        sys.modules,
        "flashinfer",
        module("flashinfer", mm_fp4, mm_nvfp4_svdquant, mm_mxfp8, mm_bf16_fp4, prepare_bf16_fp4_weights),
    )
    monkeypatch.setitem(sys.modules, "humming", module("humming"))
    schemas = module("humming.schema")
    schemas.HummingWeightSchema = schemas.HummingInputSchema = dict  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "humming.schema", schemas)
    transform = module("humming.transform", prepare_layer_config, transform_humming_tensors)
    monkeypatch.setitem(sys.modules, "humming.transform", transform)
    monkeypatch.setitem(sys.modules, "humming.forward", module("humming.forward", humming_forward))
    layer_config.cache_clear()
    monkeypatch.setitem(sys.modules, "quack", module("quack"))
    monkeypatch.setitem(sys.modules, "quack.gemm_w4", module("quack.gemm_w4", gemm_w4a16, prepare_w4_weight))
    self_test._passed.clear()
    yield
    self_test._passed.clear()


def module(name: str, *functions: Callable[..., Any]) -> types.ModuleType:
    made = types.ModuleType(name)
    for function in functions:
        setattr(made, function.__name__, function)
    return made


def asked_for(algo: str, weight: str | None = None, capability: int = 100, **fields: Any) -> LinearRequest:
    scheme = SCHEMES[algo]
    layer = LayerScheme(
        algo,
        WEIGHT_FORMATS[weight or scheme.weights[0]],
        scheme.activation_format(),
        low_rank=fields.pop("low_rank", 0),
    )
    arguments = {"n": 128, "k": 512, "packages": packages.VERSIONS} | fields
    return LinearRequest(layer, "cuda", capability, **arguments)


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
    """It is a reason at dispatch, and where the package is there but does not load, one at the check."""
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
    """As ModelOpt exports them, with one global scale or with one each."""
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
    """Merged where they have one global scale, and refused where they do not."""
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
    """Every code under every exponent of a row, exactly, or a refusal; an empty block may have any exponent."""
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
        if isinstance(backend, Humming):
            # Its blocks add their parts in the order in which they finish: one rounding to bf16 apart, seen on an H100.
            assert float((replayed.double() - again.double()).norm() / again.double().norm()) < 2**-8
        else:
            assert torch.equal(replayed, again)
