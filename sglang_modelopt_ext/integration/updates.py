"""Updates of a running server's weights: from disk and with an unchanged recipe; other ways are not supported.

A quantized layer keeps prepared weights, not the stored tensors. An update from disk restores the checkpoint's parameters, loads
strictly and prepares again. SGLang "rolls back" a failed update by reading the new folder a second time, so everything that can
fail is checked before anything is changed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sglang_modelopt_ext.checkpoint.quant_config import read_quant_config
from sglang_modelopt_ext.checkpoint.reader import Checkpoint, check_all_values, is_kv_cache_tensor
from sglang_modelopt_ext.checkpoint.tensors import read_tensors
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.integration.adapters import has_adapters
from sglang_modelopt_ext.integration.config import ModelOptExtConfig, read_served
from sglang_modelopt_ext.integration.hooks import Hook
from sglang_modelopt_ext.integration.loading import ext_config


def check_replacement(config: ModelOptExtConfig, folder: Path) -> Checkpoint:
    """Return the checkpoint in ``folder``, with all of its values checked.

    Raises:
        ModelOptExtError: it is wrong, or has other layers, schemes, shapes or KV-cache scales than the served one.
    """
    if config.checkpoint is None:
        raise ModelOptExtError.at(
            "update_weights_from_disk", "--load-format", "weights that were read from disk", "dummy"
        )
    new_config = read_quant_config(folder)
    if new_config is None:
        raise ModelOptExtError.at(folder, "quantization_config", "a checkpoint exported by ModelOpt", "none")
    checkpoint = read_served(folder, new_config)
    served = config.checkpoint
    old_layers, new_layers = ({linear.name: linear for linear in source.layers} for source in (served, checkpoint))
    for name in sorted(old_layers.keys() | new_layers.keys()):
        old, new = old_layers.get(name), new_layers.get(name)
        if old is None or new is None or (old.scheme, old.n, old.k) != (new.scheme, new.n, new.k):
            raise ModelOptExtError.at(
                folder,
                name,
                old.scheme.describe() if old else "unquantized",
                new.scheme.describe() if new else "unquantized",
            )
    for tensor in sorted(served.tensors.keys() ^ checkpoint.tensors.keys()):
        raise ModelOptExtError.at(folder, tensor, "the tensors of the served checkpoint", "another set")
    for tensor, old_tensor in served.tensors.items():
        new_tensor = checkpoint.tensors[tensor]
        if (old_tensor.dtype, old_tensor.shape) != (new_tensor.dtype, new_tensor.shape):
            raise ModelOptExtError.at(
                new_tensor.file,
                tensor,
                f"{old_tensor.dtype} {list(old_tensor.shape)}",
                f"{new_tensor.dtype} {list(new_tensor.shape)}",
            )
    check_all_values(checkpoint)
    _check_kv_cache(served, checkpoint)
    return checkpoint


def _check_kv_cache(served: Checkpoint, new: Checkpoint) -> None:
    """Raise ModelOptExtError where the KV cache's scales or biases differ: its pool keeps those of the server's start."""
    names = [name for name in served.tensors if is_kv_cache_tensor(name)]
    old_values, new_values = (
        {stored.name: tensor for stored, tensor in read_tensors([source.tensors[name] for name in names])}
        for source in (served, new)
    )
    for name in names:
        if not torch.equal(old_values[name], new_values[name]):
            raise ModelOptExtError.at(
                new.tensors[name].file, name, "the values being served: a KV cache keeps its scales", "others"
            )


def _check_graphs(model_runner: Any) -> None:
    """Raise ModelOptExtError where CUDA graphs are captured: they would go on reading the weights that an update replaces."""
    graphs = {model_runner.decode_cuda_graph_runner, model_runner.prefill_cuda_graph_runner}
    if str(model_runner.device).startswith("cuda") and graphs - {None, model_runner.eager_runner}:
        expected = "a server without CUDA graphs (--disable-cuda-graph): they hold the addresses of the weights"
        raise ModelOptExtError.at("update_weights_from_disk", "CUDA graphs", expected, "captured ones")


def _update_from_disk(
    original: Callable[..., tuple[bool, str]],
    self: Any,
    model_path: str,
    load_format: str,
    weight_name_filter: Callable[[str], bool] | None = None,
    recapture_cuda_graph: bool = False,
) -> tuple[bool, str]:
    config = ext_config(self.get_model())
    if config is None:
        return original(self, model_path, load_format, weight_name_filter, recapture_cuda_graph)
    try:
        _check_graphs(self.get_model_runner())
        if has_adapters(self.get_model()):
            expected = "a server without LoRA: its wrappers take the stored tensors' places"
            raise ModelOptExtError.at("update_weights_from_disk", "--enable-lora", expected, "one with it")
        if weight_name_filter is not None:
            raise ModelOptExtError.at("update_weights_from_disk", "weight_name_filter", "whole checkpoints", "a filter")
        if load_format not in ("auto", "safetensors"):
            raise ModelOptExtError.at("update_weights_from_disk", "load_format", "auto or safetensors", load_format)
        if not Path(model_path).is_dir():
            raise ModelOptExtError.at("update_weights_from_disk", "model_path", "a local folder", model_path)
        checkpoint = check_replacement(config, Path(model_path))
    except ModelOptExtError as error:
        return False, error.one_line()
    # File names change with the folder; layers, shapes and schemes were just compared and are equal.
    config.checkpoint = dataclasses.replace(checkpoint, config=config.config)
    return original(self, model_path, load_format, weight_name_filter, recapture_cuda_graph)


def _reject(operation: str) -> Callable[..., Any]:
    """Return a wrapper that answers ``(False, reason)`` for a model that this package serves."""

    def around(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
        if ext_config(self.get_model()) is None:
            return original(self, *args, **kwargs)
        return False, _unsupported(operation).one_line()

    return around


def _begin_weight_update(original: Callable[..., Any], self: Any, recv_req: Any) -> Any:
    from sglang.srt.managers.io_struct import BeginWeightUpdateReqOutput

    if not any(ext_config(runner.weight_updater.get_model()) for _, runner in self._select_runners(recv_req.selector)):
        return original(self, recv_req)
    # Opening the session already deletes the repacked weights, so that the error has to come before.
    error = _unsupported("update_weights_from_tensor, update_weights_from_distributed")
    return BeginWeightUpdateReqOutput(success=False, message=error.one_line())


def _unsupported(operation: str) -> ModelOptExtError:
    expected = "update_weights_from_disk, since quantized weights are kept repacked"
    return ModelOptExtError.at(operation, "weights", expected, "tensors in checkpoint form")


_UPDATER = "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater."

HOOKS = (
    Hook(
        "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager.begin_weight_update",
        ("self", "recv_req"),
        "opening an update session would take the repacked weights away",
        _begin_weight_update,
    ),
    Hook(
        _UPDATER + "update_weights_from_disk",
        ("self", "model_path", "load_format", "weight_name_filter", "recapture_cuda_graph"),
        "a checkpoint of another recipe would be half loaded",
        _update_from_disk,
    ),
    Hook(
        _UPDATER + "update_weights_from_tensor",
        ("self", "named_tensors", "load_format"),
        "tensors would be written over repacked weights",
        _reject("update_weights_from_tensor"),
    ),
    Hook(
        _UPDATER + "load_weights_from_distributed",
        ("self", "named_tensors"),
        "tensors would be written over repacked weights",
        _reject("update_weights_from_distributed"),
    ),
    Hook(
        _UPDATER + "update_weights_from_ipc",
        ("self", "recv_req"),
        "tensors would be written over repacked weights",
        _reject("update_weights_from_ipc"),
    ),
)
