"""Time attention over packed KV caches on the GPU at hand: run ``PYTHONPATH=kernels:. python -m benchmarks.attention``.

Needs torch and Triton only. First every recipe is compared with its naive twin in float64 on fresh random data. Then each case is
timed under a CUDA graph whose launches cycle through enough copies of the cache to miss L2; medians of 7 replays. Peers in the
same run, ``-`` where they cannot be imported: FlashInfer's paged decode in FP8 and bf16; for new tokens over a prefix SGLang's
Triton kernel on a bf16 cache, and torch's flash attention on an unquantized, contiguous copy.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import triton

from benchmarks.gemm import read_bandwidth
from benchmarks.registry import measured
from benchmarks.registry.attention import TOLERANCE
from benchmarks.registry.caches import HEADS, DecodeStep, random_caches, scattered_slots
from sglang_modelopt_kernels.attention.decode import naive_decode
from sglang_modelopt_kernels.attention.extend import extend_attention, naive_extend
from sglang_modelopt_kernels.attention.store import store_kv
from sglang_modelopt_kernels.formats.kv_cache import KVRecipe
from sglang_modelopt_kernels.timing import median_us

RECIPES = measured(KVRecipe)
CONTEXTS, BATCHES = (1024, 8192, 32768, 131072), (1, 8, 32, 128, 256)
PAGE = 16
"""Consecutive slots of a page, ours and FlashInfer's; pages come in random order."""

MEMORY = 24 << 30
"""Bytes that the keys and values of a case may take in bf16."""


def check(recipe: KVRecipe, head_dim: int) -> float:
    """Return the largest error of decode and extend, relative to the norm of an output vector."""
    decode = DecodeStep(recipe, 700, 3, 4, head_dim)
    decode(0)
    keys, values = decode.caches[0]
    expected = naive_decode(decode.q, keys, values, decode.indptr, decode.indices, 0.01)
    worst = _relative(decode.out, expected)
    q, k, v = (torch.randn(150, heads, head_dim, device="cuda", dtype=torch.bfloat16) for heads in (32, HEADS, HEADS))
    out = torch.empty_like(q)
    new = torch.tensor([0, 70, 149, 150], device="cuda", dtype=torch.int32)
    arguments = (new, decode.indptr, decode.indices)
    extend_attention(q, k, v, out, keys, values, *arguments, None, True, None, 79, sm_scale=0.01)
    return max(worst, _relative(out, naive_extend(q, k, v, keys, values, *arguments, 0.01)))


def _relative(out: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((out.double() - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


def flashinfer_decode(dtype: torch.dtype, context: int, batch: int, group: int, head_dim: int) -> float | None:
    """Return the microseconds of FlashInfer's paged decode; None without FlashInfer."""
    try:
        import flashinfer
    except ImportError:
        return None
    page = PAGE
    pages = context * batch // page
    wrapper: Any = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(128 << 20, dtype=torch.uint8, device="cuda"), "NHD", use_tensor_cores=True
    )
    indptr = torch.arange(0, pages + 1, context // page, device="cuda", dtype=torch.int32)
    indices = torch.randperm(pages, device="cuda").to(torch.int32)
    last = torch.full((batch,), page, device="cuda", dtype=torch.int32)
    wrapper.plan(
        indptr, indices, last, HEADS * group, HEADS, head_dim, page, q_data_type=torch.bfloat16, kv_data_type=dtype
    )
    cache = torch.randn(pages, 2, page, HEADS, head_dim, device="cuda", dtype=torch.bfloat16).to(dtype)
    q = torch.randn(batch, HEADS * group, head_dim, device="cuda", dtype=torch.bfloat16)
    return median_us(lambda _: wrapper.run(q, cache))


def decode_rows(bandwidth: float, quick: bool) -> None:
    """Print decode: every recipe over contexts and batches, ratios to the plain recipe of its format and to the peers."""
    print(
        f"{'decode':14}{'D':>4}{'GQA':>4}{'ctx':>7}{'batch':>6}{'splits':>7}{'us':>9}{'GB/s':>7}{'of read':>8}", end=""
    )
    print(f"{'/plain':>8}{'/fi fp8':>8}{'/fi bf16':>9}{'x fewer bytes than bf16':>25}")
    cases = [(128, 4, context, batch) for context in CONTEXTS for batch in BATCHES]
    cases += [(64, 8, 8192, 32), (64, 4, 8192, 32), (128, 8, 8192, 32), (128, 1, 8192, 32)]
    for head_dim, group, context, batch in cases:
        if 4 * context * batch * HEADS * head_dim > MEMORY or (
            quick and (context, batch) not in ((8192, 32), (8192, 1))
        ):
            continue
        peers = [
            flashinfer_decode(dtype, context, batch, group, head_dim) for dtype in (torch.float8_e4m3fn, torch.bfloat16)
        ]
        plain: dict[str, float] = {}
        for name, recipe in RECIPES.items():
            case = DecodeStep(recipe, context, batch, group, head_dim, PAGE)
            us = median_us(case)
            base = plain.setdefault(recipe.format.name, us)
            rate = case.stored / us / 1e3
            ratios = "".join(f"{'-' if peer is None else f'{us / peer:.2f}':>8}" for peer in peers)
            fewer = 4 * head_dim / (2 * recipe.bytes_per_vector(head_dim))
            print(
                f"{name:14}{head_dim:4}{group:4}{context:7}{batch:6}{case.splits:7}{us:9.1f}{rate:7.0f}"
                f"{rate / bandwidth / 1e3:8.2f}{us / base:8.2f}{ratios} {fewer:24.2f}",
                flush=True,
            )
            del case
            torch.cuda.empty_cache()


def stock_extend(
    new: list[torch.Tensor], full: list[torch.Tensor], spans: list[torch.Tensor], indices: torch.Tensor
) -> float | None:
    """Return the microseconds of SGLang's Triton kernel over a bf16 cache; None without SGLang.

    Args:
        new: queries, keys, values and output of the new tokens.
        full: keys and values of the prefix, ``[slots, H, D]``.
        spans: the indptr of new tokens and of the prefix.
        indices: slots of the prefix.
    """
    try:
        from sglang.kernels.ops.attention.extend_attention import extend_attention_fwd
    except ImportError:
        return None
    tokens = new[0].shape[0]
    # SGLang's pool has int64 slots.
    slots = indices.long()
    return median_us(lambda _: extend_attention_fwd(*new, *full, *spans, slots, None, True, None, tokens, 1.0, 1.0))


def extend_rows() -> None:
    """Print new tokens over a packed prefix, beside attention to unquantized keys and values."""
    from torch.nn.attention.bias import causal_lower_right
    from torch.nn.functional import scaled_dot_product_attention

    print(
        f"{'extend':14}{'D':>4}{'prefix':>8}{'new':>6}{'us':>9}{'TFLOP/s':>9}{'stock us':>10}{'bf16 sdpa us':>14}",
        end="",
    )
    print(f"{'stock/ours':>12}{'sdpa/ours':>11}")
    for head_dim, prefix, new in ((128, 8192, 2048), (128, 32768, 2048), (128, 2048, 512), (64, 8192, 2048)):
        q = torch.randn(new, 4 * HEADS, head_dim, device="cuda", dtype=torch.bfloat16)
        k, v = (torch.randn(new, HEADS, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        out = torch.empty_like(q)
        full = [torch.randn(1, HEADS, prefix + new, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
        queries = q.transpose(0, 1)[None].contiguous()
        bias = causal_lower_right(new, prefix + new)
        whole = [x.repeat_interleave(4, dim=1) for x in full]
        sdpa = median_us(
            lambda _, queries=queries, whole=whole, bias=bias: scaled_dot_product_attention(queries, *whole, bias)
        )
        indices = scattered_slots(prefix, PAGE)
        spans = [torch.tensor([0, count], device="cuda", dtype=torch.int32) for count in (new, prefix)]
        cached = [x[0, :, :prefix].transpose(0, 1).contiguous() for x in full]
        stock = stock_extend([q, k, v, out], cached, spans, indices)
        flops = 4 * 4 * HEADS * head_dim * (new * prefix + new * new / 2)
        for name, recipe in RECIPES.items():
            keys, values = random_caches(recipe, prefix, head_dim)
            operands = (q, k, v, out, keys, values, *spans, indices)

            def run(_: int, operands: tuple[Any, ...] = operands, new: int = new) -> None:
                extend_attention(*operands, None, True, None, new)

            us = median_us(run)
            peer = f"{'-':>10}" if stock is None else f"{stock:10.1f}"
            ratio = f"{'-':>12}" if stock is None else f"{stock / us:12.2f}"
            print(
                f"{name:14}{head_dim:4}{prefix:8}{new:6}{us:9.1f}{flops / us / 1e6:9.1f}{peer}{sdpa:14.1f}{ratio}{sdpa / us:11.2f}",
                flush=True,
            )


def store_rows() -> None:
    """Print the fused rounding and writing of keys and values."""
    print(f"{'store':14}{'D':>4}{'tokens':>8}{'us':>9}{'GB/s read':>11}")
    for tokens in (1, 32, 256, 8192):
        k, v = (torch.randn(tokens, HEADS, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        slots = torch.randperm(tokens, device="cuda")
        for name, recipe in RECIPES.items():
            keys, values = random_caches(recipe, tokens, 128)
            us = median_us(lambda _, a=(keys, values, slots, k, v): store_kv(*a))
            print(f"{name:14}{128:4}{tokens:8}{us:9.1f}{4 * k.numel() / us / 1e3:11.0f}", flush=True)


def main() -> None:
    """Check every recipe, then print the three tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two contexts of decode only")
    arguments = parser.parse_args()
    bandwidth = read_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    print(f"read bandwidth {bandwidth:.2f} TB/s; {HEADS} KV heads, queries bf16")
    for name, recipe in RECIPES.items():
        errors = [check(recipe, head_dim) for head_dim in (64, 128)]
        print(f"{name}: largest relative error {max(errors):.1e} of float64")
        if not max(errors) < TOLERANCE:
            raise SystemExit(f"{name} is wrong: {errors}")
    store_rows()
    extend_rows()
    decode_rows(bandwidth, arguments.quick)


if __name__ == "__main__":
    main()
