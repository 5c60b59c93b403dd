"""The kernel for a layer: for every algorithm on every architecture, with the reasons of those rejected."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from sglang_modelopt_ext.backends.base import LinearRequest, ShardWeight, tensors_of
from sglang_modelopt_ext.backends.linear.fp4 import BlackwellFp4, MmaFp4
from sglang_modelopt_ext.backends.linear.mxfp4_blackwell import BlackwellMxfp4, WidenedMxfp4
from sglang_modelopt_ext.backends.linear.mxfp4_hopper import FoldedMxfp4
from sglang_modelopt_ext.backends.packages import VERSIONS
from sglang_modelopt_ext.backends.select import BACKENDS, candidates, served_scheme
from sglang_modelopt_ext.device import Device
from sglang_modelopt_ext.env import FP4_ACTIVATIONS, GEMM
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.schemes.base import LayerScheme
from sglang_modelopt_ext.schemes.table import SCHEMES
from sglang_modelopt_kernels.formats import WEIGHT_FORMATS
from sglang_modelopt_kernels.gemm.mxfp4_fp8_blackwell import pair_blocks
from sglang_modelopt_kernels.gemm.mxfp4_fp8_hopper import unfold
from sglang_modelopt_kernels.quantize.blocks import naive_unswizzle

BLOCK, FP8, BYTE = "triton_block_scaled", "fp8_scaled_mm", "triton_eight_bit"
BF16, FP32 = "dense_bfloat16", "dense_float32"
EXPECTED = {
    # algorithm: the kernel on SM80, and from SM89
    "W4A8_NVFP4_FP8": (BLOCK, BLOCK),
    "W4A8_MXFP4_FP8": (BLOCK, BLOCK),
    "W4A8_AWQ": (BLOCK, BLOCK),
    "MXFP4": (BLOCK, BLOCK),
    "NVFP4": (BLOCK, BLOCK),
    "NVFP4_AWQ": (BLOCK, BLOCK),
    "NVFP4_SVD": (BLOCK, BLOCK),
    "W4A16_NVFP4": (BLOCK, BLOCK),
    "W4A16_AWQ": (BLOCK, BLOCK),
    "FP8": (BYTE, FP8),
    "FP8_PER_CHANNEL_PER_TOKEN": (BYTE, FP8),
    "FP8_PB_WO": (BYTE, BYTE),
    "MXFP8": (BYTE, BYTE),
    "W8A8_SQ_PER_CHANNEL": (BYTE, BYTE),
    "W8A16": (BYTE, BYTE),
}


def request(algo: str, capability: int | None = 90, weight: str | None = None, **fields: object) -> LinearRequest:
    scheme = SCHEMES[algo]
    low_rank = 32 if scheme.low_rank else 0
    layer = LayerScheme(
        algo, WEIGHT_FORMATS[weight or scheme.weights[0]], scheme.activation_format(), low_rank=low_rank
    )
    device = Device.cpu() if capability is None else Device.cuda(capability)
    arguments = {"n": 4096, "k": 4096, "packages": {}} | fields
    return LinearRequest(served_scheme(layer, device), device, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("capability", [None, 80, 89, 90, 100, 103, 120])
def test_calibrated_mxfp4_has_the_kernels_of_the_preset(capability: int | None) -> None:
    """All of them take static FP8 activations as they take those scaled by token."""
    asked = request("W4A8_MXFP4_FP8", capability)
    by_token = [backend.name for backend in candidates(asked, "layer")]
    static = SCHEMES["W4A8_MXFP4_FP8"].activation_format(["input_scale"])
    asked = dataclasses.replace(asked, scheme=dataclasses.replace(asked.scheme, activation=static))
    assert asked.scheme.describe() == "W4A8_MXFP4_FP8 (weights mxfp4, activations fp8_static)"
    assert [backend.name for backend in candidates(asked, "layer")] == by_token


def test_every_algorithm_is_expected_somewhere() -> None:
    assert EXPECTED.keys() == SCHEMES.keys()


@pytest.mark.parametrize("capability", [80, 89, 90, 100, 103, 120])
@pytest.mark.parametrize("algo", EXPECTED)
def test_on_a_gpu(algo: str, capability: int) -> None:
    for weight in SCHEMES[algo].weights:
        expected = EXPECTED[algo][capability >= 89]
        if algo == "W4A8_MXFP4_FP8" and capability == 89:
            expected = "triton_mxfp4_folded"
        if algo in ("W4A8_NVFP4_FP8", "W4A8_MXFP4_FP8") and capability == 90:
            expected = "gluon_streamed"
        if algo == "W4A8_MXFP4_FP8" and capability in (100, 103):
            expected = "triton_mxfp4_tcgen05"
        if algo == "W4A8_MXFP4_FP8" and capability == 120:
            expected = "triton_mxfp4_mma"
        if algo in ("MXFP4", "NVFP4", "NVFP4_AWQ", "NVFP4_SVD") and capability >= 100:
            expected = "triton_fp4_mma" if capability == 120 else "triton_fp4_tcgen05"
        assert candidates(request(algo, capability, weight), "layer")[0].name == expected


@pytest.mark.parametrize("capability", [80, 89, 90, 100, 103, 120])
@pytest.mark.parametrize("algo", EXPECTED)
def test_with_the_packages_of_sglang(algo: str, capability: int) -> None:
    """FlashInfer comes first on Blackwell, where nothing of ours has run; on SM90 nothing comes before what is measured."""
    weight = SCHEMES[algo].weights[0]
    names = [backend.name for backend in candidates(request(algo, capability, weight, packages=VERSIONS), "layer")]
    ours = [backend.name for backend in candidates(request(algo, capability, weight), "layer")]
    expected = None
    if capability >= 100:
        mxfp4 = "flashinfer_mm_fp4" if capability < 110 else None
        fp4 = dict.fromkeys(("NVFP4", "NVFP4_AWQ"), "flashinfer_mm_fp4") | {"NVFP4_SVD": "flashinfer_svdquant"}
        weight_only = {"W4A16_NVFP4": "flashinfer_mm_bf16_fp4"} if capability < 110 else {}
        expected = (fp4 | weight_only | {"MXFP8": "flashinfer_mm_mxfp8", "MXFP4": mxfp4}).get(algo)
    assert names[0] == (expected or ours[0])
    assert [name for name in names if not name.startswith(("flashinfer", "humming", "quack"))] == ours
    assert ("humming_mxfp4_fp8" in names) == (algo == "W4A8_MXFP4_FP8" and capability in (89, 90))
    served = request(algo, 90).scheme
    weight_only_on_hopper = capability == 90 and served.activation is None and not served.low_rank
    assert ("quack_w4a16" in names) == (weight_only_on_hopper and weight.startswith("nvfp4"))


@pytest.mark.parametrize("algo", EXPECTED)
def test_on_a_cpu(algo: str) -> None:
    names = [backend.name for backend in candidates(request(algo, None), "layer")]
    assert names == [FP32]


@pytest.mark.parametrize(
    ("algo", "fields", "name"),
    [
        ("W4A8_NVFP4_FP8", {"math": "fp8"}, FP8),
        ("W4A8_NVFP4_FP8", {"math": "fp8", "capability": 80}, BYTE),
        ("W4A8_NVFP4_FP8", {"vocabulary": True}, BLOCK),
        ("W4A8_MXFP4_FP8", {"vocabulary": True}, BLOCK),
        ("NVFP4", {"vocabulary": True, "capability": 100}, BLOCK),
        ("W4A8_NVFP4_FP8", {"k": 4104}, BF16),
        ("W4A8_NVFP4_FP8", {"capability": 75}, BF16),
        ("W4A16_NVFP4", {"dtype": torch.float32}, FP32),
        ("W4A16_AWQ", {"vocabulary": True}, BLOCK),
        ("NVFP4", {"capability": 100, "dtype": torch.float32}, BLOCK),
        ("NVFP4", {"capability": 110}, BLOCK),
        ("W4A8_MXFP4_FP8", {"capability": 120, "k": 4128}, BLOCK),
        ("FP8", {"n": 4104}, BYTE),
        ("FP8", {"dtype": torch.float32}, BYTE),
        ("FP8", {"vocabulary": True}, FP8),
        ("FP8", {"vocabulary": True, "capability": 80}, BYTE),
        ("MXFP8", {"vocabulary": True}, BYTE),
        ("MXFP8", {"dtype": torch.float32}, BYTE),
        ("MXFP8", {"dtype": torch.float16}, BYTE),
        ("MXFP8", {"capability": 75}, BF16),
        ("W8A8_SQ_PER_CHANNEL", {"dtype": torch.float32}, BYTE),
        ("W8A8_SQ_PER_CHANNEL", {"k": 131072}, BF16),
        ("W8A16", {"dtype": torch.float16}, BYTE),
        ("W8A16", {"dtype": torch.float32}, FP32),
        ("FP8_PB_WO", {"dtype": torch.float16}, BYTE),
        ("FP8_PB_WO", {"dtype": torch.float32}, FP32),
        ("FP8_PB_WO", {"k": 4104}, FP32),
    ],
)
def test_where_the_first_choice_does_not_fit(algo: str, fields: dict[str, object], name: str) -> None:
    assert candidates(request(algo, **fields), "layer")[0].name == name  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("setting", "capability", "rounds"),
    [
        ("auto", None, True),
        ("auto", 90, False),
        ("auto", 100, True),
        ("round", 90, True),
        ("keep", 100, False),
        ("keep", None, False),
    ],
)
def test_fp4_activations(monkeypatch: pytest.MonkeyPatch, setting: str, capability: int | None, rounds: bool) -> None:
    monkeypatch.setenv(FP4_ACTIVATIONS.variable, setting)
    for algo, scheme in SCHEMES.items():
        served = request(algo, capability).scheme.activation
        if scheme.activation in ("nvfp4_dynamic", "mxfp4_dynamic"):
            assert (served is not None) == rounds
        else:
            assert (served.name if served else None) == scheme.activation


@pytest.mark.parametrize(
    ("exponents", "holds"),
    [((117, 117), (True, True)), ((1, 1), (True, False)), ((100, 201), (False, True)), ((1, 202), (False, False))],
)
def test_a_backend_may_refuse_by_values(exponents: tuple[int, int], holds: tuple[bool, bool]) -> None:
    """MXFP8 scales of a row too far apart for its own backend, and those that are not exact in bf16, go to the next one."""
    scheme = request("MXFP8", 80).scheme
    codes = torch.arange(128, dtype=torch.uint8).clamp(max=126).view(torch.float8_e4m3fn).repeat(2, 1)
    stored = {"weight": codes, "weight_scale": torch.tensor([exponents * 2] * 2, dtype=torch.uint8)}
    backends = candidates(request("MXFP8", 80), "layer")
    assert [backend.name for backend in backends] == [BYTE, BF16, FP32]
    expected = scheme.weight.decode(stored).unit
    for backend, held in zip(backends, (*holds, True), strict=True):
        if held:
            prepared = backend.prepare([ShardWeight(scheme.weight, stored)])
            rows = backend.rows(prepared, torch.arange(2))
            assert torch.equal(rows, expected)
        else:
            with pytest.raises(ValueError, match=r"not exact in torch|span 2\^"):
                backend.prepare([ShardWeight(scheme.weight, stored)])


def test_shards_apart_may_be_too_uneven() -> None:
    """A fused layer fits, but not a shard of it that has an input scale of its own."""
    backend = candidates(request("FP8", n=48), "layer")[0]
    assert backend.name == FP8
    stored = WEIGHT_FORMATS["fp8"].quantize(torch.randn(24, 256))
    with pytest.raises(ValueError, match=r"^24 rows of shards"):
        backend.prepare([ShardWeight(WEIGHT_FORMATS["fp8"], stored)])


def test_operands_hold_the_activations() -> None:
    # SM110 rounds FP4 activations and has no backend that reads their codes.
    operand = {algo: candidates(request(algo, 110), "layer")[0].operand(request(algo, 110)) for algo in EXPECTED}
    older = request("W4A8_NVFP4_FP8", 80)
    assert candidates(older, "layer")[0].operand(older) == operand["NVFP4"] == torch.float16
    assert operand["W4A8_NVFP4_FP8"] == torch.float8_e4m3fn
    assert operand["MXFP4"] == operand["W4A16_NVFP4"] == torch.bfloat16  # MXFP4's exponents are those of bf16
    assert operand["FP8"] == torch.float8_e4m3fn
    assert operand["MXFP8"] == operand["W8A16"] == operand["FP8_PB_WO"] == torch.bfloat16
    assert operand["W8A8_SQ_PER_CHANNEL"] == torch.int8
    older = request("FP8", 80)
    assert candidates(older, "layer")[0].operand(older) == torch.float16
    codes = request("NVFP4", 100)
    assert candidates(codes, "layer")[0].operand(codes) == torch.uint8


def test_an_override(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(GEMM.variable, f"{FP32},{BLOCK}")
    assert candidates(request("W4A8_NVFP4_FP8"), "layer")[0].name == FP32
    monkeypatch.setenv(GEMM.variable, BLOCK)
    with pytest.raises(
        ModelOptExtError, match=r"layer: FP8: expected .* got triton_block_scaled fp8 weights have no 4-bit blocks"
    ):
        candidates(request("FP8"), "layer")
    monkeypatch.setenv(GEMM.variable, "cutlass")
    with pytest.raises(ModelOptExtError, match=r"SGLANG_MODELOPT_EXT_GEMM: expected names among .*, got cutlass"):
        candidates(request("FP8"), "layer")


def test_the_fold_and_what_is_left_to_take_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """MXFP4 x FP8 is folded before Blackwell; the block-scaled product comes next, for rows that E4M3 cannot hold.

    Whole tiles are streamed on SM90; what they hold is the same.
    """
    folded = "triton_mxfp4_folded"
    names = [backend.name for backend in candidates(request("W4A8_MXFP4_FP8", 90), "layer")]
    assert names[:3] == ["gluon_streamed", folded, BLOCK]
    for n, k in ((96, 256), (64, 320)):
        part = dataclasses.replace(request("W4A8_MXFP4_FP8", 90), n=n, k=k)
        assert candidates(part, "layer")[0].name == folded
    monkeypatch.setenv(GEMM.variable, f"{folded},{BLOCK}")
    for algo, capability, first in (
        ("W4A8_MXFP4_FP8", 89, folded),
        ("W4A8_MXFP4_FP8", 90, folded),
        ("W4A8_MXFP4_FP8", 80, BLOCK),
        ("W4A8_NVFP4_FP8", 90, BLOCK),
        ("MXFP4", 90, BLOCK),
    ):
        assert candidates(request(algo, capability), "layer")[0].name == first


def test_mxfp4_backends_keep_the_weight() -> None:
    """Two shards through ``prepare``: what each backend keeps is the stored weight, in its order."""
    weight = WEIGHT_FORMATS["mxfp4"]
    generator = torch.Generator().manual_seed(0)
    stored = [weight.quantize(torch.randn(n, 128, generator=generator) * n) for n in (16, 8)]
    expected = torch.cat([weight.decode(shard).unit for shard in stored])
    shards = [ShardWeight(weight, shard) for shard in stored]
    folded = FoldedMxfp4().prepare(shards)
    assert torch.equal((unfold(folded) * folded.out_scale.unsqueeze(1)).float(), expected)
    plain, paired = BlackwellMxfp4().prepare(shards), WidenedMxfp4().prepare(shards)
    scale = naive_unswizzle(plain.block_scale, 24, 4)
    assert torch.equal(weight.decode({"weight": plain.codes, "weight_scale": scale}).unit, expected)
    assert torch.equal(paired.codes, pair_blocks(plain.codes))
    assert torch.equal(paired.block_scale, scale)
    for backend, block_scale in ((BlackwellFp4(), plain.block_scale), (MmaFp4(), scale)):
        fp4 = backend.prepare(shards)
        assert torch.equal(fp4.codes, plain.codes)
        assert torch.equal(fp4.block_scale, block_scale)
        assert bool((fp4.out_scale == 1).all())


@pytest.mark.parametrize("vocabulary", [False, True], ids=["layer", "vocabulary"])
@pytest.mark.parametrize("capability", [80, 89, 90, 100, 103, 120])
@pytest.mark.parametrize("algo", EXPECTED)
def test_weights_keep_their_stored_size(algo: str, capability: int, vocabulary: bool) -> None:
    """Any GPU holds a layer of two shards in at most 3 % more bytes than the checkpoint, vocabularies too."""
    for name in SCHEMES[algo].weights:
        weight, sizes = WEIGHT_FORMATS[name], (256, 192)
        asked = request(algo, capability, name, n=sum(sizes), k=1024, vocabulary=vocabulary)
        generator = torch.Generator().manual_seed(0)
        stored = [weight.quantize(torch.randn(n, 1024, generator=generator)) for n in sizes]
        backend = candidates(asked, "layer")[0]
        prepared = backend.prepare([ShardWeight(weight, shard) for shard in stored])
        held = sum(tensor.nbytes for tensor in tensors_of(prepared).values())
        assert held <= 1.03 * sum(tensor.nbytes for shard in stored for tensor in shard.values()), backend.name


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("algo", EXPECTED)
def test_rows_of_a_vocabulary(algo: str, capability: int) -> None:
    """An embedding looks up the decoded weight, for indices of any shape and none."""
    for name in SCHEMES[algo].weights:
        weight = WEIGHT_FORMATS[name]
        stored = weight.quantize(torch.randn(192, 256, generator=torch.Generator().manual_seed(0)))
        asked = request(algo, capability, name, n=192, k=256, vocabulary=True)
        backend = candidates(asked, "layer")[0]
        assert backend.name in (BLOCK, FP8, BYTE)
        prepared = backend.prepare([ShardWeight(weight, stored)])
        expected = weight.decode(stored).dequantize()
        for indices in (torch.tensor([[191, 0, 7], [130, 64, 7]]), torch.zeros(0, dtype=torch.int64)):
            rows = backend.rows(prepared, indices)
            assert rows.dtype == torch.float32
            torch.testing.assert_close(rows, expected[indices], rtol=2.0**-22, atol=0)


def test_fp4_keeps_the_scales_of_its_shards() -> None:
    weight = WEIGHT_FORMATS["nvfp4"]
    stored = [weight.quantize(torch.randn(n, 64, generator=torch.Generator().manual_seed(n)) * n) for n in (16, 8)]
    kept = BlackwellFp4().prepare([ShardWeight(weight, shard) for shard in stored])
    assert (
        kept.out_scale.tolist() == [float(stored[0]["weight_scale_2"])] * 16 + [float(stored[1]["weight_scale_2"])] * 8
    )
    stored[1]["weight_scale"].view(torch.uint8)[0, 0] = 0x81  # negative, which the instruction would not see
    with pytest.raises(ValueError, match="a block scale is NaN or negative"):
        BlackwellFp4().prepare([ShardWeight(weight, shard) for shard in stored])


def test_every_reason_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    impossible = dataclasses.replace(request("FP8", None), target=Device.other("xpu"))
    with pytest.raises(ModelOptExtError) as caught:
        candidates(impossible, "layer")
    assert all(backend.name in str(caught.value) for backend in BACKENDS)
