"""The rehearsal of a server's start, without weights: it tells whether a checkpoint loads into SGLang's own model class.

``python -m sglang_modelopt_ext.integration.rehearsal FOLDER`` resolves the arguments, reads the checkpoint, builds SGLang's model
on the meta device and loads tensors without values into it, all by the code that a server runs. It is a process of its own, since
SGLang builds models from globals of the process. No weight is read and no GPU is used.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from sglang_modelopt_ext.checkpoint.kv_cache import KV_FLAGS, read_plan
from sglang_modelopt_ext.checkpoint.reader import Checkpoint
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.integration.kv.hybrid import unserved_pool, unsupported_pool
from sglang_modelopt_ext.ports import free_port

RESULT = "REHEARSAL "
"""The prefix of the output's last line, before JSON: ``{"model", "problems", "missing", "left_over", "left_out"}``."""

BACKEND = "--attention-backend"
OTHER_BACKEND = "triton"
"""An attention that classes ask for which reject the one of a CPU (gpt-oss, EXAONE): without weights nothing is computed."""

MOST_NAMES = 20
"""The largest number of names in each list of the result."""


def rehearse(folder: Path, server_arguments: list[str], stock_kv_cache: bool) -> dict[str, Any]:
    """Load ``folder`` without weights, and return the errors of that.

    Args:
        folder: the checkpoint, one that this package serves.
        server_arguments: further arguments of the server.
        stock_kv_cache: whether the target keeps its KV cache in SGLang's own format, for which no error is reported.

    Returns:
        ``model``, the class; ``problems``, the error lines with which a server would stop; ``missing``, parameters without a
        tensor; ``left_over``, tensors without a parameter; ``left_out``, the number of tensors of parts that are not served.

    Raises:
        ModelOptExtError: the error with which a server would stop before it built a model.
        Exception: any error of SGLang's where this machine cannot build the model.
    """
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.model_loader.loader import _get_quantization_config, _initialize_model
    from sglang.srt.model_loader.utils import set_default_torch_dtype

    from sglang_modelopt_ext.integration.config import ModelOptExtConfig
    from sglang_modelopt_ext.integration.loading import StrictLoad

    model_config = _resolve(folder, server_arguments)
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
        problems.append(error)  # the tensors behind it were not offered, so that nothing can be said of them
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


def _resolve(folder: Path, server_arguments: list[str]) -> Any:
    """Set this process up as a scheduler of one rank on a CPU, and return SGLang's configuration of the model."""
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.configs.update_config import adjust_config_with_unaligned_cpu_tp
    from sglang.srt.distributed import bootstrap
    from sglang.srt.layers.moe.utils import initialize_moe_config
    from sglang.srt.runtime_context import SpawnRanks, publish
    from sglang.srt.server_args import prepare_server_args

    command = ["--model-path", str(folder), "--device", "cpu", "--skip-tokenizer-init", "--max-total-tokens", "1024"]
    command.append("--disable-radix-cache")  # that of hybrid models wants a GPU, and a rehearsal has no cache
    args = prepare_server_args([*command, *server_arguments])
    args.resolve_once()
    publish(args, role="scheduler", ranks=SpawnRanks(world_rank=0, gpu_id=0))
    initialize_moe_config()
    model_config = ModelConfig.from_server_args(args)
    # SGLang's classes read fields of the configuration that this adds on a CPU, for any number of ranks.
    load_config = LoadConfig(load_format=args.load_format)
    model_config = adjust_config_with_unaligned_cpu_tp(model_config, load_config, 1)
    bootstrap.init_parallel_runtime(server_args=args, device="cpu", dist_port=free_port())
    bootstrap.init_layer_runtime(model_config=model_config)
    return model_config


def _without_values(checkpoint: Checkpoint) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every stored tensor on the meta device; one of a single entry is on the CPU, since loaders read its value."""
    for name, stored in sorted(checkpoint.tensors.items(), key=lambda item: (item[1].file, item[0])):
        elements = 1
        for size in stored.shape:
            elements *= size
        tensor = torch.empty(stored.shape, dtype=torch.float32, device="cpu" if elements == 1 else "meta")
        yield name, (tensor.fill_(1) if elements == 1 else tensor).to(stored.dtype)


def _kv_cache_problems(folder: Path, quantization: Any, model: torch.nn.Module, config: Any) -> list[ModelOptExtError]:
    """Return the errors of this package's KV cache for the model; none where the cache is SGLang's."""
    from sglang.srt.runtime_context import get_model

    from sglang_modelopt_ext.integration.kv.layers import served_attention

    flag = get_model().kv_cache_dtype
    if flag not in KV_FLAGS:
        return []
    try:
        plan = read_plan(folder, quantization.config, flag)
        kind = unserved_pool(config, several=plan is not None and bool(plan.other))
        if kind is not None:
            raise unsupported_pool(kind, flag)
        if plan is not None:
            plan.resolve(served_attention(model))
    except ModelOptExtError as error:
        return [error]
    return []


def main() -> None:
    """Print the result as one line of JSON behind :data:`RESULT`; it has ``error`` alone where nothing could be checked."""
    parser = argparse.ArgumentParser(description="Tell whether a checkpoint loads, without reading its weights.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--stock-kv-cache", action="store_true")
    options, rest = parser.parse_known_args()
    # Use no GPU, even if the machine has one; SGLang reads these variables when it is imported.
    os.environ.update(SGLANG_USE_CPU_ENGINE="1", CUDA_VISIBLE_DEVICES="")
    try:
        found = rehearse(options.folder, rest, options.stock_kv_cache)
    except ModelOptExtError as error:
        found = {"model": None, "problems": [str(error)], "missing": [], "left_over": [], "left_out": 0}
    except (Exception, SystemExit) as error:  # any error of SGLang's: the caller reports that nothing was checked
        if BACKEND not in rest and "backend" in str(error):
            sys.stdout.flush()
            os.execv(sys.executable, [sys.executable, "-m", __spec__.name, *sys.argv[1:], BACKEND, OTHER_BACKEND])
        found = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    sys.stdout.flush()
    print(RESULT + json.dumps(found), flush=True)
    # Skip the clean-up of process groups, which have no other member.
    os._exit(0)


if __name__ == "__main__":
    main()
