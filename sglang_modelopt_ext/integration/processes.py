"""The processes of a server: checks before any is started, and a one-line error when one of them stops.

SGLang loads plugins in the launching process, the schedulers, the detokenizer and the data-parallel controller. It does not load
them in extra tokenizer workers, in Ray actors and in the weight-cache daemon, which would not know this package's quantization
names: a server with these is not supported, and the error names the flag.
"""

from __future__ import annotations

import atexit
import functools
import logging
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from sglang_modelopt_ext.checkpoint.kv_cache import KV_FLAGS
from sglang_modelopt_ext.checkpoint.ownership import Ownership, decide
from sglang_modelopt_ext.env import ERROR_FILE, SETTINGS
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.integration import online
from sglang_modelopt_ext.integration.config import SERVED_LOAD_FORMATS, read_served
from sglang_modelopt_ext.integration.devices import settle
from sglang_modelopt_ext.integration.folders import config_folder
from sglang_modelopt_ext.integration.hooks import Hook
from sglang_modelopt_ext.integration.kv import hooks as kv_hooks

logger = logging.getLogger(__name__)

_COMMAND_LINES = ("sglang.launch_server", "sglang.cli.main", "sglang")


def preflight(server_args: Any) -> None:
    """Check the launch and, when the model is a local folder, its tensors, before any process is started.

    An unquantized model under a flag that names a recipe is quantized first.

    Raises:
        ModelOptExtError: the checkpoint cannot be served, or not with these arguments.
    """
    from sglang.srt.arg_groups.overrides import resolving_view

    args = resolving_view(server_args)
    folder = config_folder(args.model_path, args.revision)
    flag = args.quantization.lower() if args.quantization else None
    device = settle(args)
    load_format = str(getattr(args.load_format, "value", args.load_format))
    served = device.kind != "other" and load_format != "dummy"
    if folder is not None and flag is not None and served and online.is_asked_for(folder, flag):
        _check_arguments(args, load_format)
        folder = online.quantize(server_args, flag, device)
        args = resolving_view(server_args)
    owner = decide(folder, flag, device) if folder is not None else Ownership(None)
    report(owner)
    if owner.in_doubt and args.kv_cache_dtype not in KV_FLAGS:
        return  # all of it is left to SGLang; a KV cache of ours would still be checked
    kv_hooks.declare(server_args)
    if folder is None or owner.family is None:
        return
    _check_arguments(args, load_format)
    if load_format != "dummy" and Path(args.model_path).is_dir():
        assert owner.config is not None, "a checkpoint of ours was read"
        read_served(folder, owner.config)


def report(owner: Ownership) -> None:
    """Log in one line whether this package or SGLang serves the checkpoint and why, and a warning for each note on its files."""
    if owner.family is not None:
        logger.info("modelopt_ext: serves the checkpoint as %s: %s", owner.family, owner.why)
        for note in owner.config.notes if owner.config is not None else ():
            logger.warning("modelopt_ext: %s", note)
    elif owner.in_doubt:
        logger.warning("modelopt_ext: left to SGLang, for it is not understood here: %s", owner.why)
    elif owner.why:
        logger.info("modelopt_ext: left to SGLang: %s", owner.why)


def _check_arguments(args: Any, load_format: str) -> None:
    """Raise ModelOptExtError for a setting or an argument with which no checkpoint of ours can be served."""
    for setting in SETTINGS:
        setting.read()
    _check_launch(args)
    if load_format not in SERVED_LOAD_FORMATS:
        raise ModelOptExtError.at(
            "command line", "--load-format", f"one of {', '.join(SERVED_LOAD_FORMATS)}", load_format
        )


def _check_launch(args: Any) -> None:
    if args.tokenizer_worker_num > 1:
        raise ModelOptExtError.at(
            "command line",
            "--tokenizer-worker-num",
            "1: SGLang loads no plugins in tokenizer workers",
            args.tokenizer_worker_num,
        )
    if args.use_ray:
        raise ModelOptExtError.at("command line", "--use-ray", "no Ray: SGLang loads no plugins in Ray actors", "Ray")
    if args.weight_cache_mode != "off":
        raise ModelOptExtError.at(
            "command line",
            "--weight-cache-mode",
            "off: SGLang loads no plugins in the weight-cache daemon",
            args.weight_cache_mode,
        )


@functools.cache
def register_preflight() -> None:
    """Register :func:`preflight` as a step of SGLang's argument resolution, once for a process."""
    from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook

    register_resolution_hook("handle_model_source_paths")(_run_preflight)


def _run_preflight(server_args: Any, previous: Callable[[Any], None]) -> None:
    previous(server_args)
    preflight(server_args)


def open_error_channel() -> None:
    """Set the environment variable that names the file to which child processes write their error."""
    if not os.environ.get(ERROR_FILE.variable):
        folder = tempfile.mkdtemp(prefix="sglang_modelopt_ext-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        os.environ[ERROR_FILE.variable] = str(Path(folder) / "error")


def _scheduler_init(original: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    try:
        original(self, *args, **kwargs)
    except ModelOptExtError as error:
        from sglang.srt.runtime_context import get_parallel

        channel = ERROR_FILE.read()
        if channel:
            Path(channel).write_text(str(error), encoding="utf-8")
        # A data-parallel controller between this process and the launching one does not read the file.
        if not channel or get_parallel().num_dp_ranks > 1:
            print(error.one_line(), file=sys.stderr, flush=True)
            os.kill(os.getppid(), signal.SIGQUIT)  # it would wait for this process; the launching one sees it end
        # For a SystemExit SGLang neither prints a traceback nor signals the parent before it has read the line.
        raise SystemExit(1) from error


def _scheduler_died_error(original: Callable[..., Exception], rank: int, proc: Any) -> Exception:
    error = original(rank, proc)
    channel = Path(ERROR_FILE.read() or os.devnull)
    if not channel.is_file():
        return error
    message = channel.read_text(encoding="utf-8")
    channel.unlink()
    return ModelOptExtError(message)


def print_errors_in_one_line() -> None:
    """Print a :class:`ModelOptExtError` that ends the process without its traceback, on SGLang's command lines."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    name = spec.name if spec else Path(sys.argv[0]).name
    if name not in _COMMAND_LINES or getattr(sys.excepthook, "modelopt_ext", False):
        return
    previous = sys.excepthook

    def hook(kind: type[BaseException], value: BaseException, traceback: TracebackType | None) -> None:
        if isinstance(value, ModelOptExtError):
            print(value.one_line(), file=sys.stderr, flush=True)
        else:
            previous(kind, value, traceback)

    hook.modelopt_ext = True  # type: ignore[attr-defined]
    sys.excepthook = hook


HOOKS = (
    Hook(
        "sglang.srt.managers.scheduler.Scheduler.__init__",
        ("self", "server_args", "port_args"),
        "the reason a scheduler stopped would be buried in a traceback",
        _scheduler_init,
    ),
    Hook(
        "sglang.srt.entrypoints.engine._scheduler_died_error",
        ("rank", "proc"),
        "the launching process would only say that a scheduler died",
        _scheduler_died_error,
    ),
)
