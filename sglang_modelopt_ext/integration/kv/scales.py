"""The scales of a KV cache: read from a checkpoint once its weights are there, and set on a model's attention layers.

A server's schedulers download a model on the hub, so that a plan made in the launching process has no scales yet.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Set
from pathlib import Path
from typing import Any

import torch

from sglang_modelopt_ext.checkpoint.kv_cache import (
    KV_FLAGS,
    STOCK_FLAGS,
    UNQUANTIZED_KV,
    KVCachePlan,
    is_latent,
    kv_cache_plan,
    read_plan,
)
from sglang_modelopt_ext.checkpoint.quant_config import CONFIG_NAME, QUANT_CONFIG_NAME, QuantConfig, read_quant_config
from sglang_modelopt_ext.checkpoint.reader import is_kv_cache_tensor
from sglang_modelopt_ext.checkpoint.tensors import INDEX_NAME, tensor_names
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.integration.devices import server_device
from sglang_modelopt_ext.integration.folders import config_folder, downloaded_folder, weights_folder
from sglang_modelopt_ext.integration.hooks import Hook
from sglang_modelopt_ext.schemes.table import FAMILIES

logger = logging.getLogger(__name__)


def plan_for(model_path: str, revision: str | None, flag: str) -> KVCachePlan | None:
    """Return a model's KV-cache plan under ``--kv-cache-dtype flag``, without scales; None where it is left to SGLang.

    Raises:
        ModelOptExtError: the flag contradicts the checkpoint, or the checkpoint's configuration is wrong.
    """
    folder = config_folder(model_path, revision)
    return _plan(folder or Path(model_path), flag, _files(folder) if folder is not None else ())


def _files(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Return ``(name, size, mtime)`` of the files that a plan is read from.

    They are the cache's key: files of a model on the hub appear while a server starts.
    """
    found = [*folder.glob("*.safetensors"), folder / INDEX_NAME, folder / CONFIG_NAME, folder / QUANT_CONFIG_NAME]
    return tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in found if file.exists())


@functools.lru_cache(maxsize=8)
def _plan(folder: Path, flag: str, files: tuple[tuple[str, int, int], ...]) -> KVCachePlan | None:
    return kv_cache_plan(folder, read_quant_config(folder) if files else None, flag)


def loaded_plan(model_path: str, revision: str | None, flag: str, folder: Path | None) -> KVCachePlan | None:
    """Return a model's KV-cache plan under ``--kv-cache-dtype flag``, with scales if the weights are in ``folder``.

    Args:
        model_path: a folder, or the name of a model on the hub.
        revision: the revision of a hub model.
        flag: the value of ``--kv-cache-dtype``.
        folder: the folder with the weights, None where there are none.

    Returns:
        None where the cache is left to SGLang.

    Raises:
        ModelOptExtError: the flag contradicts the checkpoint, or the checkpoint is wrong.
    """
    described = config_folder(model_path, revision)
    config = read_quant_config(described) if described is not None else None
    if folder is None or config is None:
        return plan_for(model_path, revision, flag)
    return read_plan(folder, config, flag)


def served_plan(server_args: Any, flag: str) -> KVCachePlan:
    """Return the plan of this server's KV cache under ``--kv-cache-dtype flag``, with its scales.

    Raises:
        ModelOptExtError: the checkpoint does not fit the flag, or the weights that were loaded are not found again.
    """
    args = server_args
    is_dummy = str(getattr(args.load_format, "value", args.load_format)) == "dummy"
    folder = None if is_dummy else downloaded_folder(args.model_path, args.revision, args.download_dir)
    plan = loaded_plan(args.model_path, args.revision, flag, folder)
    assert plan is not None, "a flag of ours has a plan"
    if not is_dummy and _lacks_scales(plan):
        # Without the weights a calibrated cache would get the scales of one that was not calibrated.
        raise ModelOptExtError.at(args.model_path, "k_scale, v_scale", "the weights that were loaded", "no such folder")
    return plan


def _lacks_scales(plan: KVCachePlan) -> bool:
    """Return whether a plan that needs the checkpoint's tensors was made without them."""
    return plan.folder is not None and plan.stored is None


def wrapped_plan(server_args: Any) -> KVCachePlan | None:
    """Return the plan of a cache in SGLang's own pool with a bias or rotation around attention; None for any other cache.

    It is derived from the user's flag, which the arguments keep, and the flag that the plugin declared in its place, so that every
    process finds the same plan.

    Raises:
        ModelOptExtError: the flag is one of this package's, and the checkpoint does not fit it.
    """
    from sglang.srt.arg_groups.overrides import resolved_view

    given, resolved = server_args.kv_cache_dtype, resolved_view(server_args).kv_cache_dtype
    if resolved not in STOCK_FLAGS or given in STOCK_FLAGS:
        return None
    try:
        plan = plan_for(server_args.model_path, server_args.revision, given)
    except ModelOptExtError:
        if given in KV_FLAGS:
            raise
        return None  # the preflight left the cache to SGLang, else it would have raised this error
    return None if plan is None or plan.recipe.name == "fp8" else plan


def _get_all_weights(
    original: Callable[..., Iterator[tuple[str, torch.Tensor]]], self: Any, model_config: Any, model: torch.nn.Module
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the weights without the KV cache's tensors that are set here: SGLang's models load, drop or fail on these.

    A draft's layers have their own scales, which are left to SGLang.
    """
    folder = config_folder(model_config.model_path, model_config.revision)
    try:
        config = read_quant_config(folder) if folder is not None else None
    except ModelOptExtError:
        config = None  # the checkpoint is SGLang's, else the preflight would have raised this error
    if folder is None or config is None or config.kv_cache_algo is None or is_latent(folder):
        config = None
    if config is None or server_device().kind == "other" or getattr(model_config, "is_draft_model", False):
        yield from original(self, model_config, model)
        return
    is_set = _set_scales(model, model_config, self.load_config, config)
    for name, tensor in original(self, model_config, model):
        if not is_kv_cache_tensor(name) or not is_set(name):
            yield name, tensor


def _set_scales(
    model: torch.nn.Module, model_config: Any, load_config: Any, config: QuantConfig
) -> Callable[[str], bool]:
    """Set the scales of SGLang's own cache on the layers of ``model``, or check those of a cache of this package.

    Returns:
        A test whether a tensor of the KV cache is hidden from the model's own loader.

    Raises:
        ModelOptExtError: the scales and biases of a cache of this package do not fit the model, or the recipe that was resolved.
    """
    from sglang.srt.runtime_context import get_model, get_server_args

    from sglang_modelopt_ext.integration.kv.layers import served_attention

    flag = get_model().kv_cache_dtype
    if flag in KV_FLAGS or (flag in STOCK_FLAGS and wrapped_plan(get_server_args()) is not None):
        given = flag if flag in KV_FLAGS else get_server_args().kv_cache_dtype
        folder = weights_folder(model_config, load_config)
        if flag in KV_FLAGS and _has_biases(folder) and not KV_FLAGS[flag].affine and config.kv_cache_recipe is None:
            raise _late_biases(folder)
        plan = loaded_plan(model_config.model_path, model_config.revision, given, folder)
        if plan is not None:
            plan.resolve(served_attention(model))
        return lambda name: True
    try:
        folder = weights_folder(model_config, load_config)
        has_biases = _has_biases(folder)
    except (ModelOptExtError, OSError, RuntimeError, ValueError) as error:
        # Nothing about SGLang's own cache is an error here, not even unreadable files.
        logger.warning("modelopt_ext: the KV cache's scales are left to SGLang: %s", error)
        return lambda name: False
    if has_biases and flag == "auto" and config.kv_cache_algo == "FP8" and config.kv_cache_recipe is None:
        raise _late_biases(folder)
    if flag in UNQUANTIZED_KV or (flag == "auto" and config.kv_cache_algo != "FP8") or has_biases:
        # Attention would multiply by a layer's scale over a cache that was not divided by it; and the scale of a cache with
        # a bias does not fit a cache without one.
        return lambda name: True
    ours = model_config.quantization in FAMILIES
    plan = scales_for_sglang(model_config, folder, flag, strict=ours)
    done = set_stock_scales(model, plan, strict=ours) if plan is not None else frozenset()
    return lambda name: name in done


def _has_biases(folder: Path) -> bool:
    return any(is_kv_cache_tensor(name) and name.endswith("_bias") for name in tensor_names(folder))


def _late_biases(folder: Path) -> ModelOptExtError:
    """Return the error for biases that came with a download, after the recipe was resolved without them."""
    expected = "no biases, as the recipe was chosen before the download (start again, or name the --kv-cache-dtype)"
    return ModelOptExtError.at(folder, "k_bias, v_bias", expected, "some")


def scales_for_sglang(source: Any, folder: Path | None, flag: str, strict: bool = False) -> KVCachePlan | None:
    """Return the plan with the scales for SGLang's own cache, None where the checkpoint has no scales for its format.

    Args:
        source: an object with ``model_path`` and ``revision``.
        folder: the folder with the weights, None where there are none.
        flag: the resolved ``--kv-cache-dtype``.
        strict: whether the weights are served by this package; otherwise a fault is a warning.

    Raises:
        ModelOptExtError: with ``strict``, the scales do not fit the configuration.
    """
    if flag != "auto" and flag not in STOCK_FLAGS:
        return None
    try:
        plan = loaded_plan(source.model_path, source.revision, flag, folder)
    except ModelOptExtError as error:
        if strict:
            raise
        logger.warning("modelopt_ext: the KV cache's scales are left to SGLang: %s", error)
        return None
    if plan is None or _lacks_scales(plan) or plan.recipe.name != STOCK_FLAGS.get(flag, "fp8"):
        return None
    return plan


def set_stock_scales(model: torch.nn.Module, plan: KVCachePlan, strict: bool = False) -> Set[str]:
    """Write the scales of SGLang's own cache into the ``k_scale`` and ``v_scale`` of its layers, where the model has these.

    SGLang's NVFP4 caches expect amax / 2688 there, while exports store amax / 448; the pool of plain attention moves them into
    its method (:mod:`sglang_modelopt_ext.integration.kv.hooks`). Layers that have their scales already, as in an update of the
    weights, are not changed. A layer without scales, or with illegal ones, is left to the model unless ``strict``.

    Args:
        model: the model that is served.
        plan: the plan with the checkpoint's scales.
        strict: whether the weights are served by this package, so that no other code reads a scale that is skipped here.

    Returns:
        The names of the tensors that were used.

    Raises:
        ModelOptExtError: with ``strict``, a layer lacks a scale or has a wrong one.
    """
    from sglang_modelopt_ext.integration.kv.layers import attention_layers, served_attention

    resolved = plan.resolve(served_attention(model), strict=strict)
    for error in resolved.problems[:1]:
        more = f" (and {len(resolved.problems) - 1} more)" if len(resolved.problems) > 1 else ""
        logger.warning("modelopt_ext: the KV cache's scales of a layer are left to SGLang: %s%s", error, more)
    if not resolved.tensors:
        return frozenset()
    for _, module in attention_layers(model):
        layer = resolved.layers.get(module.layer_id)
        if layer is None or not isinstance(module.k_scale, torch.nn.Parameter) or module.k_scale_float is not None:
            continue
        module.k_scale.data.fill_(layer.k_scale)
        module.v_scale.data.fill_(layer.v_scale)
    return resolved.tensors


HOOKS = (
    Hook(
        "sglang.srt.model_loader.loader.DefaultModelLoader._get_all_weights",
        ("self", "model_config", "model"),
        "the KV cache's scales would be dropped, or fail to load, depending on the model",
        _get_all_weights,
    ),
    Hook(
        "sglang.srt.model_loader.loader.RunaiModelStreamerLoader._get_all_weights",
        ("self", "model_config", "model"),
        "the KV cache's scales would be dropped, or fail to load, depending on the model",
        _get_all_weights,
    ),
)
