"""Every registered weight format: a new one is covered here as soon as it has its row in NAIVE and in BOUNDS."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from sglang_modelopt_kernels.formats import ACTIVATION_FORMATS, WEIGHT_FORMATS, e2m1, register
from sglang_modelopt_kernels.formats.base import DecodedWeight, TensorSpec, ValueRule, WeightFormat
from sglang_modelopt_kernels.formats.nvfp4 import round_unit_to_e4m3

Tensors = dict[str, torch.Tensor]
Bound = Callable[[torch.Tensor], torch.Tensor]

every_format = pytest.mark.parametrize("number_format", WEIGHT_FORMATS.values(), ids=WEIGHT_FORMATS)

# (N, K) that each format can hold: the smallest, one that is odd or uneven in every free direction, a plain one.
SHAPES = {
    "nvfp4": [(1, 16), (3, 48), (8, 256)],
    "nvfp4_bs32": [(1, 32), (3, 96), (8, 256)],
    "nvfp4_w4a8": [(1, 32), (3, 96), (8, 256)],
    "mxfp4": [(1, 32), (3, 96), (8, 256)],
    "mxfp8": [(1, 32), (3, 96), (8, 256)],
    "fp8": [(1, 1), (3, 37), (8, 256)],
    "fp8_per_channel": [(1, 1), (3, 37), (8, 256)],
    "fp8_block": [(1, 1), (130, 37), (8, 256)],
    "int8_per_channel": [(1, 1), (3, 37), (8, 256)],
    "int4_awq": [(2, 128), (6, 384), (8, 256)],
    "int4_awq_w4a8": [(2, 128), (6, 384), (8, 256)],
}
every_shape = pytest.mark.parametrize(
    ("number_format", "shape"),
    [(WEIGHT_FORMATS[name], shape) for name in WEIGHT_FORMATS for shape in SHAPES[name]],
    ids=[f"{name}-{n}x{k}" for name in WEIGHT_FORMATS for n, k in SHAPES[name]],
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_weight(n: int, k: int, seed: int = 0) -> torch.Tensor:
    """Gaussian float32 with some zeros, some outliers and channels of very different size."""
    g = generator(seed)
    weight = torch.randn(n, k, generator=g) * torch.randn(n, 1, generator=g).mul(2).exp()
    weight[torch.rand(n, k, generator=g) < 0.05] = 0.0
    weight[torch.rand(n, k, generator=g) < 0.01] *= 30
    weight[0, 0] = 1.0  # never all zero
    return weight


def random_tensors(number_format: WeightFormat, n: int, k: int) -> Tensors:
    """Any legal content for the tensors of a format, straight from its declaration."""
    return {spec.name: _random_tensor(spec, spec.shape(n, k)) for spec in number_format.tensors}


def _random_tensor(spec: TensorSpec, shape: tuple[int, ...]) -> torch.Tensor:
    dtype = spec.dtypes[0]
    # Seeded by the name, so that the tensors of one format differ.
    raw = torch.randint(0, 256, shape, generator=generator(sum(spec.name.encode())), dtype=torch.uint8)
    match spec.values:
        case ValueRule.CODES:
            return raw.view(dtype)
        case ValueRule.POSITIVE:
            return (raw.to(torch.float64) / 37 + 2.0**-9).to(dtype)
        case ValueRule.BLOCK_SCALE_E4M3:
            return (raw % 0x7F).view(dtype)
        case ValueRule.BLOCK_SCALE_UE8M0:
            return raw % 240  # up to 448 * 2^112: no overflow of float32
        case ValueRule.FINITE:
            return torch.where(raw & 0x7F == 0x7F, 0, raw).view(dtype)


# ---- decode, against one Python number at a time -------------------------------------------------------------------

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def e2m1_at(packed: torch.Tensor, n: int, k: int) -> float:
    byte = int(packed[n, k // 2])
    code = byte % 16 if k % 2 == 0 else byte // 16
    return E2M1[code % 8] * (-1 if code >= 8 else 1)


def e4m3_of(byte: int) -> float:
    exponent, mantissa = byte >> 3 & 15, byte & 7
    magnitude = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
    return -magnitude if byte >= 128 else magnitude


def e4m3_at(t: torch.Tensor, *index: int) -> float:
    return e4m3_of(int(t.view(torch.uint8)[index]))


def int4_at(packed: torch.Tensor, n: int, k: int) -> int:
    nibble = int(packed[n // 2, k]) >> (4 * (n % 2)) & 15
    return nibble - 16 if nibble >= 8 else nibble


def nvfp4_at(block: int) -> Callable[[Tensors, int, int], float]:
    def at(t: Tensors, n: int, k: int) -> float:
        code, scale = e2m1_at(t["weight"], n, k), e4m3_at(t["weight_scale"], n, k // block)
        return code * scale * float(t["weight_scale_2"])

    return at


NAIVE: dict[str, Callable[[Tensors, int, int], float]] = {
    "nvfp4": nvfp4_at(16),
    "nvfp4_bs32": nvfp4_at(32),
    "nvfp4_w4a8": nvfp4_at(32),
    "mxfp4": lambda t, n, k: math.ldexp(e2m1_at(t["weight"], n, k), int(t["weight_scale"][n, k // 32]) - 127),
    "mxfp8": lambda t, n, k: math.ldexp(e4m3_at(t["weight"], n, k), int(t["weight_scale"][n, k // 32]) - 127),
    "fp8": lambda t, n, k: e4m3_at(t["weight"], n, k) * float(t["weight_scale"]),
    "fp8_per_channel": lambda t, n, k: e4m3_at(t["weight"], n, k) * float(t["weight_scale"][n]),
    "fp8_block": lambda t, n, k: e4m3_at(t["weight"], n, k) * float(t["weight_scale"][n // 128, 0, k // 128, 0]),
    "int8_per_channel": lambda t, n, k: int(t["weight"][n, k]) * float(t["weight_scale"][n]),
    "int4_awq": lambda t, n, k: int4_at(t["weight"], n, k) * float(t["weight_scale"][n, k // 128]),
    "int4_awq_w4a8": lambda t, n, k: int4_at(t["weight"], n, k) * float(t["weight_scale"][n, k // 128]),
}


def naive_decode(name: str, tensors: Tensors, n: int, k: int) -> torch.Tensor:
    """The weight in float64, one number at a time."""
    at = NAIVE[name]
    return torch.tensor([[at(tensors, i, j) for j in range(k)] for i in range(n)], dtype=torch.float64)


@every_shape
def test_decode_any_legal_tensors(number_format: WeightFormat, shape: tuple[int, int]) -> None:
    tensors = random_tensors(number_format, *shape)
    decoded = number_format.decode(tensors)
    assert decoded.unit.dtype == decoded.out_scale.dtype == torch.float32
    assert decoded.unit.shape == shape
    assert decoded.out_scale.shape in [(), (shape[0], 1)]
    want = naive_decode(number_format.name, tensors, *shape)
    # Two roundings to float32: in the unit weight where the scale has a mantissa, and at the global scale.
    assert torch.allclose(decoded.dequantize().double(), want, rtol=2.0**-22, atol=0)


@every_shape
def test_exact_in_bf16_keeps_its_word(number_format: WeightFormat, shape: tuple[int, int]) -> None:
    unit = number_format.decode(random_tensors(number_format, *shape)).unit
    if number_format.exact_in_bf16:
        assert torch.equal(unit.bfloat16().float(), unit)
    elif shape[1] > 1 and number_format.name != "mxfp8":  # mxfp8 only fails at scales below 2^-124
        assert not torch.equal(unit.bfloat16().float(), unit)


@every_format
def test_decode_reads_scalars_of_length_one(number_format: WeightFormat) -> None:
    """A scalar may be stored as ``[1]``; the decoded scale is ``[]`` all the same."""
    n, k = SHAPES[number_format.name][-1]
    tensors = random_tensors(number_format, n, k)
    longer = {s.name: tensors[s.name].reshape(1) if s.is_scalar else tensors[s.name] for s in number_format.tensors}
    decoded, again = number_format.decode(tensors), number_format.decode(longer)
    assert again.out_scale.shape == decoded.out_scale.shape
    assert torch.equal(again.dequantize(), decoded.dequantize())


@every_format
def test_decode_keeps_rows_apart(number_format: WeightFormat) -> None:
    """A shard decodes to the same rows alone as within a taller weight."""
    name = number_format.name
    n, k = {"fp8_block": (256, 32)}.get(name, (8, SHAPES[name][-1][1]))
    tensors = random_tensors(number_format, n, k)
    half = {}
    for spec in number_format.tensors:
        shape = spec.shape(n // 2, k)
        half[spec.name] = tensors[spec.name][: shape[0]] if shape else tensors[spec.name]
    whole, part = number_format.decode(tensors).dequantize(), number_format.decode(half).dequantize()
    assert torch.equal(whole[: n // 2], part)


# ---- exactness, every byte ------------------------------------------------------------------------------------------


def all_codes_under(scales: torch.Tensor, block: int) -> Tensors:
    """All 16 codes under each of the scales: ``weight`` and ``weight_scale`` with N = number of scales, K = block."""
    codes = torch.arange(block, dtype=torch.uint8).remainder(16).expand(len(scales), block)
    return {"weight": e2m1.pack_codes(codes), "weight_scale": scales.unsqueeze(1)}


@pytest.mark.parametrize("name", ["nvfp4", "nvfp4_bs32", "nvfp4_w4a8"])
def test_every_e2m1_code_times_every_e4m3_scale_is_exact_in_bf16_and_fp16(name: str) -> None:
    number_format = WEIGHT_FORMATS[name]
    raw = torch.arange(256, dtype=torch.uint8)
    tensors = all_codes_under(raw.view(torch.float8_e4m3fn), number_format.group_size)
    unit = number_format.decode({**tensors, "weight_scale_2": torch.tensor(1.0)}).unit
    is_nan = (raw & 0x7F) == 0x7F
    assert unit[is_nan].isnan().all()
    assert not unit[~is_nan].isnan().any()
    unit = unit[~is_nan]
    want = [[e4m3_of(b) * (-E2M1[c - 8] if c >= 8 else E2M1[c]) for c in range(16)] for b in raw[~is_nan].tolist()]
    assert unit[:, :16].tolist() == want
    assert torch.equal(unit.bfloat16().float(), unit)
    assert torch.equal(unit.half().float(), unit)


def test_every_e2m1_code_times_every_ue8m0_scale_is_exact_in_bf16() -> None:
    number_format = WEIGHT_FORMATS["mxfp4"]
    unit = number_format.decode(all_codes_under(torch.arange(256, dtype=torch.uint8), 32)).unit
    assert unit[255].isnan().all()
    for byte in range(255):
        for code in range(16):
            exact = math.ldexp(-E2M1[code - 8] if code >= 8 else E2M1[code], byte - 127)
            want = exact if abs(exact) < 2.0**128 else math.copysign(math.inf, exact)
            assert unit[byte, code].item() == want
    assert torch.equal(unit[:255].bfloat16().float(), unit[:255])


# ---- quantize -------------------------------------------------------------------------------------------------------

# The largest |W - dequantize(quantize(W))| that theory allows, for each weight, from the weight alone.


def amax_of(weight: torch.Tensor, block: int) -> torch.Tensor:
    """The amax of each block along K, at every weight. ``block`` 0: of the row."""
    block = block or weight.shape[1]
    return torch.unflatten(weight.abs(), 1, (-1, block)).amax(-1).repeat_interleave(block, dim=1)


def nvfp4_bound(block: int, unit_max: float) -> Bound:
    # Half the widest gap of E2M1 (4 to 6) is one step s * G: block scale s, global scale G = amax(W) / unit_max.
    # s is the e4m3 number next to A / 6G. In the normal range it is at most 2^-4 above, so that the step is at most
    # (1 + 2^-4) A / 6, and at most 2^-4 below, where clipping costs up to 2^-4 A < A / 6. Below 2^-6 it is off by up to
    # 2^-10, or by 2^-9 where it was raised to 2^-9: at most 2^-9 G more for a step and 6 * 2^-10 G for clipping.
    def bound(weight: torch.Tensor) -> torch.Tensor:
        return amax_of(weight, block) * (1 + 2.0**-4) / 6 + 6 * 2.0**-10 * weight.abs().max() / unit_max

    return bound


def mx_bound(element_max: float, half_gap: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Bound:
    # The scale 2^e is below 2 A / element_max, and at least 2^-127.
    def bound(weight: torch.Tensor) -> torch.Tensor:
        return half_gap(weight.abs(), (2 * amax_of(weight, 32) / element_max).clamp(min=2.0**-127))

    return bound


def e4m3_half_gap(magnitude: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    # Three mantissa bits: half a gap is at most 2^-4 of the value, and at most 2^-10 among the subnormals.
    return magnitude * 2.0**-4 + scale * 2.0**-10


def block_2d_amax(weight: torch.Tensor) -> torch.Tensor:
    amax = torch.empty_like(weight)
    for i in range(0, weight.shape[0], 128):
        for j in range(0, weight.shape[1], 128):
            tile = weight[i : i + 128, j : j + 128]
            amax[i : i + 128, j : j + 128] = tile.abs().max()
    return amax


BOUNDS: dict[str, Bound] = {
    "nvfp4": nvfp4_bound(16, 2688),
    "nvfp4_bs32": nvfp4_bound(32, 2688),
    "nvfp4_w4a8": nvfp4_bound(32, 448),
    # Half the widest gap of E2M1 is one step.
    "mxfp4": mx_bound(6, lambda _, scale: scale),
    "mxfp8": mx_bound(448, e4m3_half_gap),
    "fp8": lambda w: e4m3_half_gap(w.abs(), w.abs().max() / 448),
    "fp8_per_channel": lambda w: e4m3_half_gap(w.abs(), amax_of(w, 0) / 448),
    "fp8_block": lambda w: e4m3_half_gap(w.abs(), block_2d_amax(w) / 448),
    # Integers: half a step.
    "int8_per_channel": lambda w: amax_of(w, 0) / 127 / 2,
    "int4_awq": lambda w: amax_of(w, 128) / 7 / 2,
    "int4_awq_w4a8": lambda w: amax_of(w, 128) / 7 / 2,
}


def assert_within_bound(number_format: WeightFormat, weight: torch.Tensor) -> None:
    decoded = naive_decode(number_format.name, number_format.quantize(weight), *weight.shape)
    exact = weight.double()
    # float32 arithmetic on the way: a few units in the last place.
    slack = 1 + 2.0**-18
    assert ((decoded - exact).abs() <= BOUNDS[number_format.name](exact) * slack).all()


@every_shape
def test_quantize_makes_what_the_format_declares(number_format: WeightFormat, shape: tuple[int, int]) -> None:
    tensors = number_format.quantize(random_weight(*shape))
    assert list(tensors) == [spec.name for spec in number_format.tensors]
    for spec in number_format.tensors:
        assert tensors[spec.name].dtype in spec.dtypes
        assert tensors[spec.name].shape == spec.shape(*shape)


@every_shape
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_quantize_error_is_within_theory(
    number_format: WeightFormat, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight = random_weight(*shape).to(dtype)
    if number_format.name == "fp8" and dtype == torch.bfloat16:
        # ModelOpt rounds weight / scale to bf16 first, which may move it across a midpoint: 2^-9 on top of 2^-4.
        decoded = naive_decode("fp8", number_format.quantize(weight), *shape)
        bound = BOUNDS["fp8"](weight.double()) + weight.double().abs() * 2.0**-9 * (1 + 2.0**-3)
        assert ((decoded - weight.double()).abs() <= bound).all()
    else:
        assert_within_bound(number_format, weight)


@every_format
@pytest.mark.parametrize("size", [1e-30, 1e-10, 1e10, 1e30])
def test_quantize_error_is_within_theory_at_extreme_sizes(number_format: WeightFormat, size: float) -> None:
    n, k = SHAPES[number_format.name][-1]
    assert_within_bound(number_format, random_weight(n, k, seed=3) * size)


@every_format
def test_all_zero_blocks_decode_to_zero(number_format: WeightFormat) -> None:
    n, k = {"fp8_block": (256, 256)}.get(number_format.name, (8, 256))
    weight = random_weight(n, k)
    weight[:, 128:] = 0.0
    weight[n // 2 :] = -0.0
    tensors = number_format.quantize(weight)
    decoded = number_format.decode(tensors).dequantize()
    assert (decoded[:, 128:] == 0).all()
    assert (decoded[n // 2 :] == 0).all()
    assert (decoded[: n // 2, :128] != 0).any()


@every_format
def test_quantize_does_not_write_to_its_input(number_format: WeightFormat) -> None:
    weight = random_weight(*SHAPES[number_format.name][-1])
    before = weight.clone()
    number_format.quantize(weight)
    assert torch.equal(weight, before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@every_format
def test_a_gpu_gives_the_bits_of_a_cpu(number_format: WeightFormat) -> None:
    weight = random_weight(*SHAPES[number_format.name][-1]).bfloat16()
    on_cpu, on_gpu = number_format.quantize(weight), number_format.quantize(weight.cuda())
    for name, stored in on_cpu.items():
        assert torch.equal(stored.reshape(-1).view(torch.uint8), on_gpu[name].cpu().reshape(-1).view(torch.uint8))
    assert torch.equal(number_format.decode(on_cpu).dequantize(), number_format.decode(on_gpu).dequantize().cpu())


@every_format
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_quantize_rejects_non_finite_weights(number_format: WeightFormat, bad: float) -> None:
    weight = random_weight(*SHAPES[number_format.name][-1])
    weight[1, 3] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        number_format.quantize(weight)


@every_format
def test_quantize_rejects_what_is_no_matrix(number_format: WeightFormat) -> None:
    with pytest.raises(ValueError, match="matrix"):
        number_format.quantize(torch.ones(2, 128, 128))
    with pytest.raises(ValueError, match="matrix"):
        number_format.quantize(torch.ones(128, 128, dtype=torch.int32))


def takes_whole_blocks_only(number_format: WeightFormat) -> bool:
    return bool(number_format.group_size) and not any(d.partial for s in number_format.tensors for d in s.dims)


@pytest.mark.parametrize("name", [name for name, f in WEIGHT_FORMATS.items() if takes_whole_blocks_only(f)])
def test_a_block_that_does_not_divide_k_is_rejected(name: str) -> None:
    number_format = WEIGHT_FORMATS[name]
    k = number_format.group_size + 2
    with pytest.raises(ValueError, match="multiple"):
        number_format.quantize(torch.ones(8, k))
    with pytest.raises(ValueError, match="multiple"):
        next(spec for spec in number_format.tensors if spec.name == "weight_scale").shape(8, k)


@pytest.mark.parametrize("name", ["nvfp4", "nvfp4_bs32", "nvfp4_w4a8", "fp8"])
def test_an_all_zero_weight_has_no_export(name: str) -> None:
    with pytest.raises(ValueError, match="all-zero"):
        WEIGHT_FORMATS[name].quantize(torch.zeros(8, 64))


@pytest.mark.parametrize("name", ["nvfp4", "nvfp4_bs32", "nvfp4_w4a8"])
def test_the_scale_of_a_vanishing_block_is_the_smallest_and_never_zero(name: str) -> None:
    weight = torch.ones(2, 64)
    weight[1] = 1e-9
    scale = WEIGHT_FORMATS[name].quantize(weight)["weight_scale"].float()
    assert (scale[1] == 2.0**-9).all()
    assert (scale[0] > 1).all()


def test_int4_rejects_an_odd_number_of_channels() -> None:
    with pytest.raises(ValueError, match="odd"):
        WEIGHT_FORMATS["int4_awq"].quantize(torch.ones(3, 128))


def test_w4a8_units_fit_e4m3_and_the_others_do_not() -> None:
    weight = random_weight(8, 256)
    w4a8 = WEIGHT_FORMATS["nvfp4_w4a8"]
    full = WEIGHT_FORMATS["nvfp4_bs32"]
    assert w4a8.decode(w4a8.quantize(weight)).unit.abs().max() <= 448
    assert full.decode(full.quantize(weight)).unit.abs().max() > 448


# ---- the FP8 numerics of W4A8 ---------------------------------------------------------------------------------------


def test_round_unit_to_e4m3_rounds_and_keeps_the_scale() -> None:
    # 4.5 = 3 * 1.5 and 19.5 = 3 * 6.5 (5 significant bits) are ties of E4M3 at its steps 0.5 and 2.
    unit = torch.tensor([[4.5, 19.0, 17.0, -448.0, 0.0]])
    rounded = round_unit_to_e4m3(DecodedWeight(unit, torch.tensor(0.5)))
    assert rounded.unit.tolist() == [[4.5, 20.0, 16.0, -448.0, 0.0]]
    assert rounded.out_scale.item() == 0.5


@pytest.mark.parametrize("beyond", [448.5, -2688.0])
def test_round_unit_to_e4m3_refuses_to_clip(beyond: float) -> None:
    with pytest.raises(ValueError, match="448"):
        round_unit_to_e4m3(DecodedWeight(torch.tensor([[1.0, beyond]]), torch.tensor(1.0)))


# ---- registries -----------------------------------------------------------------------------------------------------


def test_names_are_registered_once() -> None:
    for registry in (WEIGHT_FORMATS, ACTIVATION_FORMATS):
        for name, number_format in registry.items():
            assert number_format.name == name
            with pytest.raises(ValueError, match=name):
                register(number_format)


@pytest.mark.parametrize(
    ("name", "bits"),
    [("nvfp4", 4.5), ("nvfp4_w4a8", 4.25), ("mxfp4", 4.25), ("mxfp8", 8.25), ("fp8", 8), ("int4_awq", 4.25)],
)
def test_bits_per_weight(name: str, bits: float) -> None:
    assert WEIGHT_FORMATS[name].bits_per_weight() == bits
