"""Quantized KV caches of hybrid models: attention layers between those with linear attention, or layers with and without a window.

SGLang's pool of such a model translates the number of a layer, and for a window the slots, and holds pools of plain attention
(:class:`.pool.ModelOptExtKVPool`). The states of linear attention are not quantized.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang_modelopt_ext.checkpoint.kv_cache import FLAG_PREFIX, KV_FLAGS
from sglang_modelopt_ext.checkpoint.kv_scales import LayerRecipes
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.integration.hooks import Hook
from sglang_modelopt_ext.integration.kv.scales import served_plan, wrapped_plan

WINDOWS, LINEAR_ATTENTION, SPARSE = "a hybrid sliding-window cache", "linear attention", "sparse attention"
UNEVEN = "sliding-window layers of other heads than the rest"
SEVERAL = "a hybrid pool, in several precisions"
"""Kinds of models whose KV caches are not served, as errors name them."""


def unserved_pool(config: Any, wrapped: bool = False, several: bool = False) -> str | None:
    """Return the kind of a model whose pool cannot hold a recipe of this package, None for every other model.

    Args:
        config: SGLang's ``ModelConfig``.
        wrapped: whether the cache is SGLang's own, with a bias or a rotation around its attention.
        several: whether layers differ in the precision of their cache.
    """
    from sglang.srt.configs.hybrid_arch import mambaish_config
    from sglang.srt.configs.model_config import is_minimax_sparse
    from sglang.srt.layers.attention.qsa.config import is_qwen_qsa

    if is_minimax_sparse(config.hf_config) or is_qwen_qsa(config.hf_config):
        return SPARSE
    if several and (config.is_hybrid_swa or mambaish_config(config) is not None):
        return SEVERAL
    if config.is_hybrid_swa:
        full = (config.get_num_kv_heads(1), config.head_dim, config.v_head_dim)
        windowed = (config.get_swa_num_kv_heads(1), config.swa_head_dim, config.swa_v_head_dim)
        if wrapped:
            return WINDOWS
        return UNEVEN if windowed != full else None
    return LINEAR_ATTENTION if wrapped and mambaish_config(config) is not None else None


def unsupported_pool(kind: str, flag: str) -> ModelOptExtError:
    """Return the error for ``--kv-cache-dtype flag`` with a model of ``kind``, which has no pool for it."""
    return ModelOptExtError.at("command line", "--kv-cache-dtype", f"bf16 for a model with {kind}", flag)


def _is_ours(configurator: Any) -> bool:
    """Return whether SGLang's configurator builds a pool of this package, else its own.

    Raises:
        ModelOptExtError: the recipe of the cache is not served with this model.
    """
    from sglang.srt.runtime_context import get_server_args

    flag = configurator.kv_cache_dtype_str
    plan = wrapped_plan(get_server_args())
    if flag not in KV_FLAGS and plan is None:
        return False
    several = plan is None and bool(served_plan(get_server_args(), flag).other)
    kind = unserved_pool(configurator.model_config, plan is not None, several)
    if kind is not None:
        raise unsupported_pool(kind, flag if plan is None else FLAG_PREFIX + plan.recipe.name)
    return plan is None


def _build_hybrid_swa_kv_pool(
    original: Callable[..., Any],
    self: Any,
    *,
    full_max_total_num_tokens: int | None,
    swa_max_total_num_tokens: int | None,
    mha_pool_class: Any,
) -> Any:
    sizes = {
        "full_max_total_num_tokens": full_max_total_num_tokens,
        "swa_max_total_num_tokens": swa_max_total_num_tokens,
    }
    if not _is_ours(self):
        return original(self, **sizes, mha_pool_class=mha_pool_class)
    from sglang_modelopt_ext.integration.kv.pool import ModelOptExtKVPool, number_layers

    method = self._build_mha_quant_method(num_layers=self.layer_info.num_effective_layers)

    def make(*, post_capture_active: bool = False, **arguments: Any) -> ModelOptExtKVPool:
        """Make the pool of the layers with or without a window, in memory that SGLang sizes before it captures graphs."""
        del post_capture_active
        return ModelOptExtKVPool(quant_method=method, **arguments)

    pool = original(self, **sizes, mha_pool_class=make)
    number_layers(pool)
    return pool


def _build_hybrid_linear_kv_pool(
    original: Callable[..., Any],
    self: Any,
    *,
    max_total_num_tokens: int,
    req_to_token_pool: Any,
    mha_pool_class: type,
    mla_pool_class: type,
    dsa_pool_class: type,
) -> Any:
    from sglang_modelopt_ext.integration.kv.pool import ModelOptExtKVPool, number_layers

    pool = original(
        self,
        max_total_num_tokens=max_total_num_tokens,
        req_to_token_pool=req_to_token_pool,
        mha_pool_class=ModelOptExtKVPool if _is_ours(self) else mha_pool_class,
        mla_pool_class=mla_pool_class,
        dsa_pool_class=dsa_pool_class,
    )
    number_layers(pool)
    return pool


def _build_minimax_sparse_kv_pool(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    _is_ours(self)
    return original(self, *args, **kwargs)


def _size_tokens(original: Callable[..., None], self: Any, kvc: Any) -> None:
    original(self, kvc)
    if kvc.kv_cache_dtype_str not in KV_FLAGS:
        return
    from sglang.srt.runtime_context import get_parallel

    from sglang_modelopt_ext.integration.kv.method import ModelOptExtKVMethod

    recipes = LayerRecipes(KV_FLAGS[kvc.kv_cache_dtype_str])  # of all layers: see unserved_pool
    method, config, ranks = ModelOptExtKVMethod(recipes), kvc.model_config, get_parallel()
    heads, windowed = (
        config.get_num_kv_heads(ranks.attn_tp_size),
        config.get_swa_num_kv_heads(ranks.attn_tp_size),
    )
    self._full_per_token = method.compute_cell_size(heads, config.head_dim, 1, kv_size=1)
    self._swa_per_token = method.compute_cell_size(windowed, config.swa_head_dim, 1, kv_size=1)
    self._recompute_cell_size()


_CONFIGURATOR = "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator."
HOOKS = (
    Hook(
        "sglang.srt.model_executor.pool_configurator.HybridSWAPoolConfigurator.__init__",
        ("self", "kvc"),
        "a token of a hybrid sliding-window pool would be sized as one byte for each entry",
        _size_tokens,
    ),
    Hook(
        _CONFIGURATOR + "_build_hybrid_swa_kv_pool",
        ("self", "full_max_total_num_tokens", "swa_max_total_num_tokens", "mha_pool_class"),
        "a hybrid sliding-window pool would hold vectors unrounded, cut to bytes",
        _build_hybrid_swa_kv_pool,
    ),
    Hook(
        _CONFIGURATOR + "_build_hybrid_linear_kv_pool",
        ("self", "max_total_num_tokens", "req_to_token_pool", "mha_pool_class", "mla_pool_class", "dsa_pool_class"),
        "the attention layers beside linear attention would be read as one full-width copy",
        _build_hybrid_linear_kv_pool,
    ),
    Hook(
        _CONFIGURATOR + "_build_minimax_sparse_kv_pool",
        ("self", "max_total_num_tokens"),
        "a pool of sparse attention would hold codes as values, or vectors without their bias or rotation",
        _build_minimax_sparse_kv_pool,
    ),
)
