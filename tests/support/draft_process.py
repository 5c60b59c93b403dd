"""A speculative draft of SGLang's own classes, loaded on a CPU without a server: ``python -m tests.support.draft_process``.

SGLang drafts on a CPU with kernels of a package that the CPU runtime lacks, but builds and loads drafts by the code that a server
runs. It is a process of its own, since SGLang builds models from globals of the process.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

RESULT = "DRAFT "
TIMEOUT = 300.0


def load_draft(target: Path, *arguments: str, stock: bool = False) -> dict[str, Any]:
    """Return what became of the draft beside ``target``.

    Args:
        target: the target's checkpoint.
        arguments: of the server, such as ``--speculative-algorithm EAGLE``.
        stock: whether SGLang runs without this package.

    Returns:
        ``class``, ``quantization`` (as SGLang has it in the end) and ``values``, a digest of each parameter but those of embeddings
        and heads, which a draft takes from its target; or ``error`` alone, the line with which a server would end.
    """
    command = [sys.executable, "-m", "tests.support.draft_process", str(target), *(["--stock"] if stock else [])]
    # SGLang looks for a GPU where this variable is not set.
    environment = {**os.environ, "SGLANG_USE_CPU_ENGINE": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(
        [*command, *arguments], env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    lines = [line for line in ended.stdout.splitlines() if line.startswith(RESULT)]
    assert lines, ended.stdout[-2000:] + ended.stderr[-4000:]
    found: dict[str, Any] = json.loads(lines[-1].removeprefix(RESULT))
    return found


def _load(target: Path, arguments: list[str]) -> dict[str, Any]:
    from sglang.srt.configs.device_config import DeviceConfig
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.configs.update_config import adjust_config_with_unaligned_cpu_tp
    from sglang.srt.distributed import bootstrap
    from sglang.srt.layers.moe.utils import initialize_moe_config
    from sglang.srt.model_loader.loader import get_model_loader
    from sglang.srt.runtime_context import SpawnRanks, get_spec, publish
    from sglang.srt.server_args import prepare_server_args

    from sglang_modelopt_ext.ports import free_port

    command = ["--model-path", str(target), "--device", "cpu", "--skip-tokenizer-init", "--max-total-tokens", "1024"]
    args = prepare_server_args([*command, "--dtype", "bfloat16", "--disable-radix-cache", *arguments])
    args.resolve_once()
    publish(args, role="scheduler", ranks=SpawnRanks(world_rank=0, gpu_id=0))
    initialize_moe_config()
    path = get_spec().speculative_draft_model_path
    config = ModelConfig.from_server_args(args, model_path=path, is_draft_model=True)
    config = adjust_config_with_unaligned_cpu_tp(config, LoadConfig(), 1)
    bootstrap.init_parallel_runtime(server_args=args, device="cpu", dist_port=free_port())
    bootstrap.init_layer_runtime(model_config=config)
    loader = get_model_loader(LoadConfig(), config)
    model = loader.load_model(model_config=config, device_config=DeviceConfig("cpu"))
    shared = {name for name, module in model.named_modules() if hasattr(module, "org_vocab_size")}
    values = {
        name: f"{parameter.dtype} {hashlib.sha256(parameter.data.contiguous().view(torch.uint8).numpy()).hexdigest()}"
        for name, parameter in model.named_parameters()
        if name.rpartition(".")[0] not in shared
    }
    return {"class": type(model).__name__, "quantization": config.quantization, "values": values}


def main() -> None:
    """Load the draft and print what became of it as one line of JSON behind :data:`RESULT`."""
    from sglang_modelopt_ext.errors import ModelOptExtError

    parser = argparse.ArgumentParser()
    parser.add_argument("target", type=Path)
    parser.add_argument("--stock", action="store_true")
    options, rest = parser.parse_known_args()
    if not options.stock:
        from sglang.srt.plugins import load_plugins

        load_plugins()
    try:
        found = _load(options.target, rest)
    except ModelOptExtError as error:
        found = {"error": error.one_line()}
    print(RESULT + json.dumps(found), flush=True)
    os._exit(0)  # without the clean-up of process groups, which have no other member


if __name__ == "__main__":
    main()
