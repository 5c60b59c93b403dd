"""A server for an unquantized model: quantize it once, keep the checkpoint by content, run the stock server on it."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from sglang_modelopt_ext.checkpoint.hub import CODE_FILES, HUB_FILES
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.files.digest import file_digest, folder_digest
from sglang_modelopt_ext.files.whole import locked
from sglang_modelopt_ext.workflow.common.base_model import device_for, find_model
from sglang_modelopt_ext.workflow.quantize.export import check_folder
from sglang_modelopt_ext.workflow.quantize.record import package_versions
from sglang_modelopt_ext.workflow.quantize.run import Options, quantize
from sglang_modelopt_ext.workflow.server.process import cpu_arguments, cpu_environment

DEFAULT_CACHE = Path("~/.cache/sglang-modelopt")
_OWN = ("--model-path", "--model", "--quantization", "--kv-cache-dtype", "--load-format")
"""Server arguments that the checkpoint decides."""


@dataclass(frozen=True)
class Launch:
    """A checkpoint and the command that serves it.

    Attributes:
        folder: the checkpoint.
        cached: whether an earlier call had made it.
        command: of the server.
        environment: variables the server needs besides those that are set.
    """

    folder: Path
    cached: bool
    command: tuple[str, ...]
    environment: dict[str, str]

    def run(self) -> None:
        """Replace this process by the server, whose exit code becomes this process's."""
        os.execve(self.command[0], self.command, {**os.environ, **self.environment})


def prepare(
    model: str, options: Options, cache: Path, arguments: Sequence[str] = (), *, progress: bool = True
) -> Launch:
    """Quantize a model unless that was done before, and return how to serve the result.

    Args:
        model: folder or Hugging Face name of the unquantized model.
        options: of the quantization.
        cache: folder that holds the checkpoints.
        arguments: further arguments of ``python -m sglang.launch_server``.
        progress: show progress on standard error.

    Raises:
        ModelOptExtError: bad input of any kind.
    """
    for argument in arguments:
        if argument.partition("=")[0] in _OWN:
            raise ModelOptExtError.at(
                "command line", argument, "arguments that the checkpoint does not decide", argument
            )
    cache = cache.expanduser()
    source = find_model(model, options.trust_remote_code)
    folder = cache / f"{source.resolve().name}-{Path(options.recipe).stem}-{cache_key(source, options, cache)[:16]}"
    cache.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        cached = folder.is_dir()
        if cached:
            check_folder(folder)
        else:
            quantize(model, folder, options, progress=progress)
    return Launch(folder, cached, *server_command(folder, arguments, options.trust_remote_code))


def cache_key(source: Path, options: Options, cache: Path) -> str:
    """Return the sha256 over the content of model and data files, the options, and the packages' versions."""
    data = [file_digest(Path(name)) if Path(name).is_file() else name for name in options.data]
    code = CODE_FILES if options.trust_remote_code else ()
    parts = (
        folder_digest(source, (*HUB_FILES, *code), cache),
        options,
        device_for(options.device),
        data,
        package_versions(),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def server_command(
    folder: Path, arguments: Sequence[str], trust_remote_code: bool = False
) -> tuple[tuple[str, ...], dict[str, str]]:
    """Return the stock server's command for a checkpoint, and the variables it needs.

    No flag names the quantization or the KV cache: the server detects both.
    """
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(folder)]
    command += ["--trust-remote-code"] if trust_remote_code else []
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        given = {argument.partition("=")[0] for argument in arguments}
        for name, value in cpu_arguments().items():
            command += [name, value] if name not in given else []
    return (*command, *arguments), (cpu_environment() if on_cpu else {})
