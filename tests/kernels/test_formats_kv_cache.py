"""KV formats and recipes: against an independent rounding, on all kinds of vectors. A new recipe is covered by its row."""

from __future__ import annotations

import pytest
import torch

from sglang_modelopt_kernels.attention.packed import PackedCache
from sglang_modelopt_kernels.formats.kv_cache import (
    KV_FORMATS,
    KV_RECIPES,
    KVRecipe,
    hadamard_block,
    hadamard_matrix,
    rotate,
)
from tests.support.kv import hadamard, round_vectors

HEADS = 3
SLOTS = 11
EPSILON = torch.finfo(torch.float32).eps


def packed(recipe: KVRecipe, head_dim: int, scale: float, bias: torch.Tensor | None, slots: int = SLOTS) -> PackedCache:
    """An empty cache of keys, its codes and scales poisoned."""
    number = recipe.format
    poison = 0x7F  # NaN as an E4M3 byte
    return PackedCache(
        number,
        torch.full((slots, HEADS, number.code_width(head_dim)), poison, dtype=number.code_dtype),
        torch.full((slots, HEADS, 2, number.scale_bytes(head_dim)), poison, dtype=torch.uint8)
        if number.block
        else None,
        0,
        torch.tensor([scale]),
        bias,
        recipe.rotate,
        head_dim,
        torch.float32,
    )


def vectors(head_dim: int, spread: float, seed: int = 0) -> torch.Tensor:
    """``[T, H, D]`` with outlier channels and an offset."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(7, HEADS, head_dim, generator=generator) * spread
    x[..., ::13] *= 9
    return x + torch.linspace(-spread, spread, head_dim)


@pytest.mark.parametrize("spread", [1e-3, 1.0, 300.0])
@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("name", KV_RECIPES)
def test_store_and_read_is_the_rounding(name: str, head_dim: int, spread: float) -> None:
    recipe, x = KV_RECIPES[name], vectors(head_dim, spread)
    bias = x.mean(dim=0).to(torch.bfloat16).to(torch.float32) if recipe.affine else None
    scale = float(x.abs().max()) / 448
    cache = packed(recipe, head_dim, scale * 448 / recipe.format.range, bias)
    slots = torch.tensor([3, 9, 0, 10, 4, 1, 6])
    cache.store(slots, x)
    read = cache[slots]
    # The twin has heads before tokens.
    expected = round_vectors(
        x.transpose(0, 1)[None], name, torch.tensor(scale), None if bias is None else bias[None, :, None]
    )[0].transpose(0, 1)
    # Both round to the same codes but where a quotient falls on the other side of a tie by float32's rounding, one code in
    # a million; elsewhere they differ by the rounding of a sum of head_dim products.
    apart = (read - expected).abs() / x.abs().max()
    assert float(apart.median()) <= 2 * EPSILON
    assert float((apart > 64 * EPSILON).float().mean()) < 0.002
    untouched = torch.tensor([2, 5, 7, 8])
    assert bool((cache.codes[untouched] == 0x7F).all())


@pytest.mark.parametrize("name", KV_RECIPES)
def test_error_against_the_vectors(name: str) -> None:
    """The relative error of the format: 2^-4 for E4M3, an eighth to a quarter of a step of E2M1, never the whole vector."""
    recipe, x = KV_RECIPES[name], vectors(64, 1.0)
    bias = x.mean(dim=0) if recipe.affine else None
    inner = rotate(x) if recipe.rotate else x - (0 if bias is None else bias)
    cache = packed(recipe, 64, float(inner.abs().max()) / recipe.format.range, bias)
    cache.store(torch.arange(7), x)
    relative = float((cache[:7] - x).norm() / inner.norm())
    assert relative < {"fp8": 0.04, "nvfp4": 0.13}[recipe.format.name]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", KV_RECIPES)
def test_what_is_not_a_number_shows(name: str, value: float) -> None:
    """NaN stays NaN; infinity saturates in FP8 as every FP8 cache does, and is NaN in NVFP4, whose block scale it ruins."""
    recipe = KV_RECIPES[name]
    x = vectors(32, 1.0)
    x[2, 1, 5] = value
    bias = torch.zeros(HEADS, 32) if recipe.affine else None
    cache = packed(recipe, 32, 1.0, bias)
    cache.store(torch.arange(7), x)
    read = cache[:7]
    if value != value or recipe.format.block:
        assert bool(read[2, 1].isnan().any())
    else:
        assert float(read[2, 1, 5]) == 448.0
    read[2, 1] = 0
    assert bool(torch.isfinite(read).all()), "another vector was touched"


@pytest.mark.parametrize(("name", "size"), [("fp8", 256), ("nvfp4", 144)])
def test_bytes_for_a_token_and_head(name: str, size: int) -> None:
    """Keys and values at head_dim 128, against 512 in bf16: 2 and 3.56 times the tokens."""
    for recipe in KV_RECIPES.values():
        if recipe.format is KV_FORMATS[name]:
            assert 2 * recipe.bytes_per_vector(128) == size


@pytest.mark.parametrize("size", [2, 16, 64, 256])
def test_hadamard(size: int) -> None:
    ours = hadamard_matrix(size, torch.device("cpu"))
    assert torch.allclose(ours, hadamard(size), rtol=0, atol=EPSILON)
    assert torch.allclose(ours @ ours, torch.eye(size), atol=size * EPSILON)


def test_a_head_dim_that_is_no_power_of_two_is_rotated_in_blocks() -> None:
    assert hadamard_block(96) == 32
    x = torch.randn(4, 96, generator=torch.Generator().manual_seed(1))
    expected = torch.cat([part @ hadamard(32) for part in x.split(32, dim=1)], dim=1)
    assert torch.allclose(rotate(x), expected, atol=32 * EPSILON)
    assert torch.allclose(rotate(rotate(x)), x, atol=64 * EPSILON)
