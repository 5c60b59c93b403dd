"""A server's start without weights and without a server: will this checkpoint load, in SGLang's own model class?

``python -m sglang_modelopt_ext.integration.rehearsal FOLDER`` settles the arguments, reads the checkpoint, builds SGLang's model
on the meta device and loads tensors without values into it, all by the code that a server runs. SGLang keeps what it builds models
from in globals of the process, so that this is a process of its own. No weight is read, no GPU is used.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from sglang_modelopt_ext.checkpoint.kv_cache import KV_FLAGS, read_plan
from sglang_modelopt_ext.checkpoint.reader import Checkpoint
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.integration.kv.hooks import pool_kind, refused_pool

RESULT = "REHEARSAL "
"""What the last line of the output begins with, before JSON: ``{"model", "problems", "missing", "left_over", "left_out"}``."""

MOST_NAMES = 20
"""Of each list of names."""


def rehearse(folder: Path, server_arguments: list[str], stock_kv_cache: bool) -> dict[str, Any]:
    """Return what loading ``folder`` comes to.

    Args:
        folder: the checkpoint, one that this package serves.
        server_arguments: further arguments of the server.
        stock_kv_cache: whether the target keeps its KV cache in SGLang's own format, where nothing about it is an error.

    Returns:
        ``model``, the class; ``problems``, the lines at which a server would stop; ``missing`` and ``left_over``, parameters and
        tensors; ``left_out``, how many tensors belong to parts that are not served.

    Raises:
        ModelOptExtError: a server would stop with that line before it built a model.
        Exception: whatever SGLang raises where this machine cannot build the model.
    """
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.model_loader.loader import _get_quantization_config, _initialize_model
    from sglang.srt.model_loader.utils import set_default_torch_dtype

    from sglang_modelopt_ext.integration.config import ModelOptExtConfig
    from sglang_modelopt_ext.integration.loading import StrictLoad

    model_config = _settle(folder, server_arguments)
    quantization = _get_quantization_config(model_config, LoadConfig())
    if not isinstance(quantization, ModelOptExtConfig) or quantization.checkpoint is None:
        raise RuntimeError("SGLang serves it by itself")
    with set_default_torch_dtype(model_config.dtype), torch.device("meta"):
        model = _initialize_model(model_config, LoadConfig(), quantization)
    strict = StrictLoad(model, quantization.checkpoint, has_values=False)
    problems: list[ModelOptExtError] = []
    missing: list[ModelOptExtError] = []
    unused: list[str] = []
    try:
        strict.load(model.load_weights, _without_values(quantization.checkpoint))
    except ModelOptExtError as error:
        problems.append(error)  # half way: what comes after was never offered
    else:
        missing, unused = list(strict.missing()), strict.unused(strict.used)
        problems += [*missing[:1], *strict.left_over(strict.used)]
    if not stock_kv_cache:
        problems += _kv_cache_problems(folder, quantization, model, model_config)
    return {
        "model": type(model).__name__,
        "problems": [str(error) for error in problems],
        "missing": [str(error) for error in missing[:MOST_NAMES]],
        "left_over": unused[:MOST_NAMES],
        "left_out": len(strict.left_out),
    }


def _settle(folder: Path, server_arguments: list[str]) -> Any:
    """Return SGLang's configuration of the model, in a process that is set up as a scheduler of one rank on a CPU."""
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.distributed import bootstrap
    from sglang.srt.layers.moe.utils import initialize_moe_config
    from sglang.srt.runtime_context import SpawnRanks, publish
    from sglang.srt.server_args import prepare_server_args

    command = ["--model-path", str(folder), "--device", "cpu", "--skip-tokenizer-init", "--max-total-tokens", "1024"]
    args = prepare_server_args([*command, *server_arguments])
    args.resolve_once()
    publish(args, role="scheduler", ranks=SpawnRanks(world_rank=0, gpu_id=0))
    initialize_moe_config()
    model_config = ModelConfig.from_server_args(args)
    bootstrap.init_parallel_runtime(server_args=args, device="cpu", dist_port=_free_port())
    bootstrap.init_layer_runtime(model_config=model_config)
    return model_config


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _without_values(checkpoint: Checkpoint) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every stored tensor as its header has it; one of a single value is real, as loaders ask for it."""
    for name, stored in sorted(checkpoint.tensors.items(), key=lambda item: (item[1].file, item[0])):
        elements = 1
        for size in stored.shape:
            elements *= size
        tensor = torch.empty(stored.shape, dtype=torch.float32, device="cpu" if elements == 1 else "meta")
        yield name, (tensor.fill_(1) if elements == 1 else tensor).to(stored.dtype)


def _kv_cache_problems(folder: Path, quantization: Any, model: torch.nn.Module, config: Any) -> list[ModelOptExtError]:
    """Return what is wrong with a cache of ours for this model."""
    from sglang.srt.runtime_context import get_model

    from sglang_modelopt_ext.integration.kv.layers import check_sinks, served_attention

    flag = get_model().kv_cache_dtype
    if flag not in KV_FLAGS:
        return []
    try:
        kind = pool_kind(config)
        if kind is not None:
            raise refused_pool(kind, flag)
        plan = read_plan(folder, quantization.config, flag)
        check_sinks(model)
        if plan is not None:
            plan.resolve(served_attention(model))
    except ModelOptExtError as error:
        return [error]
    return []


def main() -> None:
    """Print the result as one line of JSON behind :data:`RESULT`; ``error`` in it says why there is none."""
    parser = argparse.ArgumentParser(description="Whether a checkpoint loads, without its weights.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--stock-kv-cache", action="store_true")
    options, rest = parser.parse_known_args()
    # No GPU is touched, whatever the machine has; SGLang asks for these when it is imported.
    os.environ.update(SGLANG_USE_CPU_ENGINE="1", CUDA_VISIBLE_DEVICES="")
    try:
        found = rehearse(options.folder, rest, options.stock_kv_cache)
    except ModelOptExtError as error:
        found = {"model": None, "problems": [str(error)], "missing": [], "left_over": [], "left_out": 0}
    except (Exception, SystemExit) as error:  # SGLang's, of any kind: the caller says that nothing was checked
        found = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    sys.stdout.flush()
    print(RESULT + json.dumps(found), flush=True)
    # Without the clean-up of process groups that nobody else is in.
    os._exit(0)


if __name__ == "__main__":
    main()
