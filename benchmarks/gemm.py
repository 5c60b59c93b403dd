"""Time the products with 4- and 8-bit weights on the GPU at hand: run ``PYTHONPATH=kernels:. python -m benchmarks.gemm``.

Needs torch and Triton only. First every product of :mod:`benchmarks.registry` is compared with its naive twin in float64 on fresh
random data, then every case is timed under a CUDA graph whose launches cycle through enough copies of the weight to miss L2;
medians of 7 replays. Peers in the same run: bf16 cuBLAS and, from SM89, FP8 ``torch._scaled_mm`` with a scale for each row and
column; where they are installed, what SGLang calls for static FP8 under one scale (columns "stock": the faster of the tuner's
choice and cuBLAS's), its Marlin, humming and quack (with this package, whose adapters call the last two). A product that this
GPU does not support, or that does not run, is listed as not measured. Then come gate and up with SwiGLU and the rounding of its
result, as whole chains of launches, and last the rounding of activations.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
import triton
from triton.errors import TritonError

from benchmarks.registry import measured
from benchmarks.registry.base import Product, Rounding
from benchmarks.registry.gated import GATED, TOLERANCE, Gated, naive_gated
from benchmarks.registry.operands import capability, random_fp8
from benchmarks.registry.peers import PEERS
from sglang_modelopt_kernels.timing import COLD_BYTES, median_us

SHAPES = {"8B gate_up": (28672, 4096), "8B down": (4096, 14336), "8B qkv": (6144, 4096), "70B down": (8192, 28672)}
TOKENS = tuple(2**power for power in range(14))
ROUNDING_TOKENS = (1, 64, 4096)
PRODUCTS = measured(Product) | PEERS
"""By name. Activations are FP8 in products whose names do not say otherwise, and bf16 in Marlin's and in ``stock fp8 linear``."""
STOCK_CHOICES = ("stock fp8", "stock fp8 untuned")
TABLES = ("products", "gated", "rounding")
FAILURES = (ImportError, RuntimeError, TritonError)


def check(product: Product, m: int) -> float:
    """Return the largest error of an output row, relative to its norm, over a small problem that no tile divides."""
    weight, x = product.weight(product.rows, 2048), product.activations(m, 2048)
    y, expected = product.run(x, weight, torch.float32), product.naive(x, weight)
    return float(((y.double() - expected).norm(dim=1) / expected.norm(dim=1)).max())


def check_gated(gated: Gated, m: int) -> float:
    """Return the largest error of an output row of ``gated``, relative to its norm, where no value saturates."""
    weight, x = gated.weight(gated.rows, 2048), random_fp8(m, 2048)
    expected = naive_gated(gated.naive(x, weight))
    scale = (expected.abs().max() / 448).float()
    y = gated.run(x, weight, scale).double() * scale.double()
    return float(((y - expected).norm(dim=1) / expected.norm(dim=1)).max())


def reason(error: Exception) -> str:
    """Return the first line of an error, with its type where a peer may raise any."""
    line = (str(error).splitlines() or [""])[0]
    return line if isinstance(error, FAILURES) else f"{type(error).__name__}: {line}"


def failures(name: str) -> tuple[type[Exception], ...]:
    """Return the errors by which a product says that it does not run: any, of a peer."""
    return (Exception,) if name in PEERS or name.startswith("stock ") else FAILURES


def usable(only: Sequence[str] = ("*",)) -> dict[str, Product]:
    """Return the products that run on this GPU, of those whose names match ``only``. Raises SystemExit when one is wrong."""
    right = {}
    for name, product in PRODUCTS.items():
        if not matches(name, only):
            continue
        if not product.supports(capability()):
            print(f"{name}: not measured, not for SM{capability()}")
            continue
        try:
            # 5000 tokens reach the persistent kernels.
            errors = [check(product, m) for m in (1, 3, 17, 64, 200, 600, 5000)]
        except failures(name) as error:
            print(f"{name}: not measured, does not run: {reason(error)}", flush=True)
            continue
        print(f"{name}: largest relative error {max(errors):.1e} of float64", flush=True)
        if not max(errors) < product.tolerance:
            raise SystemExit(f"{name} is wrong: {errors}")
        right[name] = product
    return right


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Return whether a name is one of ``patterns``, as a shell expands them."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


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


def cold_weights(make: Product | Gated, n: int, k: int) -> list[Mapping[str, Any]]:
    """Return as many random weights as fill L2, of 4 bits at least."""
    return [make.weight(n, k) for _ in range(2 * COLD_BYTES // (n * k) + 2)]


def time_ours(product: Product, n: int, k: int, tokens: Sequence[int] = TOKENS) -> tuple[list[float], int]:
    """Return the microseconds of ``product`` for each of ``tokens``, and the stored bytes of one weight."""
    weights = cold_weights(product, n, k)
    copies, stored = len(weights), sum(weights[0][name].nbytes for name in ("codes", "scale"))
    times = []
    for m in tokens:
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


def time_products(
    products: Mapping[str, Product], n: int, k: int, tokens: Sequence[int]
) -> Iterator[tuple[str, list[float], int]]:
    """Yield the name, the microseconds for each of ``tokens`` and the stored bytes of each product; print which peer failed."""
    for name, product in products.items():
        try:
            times, stored = time_ours(product, n, k, tokens)
        except failures(name) as error:
            if name not in PEERS:
                raise
            print(f"{name}: not measured at N {n} and K {k}: {reason(error)}", flush=True)
            continue
        yield name, times, stored


def product_rows(
    products: Mapping[str, Product], shapes: Sequence[str], tokens: Sequence[int], bandwidth: float
) -> None:
    """Print a line for each shape, product and number of tokens."""
    headings = f"{'us':>9}{'GB/s':>7}{'TFLOP/s':>9}{'of read':>9}{'bf16 us':>9}{'fp8 us':>9}{'stock us':>10}"
    print(f"{'shape':11}{'format':>19}{'M':>6}{headings}{'/bf16':>7}{'/fp8':>7}{'/stock':>8}")
    stock_first = {name: products[name] for name in STOCK_CHOICES if name in products}
    others = {name: product for name, product in products.items() if name not in stock_first}
    for shape in shapes:
        n, k = SHAPES[shape]
        bf16, fp8 = time_bf16(n, k, tokens), time_fp8(n, k, tokens)
        stock_rows = list(time_products(stock_first, n, k, tokens))
        stock = [min((times[i] for _, times, _ in stock_rows), default=float("nan")) for i in range(len(tokens))]
        peers = list(zip(bf16, fp8, stock, strict=True))
        for name, times, stored in (*stock_rows, *time_products(others, n, k, tokens)):
            for m, us, (bf16_us, fp8_us, stock_us) in zip(tokens, times, peers, strict=True):
                rate, flops = stored / us / 1e3, 2 * m * n * k / us / 1e6
                print(
                    f"{shape:11}{name:>19}{m:6}{us:9.1f}{rate:7.0f}{flops:9.1f}{rate / bandwidth / 1e3:9.2f}"
                    f"{bf16_us:9.1f}{fp8_us:9.1f}{stock_us:10.1f}{us / bf16_us:7.2f}{us / fp8_us:7.2f}{us / stock_us:8.2f}",
                    flush=True,
                )


def gated_rows(only: Sequence[str], shapes: Sequence[str], tokens: Sequence[int]) -> None:
    """Print gate and up with SwiGLU and rounding, from E4M3 activations to E4M3 values, for each chain and number of tokens."""
    print(f"{'gate and up':11}{'format':>19}{'M':>6}{'us':>9}  launches, by |")
    scale = torch.full((), 0.05, device="cuda")
    for name, gated in GATED.items():
        if not matches(name, only):
            continue
        if not gated.supports(capability()):
            print(f"{name}: not measured, not for SM{capability()}")
            continue
        most = gated.most_tokens or max(5000, *tokens)
        try:
            errors = [check_gated(gated, m) for m in (1, 3, 16, 200) if m <= most]
            if not max(errors) < TOLERANCE:
                raise SystemExit(f"{name} with SwiGLU and rounding is wrong: {errors}")
            for shape in shapes:
                weights = cold_weights(gated, *SHAPES[shape])
                for m in tokens:
                    if m <= most:
                        x = random_fp8(m, SHAPES[shape][1])
                        us = median_us(lambda i, x=x, w=weights, run=gated.run: run(x, w[i % len(w)], scale))
                        print(f"{shape:11}{name:>19}{m:6}{us:9.1f}  {gated.includes}", flush=True)
        except failures(name) as error:
            print(f"{name} with SwiGLU: not measured, does not run: {reason(error)}", flush=True)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="products by name, e.g. 'stock*'")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS), metavar="M")
    parser.add_argument("--tables", nargs="+", default=list(TABLES), choices=TABLES)
    options = parser.parse_args(arguments)
    if min(options.tokens) < 1:
        parser.error("--tokens must be at least 1")
    names = [*PRODUCTS, *GATED]
    for pattern in options.only:
        if not any(fnmatchcase(name, pattern) for name in names):
            parser.error(f"--only {pattern!r} matches none of {', '.join(dict.fromkeys(names))}")
    return options


def main() -> None:
    """Check the products, then print the tables."""
    options = parse()
    bandwidth = read_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    print(f"read bandwidth {bandwidth:.2f} TB/s; activations fp8 e4m3 but in products named otherwise, output bf16")
    if "products" in options.tables:
        product_rows(usable(options.only), options.shapes, options.tokens, bandwidth)
    gate_up = [shape for shape in options.shapes if "gate_up" in shape]
    if "gated" in options.tables and gate_up:
        gated_rows(options.only, gate_up, options.tokens)
    if "rounding" in options.tables:
        time_rounding()


if __name__ == "__main__":
    main()
