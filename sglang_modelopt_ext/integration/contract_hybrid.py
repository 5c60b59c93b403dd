"""The rows of the contract with SGLang (:mod:`.contract`) about the pools of hybrid models."""

from __future__ import annotations

from sglang_modelopt_ext.integration.uses import Called, Object, Passes, Use

HYBRID: tuple[Use, ...] = (
    Called(
        "configs.model_config.ModelConfig.get_swa_num_kv_heads",
        "the heads of a rank's cache in layers with a window",
        ("tensor_parallel_size",),
    ),
    Called("layers.attention.qsa.config.is_qwen_qsa", "sparse attention has no cache of ours", ("config",)),
    Object(
        "model_executor.model_runner_components.layer_setup.ModelLayerInfo",
        "how many layers this stage has",
        ("num_effective_layers",),
    ),
    Object(
        "mem_cache.memory_pool.HybridLinearKVPool",
        "holds our pool, and knows its layers",
        ("full_kv_pool", "full_attention_layer_id_mapping"),
    ),
    Object(
        "mem_cache.swa_memory_pool.SWAKVPool",
        "holds our two pools, and knows their layers",
        ("full_kv_pool", "swa_kv_pool", "layers_mapping"),
    ),
    Passes(
        "mem_cache.kv_cache_configurator.KVCacheConfigurator._build_hybrid_swa_kv_pool",
        "what our two pools are made with",
        ("post_capture_active",),
    ),
    Object(
        "model_executor.pool_configurator.HybridSWAPoolConfigurator",
        "divides the memory between layers with and without a window",
        ("_full_per_token", "_swa_per_token", "_recompute_cell_size"),
    ),
)
