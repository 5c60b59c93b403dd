"""The compilations of attention over packed KV caches (:mod:`benchmarks.aot`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton.language as tl

from benchmarks.aot_case import Case
from sglang_modelopt_kernels.attention.decode import decode
from sglang_modelopt_kernels.attention.decode.kernel import merge_kernel, split_kernel
from sglang_modelopt_kernels.attention.extend import extend
from sglang_modelopt_kernels.attention.extend.kernel import extend_kernel
from sglang_modelopt_kernels.attention.store.kernel import store_kernel, turn_kernel
from sglang_modelopt_kernels.attention.store.store import MOST_ROTATED
from sglang_modelopt_kernels.formats.kv_cache import KV_RECIPES, KVRecipe, hadamard_block
from sglang_modelopt_kernels.gemm.common import matrix_instruction

HEAD_DIMS = (64, 128, 256)
QUICK_RECIPES = ("fp8_affine", "nvfp4_rotate")
"""Of 4-bit codes, biases and a rotation, each is in one and not in the other."""


def attention_cases(arch: int) -> Iterator[Case]:
    """Attention over every KV recipe, four query heads to a KV head, in a bf16 model."""
    for recipe in KV_RECIPES.values():
        for head_dim in HEAD_DIMS:
            if recipe.rotate and head_dim > MOST_ROTATED:
                continue
            code = "*i16" if recipe.format.block else "*u8"
            cache = {"k_code_ptr": code, "v_code_ptr": code, "block_ptr": "*u8"}
            cache |= {f"{side}_{name}": "*fp32" for side in "kv" for name in ("scale_ptr", "bias_ptr")}
            indices = dict.fromkeys(("qo_indptr", "kv_indptr", "kv_indices", "slot_ptr"), "*i32")
            common = {"D": head_dim, "DP": head_dim, "E": head_dim // 4, "FP4": recipe.format.block > 0}
            common |= {"AFFINE": recipe.affine, "H": 8, "GROUP": 4, "CAP": False, "ASM": True, "NATIVE": arch >= 89}
            common |= {"COMPUTE": tl.float16, "RAW": tl.bfloat16, "SIZE": hadamard_block(head_dim)}
            yield from _attention_of(recipe, head_dim, arch, cache | indices, common)


def _attention_of(
    recipe: KVRecipe, head_dim: int, arch: int, types: dict[str, str], common: dict[str, Any]
) -> Iterator[Case]:
    name = f"{recipe.name} D={head_dim}"
    scratch = dict.fromkeys(("partial_token", "partial_head", "partial_split", "lse_token", "lse_head"), "i32")
    pointers = types | {"partial_ptr": "*fp32", "lse_ptr": "*fp32", "sm_scale": "fp32", "cap": "fp32"} | scratch
    strides = dict.fromkeys(("q_stride", "rotated_stride", "k_stride", "v_stride", "out_stride"), "i32")
    wide = dict.fromkeys(("q_ptr", "rotated_ptr"), "*fp16" if recipe.rotate else "*bf16")
    wide |= dict.fromkeys(("k_ptr", "v_ptr", "out_ptr"), "*bf16")
    everything = pointers | strides | wide | dict.fromkeys(("tokens", "rows", "splits"), "i32")
    aligned = (*strides, *scratch)

    def case(label: str, kernel: Any, own: dict[str, Any], options: dict[str, int], matrix: str, weights: int) -> Case:
        constexprs = {key: value for key, value in (common | own).items() if key in kernel.arg_names}
        chosen = {key: everything[key] for key in kernel.arg_names if key not in constexprs}
        return Case(f"{label} {name}", kernel, chosen, constexprs, options, aligned, matrix, weights)

    for heads in (8, 1):
        one = decode.choose_for(recipe.format, head_dim, heads, arch)
        own = {"H": heads, "BH": one.heads, "BG": decode.LEAST_QUERIES, "BN": one.tokens, "BP": decode.MERGED}
        own["LEAST"] = decode.LEAST_TOKENS
        options = {"num_warps": one.heads, "num_stages": one.stages}
        weights = 2 * one.heads * one.tokens * head_dim
        yield case(f"decode H={heads} {one}", split_kernel, own, options, "small", weights)
    yield case("merge", merge_kernel, own, {"num_warps": 4}, "", 0)
    many = extend.choose_for(recipe.format, head_dim, arch)
    options = {"num_warps": many.warps, "num_stages": many.stages}
    own = {"BM": many.queries, "BN": many.keys, "CAUSAL": True, "WINDOW": 0}
    own["WGMMA"] = matrix_instruction(arch) == "wgmma"
    yield case(f"extend {many}", extend_kernel, own, options, "any" if many.queries >= 64 else "small", 0)
    own = {"BT": 16, "ROTATE": recipe.rotate, "NATIVE": True}
    yield case("store", store_kernel, own, {"num_warps": 4}, "", 0)
    if recipe.rotate:
        everything["q_ptr"], everything["y_ptr"] = "*bf16", "*fp16"
        yield case("turn", turn_kernel, own, {"num_warps": 4}, "", 0)
