"""Rows of attention over packed KV caches."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import triton.language as tl

from benchmarks.registry.base import Case, Kernel, Launch, StressCase
from benchmarks.registry.caches import HEADS, DecodeStep, random_caches, scattered_slots
from sglang_modelopt_kernels.attention.decode import decode, naive_decode
from sglang_modelopt_kernels.attention.decode.kernel import merge_kernel, split_kernel
from sglang_modelopt_kernels.attention.extend import extend, extend_attention, naive_extend
from sglang_modelopt_kernels.attention.extend.kernel import extend_kernel
from sglang_modelopt_kernels.attention.naive import unpacked
from sglang_modelopt_kernels.attention.store import naive_store_kv, rotate_queries, store_kv
from sglang_modelopt_kernels.attention.store.kernel import store_kernel, turn_kernel
from sglang_modelopt_kernels.attention.store.store import MOST_ROTATED
from sglang_modelopt_kernels.formats.kv_cache import KV_RECIPES, KVRecipe, hadamard_block
from sglang_modelopt_kernels.gemm.common import matrix_instruction

HEAD_DIMS = (64, 128, 256)
PREFIX, NEW, REQUESTS = 1500, 333, 8
"""Cached and new tokens of each request, and requests, of the stress cases."""
SINKS = {"sink_ptr": "*bf16"}
"""The type of attention sinks in SGLang's models; without it they are None."""
WITH_AND_WITHOUT = ((False, ""), (True, " sinks"))
"""Whether attention has sinks, and the end of the case's name."""
TOLERANCE = 0.01
"""Relative error of an output vector: bf16 outputs of fp16 softmax weights."""


def _recipes() -> Iterator[tuple[KVRecipe, int]]:
    """Yield every KV recipe and head dimension that the kernels support together."""
    for recipe in KV_RECIPES.values():
        for head_dim in HEAD_DIMS:
            if not (recipe.rotate and head_dim > MOST_ROTATED):
                yield recipe, head_dim


def _case(
    recipe: KVRecipe,
    head_dim: int,
    arch: int,
    label: str,
    kernel: Any,
    own: dict[str, Any],
    options: dict[str, int],
    matrix: str = "",
    weights: int = 0,
    types: dict[str, str] | None = None,
) -> Case:
    """Make the compilation of a kernel over one recipe: four query heads to a KV head, a bf16 model.

    Args:
        recipe: the KV recipe.
        head_dim: D.
        arch: compute capability times ten.
        label: kernel and configuration.
        kernel: the Triton function.
        own: constexprs of this kernel alone, beside those of all.
        options: warps and stages.
        matrix: see :class:`Case`.
        weights: see :class:`Case`.
        types: Triton's types that differ from those of the other kernels, or of arguments that are None without them.
    """
    code = "*i16" if recipe.format.block else "*u8"
    known = {"k_code_ptr": code, "v_code_ptr": code, "block_ptr": "*u8"}
    known |= {f"{side}_{name}": "*fp32" for side in "kv" for name in ("scale_ptr", "bias_ptr")}
    known |= dict.fromkeys(("qo_indptr", "kv_indptr", "kv_indices", "slot_ptr"), "*i32")
    known |= {"partial_ptr": "*fp32", "lse_ptr": "*fp32", "sm_scale": "fp32", "cap": "fp32"}
    known |= dict.fromkeys(("q_ptr", "rotated_ptr"), "*fp16" if recipe.rotate else "*bf16")
    known |= dict.fromkeys(("k_ptr", "v_ptr", "out_ptr"), "*bf16") | dict.fromkeys(("tokens", "rows", "splits"), "i32")
    scratch = ("partial_token", "partial_head", "partial_split", "lse_token", "lse_head")
    strides = ("q_stride", "rotated_stride", "k_stride", "v_stride", "out_stride")
    known |= dict.fromkeys((*scratch, *strides), "i32") | (types or {})
    constants = {"D": head_dim, "DP": head_dim, "E": head_dim // 4, "FP4": recipe.format.block > 0}
    constants |= {"AFFINE": recipe.affine, "H": 8, "GROUP": 4, "CAP": False, "ASM": True, "NATIVE": arch >= 89}
    constants |= {"COMPUTE": tl.float16, "RAW": tl.bfloat16, "SIZE": hadamard_block(head_dim), "sink_ptr": None} | own
    constexprs = {
        key: value for key, value in constants.items() if key in kernel.arg_names and key not in (types or {})
    }
    chosen = {key: known[key] for key in kernel.arg_names if key not in constexprs}
    name = f"{label} {recipe.name} D={head_dim}"
    return Case(name, kernel, chosen, constexprs, options, (*strides, *scratch), matrix, weights)


def _decode_cases(arch: int) -> Iterator[Case]:
    for recipe, head_dim in _recipes():
        own: dict[str, Any] = {}
        for heads in (8, 1):
            one = decode.choose_for(recipe.format, head_dim, heads, arch)
            own = {"H": heads, "BH": one.heads, "BG": decode.LEAST_QUERIES, "BN": one.tokens, "BP": decode.MERGED}
            own["LEAST"] = decode.LEAST_TOKENS
            options = {"num_warps": one.heads, "num_stages": one.stages}
            weights = 2 * one.heads * one.tokens * head_dim
            label = f"decode H={heads} {one}"
            yield _case(recipe, head_dim, arch, label, split_kernel, own, options, "small", weights)
        yield _case(recipe, head_dim, arch, "merge", merge_kernel, own, {"num_warps": 4})
        yield _case(recipe, head_dim, arch, "merge with sinks", merge_kernel, own, {"num_warps": 4}, types=SINKS)


def _extend_cases(arch: int) -> Iterator[Case]:
    for recipe, head_dim in _recipes():
        for label, types in (("extend", None), ("extend with sinks", SINKS)):
            many = extend.choose_for(recipe.format, head_dim, arch, types is not None)
            options = {"num_warps": many.warps, "num_stages": many.stages}
            own = {"BM": many.queries, "BN": many.keys, "CAUSAL": True, "WINDOW": 0}
            own["WGMMA"] = matrix_instruction(arch) == "wgmma"
            matrix = "any" if many.queries >= 64 else "small"
            yield _case(recipe, head_dim, arch, f"{label} {many}", extend_kernel, own, options, matrix, types=types)


def _store_cases(arch: int) -> Iterator[Case]:
    for recipe, head_dim in _recipes():
        own = {"BT": 16, "ROTATE": recipe.rotate, "NATIVE": True}
        yield _case(recipe, head_dim, arch, "store", store_kernel, own, {"num_warps": 4})
        if recipe.rotate:
            types = {"q_ptr": "*bf16", "y_ptr": "*fp16"}
            yield _case(recipe, head_dim, arch, "turn", turn_kernel, own, {"num_warps": 4}, types=types)


def _decode_stress(capability: int) -> Iterator[StressCase]:
    del capability
    for recipe, head_dim in _recipes():
        for sinks, label in WITH_AND_WITHOUT:
            yield StressCase(
                f"decode {recipe.name} D={head_dim}{label}", partial(_launch_decode, recipe, head_dim, sinks)
            )


def _extend_stress(capability: int) -> Iterator[StressCase]:
    del capability
    for recipe, head_dim in _recipes():
        for sinks, label in WITH_AND_WITHOUT:
            yield StressCase(
                f"extend {recipe.name} D={head_dim}{label}", partial(_launch_extend, recipe, head_dim, sinks)
            )


def _store_stress(capability: int) -> Iterator[StressCase]:
    del capability
    for recipe, head_dim in _recipes():
        yield StressCase(f"store {recipe.name} D={head_dim}", partial(_launch_store, recipe, head_dim))
    yield StressCase("turn", _launch_rotate)


def _random_sinks(heads: int) -> torch.Tensor:
    """Make a sink for each query head: beside PREFIX logits near zero one of 7 has half of the softmax, minus infinity nothing."""
    sinks = torch.randn(heads, device="cuda") + 7
    sinks[0] = -torch.inf
    return sinks.bfloat16()


def _launch_decode(recipe: KVRecipe, head_dim: int, sinks: bool) -> Launch:
    torch.manual_seed(head_dim)
    step = DecodeStep(recipe, PREFIX, REQUESTS, 4, head_dim)
    step.copies = 1
    step.sinks = _random_sinks(4 * HEADS) if sinks else None
    expected = naive_decode(step.q, *step.caches[0], step.indptr, step.indices, 0.01, sinks=step.sinks)

    def call() -> torch.Tensor:
        step(0)
        return step.out.flatten(1)

    return Launch(call, expected.flatten(1), TOLERANCE)


def _launch_extend(recipe: KVRecipe, head_dim: int, sinks: bool) -> Launch:
    torch.manual_seed(head_dim)
    keys, values = random_caches(recipe, PREFIX * REQUESTS, head_dim)
    q, k, v = (
        torch.randn(NEW * REQUESTS, heads, head_dim, device="cuda").bfloat16() for heads in (4 * HEADS, HEADS, HEADS)
    )
    qo_indptr, kv_indptr = (
        torch.arange(0, count * REQUESTS + 1, count, device="cuda", dtype=torch.int32) for count in (NEW, PREFIX)
    )
    slots = scattered_slots(PREFIX * REQUESTS, 1)
    out = torch.empty_like(q)
    spans, logits = (qo_indptr, kv_indptr, slots), _random_sinks(4 * HEADS) if sinks else None
    expected = naive_extend(q, k, v, keys, values, *spans, 0.01, sinks=logits)

    def call() -> torch.Tensor:
        extend_attention(q, k, v, out, keys, values, *spans, None, True, None, NEW, sm_scale=0.01, sinks=logits)
        return out.flatten(1)

    return Launch(call, expected.flatten(1), TOLERANCE)


def _launch_store(recipe: KVRecipe, head_dim: int) -> Launch:
    torch.manual_seed(head_dim)
    tokens = 4096
    keys, values = random_caches(recipe, tokens, head_dim)
    k, v = (torch.randn(tokens, HEADS, head_dim, device="cuda").bfloat16() for _ in range(2))
    slots = torch.randperm(tokens, device="cuda")

    def call() -> torch.Tensor:
        store_kv(keys, values, slots, k, v)
        parts = [keys.codes, values.codes, *([] if keys.block_scales is None else [keys.block_scales])]
        return torch.cat([part.view(torch.uint8).flatten() for part in parts]).unsqueeze(0)

    return Launch(call, None)


def _launch_rotate() -> Launch:
    generator = torch.Generator("cuda").manual_seed(32 * 128)
    q = torch.randn(4096, 32 * 128, generator=generator, device="cuda").bfloat16().unflatten(1, (32, 128))
    return Launch(lambda: rotate_queries(q).flatten(1), None)


DECODE = Kernel(
    "decode",
    "attention/decode",
    naive_decode,
    compile=_decode_cases,
    stress=_decode_stress,
    measured=KV_RECIPES,
)
EXTEND = Kernel("extend", "attention/extend", naive_extend, compile=_extend_cases, stress=_extend_stress)
STORE = Kernel("store", "attention/store", naive_store_kv, compile=_store_cases, stress=_store_stress)
VECTORS = Kernel(
    "kv_vectors",
    "attention",
    unpacked,
    without={
        "compile": "functions that decode, extend and store inline; it has no kernel",
        "stress": "functions that decode, extend and store inline; it has no kernel",
    },
)
