"""Quantized KV caches in SGLang's hybrid pools, built by its own code on a CPU: linear attention beside attention, and windows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("sglang")

from sglang_modelopt_ext.checkpoint.kv_scales import KVLayer, LayerRecipes
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.integration.kv import backend as kv_backend
from sglang_modelopt_ext.integration.kv import hooks as kv_hooks
from sglang_modelopt_ext.integration.kv import hybrid as kv_hybrid
from sglang_modelopt_ext.integration.kv.method import ModelOptExtKVMethod
from sglang_modelopt_ext.integration.kv.pool import ModelOptExtKVPool, is_packed, number_layers, packed_pools
from sglang_modelopt_kernels.formats.kv_cache import KV_RECIPES
from tests.support.kv import round_vectors
from tests.support.kv_trees import HEAD_DIM, attention_tree

HEADS, SIZE, SIZE_SWA, PAGE = 2, 40, 24, 4
WINDOWED, FULL = (0, 1, 3), (2, 4)
"""Layers with and without a window; with linear attention, WINDOWED are those without keys and values."""

RECIPES = pytest.mark.parametrize("recipe", KV_RECIPES)


def scales(numbers: tuple[int, ...], affine: bool) -> dict[int, KVLayer]:
    """Return scales and biases that identify their layer, of vectors whose magnitude does as well (:func:`vectors`)."""
    found = {}
    for number in numbers:
        biases = [torch.full((HEADS, HEAD_DIM), sign * (number + 1.0)) for sign in (1.0, -1.0)] if affine else []
        found[number] = KVLayer(*(0.01 * (number + 1.0) * factor for factor in (1.0, 1.5)), *biases)
    return found


def vectors(tokens: int, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    k, v = torch.randn(2, tokens, HEADS, HEAD_DIM, generator=generator) * (number + 1.0)
    return k, v


@dataclass
class Built:
    """A pool as SGLang's configurator builds it under our hooks, and what its layers were given."""

    pool: Any
    layers: dict[int, KVLayer]
    attention: dict[int, Any]
    recipe: str

    def expected(self, number: int, side: str, x: torch.Tensor) -> torch.Tensor:
        """Return ``x`` ``[T, H, D]`` read back from the cache of a layer, by the independent rounding of the recipe."""
        layer = self.layers[number]
        scale, bias = (layer.k_scale, layer.k_bias) if side == "k" else (layer.v_scale, layer.v_bias)
        stored = torch.tensor(scale * KV_RECIPES[self.recipe].format.range / 448)
        name = self.recipe if side == "k" else self.recipe.replace("_rotate", "")
        by_head = x.transpose(0, 1)[None]
        rounded = round_vectors(by_head, name, stored, None if bias is None else bias[None, :, None])
        return rounded[0].transpose(0, 1)


class Configurator:
    """The fields of SGLang's ``KVCacheConfigurator`` that build a hybrid pool, and its own methods."""

    def __init__(self, recipe: str, layers: dict[int, KVLayer]) -> None:
        places = [(f"model.layers.{number}.self_attn.attn", number) for number in layers]
        self.model = attention_tree(places, HEADS)
        self.kv_cache_dtype_str = f"modelopt_{recipe}"
        self.kv_cache_dtype, self.device = torch.uint8, "cpu"
        self.pool_page_size = self.page_size = PAGE
        self.post_capture_kv_active = True
        self.is_draft_worker = self.use_mla_backend = self.is_hybrid_swa_compress = self.draft_swa_full_capacity = False
        self.mambaish_config = SimpleNamespace(full_attention_layer_ids=list(FULL))
        self.layer_info = SimpleNamespace(
            start_layer=0,
            end_layer=5,
            num_effective_layers=5,
            swa_attention_layer_ids=list(WINDOWED),
            full_attention_layer_ids=list(FULL),
        )
        self.model_config = SimpleNamespace(
            **dict.fromkeys(("head_dim", "v_head_dim", "swa_head_dim", "swa_v_head_dim"), HEAD_DIM),
            get_num_kv_heads=lambda *ranks: HEADS,
            get_swa_num_kv_heads=lambda *ranks: HEADS,
            hf_config=SimpleNamespace(architectures=["Any"]),
            is_hybrid_swa=False,
            attention_arch=None,
        )
        self.method = ModelOptExtKVMethod(LayerRecipes(KV_RECIPES[recipe]))
        self.method.load_layers(self.model, layers, 0, 1)

    def _build_mha_quant_method(self, *, num_layers: int) -> ModelOptExtKVMethod:
        assert num_layers in (2, 5)
        return self.method

    def _hybrid_full_attention_pool_class(self, **classes: type) -> type:
        from sglang.srt.mem_cache.kv_cache_configurator import KVCacheConfigurator

        found: type = KVCacheConfigurator._hybrid_full_attention_pool_class(self, **classes)
        return found


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Built]:
    """Return a function that builds the pool of a kind of model for a recipe."""
    import sglang.srt.mem_cache.kv_cache_configurator as module
    import sglang.srt.runtime_context as context
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    for place in (module, context):
        monkeypatch.setattr(place, "get_parallel", lambda: SimpleNamespace(attn_tp_size=1, attn_dcp_size=1))
    execution = SimpleNamespace(features=SimpleNamespace(enable_memory_saver=False))
    monkeypatch.setattr(module, "get_exec", lambda: execution)
    monkeypatch.setattr(module, "get_spec", lambda: SimpleNamespace(speculative_algorithm=None))
    monkeypatch.setattr(module, "get_model", lambda: SimpleNamespace(qsa_indexer_dtype="auto"))
    monkeypatch.setattr(context, "get_server_args", lambda: None)
    monkeypatch.setattr(kv_hybrid, "wrapped_plan", lambda args: None)
    monkeypatch.setattr(kv_hybrid, "served_plan", lambda args, flag: SimpleNamespace(other={}))

    def make(kind: str, recipe: str) -> Built:
        numbers = FULL if kind == "linear" else tuple(sorted((*FULL, *WINDOWED)))
        layers = scales(numbers, KV_RECIPES[recipe].affine)
        itself: Any = Configurator(recipe, layers)
        own = module.KVCacheConfigurator
        if kind == "linear":
            pool = kv_hybrid._build_hybrid_linear_kv_pool(
                own._build_hybrid_linear_kv_pool,
                itself,
                max_total_num_tokens=SIZE,
                req_to_token_pool=SimpleNamespace(mamba_pool=None),
                mha_pool_class=MHATokenToKVPool,
                mla_pool_class=MHATokenToKVPool,
                dsa_pool_class=MHATokenToKVPool,
            )
        else:
            itself.model_config.is_hybrid_swa = True
            pool = kv_hybrid._build_hybrid_swa_kv_pool(
                own._build_hybrid_swa_kv_pool,
                itself,
                full_max_total_num_tokens=SIZE,
                swa_max_total_num_tokens=SIZE_SWA,
                mha_pool_class=MHATokenToKVPool,
            )
        attention = {module.layer_id: module for module in itself.model.modules() if hasattr(module, "layer_id")}
        return Built(pool, layers, attention, recipe)

    return make


@RECIPES
def test_attention_beside_linear_attention(build: Callable[[str, str], Built], recipe: str) -> None:
    """Every layer is written and read by its number in the model, and rounded by the scales of that number."""
    from sglang.srt.mem_cache.memory_pool import HybridLinearKVPool, KVWriteLoc

    built = build("linear", recipe)
    assert type(built.pool) is HybridLinearKVPool
    assert [numbers for _, numbers in packed_pools(built.pool)] == [list(FULL)]
    slots = torch.tensor([5, 39, 7])
    given = {number: vectors(len(slots), number) for number in FULL}
    for number, (k, v) in given.items():
        built.pool.set_kv_buffer(built.attention[number], KVWriteLoc(slots), k, v)
    for number, (k, v) in given.items():
        keys, values = built.pool.get_kv_buffer(number)
        torch.testing.assert_close(keys[slots], built.expected(number, "k", k), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(values[slots], built.expected(number, "v", v), rtol=1e-5, atol=1e-5)
        assert built.pool.get_key_buffer(number) is keys
    assert built.pool.get_v_head_dim() == HEAD_DIM
    with pytest.raises(ValueError, match="not in full attention layers"):
        built.pool.get_key_buffer(WINDOWED[0])


@RECIPES
def test_layers_with_and_without_a_window(build: Callable[[str, str], Built], recipe: str) -> None:
    """Layers with a window have slots of their own, in a pool of their own."""
    from sglang.srt.mem_cache.memory_pool import KVWriteLoc
    from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

    built = build("windows", recipe)
    assert type(built.pool) is SWAKVPool
    assert [numbers for _, numbers in packed_pools(built.pool)] == [list(FULL), list(WINDOWED)]
    assert (built.pool.full_kv_pool.size, built.pool.swa_kv_pool.size) == (SIZE, SIZE_SWA)
    assert not built.pool.post_capture_active, "SGLang does not resize what it did not size while capturing"
    slots, windowed = torch.tensor([5, 39, 7]), torch.tensor([23, 1, 11])
    given = {number: vectors(len(slots), number) for number in built.layers}
    for number, (k, v) in given.items():
        built.pool.set_kv_buffer(built.attention[number], KVWriteLoc(slots, windowed), k, v)
    for number, (k, v) in given.items():
        keys, values = built.pool.get_kv_buffer(number)
        own = windowed if number in WINDOWED else slots
        torch.testing.assert_close(keys[own], built.expected(number, "k", k), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(values[own], built.expected(number, "v", v), rtol=1e-5, atol=1e-5)
    assert built.pool.get_v_head_dim() == HEAD_DIM


@RECIPES
@pytest.mark.parametrize("kind", ["linear", "windows"])
def test_the_memory_is_what_it_was_sized_by(build: Callable[[str, str], Built], kind: str, recipe: str) -> None:
    built = build(kind, recipe)
    token = 2 * HEADS * KV_RECIPES[recipe].bytes_per_vector(HEAD_DIM)
    expected = (SIZE + PAGE) * len(FULL) + (kind == "windows") * (SIZE_SWA + PAGE) * len(WINDOWED)
    assert sum(built.pool.get_kv_size_bytes()) == token * expected


@RECIPES
def test_what_sglang_divides_the_memory_by(monkeypatch: pytest.MonkeyPatch, recipe: str) -> None:
    """SGLang's own sizing of a hybrid sliding-window pool, with our hook: the ratio of the pools is SGLang's."""
    import sglang.srt.model_executor.pool_configurator as module
    import sglang.srt.runtime_context as context

    for place in (module, context):
        monkeypatch.setattr(place, "get_parallel", lambda: SimpleNamespace(attn_tp_size=1, attn_dcp_size=1))
    monkeypatch.setattr(module, "get_schedule", lambda: SimpleNamespace(swa_full_tokens_ratio=0.5))
    monkeypatch.setattr(module, "get_memory", lambda: SimpleNamespace(enable_unified_memory=False))
    never = SimpleNamespace(**dict.fromkeys(("is_eagle", "is_standalone", "is_dflash_family"), lambda: False))
    kvc: Any = Configurator(recipe, scales((*FULL, *WINDOWED), KV_RECIPES[recipe].affine))
    kvc.sliding_window_size, kvc.spec_algorithm, kvc.fused_entry_bytes = 8, never, lambda name: None
    token = 2 * HEADS * KV_RECIPES[recipe].bytes_per_vector(HEAD_DIM)
    sizes = object.__new__(module.HybridSWAPoolConfigurator)
    kv_hybrid._size_tokens(module.HybridSWAPoolConfigurator.__init__, sizes, kvc)
    assert sizes._cell_size == token * (len(FULL) + 0.5 * len(WINDOWED))
    tokens = sizes.calculate_pool_sizes(1000 * token, page_size=PAGE)
    assert tokens.full_max_total_num_tokens == 1000 * 2 // 7 // PAGE * PAGE
    assert tokens.swa_max_total_num_tokens == tokens.full_max_total_num_tokens // 2 // PAGE * PAGE


def test_a_layer_without_a_place_is_an_error(build: Callable[[str, str], Built]) -> None:
    """Its scales would be read and never used."""
    built = build("linear", "nvfp4")
    built.pool.full_kv_pool.quant_method.layers |= scales((3,), affine=False)
    with pytest.raises(
        ModelOptExtError, match="layer 3: expected a place in HybridLinearKVPool for every attention layer"
    ):
        number_layers(built.pool)


def test_layers_that_read_another_cache_need_no_scales(build: Callable[[str, str], Built]) -> None:
    built = build("windows", "fp8_affine")
    inner = built.pool.swa_kv_pool
    inner.quant_method.layers = {n: layer for n, layer in built.layers.items() if n != WINDOWED[-1]}
    number_layers(built.pool)
    assert inner.packed.keys() == {0, 1}


@pytest.mark.parametrize("kind", ["linear", "windows"])
def test_attention_is_by_our_kernels(
    build: Callable[[str, str], Built], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    monkeypatch.setattr(kv_backend, "ModelOptExtTritonBackend", lambda runner: "ours")
    runner = SimpleNamespace(token_to_kv_pool=build(kind, "nvfp4").pool)
    assert kv_hooks._triton_backend(lambda runner: "SGLang's", runner) == "ours"
    for inner, _ in list(packed_pools(runner.token_to_kv_pool)):
        inner.__class__ = MHATokenToKVPool
    assert not is_packed(runner.token_to_kv_pool)
    assert kv_hooks._triton_backend(lambda runner: "SGLang's", runner) == "SGLang's"


@pytest.mark.parametrize("kind", ["linear", "windows"])
def test_sglangs_own_flags_build_its_own_pools(
    build: Callable[[str, str], Built], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    own = Configurator.__init__

    def plain(self: Any, recipe: str, layers: dict[int, KVLayer]) -> None:
        own(self, recipe, layers)
        self.kv_cache_dtype_str, self.kv_cache_dtype, self.post_capture_kv_active = "bf16", torch.bfloat16, False
        self._build_mha_quant_method = lambda num_layers: None

    monkeypatch.setattr(Configurator, "__init__", plain)
    pool = build(kind, "nvfp4").pool
    assert not is_packed(pool)
    assert not isinstance(pool.full_kv_pool, ModelOptExtKVPool)


def config(**changes: Any) -> Any:
    fields: dict[str, Any] = Configurator("nvfp4", {}).model_config.__dict__
    return SimpleNamespace(**{**fields, **changes})


def test_models_without_a_pool_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import sglang.srt.configs.hybrid_arch as hybrid_arch

    monkeypatch.setattr(hybrid_arch, "mambaish_config", lambda model: getattr(model, "linear", None))
    windows = config(is_hybrid_swa=True)
    uneven = config(is_hybrid_swa=True, swa_head_dim=2 * HEAD_DIM, swa_v_head_dim=2 * HEAD_DIM)
    fewer = config(is_hybrid_swa=True, get_swa_num_kv_heads=lambda ranks: 2 * HEADS)
    sparse = config(hf_config=SimpleNamespace(architectures=["Any"], indexer_n_heads=4, indexer_kv_heads=1,
                                              indexer_head_dim=128, indexer_budget=2048, indexer_compress_ratio=4))  # fmt: skip
    kinds = {
        "plain": (config(), None, None),
        "windows": (windows, None, kv_hybrid.WINDOWS),
        "uneven": (uneven, kv_hybrid.UNEVEN, kv_hybrid.WINDOWS),
        "fewer": (fewer, kv_hybrid.UNEVEN, kv_hybrid.WINDOWS),
        "linear": (config(linear=True), None, kv_hybrid.LINEAR_ATTENTION),
        "sparse": (sparse, kv_hybrid.SPARSE, kv_hybrid.SPARSE),
    }
    for name, (model, ours, wrapped) in kinds.items():
        assert (kv_hybrid.unserved_pool(model), kv_hybrid.unserved_pool(model, wrapped=True)) == (ours, wrapped), name
        several = kv_hybrid.unserved_pool(model, several=True)
        assert several == (ours if name in ("plain", "sparse") else kv_hybrid.SEVERAL), name


@pytest.mark.parametrize("flag", ["modelopt_nvfp4", "fp8_e4m3"])
def test_a_pool_that_cannot_hold_it_is_not_built(monkeypatch: pytest.MonkeyPatch, flag: str) -> None:
    """A recipe of ours in a pool of sparse attention, and in SGLang's own pools with its attention wrapped."""
    import sglang.srt.runtime_context as context

    plan = None if flag == "modelopt_nvfp4" else SimpleNamespace(recipe=KV_RECIPES["fp8_affine"])
    monkeypatch.setattr(context, "get_server_args", lambda: None)
    monkeypatch.setattr(kv_hybrid, "wrapped_plan", lambda args: plan)
    monkeypatch.setattr(kv_hybrid, "served_plan", lambda args, flag: SimpleNamespace(other={}))
    monkeypatch.setattr(
        kv_hybrid, "unserved_pool", lambda model, wrapped, several: "a window" if wrapped else "sparse attention"
    )
    itself = SimpleNamespace(kv_cache_dtype_str=flag, model_config=None)
    expected = "sparse attention, got modelopt_nvfp4" if plan is None else "a window, got modelopt_fp8_affine"
    with pytest.raises(ModelOptExtError, match=f"expected bf16 for a model with {expected}"):
        kv_hybrid._build_minimax_sparse_kv_pool(lambda self: None, itself)
