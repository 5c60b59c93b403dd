"""Time the products with 4- and 8-bit weights on the GPU at hand: run ``PYTHONPATH=kernels:. python -m benchmarks.gemm``.

Needs torch and Triton only. First every product of :mod:`benchmarks.registry` is compared with its naive twin in float64 on fresh
random data, then every case is timed under a CUDA graph whose launches cycle through enough copies of the weight to miss L2;
medians of 7 replays. Peers in the same run: bf16 cuBLAS and, from SM89, FP8 ``torch._scaled_mm`` with a scale for each row and
column; humming and quack where they are installed (and this package, whose adapters call them). A product that this GPU does not
support, or that does not run, is listed as not measured. Last comes the rounding of activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import triton
from triton.errors import TritonError

from benchmarks.registry import measured
from benchmarks.registry.base import Product, Rounding
from benchmarks.registry.operands import capability
from benchmarks.registry.peers import PEERS
from sglang_modelopt_kernels.timing import COLD_BYTES, median_us

SHAPES = {"8B gate_up": (28672, 4096), "8B down": (4096, 14336), "8B qkv": (6144, 4096), "70B down": (8192, 28672)}
TOKENS = tuple(2**power for power in range(14))
ROUNDING_TOKENS = (1, 64, 4096)
PRODUCTS = measured(Product) | PEERS
"""By name. Activations are FP8 in products whose names do not say otherwise."""


def check(product: Product, m: int) -> float:
    """Return the largest error of an output row, relative to its norm, over a small problem that no tile divides."""
    weight, x = product.weight(product.rows, 2048), product.activations(m, 2048)
    y, expected = product.run(x, weight, torch.float32), product.naive(x, weight)
    return float(((y.double() - expected).norm(dim=1) / expected.norm(dim=1)).max())


def usable() -> dict[str, Product]:
    """Return the products that run on this GPU. Raises SystemExit when one is wrong."""
    right = {}
    for name, product in PRODUCTS.items():
        if not product.supports(capability()):
            print(f"{name}: not measured, not for SM{capability()}")
            continue
        try:
            # 5000 tokens reach the persistent kernels.
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
    """Return the TB/s of a sum over 1 GiB: only reads, the upper bound of a product that reads its weight once."""
    sources = [torch.empty(1 << 28, device="cuda") for _ in range(4)]
    return 4 * sources[0].numel() / median_us(lambda i: sources[i % 4].sum()) / 1e6


def time_bf16(n: int, k: int, tokens: Sequence[int] = TOKENS) -> list[float]:
    """Return the microseconds of cuBLAS in bf16 for each of ``tokens``."""
    copies = COLD_BYTES // (2 * n * k) + 2
    weights = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
    times = []
    for m in tokens:
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        times.append(median_us(lambda i, x=x: x @ weights[i % copies].T))
    return times


def time_fp8(n: int, k: int, tokens: Sequence[int] = TOKENS) -> list[float]:
    """Return the microseconds of FP8 ``torch._scaled_mm``, scales of rows and columns, for each of ``tokens``; NaN before SM89."""
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
    """Return the microseconds of ``product`` for each of TOKENS, and the stored bytes of one weight."""
    copies = 2 * COLD_BYTES // (n * k) + 2
    weights = [product.weight(n, k) for _ in range(copies)]
    stored = sum(weights[0][name].nbytes for name in ("codes", "scale"))
    times = []
    for m in TOKENS:
        x = product.activations(m, k)
        times.append(median_us(lambda i, x=x: product.run(x, weights[i % copies], torch.bfloat16)))
    return times, stored


def time_rounding() -> None:
    """Print a line for each activation format and size: bf16 activations with smoothing, in one pass."""
    print(f"{'rounding':>16}{'M':>6}{'K':>7}{'us':>9}{'GB/s':>7}")
    for name, rounding in measured(Rounding).items():
        if not rounding.supports(capability()):
            continue
        scale = torch.full((), 0.01, device="cuda") if rounding.static else None
        for m in ROUNDING_TOKENS:
            for k in (4096, 14336):
                copies = COLD_BYTES // (2 * m * k) + 2 if m > 64 else 2
                xs = [torch.randn(m, k, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
                smoothing = torch.rand(k, device="cuda", dtype=torch.bfloat16) + 0.5
                call = partial(rounding.run, smoothing=smoothing, scale=scale)
                us = median_us(lambda i, xs=xs, call=call: call(xs[i % len(xs)]))
                moved = 2 * m * k + rounding.written(m, k)
                print(f"{name:>16}{m:6}{k:7}{us:9.1f}{moved / us / 1e3:7.0f}", flush=True)


def main() -> None:
    """Check the products, then print a line for each shape, product and number of tokens."""
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
