"""Random packed KV caches, and a step of decode attention over them."""

from __future__ import annotations

import torch

from sglang_modelopt_kernels.attention.decode import DecodeScratch, decode_attention
from sglang_modelopt_kernels.attention.packed import PackedCache
from sglang_modelopt_kernels.formats.kv_cache import KVRecipe
from sglang_modelopt_kernels.timing import COLD_BYTES

HEADS = 8
"""KV heads."""


def random_caches(recipe: KVRecipe, slots: int, head_dim: int) -> tuple[PackedCache, PackedCache]:
    """Make the keys and values of one layer, of random codes and block scales."""
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


def scattered_slots(tokens: int, page: int) -> torch.Tensor:
    """Return the slots of ``tokens`` tokens, int32: pages of ``page`` consecutive slots, in random order."""
    first = torch.randperm(tokens // page, device="cuda")[:, None] * page
    return (first + torch.arange(page, device="cuda")).flatten().to(torch.int32)


class DecodeStep:
    """One step of ``batch`` requests of ``context`` tokens, over enough copies of the cache to miss the GPU's L2.

    ``group`` query heads read each of HEADS KV heads; ``page`` slots are consecutive. ``sinks`` are those of attention, or None.
    """

    def __init__(self, recipe: KVRecipe, context: int, batch: int, group: int, head_dim: int, page: int = 1) -> None:
        self.stored = 2 * context * batch * HEADS * recipe.bytes_per_vector(head_dim)
        self.copies = max(1, min(4, COLD_BYTES // self.stored + 1))
        tokens = context * batch
        self.caches = [random_caches(recipe, tokens, head_dim) for _ in range(self.copies)]
        self.q = torch.randn(batch, HEADS * group, head_dim, device="cuda", dtype=torch.bfloat16)
        self.out = torch.empty_like(self.q)
        self.indptr = torch.arange(0, tokens + 1, context, device="cuda", dtype=torch.int32)
        self.indices = scattered_slots(tokens, page)
        sms = torch.cuda.get_device_properties(0).multi_processor_count
        room = DecodeScratch(batch, HEADS * group, HEADS, head_dim, sms, "cuda")
        self.partial, self.lse = room.of(batch, HEADS * group)
        self.splits = self.partial.shape[2]
        self.sinks: torch.Tensor | None = None

    def __call__(self, index: int) -> None:
        keys, values = self.caches[index % self.copies]
        spans, scratch = (self.indptr, self.indices), (self.partial, self.lse)
        decode_attention(self.q, keys, values, self.out, *spans, *scratch, None, self.splits, 0.01, sinks=self.sinks)
