"""The contract with SGLang: every symbol of it that this package uses, and why.

``check`` compares the table, and the functions that hooks wrap, with the sources of an SGLang without importing it. An untested
version serves where all rows hold (:mod:`sglang_modelopt_ext.integration.plugin`). ``tests/unit/test_sglang_contract.py``
fails where this package uses a symbol that no row names, and where a row names what is not used.

Symbols are relative to ``sglang.srt`` unless they begin with ``sglang.``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator
from pathlib import Path

from sglang_modelopt_ext.integration.contract_hybrid import HYBRID
from sglang_modelopt_ext.integration.contract_running import OBSERVABILITY, UPDATES
from sglang_modelopt_ext.integration.hooks import Hook
from sglang_modelopt_ext.integration.sources import Sources
from sglang_modelopt_ext.integration.uses import ROOT, Base, Called, Fields, Holds, Object, Passes, Use, Written

PLUGIN: tuple[Use, ...] = (
    Called("plugins.load_plugins", "a rehearsal loads this package as a server does"),
    Called(
        "plugins.hook_registry.HookRegistry.register",
        "installs a hook",
        given=("target", "hook", "hook_type"),
    ),
    Called("plugins.hook_registry.HookRegistry.apply_hooks", "makes hooks take at once, to see whether they do"),
    Object("plugins.hook_registry.HookRegistry", "says which hooks took", ("_patched",)),
    Object("plugins.hook_registry.HookType", "the kind of all our hooks", ("AROUND",)),
    Called("arg_groups.resolution_hooks.register_resolution_hook", "checks before any process starts", ("name",)),
    Holds(
        "arg_groups.resolution_hooks._OVERRIDABLE_HOOKS",
        "the steps of argument resolution that the checks wrap",
        ("handle_model_source_paths", "handle_attention_backend_compatibility"),
    ),
    Holds("sglang.launch_server", "the command line that serves; errors that end it print as one line"),
    Holds("sglang.cli.main", "the other command line"),
    Holds("platforms", "a rehearsal builds models where there is no GPU", ("SGLANG_USE_CPU_ENGINE",)),
    Called("utils.log_info_on_rank0", "one line of the log for all ranks", ("logger", "msg")),
    Called("utils.is_cpu", "SGLang pads sizes for the ranks of a CPU"),
)

ARGUMENTS: tuple[Use, ...] = (
    Object("server_args.ServerArgs", "declares --kv-cache-dtype, and settles the arguments", ("resolve_once",)),
    Called("server_args.prepare_server_args", "a rehearsal reads a server's command line", ("argv",)),
    Holds("server_args.add_quantization_method_choices", "--quantization takes our names"),
    Object("arg_groups.arg_utils.Arg", "--kv-cache-dtype takes our recipes", ("choices",)),
    Called("arg_groups.overrides.resolving_view", "the arguments while they are resolved", ("server_args",)),
    Called("arg_groups.overrides.resolved_view", "the arguments as they were resolved", ("server_args",)),
    Called("arg_groups.overrides.declare_resolution", "settles the cache and its backend", ("server_args", "source")),
    Called("arg_groups.overrides.attention_backends_of", "the backends of prefill and decode", ("cfg",)),
    Called("arg_groups.overrides.use_mla_backend", "latent attention has no cache of ours", ("server_args",)),
    Fields(
        "arg_groups.fields",
        "the arguments that decide whether a launch can be served",
        (
            *("model_path", "revision", "quantization", "load_format", "download_dir", "device", "kv_cache_dtype"),
            *("attention_backend", "prefill_attention_backend", "decode_attention_backend"),
            *("tokenizer_worker_num", "use_ray", "weight_cache_mode"),
            *("enable_hierarchical_cache", "enable_lmcache", "disaggregation_mode", "speculative_algorithm"),
            *("enable_unified_memory", "enable_kv_cache_sharding", "enable_page_major_kv_layout", "dcp_size"),
            *("trust_remote_code", "served_model_name", "tokenizer_path", "base_gpu_id"),
            *("enable_deterministic_inference", "prefill_only_disable_kv_cache", "enable_hisparse"),
        ),
    ),
    Called("runtime_context.get_server_args", "the arguments inside a scheduler"),
    Called("runtime_context.get_model", "the resolved --kv-cache-dtype inside a scheduler"),
    Fields("arg_groups.fields.model", "what get_model() has", ("kv_cache_dtype", "model_path")),
    Called("runtime_context.get_spec", "how drafts are made"),
    Fields("arg_groups.fields.spec", "what get_spec() has", ("speculative_algorithm",)),
    Called("runtime_context.get_exec", "whether experts are moved or doubled"),
    Fields(
        "arg_groups.fields.exec_",
        "what get_exec().moe has",
        ("enable_eplb", "init_expert_location", "ep_num_redundant_experts"),
    ),
    Called("runtime_context.get_parallel", "this process's ranks"),
    Fields(
        "arg_groups.fields.parallel",
        "what get_parallel() has",
        ("tp_rank", "attn_tp_rank", "attn_tp_size", "attn_dcp_size", "num_dp_ranks", "moe_tp_group", "pp_size"),
    ),
    Called("runtime_context.get_platform", "which GPU it is"),
    Holds("runtime_context._PLATFORM_PROBES", "what get_platform() has", ("is_sm100", "is_sm120")),
)

MODELS: tuple[Use, ...] = (
    Object(
        "configs.model_config.ModelConfig",
        "the model as SGLang understands it",
        (
            *(
                "model_path",
                "revision",
                "quantization",
                "dtype",
                "head_dim",
                "v_head_dim",
                "swa_head_dim",
                "swa_v_head_dim",
                "is_hybrid_swa",
                "hf_config",
            ),
            *("is_draft_model", "is_draft_quantization_explicit"),
        ),
    ),
    Called("configs.model_config.ModelConfig.from_server_args", "a rehearsal's model", ("server_args",)),
    Called(
        "configs.model_config.ModelConfig.get_num_kv_heads",
        "the heads of a rank's cache",
        ("tensor_parallel_size", "dcp_size"),
    ),
    Object("configs.load_config.LoadConfig", "how the weights are loaded", ("load_format", "download_dir")),
    Called("configs.load_config.LoadConfig", "a rehearsal's", named=("load_format",)),
    Called(
        "configs.hybrid_arch.mambaish_config",
        "SGLang's attention is not wrapped beside linear attention",
        ("model_config",),
    ),
    Called("configs.model_config.is_minimax_sparse", "sparse attention has no cache of ours", ("config",)),
    Called(
        "model_loader.loader.DefaultModelLoader._prepare_weights",
        "downloads a model on the hub",
        ("model_name_or_path", "revision"),
        ("fall_back_to_pt",),
    ),
    Called("model_loader.loader.DefaultModelLoader", "the loader that downloads", ("load_config",)),
    Object("model_loader.loader.DefaultModelLoader", "its configuration", ("load_config",)),
    Called("model_loader.loader.RunaiModelStreamerLoader", "the streaming loader that downloads", ("load_config",)),
    Called(
        "model_loader.loader.RunaiModelStreamerLoader._prepare_weights",
        "downloads a model on the hub",
        ("model_name_or_path", "revision"),
    ),
    Object("model_loader.loader.RunaiModelStreamerLoader", "its configuration", ("load_config",)),
    Holds(
        "model_loader.weight_utils.RUNAI_STREAMER_TENSOR_ATTR",
        "tensors in memory that is used again are marked",
    ),
    Called(
        "model_loader.loader._get_quantization_config", "a rehearsal's configuration", ("model_config", "load_config")
    ),
    Called(
        "model_loader.loader._initialize_model",
        "a rehearsal's model",
        ("model_config", "load_config", "quant_config"),
    ),
    Called("model_loader.utils.set_default_torch_dtype", "the type of a rehearsal's model", ("dtype",)),
    Called(
        "model_loader.weight_utils.default_weight_loader",
        "loads parameters without a loader",
        ("param", "loaded_weight"),
    ),
    Called("models.utils.WeightsMapper._map_name", "finds layers that a model renames", ("key",)),
    Called(
        "distributed.bootstrap.init_parallel_runtime", "groups of one rank", (), ("server_args", "device", "dist_port")
    ),
    Called("distributed.bootstrap.init_layer_runtime", "what layers ask for", (), ("model_config",)),
    Called("layers.moe.utils.initialize_moe_config", "what layers of experts ask for"),
    Called(
        "configs.update_config.adjust_config_with_unaligned_cpu_tp",
        "fields of a configuration that classes read on a CPU",
        ("model_config", "load_config", "tp_size"),
    ),
    Called("runtime_context.SpawnRanks", "a rehearsal's rank", (), ("world_rank", "gpu_id")),
    Called("runtime_context.publish", "makes a rehearsal's arguments known", ("server_args",), ("role", "ranks")),
)

LAYERS: tuple[Use, ...] = (
    Holds("layers.quantization.QUANTIZATION_METHODS", "our names of quantization"),
    Holds("layers.quantization.CPU_QUANTIZATION_METHODS", "our names of quantization on a CPU"),
    Base(
        "layers.quantization.base_config.QuantizationConfig",
        "our configuration of a checkpoint",
        (
            *("get_name", "get_supported_act_dtypes", "get_min_capability", "get_config_filenames", "from_config"),
            *("get_scaled_act_names", "apply_weight_name_mapper", "packed_modules_mapping", "get_quant_method"),
        ),
    ),
    Written(
        "layers.quantization.base_config.QuantizationConfig.get_quant_method",
        "gives every layer its method",
        ("self", "layer", "prefix"),
    ),
    Object("layers.quantization.base_config.QuantizeMethodBase", "the type of a layer's method", ("apply",)),
    Base(
        "layers.quantization.base_config.LinearMethodBase",
        "our linear method",
        ("create_weights", "apply", "process_weights_after_loading", "restore_weights_before_loading"),
    ),
    Written(
        "layers.quantization.base_config.LinearMethodBase.create_weights",
        "registers a linear layer's tensors",
        (
            *("self", "layer", "input_size_per_partition", "output_partition_sizes", "input_size", "output_size"),
            *("params_dtype", "extra_weight_attrs"),
        ),
    ),
    Written("layers.quantization.base_config.LinearMethodBase.apply", "a linear layer", ("self", "layer", "x", "bias")),
    Passes("layers.linear", "the loader of a linear layer's parameters", ("weight_loader",)),
    Base(
        "layers.quantization.base_config.FusedMoEMethodBase",
        "our method of experts",
        (
            *("create_weights", "create_moe_runner", "apply", "process_weights_after_loading"),
            "restore_weights_before_loading",
        ),
    ),
    Written(
        "layers.quantization.base_config.FusedMoEMethodBase.create_weights",
        "registers the experts' tensors",
        (
            *("self", "layer", "num_experts", "hidden_size", "intermediate_size_per_partition", "params_dtype"),
            "extra_weight_attrs",
        ),
    ),
    Written(
        "layers.quantization.base_config.FusedMoEMethodBase.create_moe_runner",
        "the experts' configuration",
        ("self", "layer", "moe_runner_config"),
    ),
    Written(
        "layers.quantization.base_config.FusedMoEMethodBase.apply",
        "the experts of a batch",
        ("self", "layer", "dispatch_output"),
    ),
    Passes(
        "layers.moe.fused_moe_triton.layer.FusedMoE",
        "the sizes of the experts",
        ("moe_intermediate_size", "with_bias"),
    ),
    Object(
        "layers.linear.LinearBase",
        "a linear layer that loads, or is served here",
        ("quant_method", "quant_config", "input_size", "output_size", "params_dtype"),
    ),
    Called(
        "layers.linear.ReplicatedLinear",
        "a quantized layer that a class builds as PyTorch's",
        ("input_size", "output_size"),
        ("bias", "params_dtype"),
    ),
    Object("lora.layers.BaseLayerWithLoRA", "the layer inside is listed for itself", ("base_layer",)),
    Object(
        "layers.linear.RowParallelLinear",
        "a layer whose input is split over the ranks",
        ("tp_group", "input_size_per_partition"),
    ),
    Object(
        "layers.linear.MergedColumnParallelLinear",
        "the partitions of a fused layer",
        ("output_sizes", "output_partition_sizes"),
    ),
    Object(
        "layers.layernorm.RMSNorm",
        "the plain case of a norm",
        (
            *("variance_size_override", "cast_x_before_out_mul", "fp32_residual", "override_orig_dtype"),
            *("weight", "variance_epsilon"),
        ),
    ),
    Called(
        "layers.logits_processor.LogitsProcessor._get_logits",
        "log probabilities of a whole window in one pass",
        ("hidden_states", "lm_head", "logits_metadata"),
        ("use_logits_buffer",),
    ),
    Called(
        "batch_invariant_ops.batch_invariant_ops.is_batch_invariant_mode_enabled", "whether a norm is the plain one", ()
    ),
    Object(
        "layers.linear.QKVParallelLinear",
        "the shards of q, k and v",
        (
            *("total_num_heads", "total_num_kv_heads", "head_size", "v_head_size"),
            *("kv_tp_group", "num_kv_head_replicas"),
        ),
    ),
    Object(
        "layers.vocab_parallel_embedding.VocabParallelEmbedding",
        "lm_head and embeddings",
        (
            *("org_vocab_size", "shard_indices", "num_embeddings", "num_embeddings_per_partition", "embedding_dim"),
            *("use_attn_tp_group", "enable_tp"),
        ),
    ),
    Object(
        "layers.vocab_parallel_embedding.VocabParallelEmbeddingShardIndices",
        "a rank's rows of a vocabulary",
        ("org_vocab_start_index", "org_vocab_end_index"),
    ),
    Called(
        "layers.vocab_parallel_embedding.ParallelLMHead",
        "a quantized head of a model with tied embeddings",
        ("num_embeddings", "embedding_dim"),
        ("quant_config", "prefix", "use_attn_tp_group", "enable_tp"),
    ),
    Object("lora.lora_manager.LoRAManager", "which layers get adapters", ("base_model", "target_modules")),
    Called("layers.quantization.unquant.UnquantizedLinearMethod", "layers that are not quantized"),
    Called(
        "layers.quantization.kv_cache.BaseKVCacheMethod", "attention with scales of SGLang's own", ("quant_config",)
    ),
    Base(
        "layers.parameter.BasevLLMParameter",
        "our parameters, which a model's class may give another loader",
        ("weight_loader", "_weight_loader"),
    ),
    Called("layers.parameter.BasevLLMParameter", "our parameters of linear layers", (), ("data", "weight_loader")),
    Called("distributed.utils.get_group_rank_size", "over how many ranks a layer is split", ("group",)),
    Called("distributed.parallel_state.get_world_group", "every rank that loads"),
    Object("distributed.parallel_state.GroupCoordinator", "the group to gather over", ("cpu_group", "all_gather")),
)

EXPERTS: tuple[Use, ...] = (
    Object(
        "layers.moe.fused_moe_triton.layer.FusedMoE",
        "a layer of experts",
        (
            *("hidden_size", "intermediate_size_per_partition", "moe_tp_size", "moe_tp_rank", "num_experts"),
            *("quant_method", "quant_config", "use_presharded_weights", "moe_runner_config"),
            "_map_global_expert_id_to_local_expert_id",
        ),
    ),
    Called(
        "layers.moe.fused_moe_triton.layer.FusedMoE._map_global_expert_id_to_local_expert_id",
        "which experts this rank holds",
        ("expert_id",),
    ),
    Called(
        "layers.moe.fused_moe_triton.layer.FusedMoE.weight_loader",
        "the loader whose place ours takes",
        ("param", "loaded_weight", "weight_name", "shard_id", "expert_id"),
    ),
    Object(
        "layers.moe.moe_runner.base.MoeRunnerConfig",
        "what a layer of experts computes",
        (
            *("activation", "is_gated", "gemm1_alpha", "gemm1_clamp_limit", "swiglu_limit", "no_combine", "top_k"),
            "gate_up_interleaved",
            *("num_fused_shared_experts", "apply_router_weight_on_input", "routed_scaling_factor"),
        ),
    ),
    Called("layers.moe.get_moe_a2a_backend", "experts that are exchanged between ranks are not served"),
    Object("layers.moe.utils.MoeA2ABackend", "whether there is such an exchange", ("is_none",)),
    Object("layers.moe.token_dispatcher.StandardDispatchOutput", "a batch", ("hidden_states", "topk_output")),
    Called("layers.moe.token_dispatcher.StandardCombineInput", "the batch's result", (), ("hidden_states",)),
    Called(
        "layers.moe.topk.TopKOutputChecker.format_is_standard",
        "whether the routing is there as numbers and weights",
        ("topk_output",),
    ),
)

ATTENTION: tuple[Use, ...] = (
    Object(
        "layers.radix_attention.RadixAttention",
        "an attention layer",
        (
            *("layer_id", "tp_q_head_num", "tp_k_head_num", "head_dim", "logit_cap", "attn_type"),
            *("is_cross_attention", "k_scale", "v_scale", "k_scale_float"),
        ),
    ),
    Object("layers.radix_attention.AttentionType", "a cache of ours is a decoder's", ("DECODER",)),
    Holds(
        "layers.attention.attention_registry.ATTENTION_BACKENDS",
        "the backends that ours stand in for",
        ("triton", "flashinfer", "trtllm_mha"),
    ),
    Called(
        "layers.attention.attention_registry.register_attention_backend", "registers ours under their names", ("name",)
    ),
    *(
        Written(
            f"layers.attention.base_attn_backend.AttentionBackend.{name}",
            "attention of SGLang's with a bias or a rotation around it",
            ("self", "q", "k", "v", "layer", "forward_batch", "save_kv_cache", "kwargs"),
        )
        for name in ("forward_decode", "forward_extend")
    ),
    Base(
        "layers.attention.triton_backend.TritonAttnBackend",
        "our attention over a packed cache",
        (
            *("device_core_count", "num_head", "num_kv_head", "v_head_dim", "device", "max_kv_splits"),
            *("decode_attention_fwd", "extend_attention_fwd", "get_num_kv_splits"),
        ),
    ),
    Called("layers.attention.triton_backend.TritonAttnBackend", "its bookkeeping", ("model_runner",)),
    Written(
        "layers.attention.triton_backend.TritonAttnBackend.get_num_kv_splits",
        "not asked for: our kernels cut a request themselves",
        ("self", "num_kv_splits", "seq_lens"),
        later=("uneven_batch",),
    ),
    Called(
        "sglang.kernels.ops.attention.decode_attention.decode_attention_fwd",
        "the kernel of decoding, in whose place ours is called",
        (
            *("q", "k_buffer", "v_buffer", "o", "kv_indptr", "kv_indices", "attn_logits", "attn_lse"),
            *("num_kv_splits", "max_kv_splits", "sm_scale", "k_scale", "v_scale"),
        ),
    ),
    Called(
        "sglang.kernels.ops.attention.extend_attention.extend_attention_fwd",
        "the kernel of prefill, in whose place ours is called",
        (
            *("q_extend", "k_extend", "v_extend", "o_extend", "k_buffer", "v_buffer", "qo_indptr", "kv_indptr"),
            *("kv_indices", "custom_mask", "is_causal", "mask_indptr", "max_len_extend", "k_scale", "v_scale"),
        ),
    ),
    Object(
        "model_executor.model_runner.ModelRunner",
        "what a backend and an update are made of",
        (
            *(
                "model",
                "device",
                "server_args",
                "token_to_kv_pool",
                "req_to_token_pool",
                "weight_updater",
                "eager_runner",
                "kv_cache_dtype_str",
            ),
            *("decode_cuda_graph_runner", "prefill_cuda_graph_runner"),
        ),
    ),
    Object("mem_cache.memory_pool.ReqToTokenPool", "how many requests run at once", ("size",)),
    Base(
        "mem_cache.memory_pool.MHATokenToKVPool",
        "our pool",
        (
            *("k_buffer", "v_buffer", "k_scale_buffer", "layer_num", "start_layer", "head_dim", "quant_method"),
            *("_slot_move_pointer_buffers", "_get_key_buffer", "_get_value_buffer", "_set_quantized_kv_buffer"),
            *("get_cpu_copy", "load_cpu_copy"),
        ),
    ),
    Written(
        "mem_cache.memory_pool.MHATokenToKVPool._set_quantized_kv_buffer",
        "writes to our pool",
        ("self", "layer_id", "global_layer_id", "loc_info", "cache_k", "cache_v", "k_scale", "v_scale"),
    ),
    Called("mem_cache.memory_pool.MHATokenToKVPool._get_key_buffer", "reads our pool", ("layer_id",)),
    Called("mem_cache.memory_pool.MHATokenToKVPool._get_value_buffer", "reads our pool", ("layer_id",)),
    Called("mem_cache.memory_pool.MHATokenToKVPool._slot_move_pointer_buffers", "what moves with a slot"),
    Called("mem_cache.memory_pool.unwrap_write_loc", "the slots that are written", ("loc_info",)),
    Base(
        "layers.quantization.fp4_kv_cache_quant_method.KVCacheQuantMethodBase",
        "how our pool is sized and allocated",
        ("name", "create_buffers", "compute_cell_size", "quantize_and_store", "dequantize_prev_kv"),
    ),
    Written(
        "layers.quantization.fp4_kv_cache_quant_method.KVCacheQuantMethodBase.create_buffers",
        "allocates our pool",
        ("self", "size", "head_num", "head_dim", "layer_num", "device"),
    ),
    Written(
        "layers.quantization.fp4_kv_cache_quant_method.KVCacheQuantMethodBase.compute_cell_size",
        "sizes our pool",
        ("self", "head_num", "head_dim", "num_layers", "kv_size"),
    ),
    Object(
        "layers.quantization.fp4_kv_cache_quant_method.NVFP4KVCacheMethod",
        "the scales of SGLang's NVFP4 cache",
        ("k_scales_float", "v_scales_float", "k_scales_gpu", "v_scales_gpu"),
    ),
    Holds("layers.quantization.kvfp4_tensor.E2M1_MAX", "the factor in those scales"),
    Object(
        "mem_cache.kv_cache_configurator.KVCacheConfigurator",
        "which pool is built, of which model",
        ("kv_cache_dtype_str", "model_config", "model", "device", "layer_info", "_build_mha_quant_method"),
    ),
)

USES: tuple[Use, ...] = (*PLUGIN, *ARGUMENTS, *MODELS, *LAYERS, *EXPERTS, *ATTENTION, *HYBRID, *UPDATES, *OBSERVABILITY)
"""The table, without the functions that hooks wrap: those are in the ``HOOKS`` of the files of ``integration/``."""


def of_hooks(hooks: Iterable[Hook]) -> Iterator[Use]:
    """Yield a row for the function that each hook wraps."""
    return (Written(hook.target, f"without it {hook.why}", hook.parameters) for hook in hooks)


def installed_root() -> Path | None:
    """Return the folder of the installed SGLang, which is not imported; None where there is none."""
    spec = importlib.util.find_spec(ROOT)
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    return Path(places[0]) if places else None


def check(uses: Iterable[Use], root: Path) -> list[str]:
    """Return the differences of the SGLang at ``root`` from ``uses``, one clause for each: ``symbol: difference``."""
    sources = Sources(root)
    return [f"{use.symbol}: {difference}" for use in uses for difference in use.broken(sources)]
