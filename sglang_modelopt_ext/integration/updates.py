"""Updates of a running server's weights with an unchanged recipe: from disk, or from tensors in a session.

A quantized layer keeps prepared weights, not the stored tensors. An update from disk restores the checkpoint's parameters, loads
strictly and prepares again. SGLang "rolls back" a failed update by reading the new folder a second time, so everything that can
fail is checked before anything is changed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from sglang_modelopt_ext.checkpoint.quant_config import read_quant_config
from sglang_modelopt_ext.checkpoint.reader import Checkpoint, check_all_values, is_kv_cache_tensor
from sglang_modelopt_ext.checkpoint.tensors import read_tensors
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.integration.adapters import has_adapters
from sglang_modelopt_ext.integration.config import ModelOptExtConfig, read_served
from sglang_modelopt_ext.integration.exchange import first_fault
from sglang_modelopt_ext.integration.hooks import Hook
from sglang_modelopt_ext.integration.loading import ext_config
from sglang_modelopt_ext.integration.session import Session


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


def _check_graphs(model_runner: Any, operation: str) -> None:
    """Raise ModelOptExtError where CUDA graphs are captured: they would go on reading the weights that an update replaces."""
    graphs = {model_runner.decode_cuda_graph_runner, model_runner.prefill_cuda_graph_runner}
    if str(model_runner.device).startswith("cuda") and graphs - {None, model_runner.eager_runner}:
        expected = "a server without CUDA graphs (--disable-cuda-graph): they hold the addresses of the weights"
        raise ModelOptExtError.at(operation, "CUDA graphs", expected, "captured ones")


def _check_adapters(model: torch.nn.Module, operation: str) -> None:
    """Raise ModelOptExtError where layers are inside of SGLang's LoRA wrappers, which have the stored tensors' names."""
    if has_adapters(model):
        raise ModelOptExtError.at(operation, "--enable-lora", "a server without LoRA adapters", "one with them")


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
        _check_graphs(self.get_model_runner(), "update_weights_from_disk")
        _check_adapters(self.get_model(), "update_weights_from_disk")
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


def _served(updaters: Iterable[Any]) -> list[tuple[Any, ModelOptExtConfig]]:
    """Return the updaters of models that this package serves, with the configuration of each."""
    found = ((updater, ext_config(updater.get_model())) for updater in updaters)
    return [(updater, config) for updater, config in found if config is not None]


def _updaters(manager: Any, selector: str) -> list[Any]:
    return [runner.weight_updater for _, runner in manager._select_runners(selector)]


def _check_session(updater: Any, config: ModelOptExtConfig) -> None:
    """Raise ModelOptExtError where a session cannot be opened."""
    from sglang.srt.runtime_context import get_parallel

    _check_graphs(updater.get_model_runner(), "begin_weight_update")
    _check_adapters(updater.get_model(), "begin_weight_update")
    if config.checkpoint is None:
        raise ModelOptExtError.at(
            "begin_weight_update", "--load-format", "weights that were read from disk, and their names", "dummy"
        )
    if get_parallel().pp_size > 1:
        expected = "1, as stages end a session one after the other: update_weights_from_disk"
        raise ModelOptExtError.at("begin_weight_update", "--pp-size", expected, get_parallel().pp_size)


def _begin_session(original: Callable[..., Any], self: Any, recv_req: Any) -> Any:
    from sglang.srt.managers.io_struct import BeginWeightUpdateReqOutput

    try:
        for updater, config in _served(_updaters(self, recv_req.selector)):
            _check_session(updater, config)
    except ModelOptExtError as error:
        return BeginWeightUpdateReqOutput(success=False, message=error.one_line())
    return original(self, recv_req)


def _begin(original: Callable[..., None], self: Any) -> None:
    config = ext_config(self.get_model())
    if config is None:
        original(self)
        return
    assert config.checkpoint is not None, "a session was refused without a checkpoint"
    assert config.used is not None, "weights that are served were loaded"
    config.session = Session(config.checkpoint, config.used)


def _gather(operation: str) -> Callable[..., Any]:
    """Return a wrapper that has an open session gather the tensors of ``operation``."""

    def around(original: Callable[..., Any], self: Any, named_tensors: Any, load_format: str | None = None) -> Any:
        config = ext_config(self.get_model())
        arguments = (named_tensors,) if operation == DISTRIBUTED else (named_tensors, load_format)
        if config is None:
            return original(self, *arguments)
        try:
            if config.session is None:
                raise ModelOptExtError.at(operation, "session", "an open one (begin_weight_update)", "none")
            if load_format not in (None, "flattened_bucket"):
                raise ModelOptExtError.at(operation, "load_format", "none or flattened_bucket", load_format)
            session = config.session
            return original(dataclasses.replace(self, get_model=lambda: session), *arguments)
        except ModelOptExtError as error:
            return False, error.one_line()

    return around


def _end_session(original: Callable[..., Any], self: Any, recv_req: Any) -> Any:
    """End a session on all ranks, or on none: they exchange their errors before any of them changes a weight."""
    from sglang.srt.managers.io_struct import EndWeightUpdateReqOutput

    served = [] if self._session is None else _served(_updaters(self, self._session.selector))
    if not served:
        return original(self, recv_req)
    error = first_fault(_fault(config for _, config in served), self.tp_cpu_group)
    if error is not None:
        ours = [updater for updater, _ in served]
        for updater in _updaters(self, self._session.selector):
            if updater not in ours:  # a draft of SGLang's has its new weights already
                updater.end_weight_update(run_post_load=False)
        for _, config in served:
            config.session = None
        self._session = None
        return EndWeightUpdateReqOutput(success=False, message=error)
    answer = original(self, recv_req)
    if not self.flush_cache():
        # Updates flush it when they come, while the old weights serve.
        late = "the cache was not flushed because requests are still running or queued"
        return EndWeightUpdateReqOutput(success=answer.success, message=f"{answer.message}; {late}")
    return answer


def _fault(configs: Iterable[ModelOptExtConfig]) -> str | None:
    """Return the first fault of the open sessions of ``configs``, None where there is none."""
    try:
        for config in configs:
            assert config.session is not None, "SGLang has a session open"
            config.session.check()
    except ModelOptExtError as error:
        return error.one_line()
    return None


def _end(original: Callable[..., None], self: Any, run_post_load: bool) -> None:
    config = ext_config(self.get_model())
    if config is None:
        original(self, run_post_load=run_post_load)
        return
    from sglang.srt.model_loader.loader import DefaultModelLoader
    from sglang.srt.model_loader.utils import set_default_torch_dtype

    assert config.session is not None, "SGLang has a session open"
    weights, config.session = config.session.tensors, None
    model, device = self.get_model(), torch.device(self.device)
    with set_default_torch_dtype(self.model_config.dtype):
        DefaultModelLoader.restore_weights_before_loading(model, device)
        DefaultModelLoader.load_weights_and_postprocess(model, iter(weights.items()), device)


def _reject_ipc(original: Callable[..., Any], self: Any, recv_req: Any) -> Any:
    if ext_config(self.get_model()) is None:
        return original(self, recv_req)
    expected = "update_weights_from_disk or _from_tensor, since quantized weights are kept repacked"
    return False, ModelOptExtError.at(IPC, "weights", expected, "tensors to be written in place").one_line()


TENSOR, DISTRIBUTED, IPC = (
    "update_weights_from_tensor",
    "update_weights_from_distributed",
    "update_weights_from_ipc",
)
_UPDATER = "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater."
_MANAGER = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager."

HOOKS = (
    Hook(
        _MANAGER + "begin_weight_update",
        ("self", "recv_req"),
        "opening an update session would take the repacked weights away",
        _begin_session,
    ),
    Hook(
        _MANAGER + "end_weight_update",
        ("self", "recv_req"),
        "one rank would serve new weights where another found a fault in its own",
        _end_session,
    ),
    Hook(
        _UPDATER + "begin_weight_update",
        ("self",),
        "opening an update session would take the repacked weights away",
        _begin,
    ),
    Hook(
        _UPDATER + "end_weight_update",
        ("self", "run_post_load"),
        "the tensors that a session gathered would not be loaded",
        _end,
    ),
    Hook(
        _UPDATER + "update_weights_from_disk",
        ("self", "model_path", "load_format", "weight_name_filter", "recapture_cuda_graph"),
        "a checkpoint of another recipe would be half loaded",
        _update_from_disk,
    ),
    Hook(
        _UPDATER + TENSOR,
        ("self", "named_tensors", "load_format"),
        "tensors would be written over repacked weights",
        _gather(TENSOR),
    ),
    Hook(
        _UPDATER + "load_weights_from_distributed",
        ("self", "named_tensors"),
        "tensors would be written over repacked weights",
        _gather(DISTRIBUTED),
    ),
    Hook(
        _UPDATER + IPC,
        ("self", "recv_req"),
        "tensors would be written over repacked weights",
        _reject_ipc,
    ),
)
