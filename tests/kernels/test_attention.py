"""Attention over packed caches against its naive twins: on a CPU in Triton's interpreter, and, marked ``gpu``, on CUDA."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_modelopt_kernels.attention.decode import DecodeScratch, decode_attention, naive_decode
from sglang_modelopt_kernels.attention.decode.decode import LEAST_TOKENS, choose_for
from sglang_modelopt_kernels.attention.extend import extend_attention, naive_extend
from sglang_modelopt_kernels.attention.naive import unpacked
from sglang_modelopt_kernels.attention.packed import PackedCache
from sglang_modelopt_kernels.attention.store import (
    naive_rotate_queries,
    naive_store_kv,
    rotate_queries,
    store_kv,
)
from sglang_modelopt_kernels.formats.kv_cache import KV_RECIPES, rotate

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""Half a unit in the last place, relative."""

POISON = 0x7F7F
"""NaN as E4M3 bytes: in codes and in block scales alike."""


@dataclass(frozen=True)
class Case:
    """A batch: ``lengths`` cached tokens of each request, ``new`` tokens beside them."""

    recipe: str
    dtype: str = "fp32"
    lengths: tuple[int, ...] = (1, 63, 130)
    new: tuple[int, ...] = (3, 70, 1)
    heads: int = 2
    group: int = 4
    head_dim: int = 64
    splits: int = 3
    cap: float = 0.0
    window: int = -1
    causal: bool = True
    size: float = 1.0
    sinks: tuple[float, ...] = ()


class Batch:
    """Random caches and tokens of a case: channels of uneven size, an offset, unused slots full of NaN."""

    def __init__(self, case: Case, device: str) -> None:
        self.case = case
        self.recipe = KV_RECIPES[case.recipe]
        self.device = device
        self.generator = torch.Generator().manual_seed(sum(case.lengths) + case.head_dim)
        self.slots = 2 * sum(case.lengths) + 3
        shape = (self.slots, case.heads, case.head_dim)
        spread = torch.linspace(0.2, 2.0, case.head_dim)
        k, v = (case.size * (self.normal(*shape) * spread + 0.7) for _ in range(2))
        width = self.recipe.format.scale_bytes(case.head_dim)
        poison = torch.full((self.slots, case.heads, 2, width), POISON & 0xFF, dtype=torch.uint8, device=device)
        scales = poison if self.recipe.format.block else None
        self.keys, self.values = self.packed(k, scales, 0), self.packed(v, scales, 1)
        order = torch.randperm(self.slots, generator=self.generator)
        self.indices = order[: sum(case.lengths)].to(torch.int32)
        for cache, x in ((self.keys, k), (self.values, v)):
            cache.store(self.indices.long().to(device), x[self.indices.long()].to(device))
        self.indices = self.indices.to(device)
        self.kv_indptr = self.indptr(case.lengths)
        self.qo_indptr = self.indptr(case.new)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)

    def indptr(self, counts: tuple[int, ...]) -> torch.Tensor:
        return torch.tensor([0, *counts]).cumsum(0).to(torch.int32).to(self.device)

    def packed(self, x: torch.Tensor, scales: torch.Tensor | None, side: int) -> PackedCache:
        number = self.recipe.format
        heads, head_dim = x.shape[1:]
        bias = x.mean(dim=0) if self.recipe.affine else None
        inner = rotate(x) if self.recipe.rotate and side == 0 else x - (0 if bias is None else bias)
        code = torch.full((self.slots, heads, number.code_width(head_dim)), POISON, dtype=torch.int16)
        return PackedCache(
            number,
            code.to(number.code_dtype).to(self.device),
            scales,
            side,
            (inner.abs().max() / number.range).reshape(1).to(self.device),
            None if bias is None else bias.to(self.device),
            self.recipe.rotate and side == 0,
            head_dim,
            torch.float32,
        )

    def sinks(self, dtype: torch.dtype) -> torch.Tensor | None:
        """The case's sinks, repeated over the query heads."""
        some = self.case.sinks
        count = self.case.heads * self.case.group
        return torch.tensor([some[i % len(some)] for i in range(count)]).to(dtype).to(self.device) if some else None

    def queries(self, tokens: int) -> torch.Tensor:
        case = self.case
        q = self.normal(tokens, case.heads * case.group, case.head_dim)
        return (q / case.size).to(DTYPES[case.dtype]).to(self.device)


def tolerance(batch: Batch, q: torch.Tensor, largest_logit: float) -> float:
    """Relative to the sum of weights times magnitudes of the values.

    The weights are rounded once to float16 (float32 for float32 models), the result to its type. A logit errs by the rounding of a
    float32 sum of exact products, or of float32 ones, and by that of the rotated query; an error of d in a logit changes
    its weight by d, and their sum by as much again. A few roundings of scales come on top.
    """
    compute = UNIT[torch.float32] if q.dtype == torch.float32 else UNIT[torch.float16]
    logit = (2 * batch.case.head_dim + 32) * 2.0**-24 + (compute if batch.keys.rotated else 0.0)
    # bf16 keys of the new tokens themselves: weights meet them in their own type.
    weights = max(compute, UNIT[q.dtype])
    return weights + UNIT[q.dtype] + 2 * logit * largest_logit + 64 * 2.0**-24


def worst(
    batch: Batch, out: torch.Tensor, expected: torch.Tensor, bound: torch.Tensor, q: torch.Tensor, k: torch.Tensor
) -> float:
    assert not bool(out.isnan().any()), "not every output was written, or an unused slot was read"
    largest = (
        float((q.double().abs().flatten(0, 1) @ k.double().abs().flatten(0, 1).T).max()) * batch.case.head_dim**-0.5
    )
    error = (out.double() - expected).abs() / bound.clamp(min=1e-300)
    return float(error.max()) / tolerance(batch, q, largest)


def absolute(cache: PackedCache, slots: torch.Tensor) -> PackedCache:
    """The magnitudes of the vectors in the slots used, in an FP32 stand-in for a cache."""
    values = torch.zeros(cache.shape, dtype=torch.float64, device=cache.codes.device)
    values[slots] = unpacked(cache, slots).abs()

    class Plain:
        shape = cache.shape

        def __getitem__(self, index: Any) -> torch.Tensor:
            return values[index]

    return Plain()  # type: ignore[return-value]


def check_decode(case: Case, device: str) -> float:
    """The worst error of the decode kernel over its tolerance."""
    batch = Batch(case, device)
    q = batch.queries(len(case.lengths))
    out = torch.full_like(q, float("nan"))
    scratch = torch.full((len(case.lengths), q.shape[1], case.splits, case.head_dim), float("nan"), device=device)
    lse = torch.full(scratch.shape[:3], float("nan"), device=device)
    scale = case.head_dim**-0.5
    sinks = batch.sinks(q.dtype)
    decode_attention(
        q, batch.keys, batch.values, out, batch.kv_indptr, batch.indices, scratch, lse, None, case.splits, scale,
        logit_cap=case.cap, sinks=sinks,
    )  # fmt: skip
    arguments = (batch.kv_indptr, batch.indices, scale, case.cap, sinks)
    expected = naive_decode(q, batch.keys, batch.values, *arguments)
    bound = naive_decode(q, batch.keys, absolute(batch.values, batch.indices.long()), *arguments)
    return worst(batch, out, expected, bound, q, unpacked(batch.keys, batch.indices.long()))


def check_extend(case: Case, device: str) -> float:
    """The worst error of the extend kernel over its tolerance."""
    batch = Batch(case, device)
    tokens = sum(case.new)
    q = batch.queries(tokens)
    qkv = (batch.normal(tokens, 2, case.heads, case.head_dim) * case.size).to(q.dtype).to(device)
    k, v = qkv[:, 0], qkv[:, 1]  # as views of one fused product
    out = torch.full_like(q, float("nan"))
    scale = case.head_dim**-0.5
    extend_attention(
        q, k, v, out, batch.keys, batch.values, batch.qo_indptr, batch.kv_indptr, batch.indices, None, case.causal, None,
        max(case.new), sm_scale=scale, logit_cap=case.cap, sliding_window_size=case.window, sinks=batch.sinks(q.dtype),
    )  # fmt: skip
    spans = (batch.qo_indptr, batch.kv_indptr, batch.indices)
    arguments = (*spans, scale, case.cap, case.causal, case.window, batch.sinks(q.dtype))
    expected = naive_extend(q, k, v, batch.keys, batch.values, *arguments)
    bound = naive_extend(q, k, v.abs(), batch.keys, absolute(batch.values, batch.indices.long()), *arguments)
    seen = torch.cat((unpacked(batch.keys, batch.indices.long()), k.double()))
    return worst(batch, out, expected, bound, q, seen)


def check_store(case: Case, device: str) -> tuple[int, int, int]:
    """(codes of keys, codes of values, block scales) that are not those of :func:`naive_store_kv`."""
    batch = Batch(case, device)
    tokens = sum(case.new)
    slots = torch.randperm(batch.slots, generator=batch.generator)[:tokens].to(device)
    shape = (tokens, 2, case.heads, case.head_dim)
    qkv = (batch.normal(*shape) * batch.normal(tokens, 1, 1, 1).exp() * case.size).to(DTYPES[case.dtype])
    qkv[0, 0, 0, 3] = float("nan")
    qkv[min(1, tokens - 1), 1, 0, 5] = float("inf")
    qkv[tokens - 1] = 0.0
    qkv = qkv.to(device)
    caches = [batch.keys, batch.values]
    twins = [
        replace(c, codes=c.codes.clone(), block_scales=None if c.block_scales is None else c.block_scales.clone())
        for c in caches
    ]
    store_kv(caches[0], caches[1], slots.to(torch.int32), qkv[:, 0], qkv[:, 1])
    naive_store_kv(twins[0], twins[1], slots, qkv[:, 0], qkv[:, 1])
    wrong = []
    scales = 0
    unused = ~torch.isin(torch.arange(batch.slots, device=device), slots)
    for side, (cache, twin) in enumerate(zip(caches, twins, strict=True)):
        assert bool((cache.codes == twin.codes)[unused].all()), "another slot was written"
        # A NaN spoils its block or, rotated, its vector; the codes beside it mean nothing.
        ours, theirs = cache[slots], twin[slots]
        spoiled = ours.isnan().any(dim=-1)
        assert torch.equal(spoiled, theirs.isnan().any(dim=-1))
        if cache.block_scales is None or twin.block_scales is None:
            wrong.append(int((cache.codes != twin.codes)[slots][~spoiled].sum()))
            continue
        differ = cache.block_scales != twin.block_scales
        assert not bool(differ[unused].any()), "block scales of another slot were written"
        scales += int(differ[slots][:, :, side][~spoiled].sum())
        wrong.append(int((cache.codes != twin.codes)[slots][~spoiled].sum()))
    return wrong[0], wrong[1], scales


def check_turn(head_dim: int, dtype: str, device: str) -> float:
    """The worst error of rotated queries, over the rounding of the result and of a float32 sum."""
    q = torch.randn(5, 3, head_dim, generator=torch.Generator().manual_seed(head_dim)).to(DTYPES[dtype]).to(device)
    rotated = rotate_queries(q)
    expected = naive_rotate_queries(q).double()
    bound = q.double().abs().sum(dim=-1, keepdim=True) * head_dim**-0.5
    unit = UNIT[rotated.dtype] + (head_dim + 8) * 2.0**-23
    return float(((rotated.double() - expected).abs() / (bound * unit)).max())


SINKS = (-torch.inf, 30.0, 1.25, -20.0, 6.0)
"""Sinks that have nothing, all but e^-30 of the softmax or more, and shares between; five of them beside six query heads."""

DECODE = [
    *[Case(recipe) for recipe in KV_RECIPES],
    *[Case(recipe, "fp16", (0, 64, 65, 200), head_dim=128, group=8, splits=8) for recipe in KV_RECIPES],
    Case("nvfp4_affine", head_dim=96, group=5, cap=30.0),
    Case("nvfp4_rotate", head_dim=96, heads=1, group=1, splits=1),
    Case("fp8_affine", head_dim=80, group=16, cap=5.0),
    Case("nvfp4", size=3e-3),
    Case("nvfp4_affine", size=200.0),
    # Twice as many parts as are merged at a time; among eight queries, some find their largest logit in the second half.
    Case("nvfp4_affine", "fp16", (16000, 5, 0), heads=1, group=8, splits=125),
    *[Case(recipe, lengths=(1, 0, 63, 257), head_dim=80, group=3, sinks=SINKS) for recipe in KV_RECIPES],
    *[Case(recipe, "fp16", (200, 130), heads=1, group=5, splits=1, sinks=(0.5,)) for recipe in ("fp8", "nvfp4_affine")],
    Case("fp8_affine", head_dim=128, splits=8, cap=5.0, sinks=SINKS),
]
EXTEND = [
    *[Case(recipe) for recipe in KV_RECIPES],
    *[Case(recipe, "fp16", (0, 90, 1), (65, 2, 1), head_dim=128, group=2) for recipe in KV_RECIPES],
    Case("nvfp4_affine", head_dim=96, group=3, cap=30.0),
    Case("nvfp4_rotate", window=20, lengths=(100, 5, 0), new=(70, 4, 40)),
    Case("fp8_affine", head_dim=80, window=64, causal=False),
    Case("nvfp4", causal=False, size=50.0),
    *[Case(recipe, lengths=(1, 0, 90), new=(3, 37, 66), head_dim=80, group=3, sinks=SINKS) for recipe in KV_RECIPES],
    Case("fp8_affine", "fp16", cap=5.0, group=5, sinks=(0.5, -3.0)),
    Case("nvfp4_affine", window=20, lengths=(100, 5, 0), new=(70, 4, 40), sinks=SINKS),
]
STORE = [
    *[Case(recipe, dtype, new=(40,)) for recipe in KV_RECIPES for dtype in ("fp32", "fp16")],
    *[Case(recipe, new=(3,), head_dim=96, size=100.0) for recipe in KV_RECIPES],
    *[Case(recipe, new=(17,), head_dim=128, heads=3, size=1e-4) for recipe in KV_RECIPES],
    *[Case(recipe, new=(200,), heads=4) for recipe in ("fp8", "nvfp4")],  # negative numbers that round to zero
]


def check_all(device: str) -> dict[str, Any]:
    """Every case; a name for each failure."""
    failures = {}
    for name, check, cases in (("decode", check_decode, DECODE), ("extend", check_extend, EXTEND)):
        for case in cases:
            error = check(case, device)
            if not error < 1:
                failures[f"{name} {case}"] = error
    for case in STORE:
        wrong = check_store(case, device)
        if max(wrong) > allowed(case):
            failures[f"store {case}"] = wrong
    for head_dim in (64, 80, 96, 128):
        for dtype in ("fp32", "fp16"):
            error = check_turn(head_dim, dtype, device)
            if not error < 1:
                failures[f"turn {head_dim} {dtype}"] = error
    return failures


def allowed(case: Case) -> int:
    """Codes that may differ: none, but for a rotated key, whose sum of head_dim products is rounded in another order."""
    if not KV_RECIPES[case.recipe].rotate:
        return 0
    return max(2, sum(case.new) * case.heads * case.head_dim // 500)


def test_what_is_too_large_to_rotate_is_refused() -> None:
    batch = Batch(Case("nvfp4_rotate", head_dim=256, lengths=(3,)), "cpu")
    with pytest.raises(ValueError, match="rotate at most 128"):
        rotate_queries(batch.queries(1))
    k = batch.normal(1, 2, 256)
    with pytest.raises(ValueError, match="rotate at most 128"):
        store_kv(batch.keys, batch.values, torch.tensor([0]), k, k)


@pytest.mark.parametrize("heads", [1, 2, 3, 8, 32])
@pytest.mark.parametrize("processors", [1, 132])
def test_scratch_holds_every_batch(heads: int, processors: int) -> None:
    room = DecodeScratch(150, 4 * heads, heads, 64, processors, "meta")
    for requests in range(1, 151):
        partial, lse = room.of(requests, 4 * heads)
        assert partial.shape == (*lse.shape, 64)
        assert lse.shape[:2] == (requests, 4 * heads)
        assert 1 <= lse.shape[2] <= 128
        # A batch of one fills the GPU as far as parts may go, and no batch leaves most of a wave of programs over.
        assert lse.shape[2] == 128 or requests * heads * lse.shape[2] > 4 * processors
    with pytest.raises(ValueError, match="150 requests, not 151"):
        room.of(151, 4 * heads)


def test_scratch_of_large_batches_stays_small() -> None:
    """8 KV heads of 128 channels, four query heads to each: 72 MB for as many requests as are cut, 67 MB for 4096."""
    room = DecodeScratch(4096, 32, 8, 128, 132, "meta")
    assert room.partial.numel() * 4 < 80 << 20
    assert room.of(4096, 32)[0].shape == (4096, 32, 1, 128)


@pytest.mark.parametrize("arch", [80, 89, 90, 100, 120])
@pytest.mark.parametrize("recipe", ["fp8", "nvfp4"])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128, 192, 256])
def test_programs_share_the_heads_evenly(head_dim: int, recipe: str, arch: int) -> None:
    for heads in range(1, 17):
        config = choose_for(KV_RECIPES[recipe].format, head_dim, heads, arch)
        assert heads % config.heads == 0
        assert config.heads & (config.heads - 1) == 0, "tiles are powers of two"
        assert LEAST_TOKENS % config.tokens == 0


def test_what_the_kernels_do_not_serve_is_refused() -> None:
    batch = Batch(Case("nvfp4"), "cpu")
    q, scratch = batch.queries(3), torch.zeros(3, 8, 2, 64)
    decode = (q, batch.keys, batch.values, q, batch.kv_indptr, batch.indices, scratch, scratch[..., 0], None, 2, 0.1)
    for argument in ("score_mod", "aux_tensors"):
        with pytest.raises(NotImplementedError, match=argument):
            decode_attention(*decode, **{argument: torch.ones(1)})
    with pytest.raises(ValueError, match="scales"):
        decode_attention(*decode, k_scale=0.5)
    for sinks in (torch.zeros(7), torch.zeros(8, 1), torch.zeros(16)[::2]):
        with pytest.raises(ValueError, match="for 8 query heads"):
            decode_attention(*decode, sinks=sinks)
    k = batch.normal(3, 2, 64)
    spans = (batch.kv_indptr, batch.kv_indptr, batch.indices)
    with pytest.raises(NotImplementedError, match="custom_mask"):
        extend_attention(q, k, k, q, batch.keys, batch.values, *spans, torch.ones(1), True, None, 1)
    with pytest.raises(ValueError, match="for 8 query heads"):
        extend_attention(q, k, k, q, batch.keys, batch.values, *spans, None, True, None, 1, sinks=torch.zeros(2))
    with pytest.raises(NotImplementedError, match="skip_prefix"):
        extend_attention(q, k, k, q, batch.keys, batch.values, *spans, None, True, None, 1, skip_prefix=True)


def test_in_the_interpreter() -> None:
    """One process for all cases: Triton decides at import whether it interprets."""
    script = (
        "import json, sys, importlib.util as u\n"
        f"spec = u.spec_from_file_location('cases', {str(Path(__file__))!r}); cases = u.module_from_spec(spec)\n"
        "sys.modules['cases'] = cases; spec.loader.exec_module(cases)\n"
        "print(json.dumps(cases.check_all('cpu')))\n"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {}


def on_gpu(cases: list[Case]) -> list[Case]:
    """The cases in bf16, every recipe in the other types too, and larger ones."""
    larger = [
        Case(recipe, lengths=(1000, 4097, 1, 777), new=(300, 1, 129, 64), heads=8, head_dim=size, splits=16)
        for recipe in KV_RECIPES
        for size in (64, 128)
    ]
    others = [replace(case, dtype=dtype) for case in cases[: len(KV_RECIPES)] for dtype in ("fp32", "fp16")]
    return [*(replace(case, dtype="bf16") for case in (*cases, *larger)), *others]


@pytest.mark.gpu
@pytest.mark.parametrize("case", on_gpu(DECODE), ids=str)
def test_decode_on_a_gpu(case: Case) -> None:
    assert check_decode(case, "cuda") < 1


@pytest.mark.gpu
@pytest.mark.parametrize("case", on_gpu(EXTEND), ids=str)
def test_extend_on_a_gpu(case: Case) -> None:
    assert check_extend(case, "cuda") < 1


@pytest.mark.gpu
@pytest.mark.parametrize("case", on_gpu(STORE), ids=str)
def test_store_on_a_gpu(case: Case) -> None:
    assert max(check_store(case, "cuda")) <= allowed(case)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
def test_turn_on_a_gpu(head_dim: int, dtype: str) -> None:
    assert check_turn(head_dim, dtype, "cuda") < 1


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", KV_RECIPES)
def test_a_step_under_cuda_graph_capture(recipe: str) -> None:
    """Store and decode of one step, captured, replayed on other tokens."""
    case = Case(recipe, "bf16", lengths=(300, 65, 1), new=(1, 1, 1))
    batch = Batch(case, "cuda")
    q = batch.queries(3)
    k, v = (torch.randn(3, case.heads, case.head_dim, dtype=q.dtype, device="cuda") for _ in range(2))
    slots = batch.indices[batch.kv_indptr[1:].long() - 1].clone()
    out = torch.empty_like(q)
    scratch = torch.empty((3, q.shape[1], 4, case.head_dim), device="cuda")
    lse = torch.empty(scratch.shape[:3], device="cuda")

    def step() -> None:
        store_kv(batch.keys, batch.values, slots, k, v)
        decode_attention(q, batch.keys, batch.values, out, batch.kv_indptr, batch.indices, scratch, lse, None, 4, 0.125)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    q.normal_()
    k.normal_()
    v.normal_()
    out.fill_(float("nan"))
    graph.replay()
    expected = naive_decode(q, batch.keys, batch.values, batch.kv_indptr, batch.indices, 0.125)
    bound = naive_decode(
        q, batch.keys, absolute(batch.values, batch.indices.long()), batch.kv_indptr, batch.indices, 0.125
    )
    assert worst(batch, out, expected, bound, q, unpacked(batch.keys, batch.indices.long())) < 1
