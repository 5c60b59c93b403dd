"""The hooks of quantized KV caches: the recipe is resolved and checked before anything starts, then its pool is built.

The recipe follows from the checkpoint's configuration, the names of its tensors and the flag, before any process starts. The scales
are read when the weights are there, for the attention layers that the model has. One of three pools holds the cache:

- **SGLang's**, for plain FP8 on a GPU and for SGLang's own flags. The checkpoint's scales are loaded here where they fit; a fault
  in them is an error only if SGLang alone would have one.
- **SGLang's, with attention wrapped** (:mod:`.wrapped`), for the other recipes on a GPU where ``--attention-backend`` names
  attention of SGLang's that can have a bias or a rotation around it. The flag becomes SGLang's own, so that SGLang's checks, pool
  and kernels apply.
- **This package's** (:mod:`.pool`), for all other recipes, and for every recipe on a CPU.
"""

from __future__ import annotations

import functools
import logging
import typing
from collections.abc import Callable
from typing import Any

import torch

from sglang_modelopt_ext.checkpoint.kv_cache import (
    FLAG_PREFIX,
    KV_FLAGS,
    STOCK_FLAGS,
    STOCK_FP8_KV,
    KVCachePlan,
    check_head_dim,
)
from sglang_modelopt_ext.checkpoint.ownership import SERVED_DEVICES, owned_family
from sglang_modelopt_ext.checkpoint.quant_config import text_config
from sglang_modelopt_ext.device import Device
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.integration.devices import device_of, server_device
from sglang_modelopt_ext.integration.folders import config_folder, downloaded_folder
from sglang_modelopt_ext.integration.hooks import Hook
from sglang_modelopt_ext.integration.kv.hybrid import unserved_pool, unsupported_pool
from sglang_modelopt_ext.integration.kv.scales import plan_for, scales_for_sglang, served_plan, wrapped_plan
from sglang_modelopt_kernels.attention.store.store import MOST_ROTATED

logger = logging.getLogger(__name__)

ATTENTION_BACKENDS = {"cpu": "torch_native", "cuda": "triton"}
"""The default attention backend for a pool of this package, by device."""

SERVED_BACKENDS = frozenset(ATTENTION_BACKENDS.values())
WRAPPED_BACKENDS = frozenset({"flashinfer", "trtllm_mha"})
"""SGLang's attention backends that can have a bias or a rotation around them; used only where the user names one."""

NOT_BY_TRITON = ("Lfm2ForCausalLM", "Lfm2MoeForCausalLM")
"""Model classes that SGLang rejects with its Triton attention."""

NOT_WRAPPED = "it has not been tested with a bias or a rotation around SGLang's own cache"

UNSUPPORTED: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (
        "--enable-hierarchical-cache",
        lambda a: a.enable_hierarchical_cache,
        "its host pool has no room for block scales",
    ),
    ("--enable-lmcache", lambda a: a.enable_lmcache, "its host pool has no room for block scales"),
    (
        "--disaggregation-mode",
        lambda a: a.disaggregation_mode != "null",
        "the transfer would leave block scales behind",
    ),
    ("--speculative-algorithm", lambda a: a.speculative_algorithm is not None, "drafts have not been tested on it"),
    ("--enable-unified-memory", lambda a: a.enable_unified_memory, "that pool does not allocate block scales"),
    ("--enable-kv-cache-sharding", lambda a: a.enable_kv_cache_sharding, "that pool stripes plain buffers"),
    ("--enable-page-major-kv-layout", lambda a: a.enable_page_major_kv_layout, "that pool holds plain buffers"),
    (
        "--enable-deterministic-inference",
        lambda a: a.enable_deterministic_inference,
        "its attention kernel reads plain buffers",
    ),
    ("--dcp-size", lambda a: (a.dcp_size or 1) > 1, "decode context parallelism masks plain buffers"),
    ("--prefill-only-disable-kv-cache", lambda a: a.prefill_only_disable_kv_cache, "there is no cache to quantize"),
    ("--enable-hisparse", lambda a: a.enable_hisparse, "that pool holds plain buffers"),
)
"""Arguments that a KV cache of this package does not support: the flag, a test whether it is set, and the reason."""


def is_stock(plan: KVCachePlan, device: Device) -> bool:
    """Return whether SGLang's own pool and attention serve the cache unchanged: plain FP8 on every device but a CPU."""
    return device.kind != "cpu" and plan.recipe.name == "fp8"


def _is_sglangs(args: Any) -> bool:
    """Return whether SGLang serves the weights itself. Raises ModelOptExtError for a checkpoint that neither can serve."""
    folder = config_folder(args.model_path, args.revision)
    flag = args.quantization.lower() if args.quantization else None
    return folder is None or owned_family(folder, flag, device_of(args)) is None


def asks_for_wrapped(args: Any) -> bool:
    """Return whether the user names an attention backend that is wrapped (:data:`WRAPPED_BACKENDS`), on a GPU."""
    named = {args.attention_backend, args.prefill_attention_backend, args.decode_attention_backend}
    return device_of(args).kind == "cuda" and bool(named & WRAPPED_BACKENDS)


def declare(server_args: Any) -> None:
    """Resolve ``--kv-cache-dtype`` and the attention backend before SGLang picks defaults.

    Where SGLang serves the weights and the user did not ask for a cache of this package, an error leaves the cache to SGLang, with
    a warning in the log.

    Raises:
        ModelOptExtError: the cache does not go with the other arguments, or the checkpoint's configuration is wrong.
    """
    from sglang.srt.arg_groups.overrides import resolving_view

    if wrapped_plan(server_args) is not None:
        return  # an earlier call replaced the flag by SGLang's
    args = resolving_view(server_args)
    asked, device = args.kv_cache_dtype in KV_FLAGS, device_of(args)
    if device.kind == "other":
        if asked:
            expected = f"{SERVED_DEVICES} with --kv-cache-dtype {args.kv_cache_dtype}"
            raise ModelOptExtError.at("command line", "--device", expected, device.name)
        return
    if device.kind == "cuda" and not asked and args.kv_cache_dtype != "auto":
        return  # SGLang's own flag on SGLang's own device
    plan = None
    try:
        plan = plan_for(args.model_path, args.revision, args.kv_cache_dtype)
        if plan is not None:
            if not asked and not plan.recipe.affine and _is_sglangs(args):
                _check_pool(server_args, plan)
            _declare_plan(server_args, args, plan)
    except ModelOptExtError as error:
        # SGLang's cache has no biases, so that one calibrated with biases cannot be left to it.
        needs_ours = asked or device.kind == "cpu" or (plan is not None and plan.recipe.affine)
        if needs_ours or not _is_sglangs(args):
            raise
        logger.warning("modelopt_ext: the KV cache is left to SGLang: %s", error)


def _check_pool(server_args: Any, plan: KVCachePlan) -> None:
    """Raise ModelOptExtError for a model whose pool cannot hold the plan's cache."""
    from sglang.srt.configs.model_config import ModelConfig

    if is_stock(plan, device_of(server_args)):
        return
    try:
        config = ModelConfig.from_server_args(server_args)
    except Exception:  # SGLang reports a faulty model configuration itself
        return
    kind = unserved_pool(config, asks_for_wrapped(server_args), bool(plan.other))
    if kind is not None:
        raise unsupported_pool(kind, FLAG_PREFIX + plan.recipe.name)


def _declare_plan(server_args: Any, args: Any, plan: KVCachePlan) -> None:
    """Declare the flag and the attention backend of the plan's cache to SGLang.

    Raises:
        ModelOptExtError: the arguments do not support the cache; nothing is declared then.
    """
    from sglang.srt.arg_groups.overrides import declare_resolution

    device = device_of(args)
    if is_stock(plan, device):
        if args.kv_cache_dtype in KV_FLAGS:
            declare_resolution(server_args, __name__, kv_cache_dtype=STOCK_FP8_KV)
        return
    wrapped = asks_for_wrapped(args)
    for flag, is_set, reason in UNSUPPORTED:
        if is_set(args):
            why = NOT_WRAPPED if wrapped else reason
            raise ModelOptExtError.at(
                "command line", flag, f"it unset with a KV cache of {plan.recipe.name}: {why}", "it set"
            )
    if wrapped:
        if plan.other:
            raise ModelOptExtError.at(
                "command line",
                "--attention-backend",
                f"triton for a KV cache of several precisions ({plan.describe()}): SGLang's has one",
                " or ".join(sorted(WRAPPED_BACKENDS)),
            )
        _check_blackwell(plan)
        (own,) = (own for own, name in STOCK_FLAGS.items() if name == plan.recipe.format.name)
        declare_resolution(server_args, __name__, kv_cache_dtype=own)
        return
    if device.kind == "cuda":
        _check_triton(args, plan)
    declare_resolution(server_args, __name__, kv_cache_dtype=FLAG_PREFIX + plan.recipe.name)
    if args.attention_backend is None:
        declare_resolution(server_args, __name__, attention_backend=ATTENTION_BACKENDS[device.kind])


def _check_triton(args: Any, plan: KVCachePlan) -> None:
    """Raise ModelOptExtError for a model that SGLang rejects with its Triton attention, which alone has our kernels on a GPU."""
    folder = config_folder(args.model_path, args.revision)
    names = text_config(folder).get("architectures") if folder is not None else None
    for name in names if isinstance(names, list) else ():
        if name in NOT_BY_TRITON:
            expected = f"bf16 for {name}, which SGLang does not serve with triton attention"
            raise ModelOptExtError.at("command line", "--kv-cache-dtype", expected, FLAG_PREFIX + plan.recipe.name)


def _check_blackwell(plan: KVCachePlan) -> None:
    """Raise ModelOptExtError for SGLang's NVFP4 cache on a GPU before Blackwell: SGLang's error would name a flag not given."""
    from sglang.srt.runtime_context import get_platform

    platform = get_platform()
    if plan.recipe.format.block and not (platform.is_sm100 or platform.is_sm120):
        raise ModelOptExtError.at(
            "command line",
            "--attention-backend",
            f"triton for a KV cache of {plan.recipe.name} on a GPU other than SM100, SM103 and SM120",
            " or ".join(sorted(WRAPPED_BACKENDS)),
        )


def check_backends(server_args: Any) -> None:
    """Raise ModelOptExtError when the attention backends that SGLang resolved cannot read the cache."""
    from sglang.srt.arg_groups.overrides import attention_backends_of, resolved_view, use_mla_backend

    args = resolved_view(server_args)
    plan = wrapped_plan(server_args)
    if args.kv_cache_dtype not in KV_FLAGS and plan is None:
        return
    flag = args.kv_cache_dtype if plan is None else FLAG_PREFIX + plan.recipe.name
    allowed = SERVED_BACKENDS if plan is None else WRAPPED_BACKENDS
    for backend in attention_backends_of(args):
        if backend not in allowed:
            raise ModelOptExtError.at(
                "command line",
                "--attention-backend",
                f"{' or '.join(sorted(allowed))} with --kv-cache-dtype {flag}",
                backend,
            )
    if use_mla_backend(server_args):
        raise ModelOptExtError.at(
            "command line", "--kv-cache-dtype", "auto for a model with latent attention (MLA)", flag
        )


def _configure_kv_cache_dtype(original: Callable[..., Any], **kwargs: Any) -> tuple[str | None, torch.dtype]:
    flag = kwargs["server_args_kv_cache_dtype"]
    if flag in KV_FLAGS:
        if kwargs["is_draft_worker"]:
            raise ModelOptExtError.at("command line", "--speculative-algorithm", f"no drafts with {flag}", "a draft")
        return flag, torch.uint8
    return original(**kwargs)


def _compute_cell_size(original: Callable[..., int], self: Any, kvc: Any, num_layers: int) -> int:
    if kvc.kv_cache_dtype_str not in KV_FLAGS:
        return original(self, kvc, num_layers)
    from sglang.srt.runtime_context import get_parallel, get_server_args

    from sglang_modelopt_ext.integration.kv.method import ModelOptExtKVMethod

    parallel, config = get_parallel(), kvc.model_config
    heads = config.get_num_kv_heads(parallel.attn_tp_size, parallel.attn_dcp_size)
    args = get_server_args()
    plan = plan_for(args.model_path, args.revision, kvc.kv_cache_dtype_str)
    assert plan is not None, "a flag of ours has a plan"
    method = ModelOptExtKVMethod(plan.recipes, kvc.layer_info.start_layer)
    return method.compute_cell_size(heads, config.head_dim, num_layers, kv_size=1)


def _build_mha_quant_method(original: Callable[..., Any], self: Any, *, num_layers: int) -> Any:
    if self.kv_cache_dtype_str not in KV_FLAGS:
        method = original(self, num_layers=num_layers)
        _set_scales_of_sglangs_cache(self, method)
        return method
    from sglang.srt.runtime_context import get_parallel, get_server_args
    from sglang.srt.utils import log_info_on_rank0

    from sglang_modelopt_ext.integration.kv.layers import check_sinks, served_attention
    from sglang_modelopt_ext.integration.kv.method import ModelOptExtKVMethod

    config = self.model_config
    recipe = KV_FLAGS[self.kv_cache_dtype_str]
    check_sinks(self.model, _attention_backends(get_server_args()))
    check_head_dim(recipe, config.head_dim, config.model_path)
    if recipe.rotate and config.head_dim > MOST_ROTATED and self.device == "cuda":
        raise ModelOptExtError.at(
            config.model_path, "head_dim", f"at most {MOST_ROTATED} for {recipe.name} on a GPU", config.head_dim
        )
    if config.v_head_dim != config.head_dim:
        raise ModelOptExtError.at(config.model_path, "v_head_dim", f"head_dim, {config.head_dim}", config.v_head_dim)
    plan = served_plan(get_server_args(), self.kv_cache_dtype_str)
    method = ModelOptExtKVMethod(plan.recipes, self.layer_info.start_layer)
    parallel = get_parallel()
    layers = plan.resolve(served_attention(self.model)).layers
    method.load_layers(self.model, layers, parallel.attn_tp_rank, parallel.attn_tp_size)
    log_info_on_rank0(logger, f"modelopt_ext: KV cache {plan.describe()}, {plan.source}")
    return method


def _set_scales_of_sglangs_cache(configurator: Any, method: Any) -> None:
    """Write the plan's scales into SGLang's own cache, where it is NVFP4 or its attention is wrapped.

    :func:`.scales.set_stock_scales` does so for plain FP8.

    Args:
        configurator: SGLang's ``KVCacheConfigurator``.
        method: SGLang's quantization method of the cache, None for FP8.

    Raises:
        ModelOptExtError: the attention of the model cannot be wrapped, or the scales do not fit it.
    """
    from sglang.srt.runtime_context import get_parallel, get_platform, get_server_args
    from sglang.srt.utils import log_info_on_rank0

    from sglang_modelopt_ext.integration.kv import wrapped
    from sglang_modelopt_ext.integration.kv.layers import check_sinks, rank_layers, served_attention

    args, model, config = get_server_args(), configurator.model, configurator.model_config
    if config.is_draft_model:
        return  # the scales are the target's
    is_wrapped = wrapped_plan(args) is not None
    if is_wrapped:
        plan: KVCachePlan | None = served_plan(args, args.kv_cache_dtype)
    elif configurator.kv_cache_dtype_str == "nvfp4" and server_device().kind != "other":
        plan = scales_for_sglang(args, downloaded_folder(args.model_path, args.revision, args.download_dir), "nvfp4")
    else:
        return
    if plan is None:
        return
    recipe, parallel, sm100 = plan.recipe, get_parallel(), bool(get_platform().is_sm100)
    backends = _attention_backends(args)
    attention = served_attention(model)
    resolved = plan.resolve(attention, strict=is_wrapped)
    if resolved.layers.keys() != attention.layers.keys():
        return  # a checkpoint with scales for some layers only is left to SGLang
    layers = rank_layers(model, resolved.layers, parallel.attn_tp_rank, parallel.attn_tp_size)
    if is_wrapped:
        wrapped.check_range(recipe, layers, backends[0])
        check_sinks(model, backends)
        wrapped.check_attention(model, config.dtype)
        check_head_dim(recipe, config.head_dim, config.model_path)
    if recipe.format.block:
        wrapped.set_nvfp4_scales(method, model, layers, sm100)
    else:
        wrapped.set_layer_scales(model, layers)
    note = wrapped.attention_note(recipe, backends, sm100)
    log_info_on_rank0(logger, f"modelopt_ext: KV cache {recipe.name}, {plan.source}; {note}; not run on hardware yet")


def _attention_backends(server_args: Any) -> tuple[str, str]:
    from sglang.srt.arg_groups.overrides import attention_backends_of, resolved_view

    prefill, decode = attention_backends_of(resolved_view(server_args))
    return prefill, decode


def _build_mha_kv_pool(
    original: Callable[..., Any],
    self: Any,
    *,
    max_total_num_tokens: int,
    mha_pool_class: type,
    quant_method: Any = None,
) -> Any:
    from sglang_modelopt_ext.integration.kv.method import ModelOptExtKVMethod
    from sglang_modelopt_ext.integration.kv.pool import ModelOptExtKVPool, number_layers

    pool = original(
        self,
        max_total_num_tokens=max_total_num_tokens,
        mha_pool_class=ModelOptExtKVPool if isinstance(quant_method, ModelOptExtKVMethod) else mha_pool_class,
        quant_method=quant_method,
    )
    number_layers(pool)
    return pool


@functools.cache
def register_kv_caches() -> None:
    """Register this package's values of ``--kv-cache-dtype``, its attention backends, and its check of the resolved backends."""
    from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS, register_attention_backend
    from sglang.srt.server_args import ServerArgs

    argument = typing.get_type_hints(ServerArgs, include_extras=True)["kv_cache_dtype"].__metadata__[0]
    argument.choices.extend(flag for flag in KV_FLAGS if flag not in argument.choices)
    for name, ours in (("triton", _triton_backend), *((name, _wrapped_backend) for name in sorted(WRAPPED_BACKENDS))):
        register_attention_backend(name)(functools.partial(ours, ATTENTION_BACKENDS[name]))
    register_resolution_hook("handle_attention_backend_compatibility")(_check_backends)


def _triton_backend(original: Callable[[Any], Any], runner: Any) -> Any:
    """Return this package's Triton attention backend over a pool of this package, SGLang's over any other."""
    from sglang_modelopt_ext.integration.kv.pool import is_packed

    if not is_packed(runner.token_to_kv_pool):
        return original(runner)
    from sglang_modelopt_ext.integration.kv.backend import ModelOptExtTritonBackend

    return ModelOptExtTritonBackend(runner)


def _wrapped_backend(original: Callable[[Any], Any], runner: Any) -> Any:
    """Return SGLang's attention backend, with the recipe's bias or rotation around it where the cache has one."""
    backend = original(runner)
    plan = wrapped_plan(runner.server_args)
    if plan is None:
        return backend
    from sglang.srt.runtime_context import get_parallel

    from sglang_modelopt_ext.integration.kv.layers import rank_layers, served_attention
    from sglang_modelopt_ext.integration.kv.wrapped import around_layers, wrap

    parallel, args = get_parallel(), runner.server_args
    resolved = served_plan(args, args.kv_cache_dtype).resolve(served_attention(runner.model)).layers
    layers = rank_layers(runner.model, resolved, parallel.attn_tp_rank, parallel.attn_tp_size)
    wrap(backend, around_layers(plan.recipe, layers, runner.model, runner.device))
    return backend


def _check_backends(server_args: Any, previous: Callable[[Any], None]) -> None:
    previous(server_args)
    check_backends(server_args)


_CONFIGURATOR = "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator."
HOOKS = (
    Hook(
        "sglang.srt.mem_cache.kv_cache_dtype.configure_kv_cache_dtype",
        (
            "server_args_kv_cache_dtype",
            "model",
            "model_dtype",
            "is_draft_worker",
            "is_dflash",
            "speculative_draft_attention_backend",
            "speculative_draft_kv_cache_dtype",
        ),
        "our values of --kv-cache-dtype would be rejected",
        _configure_kv_cache_dtype,
    ),
    Hook(
        "sglang.srt.model_executor.pool_configurator.DefaultPoolConfigurator._compute_cell_size",
        ("self", "kvc", "num_layers"),
        "a token would be sized as one byte for each entry",
        _compute_cell_size,
    ),
    Hook(
        _CONFIGURATOR + "_build_mha_quant_method",
        ("self", "num_layers"),
        "the pool would hold vectors unrounded, cut to bytes",
        _build_mha_quant_method,
    ),
    Hook(
        _CONFIGURATOR + "_build_mha_kv_pool",
        ("self", "max_total_num_tokens", "mha_pool_class", "quant_method"),
        "a quantized cache would be read as one full-width copy",
        _build_mha_kv_pool,
    ),
)
