"""The block-scaled product on the GPU at hand: run ``PYTHONPATH=kernels:. python -m benchmarks.gemm``. Needs torch and Triton only.

First every format is checked against its naive twin in float64 on fresh random data, then every case is timed under a CUDA
graph whose launches go through enough copies of the weight to miss the cache; medians of 7 replays. Peers in the same run: bf16
cuBLAS and, from sm_89, FP8 ``torch._scaled_mm`` with a scale for each row.
"""

from __future__ import annotations

from functools import partial

import torch
import triton

from sglang_modelopt_kernels.formats.base import BlockWeight
from sglang_modelopt_kernels.gemm.block_scaled import PackedWeight, block_scaled_linear, naive_block_scaled_linear, pack
from sglang_modelopt_kernels.timing import COLD_BYTES, median_us

SHAPES = {"8B gate_up": (28672, 4096), "8B down": (4096, 14336), "8B qkv": (6144, 4096), "70B down": (8192, 28672)}
TOKENS = tuple(2**power for power in range(14))
KINDS = ("nvfp4", "mxfp4", "int4")


def random_weight(kind: str, n: int, k: int) -> PackedWeight:
    """A random packed weight of small values."""
    one = torch.full((), 2.0**-6, device="cuda")
    codes = torch.randint(0, 16, (n, k), device="cuda", dtype=torch.uint8)
    if kind == "nvfp4":
        scale = (torch.rand(n, k // 16, device="cuda") + 0.5).to(torch.float8_e4m3fn)
        return pack(BlockWeight(codes, scale, one, "e2m1", 16))
    if kind == "mxfp4":
        scale = torch.randint(118, 128, (n, k // 32), device="cuda").to(torch.uint8)
        return pack(BlockWeight(codes, scale, one, "e2m1", 32))
    return pack(BlockWeight(codes.to(torch.int8) - 8, torch.rand(n, k // 128, device="cuda") + 0.5, one, "int4", 128))


def check(kind: str, m: int) -> float:
    """The largest relative error (of the row's norm) over a small odd problem."""
    weight = random_weight(kind, 1030, 2048)
    x = torch.randn(m, 2048, device="cuda").to(torch.float8_e4m3fn)
    y = block_scaled_linear(x, weight, out_dtype=torch.float32)
    expected = naive_block_scaled_linear(x, weight)
    return float(((y.double() - expected).norm(dim=1) / expected.norm(dim=1)).max())


def read_bandwidth() -> float:
    """TB/s of a sum over 1 GiB, the roof of a product that reads its weight once: only reads, like it."""
    sources = [torch.empty(1 << 28, device="cuda") for _ in range(4)]
    return 4 * sources[0].numel() / median_us(lambda i: sources[i % 4].sum()) / 1e6


def time_bf16(n: int, k: int) -> list[float]:
    """Microseconds of cuBLAS in bf16 for each of TOKENS."""
    copies = COLD_BYTES // (2 * n * k) + 2
    weights = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
    times = []
    for m in TOKENS:
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        times.append(median_us(lambda i, x=x: x @ weights[i % copies].T))
    return times


def time_fp8(n: int, k: int) -> list[float]:
    """Likewise of ``torch._scaled_mm`` in FP8 with a scale for each row and column, NaN before sm_89."""
    if torch.cuda.get_device_capability() < (8, 9):
        return [float("nan")] * len(TOKENS)
    copies = COLD_BYTES // (n * k) + 2
    weights = [torch.randn(n, k, device="cuda").to(torch.float8_e4m3fn) for _ in range(copies)]
    column = torch.ones(1, n, device="cuda")
    times = []
    for m in TOKENS:
        x, row = torch.randn(m, k, device="cuda").to(torch.float8_e4m3fn), torch.ones(m, 1, device="cuda")
        product = partial(torch._scaled_mm, x, scale_a=row, scale_b=column, out_dtype=torch.bfloat16)
        times.append(median_us(lambda i, product=product: product(weights[i % copies].T)))
    return times


def time_ours(kind: str, n: int, k: int) -> tuple[list[float], int]:
    """Likewise of the block-scaled product, and the stored bytes of one weight."""
    copies = 2 * COLD_BYTES // (n * k) + 2
    weights = [random_weight(kind, n, k) for _ in range(copies)]
    stored = sum(t.numel() * t.element_size() for t in (weights[0].codes, weights[0].scale))
    times = []
    for m in TOKENS:
        x = torch.randn(m, k, device="cuda").to(torch.float8_e4m3fn)
        times.append(median_us(lambda i, x=x: block_scaled_linear(x, weights[i % copies])))
    return times, stored


def main() -> None:
    """Checks, then prints one line per shape, format and number of tokens."""
    bandwidth = read_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    print(f"read bandwidth {bandwidth:.2f} TB/s; activations fp8 e4m3, output bf16")
    for kind in KINDS:
        errors = [check(kind, m) for m in (1, 3, 17, 64, 200, 600)]
        print(f"{kind}: largest relative error {max(errors):.1e} of float64")
        if not max(errors) < 1e-5:
            raise SystemExit(f"{kind} is wrong: {errors}")
    headings = f"{'us':>9}{'GB/s':>7}{'TFLOP/s':>9}{'of read':>9}{'bf16 us':>9}{'fp8 us':>9}{'/bf16':>7}{'/fp8':>7}"
    print(f"{'shape':11}{'format':>7}{'M':>6}{headings}")
    for shape, (n, k) in SHAPES.items():
        bf16, fp8 = time_bf16(n, k), time_fp8(n, k)
        for kind in KINDS:
            ours, stored = time_ours(kind, n, k)
            for m, us, bf16_us, fp8_us in zip(TOKENS, ours, bf16, fp8, strict=True):
                rate, flops = stored / us / 1e3, 2 * m * n * k / us / 1e6
                print(
                    f"{shape:11}{kind:>7}{m:6}{us:9.1f}{rate:7.0f}{flops:9.1f}{rate / bandwidth / 1e3:9.2f}"
                    f"{bf16_us:9.1f}{fp8_us:9.1f}{us / bf16_us:7.2f}{us / fp8_us:7.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
