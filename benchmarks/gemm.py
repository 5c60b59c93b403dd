"""The products with 4- and 8-bit weights on the GPU at hand: run ``PYTHONPATH=kernels:. python -m benchmarks.gemm``.

Needs torch and Triton only. First every product is checked against its naive twin in float64 on fresh random data, then every case
is timed under a CUDA graph whose launches go through enough copies of the weight to miss the cache; medians of 7 replays. Peers
in the same run: bf16 cuBLAS and, from sm_89, FP8 ``torch._scaled_mm`` with scales of rows; humming and quack where they are
installed (and this package, whose adapters call them). A product that is not for this GPU, or that does not run, is named as not
measured and left out. Last comes the rounding of activations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
from triton.errors import TritonError

from sglang_modelopt_kernels.formats import e2m1
from sglang_modelopt_kernels.formats.base import BlockActivation, BlockWeight
from sglang_modelopt_kernels.gemm.blackwell_common import takes_tiles
from sglang_modelopt_kernels.gemm.fp4_blackwell import fp4_linear, naive_fp4_linear
from sglang_modelopt_kernels.gemm.mxfp4_fp8_blackwell import mxfp4_linear, naive_mxfp4_linear, pair_blocks
from sglang_modelopt_kernels.gemm.mxfp4_fp8_hopper import fold, folded_linear
from sglang_modelopt_kernels.gemm.w4_decode import block_scaled_linear, naive_block_scaled_linear, pack
from sglang_modelopt_kernels.gemm.w8_decode import eight_bit_linear, float_blocks, mxfp8, naive_eight_bit_linear, whole
from sglang_modelopt_kernels.quantize.blocks import BLOCK_ACTIVATIONS, naive_swizzle, naive_unswizzle, quantize_blocks
from sglang_modelopt_kernels.quantize.fp8 import quantize_fp8
from sglang_modelopt_kernels.timing import COLD_BYTES, median_us

SHAPES = {"8B gate_up": (28672, 4096), "8B down": (4096, 14336), "8B qkv": (6144, 4096), "70B down": (8192, 28672)}
TOKENS = tuple(2**power for power in range(14))
ROUNDING_TOKENS = (1, 64, 4096)


@dataclass(frozen=True)
class Product:
    """One product.

    Attributes:
        wants: what it runs on, by compute capability times ten.
        weight: a random weight ``(n, k)``, by name.
        activations: random activations ``(m, k)``.
        run: the product of ``(activations, weight)``, and the type of the result.
        naive: the same in float64.
        tolerance: of the largest relative error; on instructions that were not run yet, what bf16 still hides.
        rows: outputs of the odd problem it is checked on.
    """

    wants: Callable[[int], bool]
    weight: Callable[[int, int], Mapping[str, Any]]
    activations: Callable[[int, int], Any]
    run: Callable[[Any, Mapping[str, Any], torch.dtype], torch.Tensor]
    naive: Callable[[Any, Mapping[str, Any]], torch.Tensor]
    tolerance: float = 1e-5
    rows: int = 1030


def random_codes(n: int, k: int) -> torch.Tensor:
    """Two random codes to a byte."""
    return torch.randint(0, 256, (n, k // 2), device="cuda", dtype=torch.uint8)


def random_scale(kind: str, n: int, k: int) -> torch.Tensor:
    """Random block scales as stored."""
    if kind == "mxfp4":
        return torch.randint(118, 128, (n, k // 32), device="cuda").to(torch.uint8)
    return (torch.rand(n, k // 16, device="cuda") + 0.5).to(torch.float8_e4m3fn)


def packed_weight(kind: str, n: int, k: int) -> dict[str, Any]:
    """A random weight of the block-scaled product, of small values."""
    one = torch.full((), 2.0**-6, device="cuda")
    codes = torch.randint(0, 16, (n, k), device="cuda", dtype=torch.uint8)
    if kind == "int4":
        scale = torch.rand(n, k // 128, device="cuda") + 0.5
        packed = pack(BlockWeight(codes.to(torch.int8) - 8, scale, one, "int4", 128))
    else:
        packed = pack(BlockWeight(codes, random_scale(kind, n, k), one, "e2m1", 32 if kind == "mxfp4" else 16))
    return {"weight": packed, "codes": packed.codes, "scale": packed.scale}


def stored_weight(kind: str, n: int, k: int) -> dict[str, Any]:
    """A random weight as ModelOpt stores it, and for SM120 with its blocks in pairs, for SM100 with its scales in tiles."""
    codes, scale = random_codes(n, k), random_scale(kind, n, k)
    weight = {"codes": codes, "scale": scale, "out_scale": torch.ones(n, device="cuda")}
    return weight | ({"paired": pair_blocks(codes)} if capability() >= 120 else {"tiles": naive_swizzle(scale)})


def folded_weight(n: int, k: int) -> dict[str, Any]:
    """A random MXFP4 weight, packed for the folded product and as stored."""
    codes, scale = random_codes(n, k), random_scale("mxfp4", n, k)
    packed = fold(codes, scale)
    return {"weight": packed, "codes": packed.codes, "scale": packed.exponent, "stored": (codes, scale)}


def byte_weight(kind: str, n: int, k: int) -> dict[str, Any]:
    """A random weight of the 8-bit product."""
    out_scale = torch.rand(n, device="cuda") + 0.5
    if kind == "int8":
        weight = whole(torch.randint(-128, 128, (n, k), device="cuda", dtype=torch.int8), out_scale)
    elif kind == "mxfp8":
        weight = mxfp8(random_fp8(n, k), random_scale("mxfp4", n, k))
    else:
        scale = torch.rand(triton.cdiv(n, 128), triton.cdiv(k, 128), device="cuda") + 0.5
        weight = float_blocks([(random_fp8(n, k), scale)])
    return {"weight": weight, "codes": weight.codes, "scale": out_scale if weight.scale is None else weight.scale}


def random_int8(m: int, k: int) -> torch.Tensor:
    """Random INT8 activations."""
    return torch.randint(-128, 128, (m, k), device="cuda", dtype=torch.int8)


def random_bf16(m: int, k: int) -> torch.Tensor:
    """Random bf16 activations."""
    return torch.randn(m, k, device="cuda", dtype=torch.bfloat16)


def eight_bit(kind: str, activations: Callable[[int, int], torch.Tensor]) -> Product:
    """Codes of a byte, decoded in registers or multiplied as they are."""
    return Product(
        lambda _: True,
        partial(byte_weight, kind),
        activations,
        lambda x, weight, out_dtype: eight_bit_linear(x, weight["weight"], out_dtype=out_dtype),
        lambda x, weight: naive_eight_bit_linear(x, weight["weight"]),
        rows=1032,
    )


def random_fp8(m: int, k: int) -> torch.Tensor:
    """Random E4M3 activations."""
    return torch.randn(m, k, device="cuda").to(torch.float8_e4m3fn)


def run_mxfp4(x: torch.Tensor, weight: Mapping[str, Any], out_dtype: torch.dtype) -> torch.Tensor:
    """MXFP4 with FP8 activations in block-scaled instructions."""
    codes, scale = weight.get("paired", weight["codes"]), weight.get("tiles", weight["scale"])
    return mxfp4_linear(x, codes, scale, weight["out_scale"], None, None, out_dtype, "paired" in weight)


def random_fp4(kind: str, m: int, k: int) -> BlockActivation:
    """Random FP4 activations, their scales in tiles where the product reads them so."""
    scale = random_scale(kind, m, k)
    return BlockActivation(random_codes(m, k), naive_swizzle(scale) if in_tiles(m) else scale, None)


def in_tiles(m: int) -> bool:
    """Whether the product of ``m`` FP4 tokens reads their scales in tiles."""
    return capability() < 120 and takes_tiles(m)


def naive_fp4(x: BlockActivation, weight: Mapping[str, Any]) -> torch.Tensor:
    """In float64, of scales in either order."""
    m, blocks = x.codes.shape[0], weight["scale"].shape[1]
    scale = naive_unswizzle(x.scale, m, blocks) if in_tiles(m) else x.scale
    return naive_fp4_linear(BlockActivation(x.codes, scale, None), weight["codes"], weight["scale"])


def run_fp4(x: BlockActivation, weight: Mapping[str, Any], out_dtype: torch.dtype) -> torch.Tensor:
    """FP4 on both sides in block-scaled instructions."""
    scale, tiled = weight.get("tiles", weight["scale"]), "tiles" in weight
    return fp4_linear(x, weight["codes"], scale, weight["out_scale"], None, out_dtype, tiled)


def block_scaled(kind: str) -> Product:
    """Codes decoded in registers."""
    return Product(
        lambda _: True,
        partial(packed_weight, kind),
        random_fp8,
        lambda x, weight, out_dtype: block_scaled_linear(x, weight["weight"], out_dtype=out_dtype),
        lambda x, weight: naive_block_scaled_linear(x, weight["weight"]),
    )


def fp4(kind: str) -> Product:
    """FP4 on both sides."""
    return Product(
        lambda capability: capability // 10 in (10, 12),
        partial(stored_weight, kind),
        partial(random_fp4, kind),
        run_fp4,
        naive_fp4,
        2.0**-10,
    )


def humming_weight(n: int, k: int) -> dict[str, Any]:
    """A random MXFP4 weight in humming's packing, by this package's adapter, and as stored. Raises ImportError without humming."""
    from sglang_modelopt_ext.backends.base import ShardWeight
    from sglang_modelopt_ext.backends.linear.humming import Humming
    from sglang_modelopt_kernels.formats import WEIGHT_FORMATS

    codes, scale = random_codes(n, k), random_scale("mxfp4", n, k)
    stored = ShardWeight(WEIGHT_FORMATS["mxfp4"], {"weight": codes, "weight_scale": scale})
    prepared = Humming().prepare([stored])
    sizes = {"codes": prepared.weight, "scale": prepared.weight_scale}
    return {"backend": Humming(), "prepared": prepared, "stored": (codes, scale), **sizes}


def quack_weight(n: int, k: int) -> dict[str, Any]:
    """A random NVFP4 weight in quack's packing, likewise, and as stored. Raises ImportError without quack."""
    from sglang_modelopt_ext.backends.base import ShardWeight
    from sglang_modelopt_ext.backends.linear.weight_only import QuackWeightOnly
    from sglang_modelopt_kernels.formats import WEIGHT_FORMATS

    codes, scale = random_codes(n, k), random_scale("nvfp4", n, k)
    one = torch.ones((), device="cuda")
    tensors = {"weight": codes, "weight_scale": scale, "weight_scale_2": one}
    prepared = QuackWeightOnly().prepare([ShardWeight(WEIGHT_FORMATS["nvfp4"], tensors)])
    sizes = {"codes": codes, "scale": scale}
    return {"backend": QuackWeightOnly(), "prepared": prepared, "stored": (codes, scale), **sizes}


def run_package(x: torch.Tensor, weight: Mapping[str, Any], out_dtype: torch.dtype) -> torch.Tensor:
    """The product of another package, which rounds to bf16."""
    y: torch.Tensor = weight["backend"].matmul(weight["prepared"], x, None, None, torch.bfloat16)
    return y.to(out_dtype)


def naive_nvfp4(x: torch.Tensor, weight: Mapping[str, Any]) -> torch.Tensor:
    """The product in float64 of activations and stored NVFP4."""
    codes, scale = weight["stored"]
    values = e2m1.decode(e2m1.unpack_codes(codes)).double() * scale.double().repeat_interleave(16, dim=1)
    return x.double() @ values.T


PRODUCTS = {
    "nvfp4": block_scaled("nvfp4"),
    "mxfp4": block_scaled("mxfp4"),
    "int4": block_scaled("int4"),
    "int8 x int8": eight_bit("int8", random_int8),
    "int8 x bf16": eight_bit("int8", random_bf16),
    "fp8_pb x bf16": eight_bit("fp8_block", random_bf16),
    "mxfp8 x bf16": eight_bit("mxfp8", random_bf16),
    "mxfp4 folded": Product(
        lambda capability: capability in (89, 90),
        folded_weight,
        random_fp8,
        lambda x, weight, out_dtype: folded_linear(x, weight["weight"], out_dtype=out_dtype),
        lambda x, weight: naive_mxfp4_linear(x, *weight["stored"]),
        2.0**-10,
    ),
    "humming mxfp4": Product(
        lambda capability: capability in (89, 90),
        humming_weight,
        random_fp8,
        run_package,
        lambda x, weight: naive_mxfp4_linear(x, *weight["stored"]),
        2.0**-8,
        1040,
    ),
    "quack nvfp4": Product(
        lambda capability: capability == 90,
        quack_weight,
        random_bf16,
        run_package,
        naive_nvfp4,
        2.0**-8,
        1024,
    ),
    "mxfp4 x fp8": Product(
        lambda capability: capability // 10 in (10, 12),
        partial(stored_weight, "mxfp4"),
        random_fp8,
        run_mxfp4,
        lambda x, weight: naive_mxfp4_linear(x, weight["codes"], weight["scale"]),
        2.0**-10,
    ),
    "nvfp4 x nvfp4": fp4("nvfp4"),
    "mxfp4 x mxfp4": fp4("mxfp4"),
}
"""By name; the first three are block-scaled with FP8 activations, the next four 8-bit with int8 or bf16 ones, those of humming and
quack are peers."""


def capability() -> int:
    """The GPU's compute capability times ten."""
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def check(product: Product, m: int) -> float:
    """The largest relative error (of the row's norm) over a small odd problem."""
    weight, x = product.weight(product.rows, 2048), product.activations(m, 2048)
    y, expected = product.run(x, weight, torch.float32), product.naive(x, weight)
    return float(((y.double() - expected).norm(dim=1) / expected.norm(dim=1)).max())


def usable() -> dict[str, Product]:
    """The products that run here. Raises SystemExit when one is wrong."""
    right = {}
    for name, product in PRODUCTS.items():
        if not product.wants(capability()):
            print(f"{name}: not measured, not for SM{capability()}")
            continue
        try:
            # The last for persistent kernels.
            errors = [check(product, m) for m in (1, 3, 17, 64, 200, 600, 5000)]
        except (ImportError, RuntimeError, TritonError) as error:
            print(f"{name}: not measured, does not run: {(str(error).splitlines() or [''])[0]}")
            continue
        print(f"{name}: largest relative error {max(errors):.1e} of float64")
        if not max(errors) < product.tolerance:
            raise SystemExit(f"{name} is wrong: {errors}")
        right[name] = product
    return right


def read_bandwidth() -> float:
    """TB/s of a sum over 1 GiB, the roof of a product that reads its weight once: only reads, like it."""
    sources = [torch.empty(1 << 28, device="cuda") for _ in range(4)]
    return 4 * sources[0].numel() / median_us(lambda i: sources[i % 4].sum()) / 1e6


def time_bf16(n: int, k: int, tokens: Sequence[int] = TOKENS) -> list[float]:
    """Microseconds of cuBLAS in bf16 for each of ``tokens``."""
    copies = COLD_BYTES // (2 * n * k) + 2
    weights = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
    times = []
    for m in tokens:
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        times.append(median_us(lambda i, x=x: x @ weights[i % copies].T))
    return times


def time_fp8(n: int, k: int, tokens: Sequence[int] = TOKENS) -> list[float]:
    """Likewise of ``torch._scaled_mm`` in FP8 with a scale for each row and column, NaN before sm_89."""
    if torch.cuda.get_device_capability() < (8, 9):
        return [float("nan")] * len(tokens)
    copies = COLD_BYTES // (n * k) + 2
    weights = [torch.randn(n, k, device="cuda").to(torch.float8_e4m3fn) for _ in range(copies)]
    column = torch.ones(1, n, device="cuda")
    times = []
    for m in tokens:
        x, row = torch.randn(m, k, device="cuda").to(torch.float8_e4m3fn), torch.ones(m, 1, device="cuda")
        product = partial(torch._scaled_mm, x, scale_a=row, scale_b=column, out_dtype=torch.bfloat16)
        times.append(median_us(lambda i, product=product: product(weights[i % copies].T)))
    return times


def time_ours(product: Product, n: int, k: int) -> tuple[list[float], int]:
    """Likewise of one of ours, and the stored bytes of one weight."""
    copies = 2 * COLD_BYTES // (n * k) + 2
    weights = [product.weight(n, k) for _ in range(copies)]
    stored = sum(weights[0][name].nbytes for name in ("codes", "scale"))
    times = []
    for m in TOKENS:
        x = product.activations(m, k)
        times.append(median_us(lambda i, x=x: product.run(x, weights[i % copies], torch.bfloat16)))
    return times, stored


def time_rounding() -> None:
    """Prints a line for each activation format and size: bf16 activations with smoothing, in one pass."""
    print(f"{'rounding':>16}{'M':>6}{'K':>7}{'us':>9}{'GB/s':>7}")
    for name in ("fp8_per_token", *BLOCK_ACTIVATIONS):
        if name == "fp8_per_token" and capability() < 89:
            continue
        scale = torch.full((), 0.01, device="cuda") if name == "nvfp4_dynamic" else None
        for m in ROUNDING_TOKENS:
            for k in (4096, 14336):
                copies = COLD_BYTES // (2 * m * k) + 2 if m > 64 else 2
                xs = [torch.randn(m, k, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
                smoothing = torch.rand(k, device="cuda", dtype=torch.bfloat16) + 0.5
                if name == "fp8_per_token":
                    us = median_us(lambda i, xs=xs, smoothing=smoothing: quantize_fp8(xs[i % len(xs)], smoothing))
                    written = m * k
                else:
                    call = partial(quantize_blocks, activation=name, smoothing=smoothing, input_scale=scale)
                    us = median_us(lambda i, xs=xs, call=call: call(xs[i % len(xs)]))
                    rounded = call(xs[0])
                    written = rounded.codes.nbytes + rounded.scale.nbytes
                print(f"{name:>16}{m:6}{k:7}{us:9.1f}{(2 * m * k + written) / us / 1e3:7.0f}", flush=True)


def main() -> None:
    """Checks, then prints one line per shape, product and number of tokens."""
    bandwidth = read_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    print(f"read bandwidth {bandwidth:.2f} TB/s; activations fp8 e4m3 but in products named otherwise, output bf16")
    products = usable()
    print("marlin: not measured, it rounds scales that the recipes keep (docs/roadmap.md)")
    headings = f"{'us':>9}{'GB/s':>7}{'TFLOP/s':>9}{'of read':>9}{'bf16 us':>9}{'fp8 us':>9}{'/bf16':>7}{'/fp8':>7}"
    print(f"{'shape':11}{'format':>14}{'M':>6}{headings}")
    for shape, (n, k) in SHAPES.items():
        bf16, fp8 = time_bf16(n, k), time_fp8(n, k)
        for name, product in products.items():
            ours, stored = time_ours(product, n, k)
            for m, us, bf16_us, fp8_us in zip(TOKENS, ours, bf16, fp8, strict=True):
                rate, flops = stored / us / 1e3, 2 * m * n * k / us / 1e6
                print(
                    f"{shape:11}{name:>14}{m:6}{us:9.1f}{rate:7.0f}{flops:9.1f}{rate / bandwidth / 1e3:9.2f}"
                    f"{bf16_us:9.1f}{fp8_us:9.1f}{us / bf16_us:7.2f}{us / fp8_us:7.2f}",
                    flush=True,
                )
    time_rounding()


if __name__ == "__main__":
    main()
