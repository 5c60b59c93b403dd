"""Attention over packed KV caches on the GPU at hand: run ``PYTHONPATH=kernels:. python -m benchmarks.attention``.

Needs torch and Triton only. First every recipe is checked against its naive twin in float64 on fresh random data. Then each case is
timed under a CUDA graph whose launches go through enough copies of the cache to miss the GPU's; medians of 7 replays. Peers in the
same run, ``-`` where they cannot be imported: FlashInfer's paged decode in FP8 and bf16; for new tokens over a prefix SGLang's
Triton kernel on a bf16 cache, and torch's flash attention on an unquantized, contiguous copy.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import triton

from benchmarks.gemm import read_bandwidth
from sglang_modelopt_kernels.attention.decode import DecodeScratch, decode_attention
from sglang_modelopt_kernels.attention.extend import extend_attention
from sglang_modelopt_kernels.attention.naive import naive_decode, naive_extend
from sglang_modelopt_kernels.attention.packed import PackedCache
from sglang_modelopt_kernels.attention.store import store_kv
from sglang_modelopt_kernels.formats.kv_cache import KV_RECIPES, KVRecipe
from sglang_modelopt_kernels.timing import COLD_BYTES, median_us

HEADS = 8
CONTEXTS, BATCHES = (1024, 8192, 32768, 131072), (1, 8, 32, 128, 256)
PAGE = 16
"""Tokens that lie side by side, ours and FlashInfer's; pages come in random order."""

MEMORY = 24 << 30
"""Bytes of bf16 keys and values that a case may stand for."""


def empty(recipe: KVRecipe, slots: int, head_dim: int) -> tuple[PackedCache, PackedCache]:
    """Keys and values of random codes."""
    shape = (slots, HEADS, 2, head_dim // 16)
    block = torch.randint(0x30, 0x40, shape, device="cuda", dtype=torch.uint8) if recipe.format.block else None
    return _side(recipe, slots, head_dim, block, 0), _side(recipe, slots, head_dim, block, 1)


def _side(recipe: KVRecipe, slots: int, head_dim: int, block: torch.Tensor | None, side: int) -> PackedCache:
    number = recipe.format
    code = torch.randint(
        -(1 << 15), 1 << 15, (slots, HEADS, number.code_width(head_dim)), device="cuda", dtype=torch.int16
    )
    if number.code_dtype == torch.uint8:
        code = torch.randint(0, 0x7E, code.shape, device="cuda", dtype=torch.uint8)
    bias = torch.randn(HEADS, head_dim, device="cuda") if recipe.affine else None
    scale = torch.full((1,), 0.05, device="cuda")
    return PackedCache(number, code, block, side, scale, bias, recipe.rotate and side == 0, head_dim, torch.float32)


def scattered(tokens: int, page: int) -> torch.Tensor:
    """Slots of ``tokens`` tokens, int32: pages of ``page`` side by side, in random order."""
    first = torch.randperm(tokens // page, device="cuda")[:, None] * page
    return (first + torch.arange(page, device="cuda")).flatten().to(torch.int32)


class Decode:
    """One step of a batch of requests of one length over ``copies`` caches."""

    def __init__(self, recipe: KVRecipe, context: int, batch: int, group: int, head_dim: int, page: int = 1) -> None:
        stored = 2 * context * batch * HEADS * recipe.bytes_per_vector(head_dim)
        self.stored = stored
        self.copies = max(1, min(4, COLD_BYTES // stored + 1))
        tokens = context * batch
        self.caches = [empty(recipe, tokens, head_dim) for _ in range(self.copies)]
        self.q = torch.randn(batch, HEADS * group, head_dim, device="cuda", dtype=torch.bfloat16)
        self.out = torch.empty_like(self.q)
        self.indptr = torch.arange(0, tokens + 1, context, device="cuda", dtype=torch.int32)
        self.indices = scattered(tokens, page)
        processors = torch.cuda.get_device_properties(0).multi_processor_count
        room = DecodeScratch(batch, HEADS * group, HEADS, head_dim, processors, "cuda")
        self.partial, self.lse = room.of(batch, HEADS * group)
        self.splits = self.partial.shape[2]

    def __call__(self, index: int) -> None:
        keys, values = self.caches[index % self.copies]
        decode_attention(
            self.q,
            keys,
            values,
            self.out,
            self.indptr,
            self.indices,
            self.partial,
            self.lse,
            None,
            self.splits,
            0.01,
        )


def check(recipe: KVRecipe, head_dim: int) -> float:
    """The largest error of decode and extend, relative to the norm of an output vector."""
    decode = Decode(recipe, 700, 3, 4, head_dim)
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
    """Microseconds of FlashInfer's paged decode, None without FlashInfer."""
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
    """Prints decode: every recipe over contexts and batches, ratios to the plain recipe of its format and to the peers."""
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
        for name, recipe in KV_RECIPES.items():
            case = Decode(recipe, context, batch, group, head_dim, PAGE)
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
    """Microseconds of SGLang's Triton kernel over a bf16 cache, None without SGLang.

    Args:
        new: queries, keys, values and output of the new tokens.
        full: keys and values of the prefix, ``[slots, H, D]``.
        spans: where new tokens and prefix begin and end.
        indices: slots of the prefix.
    """
    try:
        from sglang.kernels.ops.attention.extend_attention import extend_attention_fwd
    except ImportError:
        return None
    tokens = new[0].shape[0]
    # Slots as SGLang's pool has them, int64.
    slots = indices.long()
    return median_us(lambda _: extend_attention_fwd(*new, *full, *spans, slots, None, True, None, tokens, 1.0, 1.0))


def extend_rows() -> None:
    """Prints new tokens over a packed prefix, beside what attends to unquantized keys and values."""
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
        wide = q.transpose(0, 1)[None].contiguous()
        bias = causal_lower_right(new, prefix + new)
        whole = [x.repeat_interleave(4, dim=1) for x in full]
        sdpa = median_us(lambda _, wide=wide, whole=whole, bias=bias: scaled_dot_product_attention(wide, *whole, bias))
        indices = scattered(prefix, PAGE)
        spans = [torch.tensor([0, count], device="cuda", dtype=torch.int32) for count in (new, prefix)]
        cached = [x[0, :, :prefix].transpose(0, 1).contiguous() for x in full]
        stock = stock_extend([q, k, v, out], cached, spans, indices)
        flops = 4 * 4 * HEADS * head_dim * (new * prefix + new * new / 2)
        for name, recipe in KV_RECIPES.items():
            keys, values = empty(recipe, prefix, head_dim)
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
    """Prints the fused rounding and writing of keys and values."""
    print(f"{'store':14}{'D':>4}{'tokens':>8}{'us':>9}{'GB/s read':>11}")
    for tokens in (1, 32, 256, 8192):
        k, v = (torch.randn(tokens, HEADS, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        slots = torch.randperm(tokens, device="cuda")
        for name, recipe in KV_RECIPES.items():
            keys, values = empty(recipe, tokens, 128)
            us = median_us(lambda _, a=(keys, values, slots, k, v): store_kv(*a))
            print(f"{name:14}{128:4}{tokens:8}{us:9.1f}{4 * k.numel() / us / 1e3:11.0f}", flush=True)


def main() -> None:
    """Checks, then prints the three tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two contexts of decode only")
    arguments = parser.parse_args()
    bandwidth = read_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    print(f"read bandwidth {bandwidth:.2f} TB/s; {HEADS} KV heads, queries bf16")
    for name, recipe in KV_RECIPES.items():
        errors = [check(recipe, head_dim) for head_dim in (64, 128)]
        print(f"{name}: largest relative error {max(errors):.1e} of float64")
        # bf16 outputs and float16 weights: a few 2^-9.
        if not max(errors) < 0.01:
            raise SystemExit(f"{name} is wrong: {errors}")
    store_rows()
    extend_rows()
    decode_rows(bandwidth, arguments.quick)


if __name__ == "__main__":
    main()
